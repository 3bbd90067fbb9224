"""What forecasts need from the host: the factor of each cached value, and how full steps update these values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from duca_compile.core.ports import FORECAST_GAP, FULL_ROWS, PROBE_CHANGE, RATE, SUMMED, Port, PortKind
from duca_compile.core.tensors import Array
from duca_compile.policies.base import Forecast
from duca_compile.runtime.cache_state import CacheState
from duca_compile.runtime.forecast_state import ForecastState

REMEMBERED = 256  # steps of each program whose numbers are remembered
_OF_FORECASTS = (PortKind.FACTOR, PortKind.SUM_FACTOR)
_COMBINING = (FORECAST_GAP, SUMMED, FULL_ROWS, PROBE_CHANGE, RATE)


def compares_caches(ports: Collection[Port]) -> bool:
    """Whether a variant with these inputs and outputs compares new values with old ones, which must then exist."""
    return any(port in ports for port in _COMBINING)


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

    @cached_property
    def _extrapolates(self) -> bool:
        return any(port.kind in _OF_FORECASTS for port in self.numbers)

    @property
    def needed(self) -> bool:
        """Whether there are any."""
        return bool(self.numbers or self.zero_caches)

    def values(
        self,
        forecast: Forecast | None,
        state: CacheState,
        step: int,
        total: int | None,
        rows: Sequence[bool] | None = None,
    ) -> dict[Port, Array]:
        """The numbers for ``step``; records a full step in ``state``, and creates the caches that are missing.

        A guidance pass that is new, or missed a step, has no differences: its full step counts as a first one.

        Args:
            forecast: how the policy forecasts, if it does.
            state: of the pass.
            step: the step, counted from 0.
            total: the number of steps of the request, if it is known.
            rows: which batch rows a full step is for, where they differ.
        """
        if missing := self.zero_caches.keys() - state.caches.keys():
            state.store({port: self.zero_caches[port]() for port in missing})
        if not self.numbers:
            return {}
        full = (True,) * self.rows if rows is None or self.rows == 1 else tuple(rows)
        before = state.forecasts or (ForecastState(),) * self.rows
        if forecast is not None and not self._extrapolates:
            before = before if step - state.last_step <= 1 else (ForecastState(),) * self.rows
            state.forecasts = tuple(
                old.after(step, forecast) if is_full else old for old, is_full in zip(before, full, strict=True)
            )
        key = forecast, step, total, full, before, state.forecasts
        values = self._known.get(key)
        if values is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            values = self._known[key] = self._make(forecast, step, total, full, before)
        return values

    def _make(
        self,
        forecast: Forecast | None,
        step: int,
        total: int | None,
        full: tuple[float, ...],
        before: tuple[ForecastState, ...],
    ) -> dict[Port, Array]:
        numbers: dict[Port, tuple[float, ...]] = {FULL_ROWS: full}
        if forecast is not None:
            numbers_of = ForecastState.in_forecast if self._extrapolates else ForecastState.in_full
            by_row = [dict(numbers_of(state, step, forecast, total)) for state in before]
            numbers |= {port: tuple(row[port] for row in by_row) for port in by_row[0]}
        return {port: make(numbers[port]) for port, make in self.numbers.items()}
