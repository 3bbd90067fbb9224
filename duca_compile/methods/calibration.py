"""Finds the full steps of a loop, and the factors of the forecasts between them, from recorded loops.

Full steps keep the end of the residual stream, h, and its differences, as TaylorSeer does (arXiv 2503.06923). Where the
Taylor series multiplies the difference of order i by x^i / i!, ``Calibrated`` takes the factors with the smallest
squared error on the recorded loops. Full steps are placed where that error, relative to the square of h and summed over
the loop, is smallest. Both follow from the inner products of h at any two steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from duca_compile.errors import UsageError
from duca_compile.methods.recording import Recorder, SampleLoop
from duca_compile.policies.base import FittedFactors, Series
from duca_compile.policies.calibrated import Calibrated
from duca_compile.policies.checks import check_full_steps, check_whole

Array = np.ndarray[Any, np.dtype[np.float64]]
_BEAM = 12  # schedules kept for each number of full steps and each last full step
_RIDGE = 1e-9  # times the mean square of the differences: keeps factors finite where differences are dependent
_TINY = 1e-300  # replaces a zero divisor
_CHUNK = 1 << 18  # values of each step in one product


def calibrate(model: nn.Module, sample: SampleLoop, *, loops: int = 1, timestep: str | None = None) -> Calibration:
    """Measures the model's own uncached denoising loop, for ``Calibrated`` policies.

    Args:
        model: a Diffusion Transformer in eval mode. It is not changed.
        sample: ``sample(drop_in, number)`` runs one denoising loop with ``drop_in`` in place of the model. Another
            number should give another loop (other noise, other prompts) of the same length.
        loops: how many loops to measure. Memory holds the end of the stream for all steps of one loop.
        timestep: name of the timestep argument; needed only if the graph does not show it.

    Returns:
        The measurements, which make policies of any speed.

    Raises:
        UsageError: ``sample`` does not run one loop of at least two steps, its loops differ in length, or no guidance
            pass runs at every step.
        PolicyError: the number of loops is invalid.
    """
    check_whole("loops", loops, least=1)
    return calibration_of(Recorder(model, sample, timestep, whole=False), loops)


def calibration_of(recorder: Recorder, loops: int) -> Calibration:
    """The measurements of the first ``loops`` loops of a recorder. Raises what ``calibrate`` raises."""
    recorded = list[_Products]()
    for number in range(loops):
        for recorded_pass in recorder.passes(number):
            if len(recorded_pass.steps) == recorder.steps:
                recorded.append(_Products.of([call.hidden for call in recorded_pass.calls]))
    if not recorded:
        raise UsageError("no guidance pass runs at every step of the loop, so forecasts cannot be measured")
    lengths = {len(products.inner) for products in recorded}
    if len(lengths) > 1:
        raise UsageError(f"sample() must run loops of the same length; these have {sorted(lengths)} steps")
    return Calibration(recorded)


class Calibration:
    """The measurements of ``calibrate``. They make policies of any speed, each in about a second.

    Attributes:
        steps: the number of steps of the measured loops, for which the policies hold.
    """

    def __init__(self, recorded: Sequence[_Products]) -> None:
        self._recorded, self.steps = recorded, len(recorded[0].inner)

    def settings(self) -> tuple[Series, ...]:
        """The policies that ``tune`` tries: of two orders, with fewer and fewer full steps."""
        searches = [_Search(self._recorded, order) for order in (1, 2)]
        counts = range(2, max(3, self.steps // 2 + 1))
        return tuple(tuple(reversed(search.policies(counts))) for search in searches)

    def policy(self, full_steps: int | Iterable[int], max_order: int = 2) -> Calibrated:
        """The policy with the smallest error on the measured loops.

        Args:
            full_steps: how many steps of a loop are full, which sets its speed; or their numbers, counted from 0.
            max_order: the highest order of difference used, 1 to 4.

        Returns:
            The policy, for loops of ``steps`` steps.

        Raises:
            PolicyError: an invalid parameter, or step 0 is not full.
        """
        check_whole("max_order", max_order, least=1, most=4)
        return _Search(self._recorded, max_order).policy(full_steps)


@dataclass(frozen=True)
class _Products:
    """Inner products of h at any two steps of one guidance pass, less its mean over the steps; and squares of h."""

    inner: Array  # (steps, steps)
    squares: Array  # (steps,)

    @staticmethod
    def of(hidden: Sequence[Tensor]) -> _Products:
        steps = len(hidden)
        inner, squares = torch.zeros(steps, steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
        flat = [state.flatten() for state in hidden]
        for start in range(0, len(flat[0]), _CHUNK):
            part = torch.stack([values[start : start + _CHUNK] for values in flat]).double()
            squares += part.square().sum(1).cpu()
            part -= part.mean(0)  # differences do not depend on the mean, and products round less without it
            inner += (part @ part.t()).cpu()
        return _Products(inner.numpy(), squares.numpy())


class _Search:
    """The errors of forecasts from any full steps, and the full steps for which their sum is smallest."""

    def __init__(self, recorded: Sequence[_Products], order: int) -> None:
        self._order, self._steps = order, len(recorded[0].inner)
        self._inner = np.stack([products.inner for products in recorded])
        self._weights = 1 / np.stack([products.squares for products in recorded]).clip(_TINY) / len(recorded)
        self._known: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def policy(self, full_steps: int | Iterable[int]) -> Calibrated:
        if isinstance(full_steps, Iterable):
            chosen = self._checked([*full_steps])
        else:
            check_whole("full_steps", full_steps, least=1, most=self._steps)
            (chosen,) = self._placed(range(int(full_steps), int(full_steps) + 1))
        return self._with_full(chosen)

    def policies(self, counts: range) -> list[Calibrated]:
        """The policy for each number of full steps in ``counts``."""
        return [self._with_full(chosen) for chosen in self._placed(counts)]

    def _with_full(self, chosen: tuple[int, ...]) -> Calibrated:
        measured: list[FittedFactors | None] = []
        total = 0.0
        for step in range(self._steps):
            if step in chosen:
                measured.append(None)
                continue
            last = tuple(full for full in chosen if full < step)[-self._order - 1 :]
            errors, factors = self._forecasts_from(last)
            total += errors[step]
            measured.append(FittedFactors(last[-1], tuple(map(float, factors[step]))))
        forecasts = max(1, self._steps - len(chosen))
        return Calibrated(tuple(measured), self._order, float(np.sqrt(total / forecasts)))

    def _checked(self, full_steps: Sequence[int]) -> tuple[int, ...]:
        check_full_steps(full_steps, most=self._steps - 1)
        return tuple(sorted({int(step) for step in full_steps}))

    def _placed(self, counts: range) -> Iterator[tuple[int, ...]]:
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
            beam = [schedule for schedules in by_last.values() for schedule in sorted(schedules)[:_BEAM]]

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
        differences = _differences(full)
        moved = differences @ inner  # (passes, orders, steps)
        along = np.einsum("ps,pks->sk", weights, moved - moved[:, :, last, None])
        among = np.einsum("ps,pkl->skl", weights, moved[:, :, points] @ differences.T)
        size = np.einsum("skk->s", among) / len(differences) + _TINY
        among += _RIDGE * size[:, None, None] * np.eye(len(differences))
        factors = np.linalg.solve(among, along[..., None])[..., 0]
        return (error - (factors * along).sum(1)).clip(0), factors


def _differences(full: tuple[int, ...]) -> Array:
    """D_1, D_2, ... at the last of these full steps, as sums of h at the full steps, (full steps - 1, full steps)."""
    unit = np.eye(len(full))
    differences = [unit[0]]
    for i in range(1, len(full)):
        updated = [unit[i]]
        for old in differences:
            updated.append((updated[-1] - old) / (full[i] - full[i - 1]))
        differences = updated
    return np.array(differences[1:])
