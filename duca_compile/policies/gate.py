"""Residual gates (TeaCache, FirstBlockCache): a probe at the model's start decides whether the rest is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from duca_compile.core.steps import Probe, Restores, Step, StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import AdaptivePolicy, DecidePer, Decider, check_per
from duca_compile.policies.base import Forecast, Series
from duca_compile.policies.checks import check_flag, check_number, check_whole

_KINDS = {"change": StepKind.SKIP, "branches": StepKind.REUSE, "forecast": StepKind.FORECAST}


@dataclass(frozen=True)
class ResidualGate(AdaptivePolicy):
    """A step is cheap as long as what a probe sees stays close to what it saw before; else it is full.

    The probe's relative change is mean |now - before| / mean |before|, for each batch row. The first step is full.
    Sources: TeaCache (arXiv 2411.19108) and FirstBlockCache.

    Attributes:
        threshold: a step is full if the change is at least this.
        probe: what is compared. "modulated": the first block's input after norm and modulation, as in TeaCache.
            "first_block": what the first block adds to the stream, as in FirstBlockCache.
        accumulate: whether the changes from step to step are summed since the last full step (TeaCache). Otherwise the
            change since the last full step counts (FirstBlockCache).
        coefficients: a polynomial applied to each change first, highest power first, as calibrated for a model; empty
            for none.
        cached: what a cheap step does. "change": it adds what all blocks added at the last full step to the start of
            each stream, which takes one tensor for each stream. "branches": it reuses every branch, and computes gates.
            "forecast": it forecasts every branch.
        max_order: the highest order of difference of those forecasts, 0 to 4.
        max_cached_steps: the most cheap steps in a row; None for no limit.
        last_full: whether the last step is full, if the number of steps is known.
        decide_per: who decides. "batch": all batch rows together, by the largest change. "row": each row for itself.
            "pair": rows i and i + batch / 2 together, the two halves of guidance.

    Raises:
        PolicyError: an invalid parameter.
    """

    threshold: float = 0.1
    probe: Literal["modulated", "first_block"] = "modulated"
    accumulate: bool = True
    coefficients: tuple[float, ...] = ()
    cached: Literal["change", "branches", "forecast"] = "change"
    max_order: int = 1
    max_cached_steps: int | None = None
    last_full: bool = True
    decide_per: DecidePer = "batch"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0)
        if self.probe not in ("modulated", "first_block"):
            raise PolicyError(f"probe={self.probe!r} is unknown; choose 'modulated' or 'first_block'")
        if self.cached not in _KINDS:
            raise PolicyError(f"cached={self.cached!r} is unknown; choose one of {sorted(_KINDS)}")
        for i, coefficient in enumerate(self.coefficients):
            check_number(f"coefficients[{i}]", coefficient)
        check_whole("max_order", self.max_order, least=0, most=4)
        if self.max_cached_steps is not None:
            check_whole("max_cached_steps", self.max_cached_steps, least=1)
        check_flag("accumulate", self.accumulate)
        check_flag("last_full", self.last_full)
        check_per(self.decide_per)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        as_teacache = tuple(cls(threshold) for threshold in (0.03, 0.06, 0.1, 0.2, 0.4, 0.8))
        as_first_block = tuple(cls(t, "first_block", accumulate=False) for t in (0.02, 0.05, 0.1, 0.2, 0.4))
        return as_teacache, as_first_block

    @property
    def name(self) -> str:
        return f"residual gate ({self.probe}, threshold {self.threshold:g}, {self.cached})"

    @property
    def forecast(self) -> Forecast | None:
        return Forecast(self.max_order) if self.cached == "forecast" else None

    @property
    def restores(self) -> Restores:
        return "change" if self.cached == "change" else "end"

    @property
    def measure(self) -> Probe:
        return Probe(self.probe, to_last_full=not self.accumulate)

    @property
    def per(self) -> DecidePer:
        return self.decide_per

    @property
    def choices(self) -> tuple[Step, ...]:
        return Step(StepKind.FULL), Step(_KINDS[self.cached])

    def decider(self, total: int | None) -> Decider:
        cheap, limit = _KINDS[self.cached], self.max_cached_steps
        return GateDecider(cheap, self.threshold, total, 1, self.last_full, limit, self.accumulate, self.rescaled)

    def rescaled(self, change: float) -> float:
        """The value of the polynomial ``coefficients`` at ``change``."""
        if not self.coefficients:
            return change
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value


class SkipGate(AdaptivePolicy):
    """A gate whose changes add up, and whose cheap steps run no block.

    Subclasses are dataclasses with these fields, and say what is measured.
    """

    threshold: float
    first_full_steps: int
    last_full: bool
    decide_per: DecidePer

    def _check(self, least_full: int) -> None:
        """Raises PolicyError if a field is invalid; at least so many steps must be full at the start."""
        check_number("threshold", self.threshold, least=0)
        check_whole("first_full_steps", self.first_full_steps, least=least_full)
        check_per(self.decide_per)
        check_flag("last_full", self.last_full)

    @property
    def per(self) -> DecidePer:
        return self.decide_per

    @property
    def choices(self) -> tuple[Step, ...]:
        return Step(StepKind.FULL), Step(StepKind.SKIP)

    def decider(self, total: int | None) -> Decider:
        return GateDecider(StepKind.SKIP, self.threshold, total, self.first_full_steps, self.last_full)


@dataclass
class GateDecider(Decider):
    """Steps are cheap until the measured changes, summed since the last full step, reach a threshold.

    Attributes:
        cheap: the kind of step that is not full.
        threshold: a step is full if the sum is at least this.
        total: the number of steps of the request, if it is known.
        first_full_steps: how many steps are full at first, whenever the pass joins.
        last_full: whether the last step is full, if the number of steps is known.
        max_cached_steps: the most cheap steps in a row; None for no limit.
        accumulate: whether changes are summed; otherwise the last one counts.
        rescaled: applied to each change first.
    """

    cheap: StepKind
    threshold: float
    total: int | None
    first_full_steps: int = 1
    last_full: bool = True
    max_cached_steps: int | None = None
    accumulate: bool = True
    rescaled: Callable[[float], float] = float
    _started: int | None = None  # the step at which the pass joined
    _change: float = 0.0
    _cached: int = 0

    def propose(self, index: int) -> Step:
        self._started = index if self._started is None else self._started
        first = index - self._started < self.first_full_steps
        last = self.last_full and self.total is not None and index >= self.total - 1
        limit = self.max_cached_steps is not None and self._cached >= self.max_cached_steps
        return Step(StepKind.FULL if first or last or limit else self.cheap)

    def decide(self, index: int, proposed: Step, measured: float | None) -> Step:
        change = 0.0 if measured is None else self.rescaled(measured)
        self._change = self._change + change if self.accumulate else change
        if proposed.kind is not StepKind.FULL and self._change < self.threshold:
            self._cached += 1
            return proposed
        self._change, self._cached = 0.0, 0
        return Step(StepKind.FULL)
