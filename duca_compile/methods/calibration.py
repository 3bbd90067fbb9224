"""Finds the full steps of a loop, and the factors of the forecasts between them, from one recorded loop or a few.

Full steps keep the end of the residual stream, h, and its differences, as TaylorSeer does (arXiv 2503.06923). Where
Taylor's series has x^i / i! for the difference of order i, the factors of ``Calibrated`` are those of the smallest
squared error in the recorded loops; and the full steps are placed where that error, summed over the loop and relative
to the squares of h, is smallest. All of it follows from the inner products of h at any two steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from duca_compile.errors import UsageError
from duca_compile.methods.recording import Recorder, SampleLoop
from duca_compile.policies.base import FittedFactors
from duca_compile.policies.calibrated import Calibrated
from duca_compile.policies.checks import check_full_steps, check_whole

Array = np.ndarray[Any, np.dtype[np.float64]]
_BEAM = 12  # schedules kept for each number of full steps and each last one
_RIDGE = 1e-9  # of the mean square of the differences: keeps factors finite where differences depend on each other
_TINY = 1e-300  # divides in the place of zero
_CHUNK = 1 << 18  # values of each step whose inner products are taken at once


def calibrate(model: nn.Module, sample: SampleLoop, *, loops: int = 1, timestep: str | None = None) -> Calibration:
    """Measures ``model``'s own uncached denoising loop.

    Args:
        model: a Diffusion Transformer in eval mode. It is not changed.
        sample: ``sample(drop_in, number)`` runs one denoising loop with ``drop_in`` in the place of the model. Another
            number should give another loop of the same length.
        loops: how many loops are measured. The end of the stream is kept for all steps of one.
        timestep: name of the timestep argument, where it cannot be told from the graph.

    Raises:
        UsageError: ``sample`` does not run one loop of two steps or more, its loops differ in length, or no pass of a
            loop has all steps.
        PolicyError: an impossible number of loops.
    """
    check_whole("loops", loops, least=1)
    recorder, recorded = Recorder(model, sample, timestep, whole=False), list[_Products]()
    for number in range(loops):
        for each in recorder.passes(number):
            if len(each.steps) == recorder.steps:
                recorded.append(_Products.of([call.hidden for call in each.calls]))
    if not recorded:
        raise UsageError("no pass of the loop has all of its steps, so there is nothing to measure forecasts by")
    lengths = {len(each.inner) for each in recorded}
    if len(lengths) > 1:
        raise UsageError(f"sample() must run loops of the same length; these have {sorted(lengths)} steps")
    return Calibration(recorded)


class Calibration:
    """What ``calibrate`` has measured: makes policies of any speed, each in about a second."""

    def __init__(self, recorded: Sequence[_Products]) -> None:
        self._recorded, self.steps = recorded, len(recorded[0].inner)

    def policy(self, full_steps: int | Iterable[int], max_order: int = 2) -> Calibrated:
        """The policy of the smallest error.

        Args:
            full_steps: how many steps of a loop are full, which says how fast it will be; or which, by number, from 0
                on.
            max_order: the highest difference used, 1 to 4.

        Raises:
            PolicyError: an invalid parameter, or no full step at the start.
        """
        check_whole("max_order", max_order, least=1, most=4)
        return _Search(self._recorded, max_order).policy(full_steps)


@dataclass(frozen=True)
class _Products:
    """Of one pass: the inner products of h, less its mean over the steps, at any two steps; and the squares of h."""

    inner: Array  # (steps, steps)
    squares: Array  # (steps,)

    @staticmethod
    def of(hidden: Sequence[Tensor]) -> _Products:
        steps = len(hidden)
        inner, squares = torch.zeros(steps, steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
        flat = [each.flatten() for each in hidden]
        for start in range(0, len(flat[0]), _CHUNK):
            part = torch.stack([each[start : start + _CHUNK] for each in flat]).double()
            squares += part.square().sum(1).cpu()
            part -= part.mean(0)  # forecasts add differences, which do not change by it; products round less
            inner += (part @ part.t()).cpu()
        return _Products(inner.numpy(), squares.numpy())


class _Search:
    """Forecast errors of all steps behind any full steps, and the full steps where they are smallest."""

    def __init__(self, recorded: Sequence[_Products], order: int) -> None:
        self._order, self._steps = order, len(recorded[0].inner)
        self._inner = np.stack([each.inner for each in recorded])
        self._weights = 1 / np.stack([each.squares for each in recorded]).clip(_TINY) / len(recorded)
        self._known: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def policy(self, full_steps: int | Iterable[int]) -> Calibrated:
        if isinstance(full_steps, Iterable):
            chosen = self._checked([*full_steps])
        else:
            check_whole("full_steps", full_steps, least=1, most=self._steps)
            chosen = self._placed(int(full_steps))
        measured: list[FittedFactors | None] = []
        total = 0.0
        for step in range(self._steps):
            if step in chosen:
                measured.append(None)
                continue
            last = tuple(each for each in chosen if each < step)[-self._order - 1 :]
            errors, factors = self._behind(last)
            total += errors[step]
            measured.append(FittedFactors(last[-1], tuple(map(float, factors[step]))))
        forecasts = max(1, self._steps - len(chosen))
        return Calibrated(tuple(measured), self._order, float(np.sqrt(total / forecasts)))

    def _checked(self, full_steps: Sequence[int]) -> tuple[int, ...]:
        check_full_steps(full_steps, most=self._steps - 1)
        return tuple(sorted({int(step) for step in full_steps}))

    def _placed(self, count: int) -> tuple[int, ...]:
        """The ``count`` full steps of the smallest error, by beam search from the start of the loop."""
        beam: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))]
        for placed in range(1, count):
            found: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
            for error, full in beam:
                behind = self._sums(full)
                for step in range(full[-1] + 1, self._steps - (count - 1 - placed)):
                    found.setdefault(step, []).append((error + behind[step], (*full, step)))
            beam = [each for several in found.values() for each in sorted(several)[:_BEAM]]
        return min((error + self._sums(full)[-1], full) for error, full in beam)[1]

    def _sums(self, full: tuple[int, ...]) -> Array:
        """The sums of the errors of the steps between the last full one and each step, (steps + 1,)."""
        errors, _ = self._behind(full[-self._order - 1 :])
        sums: Array = np.concatenate([[0.0], np.cumsum(errors)])
        sums -= sums[full[-1] + 1]
        return sums

    def _behind(self, full: tuple[int, ...]) -> tuple[Array, Array]:
        """Relative squared errors of forecasts from these full steps, (steps,), and their factors, (steps, orders)."""
        if full not in self._known:
            self._known[full] = self._fitted(full)
        return self._known[full]

    def _fitted(self, full: tuple[int, ...]) -> tuple[Array, Array]:
        """By least squares: differences and errors are sums of h at single steps, so their products are known."""
        points, last, weights = list(full), full[-1], self._weights
        inner = self._inner[:, points]  # of the full steps with every step
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
    """D_1, D_2, ... behind these full steps, as sums over h at these: (full steps - 1, full steps)."""
    unit = np.eye(len(full))
    found = [unit[0]]
    for place in range(1, len(full)):
        now = [unit[place]]
        for old in found:
            now.append((now[-1] - old) / (full[place] - full[place - 1]))
        found = now
    return np.array(found[1:])
