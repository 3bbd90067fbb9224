"""HiCache (arXiv 2508.16984): TaylorSeer's differences, extrapolated by scaled Hermite polynomials."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Forecast, Policy, Series
from duca_compile.policies.checks import check_flag, check_number, check_whole
from duca_compile.policies.schedule import full_after_start, intervals


@dataclass(frozen=True)
class HiCache(Policy):
    """Full steps at a fixed interval; forecasts by Hermite polynomials in between, which grow less than Taylor's.

    A forecast k steps after a full one is the sum of D_i s^i H_i(s k) / i!, where D_0 is the feature of the last full
    step, D_i its difference of order i over the full steps, H_i the Hermite polynomial and s the scale. At a scale of
    0.5 the factors are 1, k / 2 and k^2 / 8 - 1 / 4. Source: arXiv 2508.16984.

    Attributes:
        interval: number of steps from one full step to the next.
        max_order: the highest order of difference used, 1 to 4. Caches hold this many more tensors for each branch.
            Each full step after the first makes one more order available, starting with the last of
            ``first_full_steps``.
        scale: s, above 0; the smaller it is, the closer forecasts stay to the last full step.
        first_full_steps: how many steps at the start are full.
        lite: whether only the end of the residual stream is cached and forecast; then no block runs.

    Raises:
        PolicyError: an invalid parameter.
    """

    interval: int = 7
    max_order: int = 2
    scale: float = 0.5
    first_full_steps: int = 3
    lite: bool = False

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, least=1)
        check_whole("max_order", self.max_order, least=1, most=4)
        check_number("scale", self.scale, least=0)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        if not self.scale:
            raise PolicyError("scale=0 is invalid: it must be above 0; FORA reuses features as they are")
        check_flag("lite", self.lite)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        return tuple(tuple(cls(n, lite=lite) for n in intervals(steps)) for lite in (True, False))

    @property
    def name(self) -> str:
        return f"HiCache{' lite' * self.lite} (N={self.interval}, order {self.max_order}, scale {self.scale:g})"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, self.lite, self.first_full_steps - 1, hermite=self.scale)

    def steps(self, total: int | None) -> Iterator[Step]:
        for full in full_after_start(self.first_full_steps, self.interval, total):
            yield Step(StepKind.FULL if full else StepKind.FORECAST, self.interval)
