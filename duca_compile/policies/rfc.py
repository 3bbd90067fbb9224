"""Relational Feature Caching (arXiv 2602.19506): forecasts whose length follows from how far the inputs have moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.policies.base import Forecast, Gate, Policy, Step, StepKind
from duca_compile.policies.checks import check_number, check_whole


@dataclass(frozen=True)
class RelationalFeatureCaching(Policy):
    """The first steps in full; then each step is a forecast until the forecasts of the first input have gone astray.

    Attributes:
        threshold: the sum of relative input errors since the last full step at which a step runs in full. Smaller is
            slower and closer to the uncached loop.
        max_order: the highest difference used, 1 to 4. Caches hold this many tensors more for each branch, and its
            input.
        first_full_steps: how many steps at the start are full.
        interval: where set, a full step this often instead, and no threshold: relational estimation alone.

    Raises:
        PolicyError: impossible numbers.
    """

    threshold: float = 0.2
    max_order: int = 2
    first_full_steps: int = 2
    interval: int | None = None

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0)
        check_whole("max_order", self.max_order, least=1, most=4)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        if self.interval is not None:
            check_whole("interval", self.interval, least=1)

    @property
    def name(self) -> str:
        often = f"threshold {self.threshold:g}" if self.interval is None else f"N={self.interval}"
        return f"RFC ({often}, order {self.max_order})"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, first=self.first_full_steps - 1, relational=True)

    @property
    def gate(self) -> Gate | None:
        return Gate(self.threshold) if self.interval is None else None

    def steps(self, total: int | None) -> Iterator[Step]:
        last = self.first_full_steps - 1
        for index in count() if total is None else range(total):
            if index <= last or (self.interval is not None and (index - last) % self.interval == 0):
                yield Step(StepKind.FULL, self.interval or 1)
            else:
                yield Step(StepKind.FORECAST, self.interval or 1, gated=self.interval is None)


RFC = RelationalFeatureCaching
