"""The full steps that a forecast starts from, and the factors of their differences."""

from __future__ import annotations

from math import factorial
from typing import NamedTuple

from duca_compile.policies.base import Forecast


class ForecastState(NamedTuple):
    """The last full step of one guidance pass, and how many differences of each cache are built.

    Attributes:
        last_full: the last full step; None before the first.
        orders: the highest order of difference that is built; higher ones are zero.
    """

    last_full: int | None = None
    orders: int = 0

    def distance(self, step: int) -> int:
        """Steps since the last full one; 1 if there was none, since differences are divided by it."""
        return 1 if self.last_full is None else step - self.last_full

    def factors(self, step: int, forecast: Forecast) -> tuple[float, ...]:
        """The factors of the differences of orders 1, 2, ... in a forecast of ``step``.

        Those that were fitted to the model, if the full steps are the ones that they were fitted for; else those of the
        Taylor series, distance^i / i!.
        """
        measured = forecast.measured_at(step)
        if measured is not None and (measured.last_full, len(measured.factors)) == (self.last_full, self.orders):
            return measured.factors + (0.0,) * (forecast.order - self.orders)
        distance = self.distance(step)
        return tuple(distance**i / factorial(i) for i in range(1, forecast.order + 1))

    def after(self, step: int, forecast: Forecast) -> ForecastState:
        """The state after a full step: one order more, once differences are being built."""
        built = self.last_full is not None and step >= forecast.first
        return ForecastState(step, min(forecast.order, self.orders + 1) if built else 0)
