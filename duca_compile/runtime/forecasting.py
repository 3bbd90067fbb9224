"""What forecasts need from the host: the factor of each difference, and how many differences are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from duca_compile.core.ports import FORECAST_FACTORS, FORECAST_GAP, FORECAST_ORDERS, FULL_ROWS, Port
from duca_compile.core.tensors import Array
from duca_compile.policies.base import Forecast
from duca_compile.runtime.cache_state import CacheState
from duca_compile.runtime.forecast_state import ForecastState

REMEMBERED = 256  # steps of each program whose numbers are remembered
NUMBERS = (FORECAST_GAP, FORECAST_ORDERS, *FORECAST_FACTORS, FULL_ROWS)


@dataclass(frozen=True)
class ForecastInputs:
    """The inputs of a variant that the step's number and the decisions alone determine.

    Attributes:
        numbers: for each of these inputs, a function that makes it from its values.
        zero_caches: for each cache that the variant compares with, or keeps rows of, a function that makes the zeros to
            start from.
        rows: how many values each number has: one, or one for each batch row.
    """

    numbers: Mapping[Port, Callable[[tuple[float, ...]], Array]]
    zero_caches: Mapping[Port, Callable[[], Array]]
    rows: int = 1
    _known: dict[tuple[object, ...], dict[Port, Array]] = field(default_factory=dict)  # the same in most requests

    @property
    def needed(self) -> bool:
        """Whether there are any."""
        return bool(self.numbers or self.zero_caches)

    def values(
        self, forecast: Forecast | None, state: CacheState, step: int, rows: Sequence[bool] | None = None
    ) -> dict[Port, Array]:
        """The numbers for ``step``; records a full step in ``state``, and creates the caches that are missing.

        A guidance pass that is new, or missed a step, has no differences: its full step counts as a first one.

        Args:
            forecast: how the policy forecasts, if it does.
            state: of the pass.
            step: the step, counted from 0.
            rows: which batch rows a full step is for, where they differ.
        """
        if missing := self.zero_caches.keys() - state.caches.keys():
            state.store({port: self.zero_caches[port]() for port in missing})
        if not self.numbers:
            return {}
        full = (True,) * self.rows if rows is None or self.rows == 1 else tuple(rows)
        before = state.forecasts or (ForecastState(),) * self.rows
        if forecast is not None and FORECAST_FACTORS[0] not in self.numbers:
            before = before if step - state.last_step <= 1 else (ForecastState(),) * self.rows
            state.forecasts = tuple(
                old.after(step, forecast) if is_full else old for old, is_full in zip(before, full, strict=True)
            )
        key = step, full, before, state.forecasts
        values = self._known.get(key)
        if values is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            values = self._known[key] = self._make(forecast, step, full, before, state.forecasts)
        return values

    def _make(
        self,
        forecast: Forecast | None,
        step: int,
        full: tuple[float, ...],
        before: tuple[ForecastState, ...],
        after: tuple[ForecastState, ...],
    ) -> dict[Port, Array]:
        numbers: dict[Port, tuple[float, ...]] = {FULL_ROWS: full}
        if forecast is not None and FORECAST_FACTORS[0] in self.numbers:
            factors = [state.factors(step, forecast) for state in before]
            numbers |= zip(FORECAST_FACTORS, zip(*factors, strict=True), strict=False)
        elif forecast is not None:
            numbers[FORECAST_GAP] = tuple(state.distance(step) for state in before)
            numbers[FORECAST_ORDERS] = tuple(state.orders for state in after)
        return {port: make(numbers[port]) for port, make in self.numbers.items()}
