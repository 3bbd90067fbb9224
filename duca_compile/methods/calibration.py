"""Finds the full steps of a loop, and the factors of the forecasts between them, from recorded loops.

Full steps keep the end of the residual stream, h, and its differences, as TaylorSeer does (arXiv 2503.06923). Where the
Taylor series multiplies the difference of order i by x^i / i!, ``Calibrated`` takes the factors with the smallest
squared error on the recorded loops. Full steps are placed where that error, relative to the square of h and summed over
the loop, is smallest. Both follow from the inner products of h at any two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from duca_compile.errors import PolicyError, not_none
from duca_compile.methods.recording import Recorder, SampleLoop
from duca_compile.methods.search import ClosedLoopSearch, shortest_path
from duca_compile.methods.trials import Trials
from duca_compile.policies.base import Series
from duca_compile.policies.calibrated import Calibrated
from duca_compile.policies.checks import check_number, check_whole
from duca_compile.policies.fitting import Fitting, Products
from duca_compile.runtime.torch.samples import products


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
    recorded = recorder.measured(loops, lambda each: products([call.hidden for call in each.calls]), "forecasts")
    return Calibration(recorded, trials)


class Calibration:
    """The measurements of ``calibrate``. They make policies of any speed, each in about a second.

    Attributes:
        steps: the number of steps of the measured loops, for which the policies hold.
    """

    def __init__(self, recorded: Sequence[Products], trials: Callable[[int], Trials] | None = None) -> None:
        self._recorded, self._trials, self.steps = recorded, trials, len(recorded[0].inner)

    def settings(self) -> tuple[Series, ...]:
        """The policies that ``tune`` tries: of two orders, with fewer and fewer full steps."""
        searches = [Fitting(self._recorded, order) for order in (1, 2)]
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
        return Fitting(self._recorded, self._checked_order(max_order)).policy(full_steps)

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
        search = Fitting(self._recorded, 1)
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
        placed = Fitting(self._recorded, self._checked_order(max_order))
        trials = not_none(self._trials, "what runs the loop")(number)
        search = ClosedLoopSearch(lambda full: trials.loss(placed.policy(full)), self.steps, forced, seed)
        start = _forced(placed.policy(full_steps).full_steps, forced, self.steps)
        return placed.policy(search.climb(search.anneal(start, iterations, hot, cold), rounds))


def _forced(full: tuple[int, ...], first: int, steps: int) -> tuple[int, ...]:
    """As many full steps, the ``first`` ones of the loop among them; where that frees some, they are at its end."""
    kept = [*range(first), *(step for step in full if step >= first)]
    kept += [step for step in reversed(range(steps)) if step not in kept]
    return tuple(sorted(kept[: len(full)]))
