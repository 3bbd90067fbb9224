"""What forecasts need from the host: the distance to the last full step, and how many differences there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duca_compile.graph import FORECAST_DISTANCE, FORECAST_GAP, FORECAST_ORDERS
from duca_compile.policies.base import Forecast
from duca_compile.runtime.arrays import Array

if TYPE_CHECKING:
    from duca_compile.runtime.request import CacheState

NUMBERS = (FORECAST_GAP, FORECAST_ORDERS, FORECAST_DISTANCE)


@dataclass(frozen=True)
class Past:
    """The full steps of one pass, as far as its differences go."""

    last_full: int | None = None
    orders: int = 0  # how many differences of each cache are built; the others are zero

    def after(self, step: int, forecast: Forecast) -> Past:
        """The same after a full step: one order more, if differences are built yet."""
        built = self.last_full is not None and step >= forecast.first
        return Past(step, min(forecast.order, self.orders + 1) if built else 0)


@dataclass(frozen=True)
class ForecastInputs:
    """The inputs that a variant has for forecasts alone, by name, with what makes them."""

    numbers: Mapping[str, Callable[[int], Array]]
    old: Mapping[str, Callable[[], Array]]  # caches that a full step takes differences to; zeros, where there are none

    def values(self, forecast: Forecast | None, state: CacheState, step: int) -> dict[str, Array]:
        """The numbers for ``step``, which before a full step is noted in ``state``, with zeros for old caches.

        A pass that is new or missed a step has no differences: its full step counts as a first one.
        """
        if forecast is None or not self.numbers:
            return {}
        if FORECAST_GAP not in self.numbers:
            assert state.past.last_full is not None  # caches that a forecast reads come from a full step
            return self._filled({FORECAST_DISTANCE: step - state.past.last_full})
        past = state.past if step - state.last_step <= 1 else Past()
        state.past = past.after(step, forecast)
        for name in self.old.keys() - state.caches.keys():
            state.caches[name] = self.old[name]()
        gap = 1 if past.last_full is None else step - past.last_full
        return self._filled({FORECAST_GAP: gap, FORECAST_ORDERS: state.past.orders})

    def _filled(self, numbers: Mapping[str, int]) -> dict[str, Array]:
        return {name: self.numbers[name](number) for name, number in numbers.items()}
