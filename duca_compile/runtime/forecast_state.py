"""The full steps that a forecast goes on from, and what each of their differences counts in it."""

from __future__ import annotations

from math import factorial
from typing import NamedTuple

from duca_compile.policies.base import Forecast


class ForecastState(NamedTuple):
    """The full steps of one pass, as far as its differences go."""

    last_full: int | None = None
    orders: int = 0  # how many differences of each cache are built; the others are zero

    def distance(self, step: int) -> int:
        """Steps since the last full one; 1 where there was none, since it divides."""
        return 1 if self.last_full is None else step - self.last_full

    def factors(self, step: int, forecast: Forecast) -> tuple[float, ...]:
        """What the differences of orders 1, 2, ... count in a forecast of ``step``: as measured, or as Taylor has it.

        What was measured holds behind the full steps that it was measured with alone.
        """
        measured = forecast.measured_at(step)
        if measured is not None and (measured.last_full, len(measured.factors)) == (self.last_full, self.orders):
            return measured.factors + (0.0,) * (forecast.order - self.orders)
        distance = self.distance(step)
        return tuple(distance**i / factorial(i) for i in range(1, forecast.order + 1))

    def after(self, step: int, forecast: Forecast) -> ForecastState:
        """The same after a full step: one order more, if differences are built yet."""
        built = self.last_full is not None and step >= forecast.first
        return ForecastState(step, min(forecast.order, self.orders + 1) if built else 0)
