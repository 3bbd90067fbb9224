"""What forecasts need from the host: what each difference counts, and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from duca_compile.core.ports import FORECAST_FACTORS, FORECAST_GAP, FORECAST_ORDERS, FULL_ROWS, Port
from duca_compile.core.tensors import Array
from duca_compile.policies.base import Forecast
from duca_compile.runtime.past import Past
from duca_compile.runtime.request import CacheState

REMEMBERED = 256  # steps, of each program, whose numbers are remembered
NUMBERS = (FORECAST_GAP, FORECAST_ORDERS, *FORECAST_FACTORS, FULL_ROWS)


@dataclass(frozen=True)
class ForecastInputs:
    """The inputs of a variant that the step's number and decisions alone determine, with what makes them."""

    numbers: Mapping[Port, Callable[[tuple[float, ...]], Array]]
    old: Mapping[Port, Callable[[], Array]]  # caches that it compares with or keeps rows of; zeros where there are none
    rows: int = 1  # how many values each number has: one, or one for each row of the batch
    _known: dict[tuple[object, ...], dict[Port, Array]] = field(default_factory=dict)  # as requests are alike

    @property
    def needed(self) -> bool:
        """Whether there are any."""
        return bool(self.numbers or self.old)

    def values(
        self, forecast: Forecast | None, state: CacheState, step: int, rows: Sequence[bool] | None = None
    ) -> dict[Port, Array]:
        """The numbers for ``step``, which before a full step is noted in ``state``, with zeros for old caches.

        A pass that is new or missed a step has no differences: its full step counts as a first one. Where rows differ,
        ``rows`` says which of them a full step is for.
        """
        if missing := self.old.keys() - state.caches.keys():
            state.store({port: self.old[port]() for port in missing})
        if not self.numbers:
            return {}
        full = (True,) * self.rows if rows is None or self.rows == 1 else tuple(rows)
        past = state.past or (Past(),) * self.rows
        if forecast is not None and FORECAST_FACTORS[0] not in self.numbers:
            past = past if step - state.last_step <= 1 else (Past(),) * self.rows
            state.past = tuple(p.after(step, forecast) if f else p for p, f in zip(past, full, strict=True))
        key = step, full, past, state.past
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = self._known[key] = self._made(forecast, step, full, past, state.past)
        return found

    def _made(
        self,
        forecast: Forecast | None,
        step: int,
        full: tuple[float, ...],
        past: tuple[Past, ...],
        after: tuple[Past, ...],
    ) -> dict[Port, Array]:
        numbers: dict[Port, tuple[float, ...]] = {FULL_ROWS: full}
        if forecast is not None and FORECAST_FACTORS[0] in self.numbers:
            factors = [each.factors(step, forecast) for each in past]
            numbers |= zip(FORECAST_FACTORS, zip(*factors, strict=True), strict=False)
        elif forecast is not None:
            numbers[FORECAST_GAP] = tuple(each.distance(step) for each in past)
            numbers[FORECAST_ORDERS] = tuple(each.orders for each in after)
        return {port: make(numbers[port]) for port, make in self.numbers.items()}
