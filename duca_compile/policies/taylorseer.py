"""TaylorSeer (arXiv 2503.06923): features between full steps are forecast by a Taylor series of their differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Forecast, Policy, Series
from duca_compile.policies.checks import check_flag, check_whole
from duca_compile.policies.schedule import full_after_start, intervals


@dataclass(frozen=True)
class TaylorSeer(Policy):
    """Full steps at a fixed interval; forecasts in between.

    A forecast k steps after a full one is the sum of D_i k^i / i!, where D_0 is the feature of the last full step and
    D_i its difference of order i over the full steps. Source: arXiv 2503.06923.

    Attributes:
        interval: number of steps from one full step to the next.
        max_order: the highest order of difference used, 0 to 4; 0 is reuse. Caches hold this many more tensors for each
            branch. Each full step after the first makes one more order available, starting with the last of
            ``first_full_steps``.
        first_full_steps: how many steps at the start are full. The released values are 2 for DiT, 3 for FLUX and 1 for
            HunyuanVideo.
        lite: whether only the end of the residual stream is cached and forecast; then no block runs.
        relational: whether the series gives only the direction of a branch's change, and its length follows from how
            far the branch's input has moved, as in relational feature caching (RFC, arXiv 2602.19506). Caches then hold
            the inputs, too.

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
        check_flag("lite", self.lite)
        if not isinstance(self.relational, bool) or (self.relational and (self.lite or self.max_order == 0)):
            raise PolicyError(
                f"relational={self.relational!r} is invalid: it must be True or False, and needs branches "
                "(lite=False) and a direction (max_order of at least 1)"
            )

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        forms = [(order, lite) for lite in (True, False) for order in (1, 2)]
        return tuple(tuple(cls(n, order, lite=lite) for n in intervals(steps)) for order, lite in forms)

    @property
    def name(self) -> str:
        kind = " lite" if self.lite else " relational" if self.relational else ""
        return f"TaylorSeer{kind} (N={self.interval}, order {self.max_order})"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, self.lite, self.first_full_steps - 1, self.relational)

    def steps(self, total: int | None) -> Iterator[Step]:
        for full in full_after_start(self.first_full_steps, self.interval, total):
            yield Step(StepKind.FULL if full else StepKind.FORECAST, self.interval)
