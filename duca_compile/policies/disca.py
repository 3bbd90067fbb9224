"""DisCa (arXiv 2602.05449): between full steps, a small trained network predicts the end of the residual stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.core.steps import Step, StepKind
from duca_compile.policies.base import Policy
from duca_compile.policies.checks import check_full_steps, check_whole
from duca_compile.policies.predictor import Predictor


@dataclass(frozen=True)
class DisCa(Policy):
    """Full steps keep the last hidden state; at the others, a predictor makes the current one of it.

    Attributes:
        learned: the predictor, or the file that ``train_predictor`` wrote.
        interval: steps from one full step to the next.
        full_steps: where set, the full steps by number, from 0 on, and no interval. The first must be among them.

    Raises:
        PolicyError: an invalid parameter.
        UsageError: the file cannot be read or is no predictor.
    """

    learned: Predictor | str | os.PathLike[str]
    interval: int = 4
    full_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.learned, Predictor):
            object.__setattr__(self, "learned", Predictor.load(self.learned))
        check_whole("interval", self.interval, least=1)
        if self.full_steps is not None:
            check_full_steps(self.full_steps)

    @property
    def name(self) -> str:
        return f"DisCa (N={self.interval})" if self.full_steps is None else f"DisCa ({len(self.full_steps)} full)"

    @property
    def predictor(self) -> Predictor:
        assert isinstance(self.learned, Predictor)
        return self.learned

    def steps(self, total: int | None) -> Iterator[Step]:
        for index in count() if total is None else range(total):
            full = index % self.interval == 0 if self.full_steps is None else index in self.full_steps
            yield Step(StepKind.FULL if full else StepKind.PREDICT, self.interval)
