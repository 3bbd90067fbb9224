"""Spectrum (arXiv 2603.01623): the end of the stream is forecast by a Chebyshev series through all full steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from duca_compile.core.steps import Step, StepKind
from duca_compile.policies.base import Forecast, Policy, Series
from duca_compile.policies.checks import check_number, check_whole, known_total
from duca_compile.policies.factors import Chebyshev


@dataclass(frozen=True)
class Spectrum(Policy):
    """Full steps ever farther apart; in between, a ridge regression on all of them gives the end of the stream.

    The regression is that of ``degree`` + 1 Chebyshev polynomials of the step. It takes that many weighted sums of the
    end of the stream, however many full steps there were. Source: arXiv 2603.01623.

    Attributes:
        growth: how much longer the interval between full steps gets with each of them, in steps; released: 0.75, and 3
            for more speed. Suited to 50 steps: with fewer, a long interval may end the loop.
        first_full_steps: how many steps at the start are full. A guidance pass that joins late has as many.
        interval: the first interval after these.
        degree: the highest polynomial, 1 to 8. Caches hold one tensor more, in float32.
        ridge: the penalty on the squares of the coefficients. The lower, the closer the series is to the full steps,
            and the more it swings between them.
        share: the weight of the series, above 0 and up to 1; the rest is the line through the last two full steps. Less
            than 1 takes two tensors more.

    Raises:
        PolicyError: an invalid parameter. When steps are planned: the number of steps is needed, and not known.
    """

    growth: float = 0.75
    first_full_steps: int = 5
    interval: int = 2
    degree: int = 4
    ridge: float = 0.1
    share: float = 1.0

    def __post_init__(self) -> None:
        check_number("growth", self.growth, least=0)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        check_whole("interval", self.interval, least=1)
        self._series  # noqa: B018 - raises PolicyError now

    @property
    def _series(self) -> Chebyshev:
        return Chebyshev(self.degree, self.ridge, self.share)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        del steps
        shares = 1.0, 0.5  # the paper's weight of the series, and the one that the authors advise
        return tuple(tuple(cls(growth, share=share) for growth in (0.25, 0.75, 1.5, 3.0)) for share in shares)

    @property
    def name(self) -> str:
        share = "" if self.share == 1 else f", share {self.share:g}"
        return f"Spectrum (growth {self.growth:g}, degree {self.degree}{share})"

    @property
    def forecast(self) -> Forecast:
        order = int(self.share < 1)
        return Forecast(order, lite=True, first=0, chebyshev=self._series, least=self.first_full_steps)

    def steps(self, total: int | None) -> Iterator[Step]:
        interval, skipped = float(self.interval), 0
        for index in range(known_total("Spectrum's forecasts depend", total)):
            skipped += 1
            if index < self.first_full_steps or skipped % int(interval) == 0:
                interval += 0.0 if index < self.first_full_steps else self.growth
                interval, skipped = round(interval, 3), 0
                yield Step(StepKind.FULL)
            else:
                yield Step(StepKind.FORECAST)
