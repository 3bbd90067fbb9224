"""The full steps that a forecast starts from, and the factors of what they keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from duca_compile.core.ports import (
    FORECAST_FACTORS,
    FORECAST_GAP,
    FORECAST_ORDERS,
    FORECAST_START,
    SUMMED,
    Port,
    PortKind,
)
from duca_compile.errors import not_none
from duca_compile.policies.base import Forecast
from duca_compile.policies.factors import hermite, taylor


class ForecastState(NamedTuple):
    """The full steps of one guidance pass, and how many differences of each cache are built.

    Attributes:
        full: the full steps so far; only the last ones, if forecasts need no others.
        orders: the highest order of difference that is built; higher ones are zero.
    """

    full: tuple[int, ...] = ()
    orders: int = 0

    def distance(self, step: int) -> int:
        """Steps since the last full one; 1 if there was none, since differences are divided by it."""
        return step - self.full[-1] if self.full else 1

    def factors(self, step: int, forecast: Forecast) -> tuple[float, ...]:
        """The factors of the differences of orders 1, 2, ... in a forecast of ``step``.

        Those that were fitted to the model, if the full steps are the ones that they were fitted for; else those of the
        method's polynomials.
        """
        if (fitted := self.fitted(step, forecast)) is not None:
            return fitted + (0.0,) * (forecast.order - self.orders)
        distance = self.distance(step)
        if forecast.hermite is not None:
            return hermite(distance, forecast.order, forecast.hermite)
        return taylor(distance, forecast.order)

    def fitted(self, step: int, forecast: Forecast) -> tuple[float, ...] | None:
        """The factors that were fitted for these full steps; None if they were fitted for others, or not at all."""
        measured = forecast.measured_at(step)
        if measured is None or self.orders != len(measured.factors):
            return None
        wanted = [full for full in range(step) if forecast.measured[full] is None][-self.orders - 1 :]
        return measured.factors if self.full[-self.orders - 1 :] == tuple(wanted) else None

    def in_forecast(self, step: int, forecast: Forecast, total: int | None) -> Iterator[tuple[Port, float]]:
        """The factor of each cached value in a forecast of ``step``, by its input."""
        series, factors = forecast.chebyshev, self.factors(step, forecast)
        share = 0.0
        if series is not None:
            share = series.share
            values = series.factors(step, self.full, not_none(total, "the number of steps"))
            for i, value in enumerate(values):
                yield Port(PortKind.SUM_FACTOR, i), share * value
        yield FORECAST_START, 1 - share
        for port, factor in zip(FORECAST_FACTORS, factors, strict=False):
            yield port, (1 - share) * factor

    def in_full(self, step: int, forecast: Forecast, total: int | None) -> Iterator[tuple[Port, float]]:
        """The numbers with which a full step updates what it keeps, by their inputs; the state is that before it."""
        yield FORECAST_GAP, self.distance(step)
        yield FORECAST_ORDERS, self.after(step, forecast).orders
        if forecast.chebyshev is not None:
            yield SUMMED, len(self.full)
            values = forecast.chebyshev.values(step, not_none(total, "the number of steps"))
            for i, value in enumerate(values):
                yield Port(PortKind.SUM_WEIGHT, i), value

    def after(self, step: int, forecast: Forecast) -> ForecastState:
        """The state after a full step: one order more, once differences are being built."""
        built = bool(self.full) and step >= forecast.first
        orders = min(forecast.order, self.orders + 1) if built else 0
        earlier = self.full if forecast.chebyshev is not None or len(self.full) < forecast.least else ()
        if forecast.measured:
            earlier = self.full[-forecast.order :]
        return ForecastState((*earlier, step), orders)
