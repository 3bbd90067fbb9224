"""Fits forecasts to recorded loops: the factors of each, and the full steps between which their errors are smallest.

All of it follows from the inner products of the end of the residual stream, h, at any two steps of a loop. Full steps
keep h and its differences, as TaylorSeer does (arXiv 2503.06923).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duca_compile.policies.base import FittedFactors
from duca_compile.policies.calibrated import Calibrated
from duca_compile.policies.checks import check_full_steps, check_whole

Array = np.ndarray[Any, np.dtype[np.float64]]
BEAM = 12  # schedules kept for each number of full steps and each last full step
_RIDGE = 1e-9  # times the mean square of the differences: keeps factors finite where differences are dependent
TINY = 1e-300  # replaces a zero divisor


@dataclass(frozen=True)
class Products:
    """Inner products of a feature at any two steps of one guidance pass, less its mean over the steps; and squares.

    Attributes:
        inner: float64 (steps, steps).
        squares: of the feature itself, float64 (steps,); infinite where the pass did not run.
    """

    inner: Array
    squares: Array

    def padded(self, steps: int) -> Products:
        """For a loop of so many steps, whose last ones do not have this pass."""
        missing = steps - len(self.squares)
        inner = np.pad(self.inner, (0, missing))
        return Products(inner, np.pad(self.squares, (0, missing), constant_values=np.inf))


class Fitting:
    """The errors of forecasts from any full steps, and the full steps for which their sum is smallest.

    Args:
        recorded: the products of h in each guidance pass of each loop, all of the same length.
        order: the highest order of difference used.
        beam: how many schedules are kept for each number of full steps and each last full step.
    """

    def __init__(self, recorded: Sequence[Products], order: int, beam: int = BEAM) -> None:
        self._order, self._steps, self._beam = order, len(recorded[0].inner), beam
        self._inner = np.stack([products.inner for products in recorded])
        self._weights = 1 / np.stack([products.squares for products in recorded]).clip(TINY) / len(recorded)
        self._known: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def policy(self, full_steps: int | Iterable[int]) -> Calibrated:
        if isinstance(full_steps, Iterable):
            chosen = self._checked([*full_steps])
        else:
            check_whole("full_steps", full_steps, least=1, most=self._steps)
            (chosen,) = self.placed(range(int(full_steps), int(full_steps) + 1))
        return self.with_full(chosen)

    def policies(self, counts: range) -> list[Calibrated]:
        """The policy for each number of full steps in ``counts``."""
        return [self.with_full(chosen) for chosen in self.placed(counts)]

    def with_full(self, chosen: tuple[int, ...]) -> Calibrated:
        """The policy with these full steps."""
        measured: list[FittedFactors | None] = []
        total = 0.0
        for step in range(self._steps):
            if step in chosen:
                measured.append(None)
                continue
            total += self._forecasts_from(self._before(step, chosen))[0][step]
            measured.append(self.forecast(step, chosen))
        forecasts = max(1, self._steps - len(chosen))
        return Calibrated(tuple(measured), self._order, float(np.sqrt(total / forecasts)))

    def _before(self, step: int, chosen: tuple[int, ...]) -> tuple[int, ...]:
        """The full steps that a forecast of ``step`` is made of."""
        return tuple(full for full in chosen if full < step)[-self._order - 1 :]

    def forecast(self, step: int, chosen: tuple[int, ...]) -> FittedFactors:
        """How ``step`` is forecast from the full steps before it, whether or not it is one of them."""
        last = self._before(step, chosen)
        return FittedFactors(last[-1], tuple(map(float, self._forecasts_from(last)[1][step])))

    def errors_of(self, features: Sequence[Products], chosen: tuple[int, ...]) -> Array:
        """Errors if another feature is forecast with the factors of h: relative, squared, (passes, steps).

        Full steps, too, have the error that a forecast in their place would have had; the first has none.
        """
        inner = np.stack([products.inner for products in features])
        weights = 1 / np.stack([products.squares for products in features]).clip(TINY)
        errors = np.zeros(weights.shape)
        for step in range(1, self._steps):
            last = self._before(step, chosen)
            points = [*last, step]
            terms = np.array([*in_terms_of(last, self.forecast(step, chosen).factors), -1.0])
            apart = np.einsum("a,pab,b->p", terms, inner[:, points][:, :, points], terms)
            errors[:, step] = apart.clip(0) * weights[:, step]
        return errors

    def line_errors(self) -> Array:
        """Errors of the lines through any two steps, (first one, second one, step); zero up to the second one."""
        errors = np.zeros((self._steps,) * 3)
        for i in range(self._steps):
            for j in range(i + 1, self._steps):
                step = np.arange(j + 1, self._steps)
                factors = np.stack([np.ones(len(step)), -((step - j) / (j - i) + 1), (step - j) / (j - i)], -1)
                points = np.stack([step, np.full(len(step), j), np.full(len(step), i)], -1)
                inner = self._inner[:, points[:, :, None], points[:, None, :]]
                squares = np.einsum("sa,psab,sb->ps", factors, inner, factors).clip(0)
                errors[i, j, j + 1 :] = np.sqrt(squares).mean(0)
        return errors

    def along_lines(self, chosen: tuple[int, ...]) -> Calibrated:
        """The policy with these full steps whose forecasts are lines through the last two of them."""
        measured: list[FittedFactors | None] = []
        total = 0.0
        for step in range(self._steps):
            earlier = [full for full in chosen if full < step]
            if step in chosen:
                measured.append(None)
                continue
            distance = float(step - earlier[-1]) if len(earlier) > 1 else 0.0
            measured.append(FittedFactors(earlier[-1], (distance,) * (len(earlier) > 1)))
            total += self._line_error(earlier[-2:], step)
        return Calibrated(tuple(measured), 1, float(np.sqrt(total / max(1, self._steps - len(chosen)))))

    def _line_error(self, full: Sequence[int], step: int) -> float:
        """The relative squared error of the forecast of ``step`` along the line through these full steps."""
        rise = (step - full[-1]) / (full[-1] - full[0]) if len(full) > 1 else 0.0
        weights, points = np.array([1.0, -1 - rise, rise]), [step, full[-1], full[0]]
        inner = self._inner[:, points][:, :, points]
        return float((np.einsum("a,pab,b->p", weights, inner, weights).clip(0) * self._weights[:, step]).sum())

    def _checked(self, full_steps: Sequence[int]) -> tuple[int, ...]:
        check_full_steps(full_steps, most=self._steps - 1)
        return tuple(sorted({int(step) for step in full_steps}))

    def placed(self, counts: range) -> Iterator[tuple[int, ...]]:
        """For each number of full steps, those with the smallest error, by beam search from the start of the loop."""
        beam: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))]
        for placed in range(1, counts.stop):
            if placed in counts:
                yield min((error + self._sums(full)[-1], full) for error, full in beam)[1]
            by_last: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
            for error, full in beam if placed + 1 < counts.stop else ():
                sums = self._sums(full)
                for step in range(full[-1] + 1, self._steps - max(0, counts.start - 1 - placed)):
                    by_last.setdefault(step, []).append((error + sums[step], (*full, step)))
            beam = [schedule for schedules in by_last.values() for schedule in sorted(schedules)[: self._beam]]

    def _sums(self, full: tuple[int, ...]) -> Array:
        """For each step, the sum of the errors of the steps between the last full one and it, (steps + 1,)."""
        errors, _ = self._forecasts_from(full[-self._order - 1 :])
        sums: Array = np.concatenate([[0.0], np.cumsum(errors)])
        sums -= sums[full[-1] + 1]
        return sums

    def _forecasts_from(self, full: tuple[int, ...]) -> tuple[Array, Array]:
        """Relative squared errors of forecasts from these full steps, (steps,), and their factors, (steps, orders)."""
        if full not in self._known:
            self._known[full] = self._fitted(full)
        return self._known[full]

    def _fitted(self, full: tuple[int, ...]) -> tuple[Array, Array]:
        """Least squares. Differences and errors are sums of h at single steps, so their products are known."""
        points, last, weights = list(full), full[-1], self._weights
        inner = self._inner[:, points]  # of the full steps and every step
        squares = np.einsum("pss->ps", self._inner) - 2 * inner[:, -1] + inner[:, -1, last, None]
        error = (weights * squares).sum(0)
        if len(full) == 1:
            return error, np.zeros((self._steps, 0))
        changes = differences(full)
        moved = changes @ inner  # (passes, orders, steps)
        along = np.einsum("ps,pks->sk", weights, moved - moved[:, :, last, None])
        among = np.einsum("ps,pkl->skl", weights, moved[:, :, points] @ changes.T)
        size = np.einsum("skk->s", among) / len(changes) + TINY
        among += _RIDGE * size[:, None, None] * np.eye(len(changes))
        factors = np.linalg.solve(among, along[..., None])[..., 0]
        return (error - (factors * along).sum(1)).clip(0), factors


def differences(full: tuple[int, ...]) -> Array:
    """D_1, D_2, ... at the last of these full steps, as sums of h at the full steps, (full steps - 1, full steps)."""
    unit = np.eye(len(full))
    found = [unit[0]]
    for i in range(1, len(full)):
        updated = [unit[i]]
        for old in found:
            updated.append((updated[-1] - old) / (full[i] - full[i - 1]))
        found = updated
    return np.array(found[1:])


def in_terms_of(full: tuple[int, ...], factors: tuple[float, ...]) -> Array:
    """The factor of h at each of these full steps in h + f_1 D_1 + f_2 D_2 + ... at the last of them."""
    terms = np.zeros(len(full))
    terms[-1] = 1.0
    if factors:
        terms += np.array(factors) @ differences(full)
    return terms
