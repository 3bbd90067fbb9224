"""Compares points of speed and fidelity; needs only the standard library."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

OK = "ok"
TARGET = 1.2  # times the speed of the best other library at an equal or higher PSNR
EXACT = 80.0  # dB; images with a higher PSNR differ only by rounding: nothing was skipped


def best_of_modes(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The faster mode of each setting."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in points:
        if point["status"] == OK:
            name = tuple(point[each] for each in ("steps", "library", "method", "setting"))
            if name not in found or speed(point) > speed(found[name]):
                found[name] = point
    return [*found.values()]


def speed(point: dict[str, Any]) -> float:
    return float(point["speedup"]["median"])


def frontier(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other one beats in speed at an equal or higher PSNR, fastest first."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda each: (-speed(each), -each["psnr"])):
        if not found or point["psnr"] > found[-1]["psnr"]:
            found.append(point)
    return found


@dataclass(frozen=True)
class Match:
    """A point of another library, our fastest at an equal or higher PSNR (to 0.1 dB), and the ratio of their speeds."""

    other: dict[str, Any]
    own: dict[str, Any] | None

    @property
    def ratio(self) -> float:
        return speed(self.own) / speed(self.other) if self.own else 0.0


def matches(own: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[Match]:
    found = []
    for other in others:
        able = [point for point in own if round(point["psnr"], 1) >= round(other["psnr"], 1)]
        found.append(Match(other, max(able, key=speed, default=None)))
    return found


def split(points: list[dict[str, Any]], steps: int) -> dict[str, list[dict[str, Any]]]:
    """For each library, the faster mode of each setting."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for point in best_of_modes(points):
        if point["steps"] == steps:
            found[point["library"]].append(point)
    return found


def peers_of(by_library: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = [point for library in ("cache-dit", "diffusers") for point in by_library.get(library, [])]
    return [point for point in found if point["psnr"] < EXACT]
