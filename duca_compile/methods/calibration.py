"""Finds the full steps of a loop, and the factors of the forecasts between them, from recorded loops.

Full steps keep the end of the residual stream, h, and its differences, as TaylorSeer does (arXiv 2503.06923). Where the
Taylor series multiplies the difference of order i by x^i / i!, ``Calibrated`` takes the factors with the smallest
squared error on the recorded loops. Full steps are placed where that error, relative to the square of h and summed over
the loop, is smallest. Both follow from the inner products of h at any two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from duca_compile.errors import PolicyError, not_none
from duca_compile.methods.recording import Recorder, SampleLoop
from duca_compile.methods.search import ClosedLoopSearch, shortest_path
from duca_compile.methods.trials import Trials
from duca_compile.policies.base import FittedFactors, Series
from duca_compile.policies.calibrated import Calibrated
from duca_compile.policies.checks import check_full_steps, check_number, check_whole

Array = np.ndarray[Any, np.dtype[np.float64]]
_BEAM = 12  # schedules kept for each number of full steps and each last full step
_RIDGE = 1e-9  # times the mean square of the differences: keeps factors finite where differences are dependent
_TINY = 1e-300  # replaces a zero divisor
_CHUNK = 1 << 18  # values of each step in one product


def calibrate(
    model: nn.Module, sample: SampleLoop, *, loops: int = 1, timestep: str | None = None, latent: str | None = None
) -> Calibration:
    """Measures the model's own uncached denoising loop, for ``Calibrated`` policies.

    Args:
        model: a Diffusion Transformer in eval mode. It is not changed.
        sample: ``sample(drop_in, number)`` runs one denoising loop with ``drop_in`` in place of the model. Another
            number should give another loop (other noise, other prompts) of the same length.
        loops: how many loops to measure. Memory holds the end of the stream for all steps of one loop.
        timestep: name of the timestep argument; needed only if the graph does not show it.
        latent: name of the argument that is denoised; needed only if the graph does not show it.

    Returns:
        The measurements, which make policies of any speed.

    Raises:
        UsageError: ``sample`` does not run one loop of at least two steps, its loops differ in length, or no guidance
            pass runs at every step.
        PolicyError: the number of loops is invalid.
    """
    check_whole("loops", loops, least=1)
    recorder = Recorder(model, sample, timestep, whole=False, latent=latent)
    trials = partial(Trials, model, sample, timestep=timestep, latent=latent)
    return calibration_of(recorder, loops, lambda number: trials(number=number, steps=recorder.steps))


def calibration_of(recorder: Recorder, loops: int, trials: Callable[[int], Trials] | None = None) -> Calibration:
    """The measurements of the first ``loops`` loops of a recorder. Raises what ``calibrate`` raises."""
    recorded = recorder.measured(loops, lambda each: _Products.of([call.hidden for call in each.calls]), "forecasts")
    return Calibration(recorded, trials)


class Calibration:
    """The measurements of ``calibrate``. They make policies of any speed, each in about a second.

    Attributes:
        steps: the number of steps of the measured loops, for which the policies hold.
    """

    def __init__(self, recorded: Sequence[_Products], trials: Callable[[int], Trials] | None = None) -> None:
        self._recorded, self._trials, self.steps = recorded, trials, len(recorded[0].inner)

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
        return _Search(self._recorded, self._checked_order(max_order)).policy(full_steps)

    @staticmethod
    def _checked_order(max_order: int) -> int:
        check_whole("max_order", max_order, least=1, most=4)
        return int(max_order)

    def policy_by_path(self, full_steps: int, *, first_full_steps: int = 3, largest_gap: float = 0.3) -> Calibrated:
        """The policy whose forecasts, each the line through the last two full steps, have the smallest sum of errors.

        The full steps are found by dynamic programming, as in DPCache (arXiv 2602.22654); nothing is fitted. The error
        of a forecast is the root of its mean squared difference, averaged over guidance passes and loops.

        Args:
            full_steps: how many steps of a loop are full.
            first_full_steps: how many of them are at the start, at least 2.
            largest_gap: the longest way from one full step to the next, as a share of the loop.

        Returns:
            The policy, for loops of ``steps`` steps.

        Raises:
            PolicyError: an invalid parameter, or so few full steps leave longer gaps.
        """
        check_whole("first_full_steps", first_full_steps, least=2, most=self.steps)
        check_whole("full_steps", full_steps, least=int(first_full_steps), most=self.steps)
        check_number("largest_gap", largest_gap, least=0, most=1)
        search = _Search(self._recorded, 1)
        gap = max(1, int(largest_gap * self.steps))
        chosen = shortest_path(search.line_errors(), int(full_steps), int(first_full_steps), gap)
        return search.along_lines(chosen)

    def policy_by_loops(
        self,
        full_steps: int,
        max_order: int = 2,
        *,
        iterations: int = 200,
        rounds: int = 20,
        forced: int | None = None,
        number: int = 0,
        seed: int = 0,
        temperatures: tuple[float, float] = (0.05, 1e-5),
    ) -> Calibrated:
        """The policy whose own loop ends closest to the uncached one, as far as a search finds it.

        Other than ``policy``, this sees how errors of early steps change later ones. It starts from the full steps of
        ``policy``, and moves them by simulated annealing and then by climbing, as in BudCache (arXiv 2606.13496).
        Forecasts are fitted for each choice. Each new choice runs one loop, with as many full steps as the policy.

        Args:
            full_steps: how many steps of a loop are full.
            max_order: the highest order of difference used, 1 to 4.
            iterations: moves of the annealing; 0 for none.
            rounds: the most rounds of climbing, each of which tries all full steps up to three places away.
            forced: how many full steps stay at the start; by default a quarter, and at least one.
            number: of the loop that is run. ``sample`` must return its final latent, a tensor.
            seed: of the random moves.
            temperatures: of the annealing, at its start and its end, in units of the mean squared error.

        Returns:
            The policy, for loops of ``steps`` steps.

        Raises:
            PolicyError: an invalid parameter.
            UsageError: ``sample`` returns no tensor.
        """
        check_whole("full_steps", full_steps, least=1, most=self.steps)
        forced = max(1, int(full_steps) // 4) if forced is None else forced
        check_whole("forced", forced, least=1, most=int(full_steps))
        check_whole("iterations", iterations, least=0)
        check_whole("rounds", rounds, least=0)
        for i, temperature in enumerate(temperatures):
            check_number(f"temperatures[{i}]", temperature, least=0)
        hot, cold = temperatures
        if not 0 < cold <= hot:
            raise PolicyError(f"temperatures={temperatures!r} is invalid: it falls, and stays above 0")
        placed = _Search(self._recorded, self._checked_order(max_order))
        trials = not_none(self._trials, "what runs the loop")(number)
        search = ClosedLoopSearch(lambda full: trials.loss(placed.policy(full)), self.steps, forced, seed)
        start = _forced(placed.policy(full_steps).full_steps, forced, self.steps)
        return placed.policy(search.climb(search.anneal(start, iterations, hot, cold), rounds))


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


def _forced(full: tuple[int, ...], first: int, steps: int) -> tuple[int, ...]:
    """As many full steps, the ``first`` ones of the loop among them; where that frees some, they are at its end."""
    kept = [*range(first), *(step for step in full if step >= first)]
    kept += [step for step in reversed(range(steps)) if step not in kept]
    return tuple(sorted(kept[: len(full)]))


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
