"""Relational feature caching (RFC, arXiv 2602.19506): the length of a forecast follows from how far inputs moved."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.steps import Probe, Step, StepKind
from duca_compile.policies.adaptive import AdaptivePolicy, DecidePer, Decider, check_per
from duca_compile.policies.base import Forecast, Series
from duca_compile.policies.checks import check_number, check_whole


@dataclass(frozen=True)
class RelationalFeatureCaching(AdaptivePolicy):
    """The first steps are full; then steps are forecasts, until forecasts of the first branch's input are too far off.

    Source: arXiv 2602.19506. ``TaylorSeer(relational=True)`` makes the same forecasts at a fixed interval.

    Attributes:
        threshold: a step is full if the relative errors of that input, summed since the last full step, exceed this. A
            smaller threshold is slower, and closer to the uncached loop.
        max_order: the highest order of difference used, 1 to 4. Caches hold this many more tensors for each branch, and
            its input.
        first_full_steps: how many steps at the start are full.
        decide_per: who decides. "batch": all batch rows together, by the largest error. "row": each row for itself.
            "pair": rows i and i + batch / 2 together, the two halves of guidance.

    Raises:
        PolicyError: an invalid parameter.
    """

    threshold: float = 0.2
    max_order: int = 2
    first_full_steps: int = 2
    decide_per: DecidePer = "batch"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0)
        check_whole("max_order", self.max_order, least=1, most=4)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        check_per(self.decide_per)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        return (tuple(cls(threshold) for threshold in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)),)

    @property
    def name(self) -> str:
        return f"RFC (threshold {self.threshold:g}, order {self.max_order})"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, first=self.first_full_steps - 1, relational=True)

    @property
    def measure(self) -> Probe:
        return Probe("forecast")

    @property
    def per(self) -> DecidePer:
        return self.decide_per

    @property
    def choices(self) -> tuple[Step, ...]:
        return Step(StepKind.FULL), Step(StepKind.FORECAST)

    def decider(self, total: int | None) -> Decider:
        return _ErrorSum(self)


class _ErrorSum(Decider):
    """The paper's relational cache scheduling: sums the errors since the last full step."""

    def __init__(self, policy: RelationalFeatureCaching) -> None:
        self._policy, self._started, self._error = policy, False, 0.0

    def propose(self, index: int) -> Step:
        first, self._started = not self._started, True
        return Step(StepKind.FULL if first or index < self._policy.first_full_steps else StepKind.FORECAST)

    def decide(self, index: int, proposed: Step, measured: float | None) -> Step:
        self._error += measured or 0.0
        if proposed.kind is not StepKind.FULL and self._error <= self._policy.threshold:
            return proposed
        self._error = 0.0
        return Step(StepKind.FULL)


RFC = RelationalFeatureCaching
