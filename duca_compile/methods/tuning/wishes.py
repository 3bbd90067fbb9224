"""What a user asks of a policy, and how far a setting is from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, get_type_hints

from duca_compile.errors import UsageError
from duca_compile.policies.checks import check_number, check_whole

PSNR = "psnr"
DEFAULT_PSNR = 30.0  # where nothing is said of speed or quality
MARGIN = 0.05  # settings are chosen that exceed a wish by this share of it, since other calls give other figures


class Wishes(TypedDict, total=False):
    """The wishes that ``tune`` takes, in any combination.

    Attributes:
        speedup: how many times as fast as the uncached loop a call must be, on this device.
        max_seconds: the most seconds that a call may take.
        min_psnr: the least PSNR to the uncached results, in dB, on average over calls.
        max_cache_bytes: the most bytes that caches may hold. Without another wish, ``min_psnr=30`` is added.
        metric: "psnr"; or a function of two results, the cached and the uncached one. Larger is closer.
        min_metric: the least value of ``metric``, on average over calls.
    """

    speedup: float | None
    max_seconds: float | None
    min_psnr: float | None
    max_cache_bytes: int | None
    metric: str | Callable[[Any, Any], float]
    min_metric: float | None


@dataclass(frozen=True)
class Outcome:
    """What a setting gave, on average over some calls.

    Attributes:
        quality: the metric.
        speedup: over the uncached loop.
        seconds: of one call.
        cache_bytes: the most bytes that caches held.
    """

    quality: float
    speedup: float
    seconds: float
    cache_bytes: int


@dataclass(frozen=True)
class Wish:
    """Bounds; None where nothing is asked. ``metric`` is None for PSNR."""

    speedup: float | None = None
    max_seconds: float | None = None
    min_quality: float | None = None
    max_cache_bytes: int | None = None
    metric: Callable[[Any, Any], float] | None = None

    @property
    def wants_speed(self) -> bool:
        """Whether there is a least speed, so that quality is what remains to be improved."""
        return self.speedup is not None or self.max_seconds is not None

    def least_speedup(self, uncached_seconds: float) -> float:
        """The speed-up that a setting must have to be worth trying."""
        return max(1.0, self.speedup or 0.0, uncached_seconds / self.max_seconds if self.max_seconds else 0.0)

    def shortfall(self, found: Outcome, margin: float = 0.0) -> float:
        """By which share of a bound the outcome misses it, for the bound that is missed most; 0 or less if none is.

        Args:
            found: the outcome.
            margin: the share by which bounds of speed and quality must be exceeded.
        """
        missed = [_below(found.speedup, self.speedup or (0.0 if self.wants_speed else 1.0), margin)]
        if self.max_seconds is not None:
            missed.append((found.seconds * (1 + margin) - self.max_seconds) / self.max_seconds)
        if self.min_quality is not None:
            missed.append(_below(found.quality, self.min_quality, margin))
        if self.max_cache_bytes is not None:
            missed.append((found.cache_bytes - self.max_cache_bytes) / max(1, self.max_cache_bytes))
        return max(missed)

    def rank(self, found: Outcome, margin: float = MARGIN) -> tuple[float, ...]:
        """A key that sorts outcomes from the best to the worst: what gains no time comes after what does."""
        missed = self.shortfall(found, margin)
        if missed > 0:
            return 2.0, missed
        if found.speedup <= 1:
            return 1.0, -found.speedup
        return 0.0, -(found.quality if self.wants_speed else found.speedup)

    @property
    def metric_name(self) -> str:
        return "PSNR" if self.metric is None else getattr(self.metric, "__name__", type(self.metric).__name__)

    def quality_text(self, value: float) -> str:
        """A value of the metric, for tables."""
        if math.isinf(value):
            return "equal" if value > 0 else "not finite"
        return f"{value:.1f} dB" if self.metric is None else f"{value:.4g}"

    def __str__(self) -> str:
        parts = []
        if self.speedup is not None:
            parts.append(f"at least {self.speedup:g} times as fast")
        if self.max_seconds is not None:
            parts.append(f"at most {self.max_seconds:g} s for a call")
        if self.min_quality is not None:
            parts.append(f"{self.metric_name} of at least {self.quality_text(self.min_quality)}")
        if self.max_cache_bytes is not None:
            parts.append(f"caches of at most {self.max_cache_bytes:,} bytes")
        return ", ".join(parts)


def _below(value: float, least: float, margin: float) -> float:
    """How far ``value`` is below ``least`` and a margin on top, as a share of ``least``."""
    return margin + (least - value) / (abs(least) or 1.0)


def read_wish(given: Mapping[str, Any]) -> Wish:
    """The wish that these keyword arguments of ``tune`` express.

    Raises:
        UsageError: there is none, one is unknown, or they contradict each other.
        PolicyError: a value is impossible.
    """
    wish = {name: value for name, value in given.items() if value is not None}
    _check_values(given, wish)
    metric, bounds = _metric(wish), wish.keys() - {"metric"}
    if not bounds:
        more = "metric says how to compare, not how close to be: add min_metric=, or " if metric else ""
        raise UsageError(f"{more}say what you wish for: speedup=3, min_psnr=30, max_seconds=2 or max_cache_bytes=2**30")
    least = wish.get("min_psnr", wish.get("min_metric"))
    if bounds == {"max_cache_bytes"}:
        if metric:
            raise UsageError("max_cache_bytes says nothing of quality: add min_metric= for your metric")
        least = DEFAULT_PSNR
    return Wish(wish.get("speedup"), wish.get("max_seconds"), least, wish.get("max_cache_bytes"), metric)


def _check_values(given: Mapping[str, Any], wish: Mapping[str, Any]) -> None:
    unknown = sorted(given.keys() - get_type_hints(Wishes).keys())
    if unknown:
        raise UsageError(f"{unknown[0]} is no wish; the wishes are {sorted(get_type_hints(Wishes))}")
    for name in ("speedup", "max_seconds"):
        if name in wish:
            check_number(name, wish[name], least=0)
            if wish[name] == 0:
                raise UsageError(f"{name}=0 is invalid: it must be more than 0")
    for name in ("min_psnr", "min_metric"):
        if name in wish:
            check_number(name, wish[name])
    if "max_cache_bytes" in wish:
        check_whole("max_cache_bytes", wish["max_cache_bytes"], least=0)


def _metric(wish: Mapping[str, Any]) -> Callable[[Any, Any], float] | None:
    metric = wish.get("metric", PSNR)
    if metric == PSNR:
        if "min_metric" in wish and "min_psnr" in wish:
            raise UsageError("min_metric and min_psnr both bound the PSNR; leave one of them out")
        return None
    if not callable(metric):
        raise UsageError(f"metric={metric!r} is unknown: it is {PSNR!r}, or a function of two results")
    if "min_psnr" in wish:
        raise UsageError("min_psnr bounds the PSNR, and metric is another one: bound it by min_metric")
    function: Callable[[Any, Any], float] = metric
    return function
