"""The settings that each method was published with, by model family; what varies is an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duca_compile.errors import PolicyError
from duca_compile.policies.base import Policy, Selection, SelectionKind
from duca_compile.policies.duca import DuCa
from duca_compile.policies.fora import FORA
from duca_compile.policies.schedule import Interval, Linear
from duca_compile.policies.taylorseer import TaylorSeer


def published(method: str, family: str, **settings: Any) -> Policy:
    """The policy of ``method`` as its authors released it for ``family``.

    ``published("duca", "dit", interval=3, fresh_ratio=0.05, selection="attention", latched=True)``;
    ``published("fora", "dit", interval=3)``; ``published("taylorseer", "dit", interval=4, max_order=4)``.

    Raises:
        PolicyError: no such method, family or setting; the message lists what there is.
    """
    try:
        build = _PUBLISHED[method.lower(), family.lower()]
    except KeyError:
        known = sorted(f"{m}/{f}" for m, f in _PUBLISHED)
        raise PolicyError(f"nothing is published here for {method}/{family}; there is {known}") from None
    try:
        return build(**settings)
    except TypeError as error:
        raise PolicyError(f"published({method!r}, {family!r}): {error}") from error


def _fora_dit(*, interval: int = 3) -> FORA:
    """FORA on DiT: full at the first step and wherever the step, counted down, divides by the interval."""
    return FORA(Interval(interval, descending=True))


def _duca_dit(
    *, interval: int = 3, fresh_ratio: float = 0.05, selection: SelectionKind = "attention", latched: bool = True
) -> DuCa:
    """DuCa on DiT with DDIM: denser full steps towards the end, more fresh tokens too, 2x2 patches favoured."""
    return DuCa(
        interval=Interval(interval, factor=Linear(1.4, -0.8), forced=(0.2, 0.4, 2), descending=True),
        fresh_ratio=fresh_ratio,
        selection=Selection(selection, staleness=0.25, patch_bonus=0.8, patch=2),
        step_factor=Linear(3.0, -4.0),
        block_factor=Linear(0.8, 0.4),
        kind_factor={"mlp": 2.5},
        latched=latched,
    )


def _taylorseer_dit(*, interval: int = 4, max_order: int = 4) -> TaylorSeer:
    """TaylorSeer on DiT: the first two steps in full, so that the first forecasts have a slope."""
    return TaylorSeer(interval, max_order, first_full_steps=2)


_PUBLISHED: dict[tuple[str, str], Callable[..., Policy]] = {
    ("fora", "dit"): _fora_dit,
    ("duca", "dit"): _duca_dit,
    ("taylorseer", "dit"): _taylorseer_dit,
}
