"""Checks of parameters, with one form of message: the name, the value and what it may be."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

from duca_compile.errors import PolicyError


def check_whole(name: str, value: Any, least: int, most: float = inf) -> None:
    """Raises PolicyError unless ``value`` is a whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        limits = f"of at least {least}" if most == inf else f"from {least} to {most}"
        raise PolicyError(f"{name}={value!r} is invalid: it must be a whole number {limits}")


def check_number(name: str, value: Any, least: float = -inf, most: float = inf) -> None:
    """Raises PolicyError unless ``value`` is a finite number from ``least`` to ``most``."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not isfinite(value)
        or not least <= float(value) <= most
    ):
        limits = {-inf: "", 0: " of at least 0"}[least] if most == inf else f" from {least} to {most}"
        raise PolicyError(f"{name}={value!r} is invalid: it must be a finite number{limits}")


def check_flag(name: str, value: Any) -> None:
    """Raises PolicyError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise PolicyError(f"{name}={value!r} is invalid: it must be True or False")


def check_grid(grid: Sequence[int] | None) -> None:
    """Raises PolicyError unless ``grid`` is the layout of an image's or a video's tokens, or None."""
    if grid is None:
        return
    if len(grid) not in (2, 3):
        raise PolicyError(f"grid={grid!r} is invalid: it is (height, width) or (frames, height, width)")
    for i, size in enumerate(grid):
        check_whole(f"grid[{i}]", size, least=1)


def check_full_steps(full_steps: Sequence[int], most: float = inf) -> None:
    """Raises PolicyError unless these are step numbers from 0 to ``most``, with step 0 among them."""
    for index, step in enumerate(full_steps):
        check_whole(f"full_steps[{index}]", step, least=0, most=most)
    if 0 not in full_steps:
        raise PolicyError(f"full_steps={tuple(full_steps)} lacks step 0: there would be nothing to start from")


def known_total(what: str, total: int | None) -> int:
    """The number of steps, which ``what`` it depends on. Raises PolicyError where it is not known."""
    if total is None:
        raise PolicyError(
            f"{what} on the number of steps; pass optimize(..., num_inference_steps=50) (the number your scheduler "
            "runs)"
        )
    return total
