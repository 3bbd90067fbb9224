"""What forecasts need from the host: the distance to the last full step, and how many differences there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duca_compile.graph import FORECAST_DISTANCE, FORECAST_GAP, FORECAST_ORDERS, Variant, cache_input
from duca_compile.policies.base import Forecast

if TYPE_CHECKING:
    from duca_compile.runtime.request import CacheState

_NUMBERS = (FORECAST_GAP, FORECAST_ORDERS, FORECAST_DISTANCE)


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
    """The inputs that a variant has for forecasts alone, by name, with fake tensors of their kind."""

    numbers: Mapping[str, Tensor]
    old: Mapping[str, Tensor]  # caches that a full step takes differences to, where they are there

    @staticmethod
    def of(variant: Variant) -> ForecastInputs:
        kinds = {n.name: n.meta["val"] for n in variant.module.graph.nodes if n.op == "placeholder"}
        caches = {name: like for name, like in kinds.items() if name.startswith(cache_input(""))}
        numbers = {name: kinds[name] for name in _NUMBERS if name in kinds}
        return ForecastInputs(numbers, caches if FORECAST_GAP in numbers else {})

    def values(self, forecast: Forecast | None, state: CacheState, step: int) -> dict[str, Tensor]:
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
            like = self.old[name]
            state.caches[name] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        gap = 1 if past.last_full is None else step - past.last_full
        return self._filled({FORECAST_GAP: gap, FORECAST_ORDERS: state.past.orders})

    def _filled(self, numbers: Mapping[str, int]) -> dict[str, Tensor]:
        """Made on the device that reads them: a copy from the host would wait for it."""
        likes = self.numbers
        return {
            name: torch.full((), n, dtype=likes[name].dtype, device=likes[name].device) for name, n in numbers.items()
        }
