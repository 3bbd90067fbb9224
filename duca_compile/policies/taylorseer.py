"""TaylorSeer (arXiv 2503.06923): between full steps, features are forecast by a Taylor series of their differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Forecast, Policy
from duca_compile.policies.checks import check_whole


@dataclass(frozen=True)
class TaylorSeer(Policy):
    """The first steps in full, then a full step every ``interval``; forecasts in between.

    Attributes:
        interval: steps from one full step to the next.
        max_order: the highest difference used, 0 to 4; 0 is reuse. Caches hold this many tensors more for each branch.
            Orders come one by one: a forecast has one for each full step after the first, from the last of
            ``first_full_steps`` on.
        first_full_steps: how many steps at the start are full; released with 2 for DiT, 3 for FLUX and 1 for
            HunyuanVideo.
        lite: forecasts the end of the residual stream alone, which is then all that is cached, and runs no block.
        relational: the series gives a branch's direction alone, and how far its input has moved gives the length: the
            estimation of relational feature caching (arXiv 2602.19506), at this interval. Caches hold the inputs too.

    Raises:
        PolicyError: an invalid parameter.
    """

    interval: int = 5
    max_order: int = 2
    first_full_steps: int = 2
    lite: bool = False
    relational: bool = False

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, least=1)
        check_whole("max_order", self.max_order, least=0, most=4)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        if not isinstance(self.lite, bool):
            raise PolicyError(f"lite={self.lite!r} is invalid: it must be True or False")
        if not isinstance(self.relational, bool) or (self.relational and (self.lite or self.max_order == 0)):
            raise PolicyError(
                f"relational={self.relational!r} is invalid: it must be True or False, and needs branches "
                "(lite=False) and a direction (max_order of at least 1)"
            )

    @property
    def name(self) -> str:
        kind = " lite" if self.lite else " relational" if self.relational else ""
        return f"TaylorSeer{kind} (N={self.interval}, order {self.max_order})"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, self.lite, self.first_full_steps - 1, self.relational)

    def steps(self, total: int | None) -> Iterator[Step]:
        last = self.first_full_steps - 1
        for index in count() if total is None else range(total):
            full = index < last or (index - last) % self.interval == 0
            yield Step(StepKind.FULL if full else StepKind.FORECAST, self.interval)
