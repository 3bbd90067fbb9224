"""FORA (arXiv 2407.01425): full steps at a fixed interval, and reuse of every branch in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from duca_compile.core.steps import Step, StepKind
from duca_compile.policies.base import Policy, Series
from duca_compile.policies.schedule import Interval, intervals


@dataclass(frozen=True)
class FORA(Policy):
    """Full steps at a fixed interval; the steps in between reuse every attention and MLP branch.

    Source: arXiv 2407.01425.

    Attributes:
        interval: number of steps from one full step to the next; an int, or an ``Interval`` that varies along the loop.

    Raises:
        PolicyError: an invalid parameter.
    """

    interval: int | Interval = 3

    def __post_init__(self) -> None:
        self._interval  # noqa: B018 - raises PolicyError now

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        return (tuple(cls(interval) for interval in intervals(steps)),)

    @property
    def name(self) -> str:
        return f"FORA (N={self._interval.length})"

    @property
    def _interval(self) -> Interval:
        return self.interval if isinstance(self.interval, Interval) else Interval(self.interval)

    def steps(self, total: int | None) -> Iterator[Step]:
        for moment in self._interval.moments(total):
            kind = StepKind.FULL if moment.residue == 0 else StepKind.REUSE
            yield Step(kind, self._interval.length)
