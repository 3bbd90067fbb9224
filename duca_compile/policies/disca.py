"""DisCa (arXiv 2602.05449): a small trained network predicts the end of the residual stream between full steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import InternalError
from duca_compile.policies.base import Policy
from duca_compile.policies.checks import check_full_steps, check_whole
from duca_compile.policies.predictor import Predictor


@dataclass(frozen=True)
class DisCa(Policy):
    """Full steps cache the last hidden state; at all other steps a trained network predicts the current one from it.

    Source: DisCa, arXiv 2602.05449.

    Attributes:
        learned: the predictor, or the path of the file that ``train_predictor`` wrote.
        interval: number of steps from one full step to the next.
        full_steps: the numbers of the full steps, counted from 0, in place of an interval. Step 0 must be among them.

    Raises:
        PolicyError: an invalid parameter.
        UsageError: the file cannot be read, or does not hold a predictor.
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
        if not isinstance(self.learned, Predictor):
            raise InternalError("DisCa.learned was not loaded")
        return self.learned

    def steps(self, total: int | None) -> Iterator[Step]:
        for index in count() if total is None else range(total):
            full = index % self.interval == 0 if self.full_steps is None else index in self.full_steps
            yield Step(StepKind.FULL if full else StepKind.PREDICT, self.interval)
