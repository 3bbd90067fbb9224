"""``Auto``: full steps and forecasts that are learnt from the requests themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, repeat

import numpy as np

from duca_compile.core.steps import CacheKinds, Step, StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.base import FittedFactors, Forecast, Policy
from duca_compile.policies.calibrated import Calibrated
from duca_compile.policies.checks import check_number, check_whole, known_total
from duca_compile.policies.files import save_policy
from duca_compile.policies.fitting import Array, Fitting, Products

DEFAULT_ERROR = 0.09  # kept trained models above 30 dB, see docs/methods/auto.md
FEWEST_STEPS = 10  # shorter loops are full: they are of models trained for few steps, which differ too much
MOST_FULL = 0.9  # the largest share of full steps; with more, forecasts are not worth their memory
TOLERANCE = 1.5  # times the error that was asked for: beyond, what was learnt does not hold
_BEAM = 4  # of the search in loops of up to 50 steps; narrower in longer ones, since a request waits for it

FULL = Step(StepKind.FULL)
PLAIN = Step(StepKind.FULL, kept=CacheKinds.NOTHING, live=CacheKinds.NOTHING)  # keeps nothing for later steps
FORECAST = Step(StepKind.FORECAST)


@dataclass(frozen=True)
class PassKind:
    """One guidance pass of a request.

    Attributes:
        name: the name that the caller gave it.
        latent: the shape of its latent.
    """

    name: str | None
    latent: tuple[int, ...]


@dataclass(frozen=True)
class RequestKind:
    """What requests have in common that share what was learnt.

    Attributes:
        steps: the number of steps.
        scheduler: the class of the pipeline's scheduler; empty without a pipeline.
        times: the timesteps, if a scheduler knows them; else the first two, if they were read.
        passes: the guidance passes of the first step, in order.
    """

    steps: int
    scheduler: str
    times: tuple[float, ...]
    passes: tuple[PassKind, ...]

    def __str__(self) -> str:
        passes = " and ".join(
            f"{'x'.join(map(str, each.latent))}{f' ({each.name})' if each.name else ''}" for each in self.passes
        )
        return f"{self.steps} steps{f' of {self.scheduler}' if self.scheduler else ''}, latent {passes}"


@dataclass(frozen=True)
class Check:
    """A forecast that a full step is compared with.

    Attributes:
        step: the full step.
        forecast: what would have been forecast in its place.
        expected: the squared relative error that this forecast had in the loops that were learnt from.
        before: the sum of those of the forecast steps between this full step and the one before it.
    """

    step: int
    forecast: FittedFactors
    expected: float
    before: float

    def later(self, steps: int) -> Check:
        """The same, so many steps later."""
        return replace(self, step=self.step + steps, forecast=self.forecast.later(steps))


@dataclass(frozen=True)
class Learnt:
    """What was learnt of one kind of request.

    Attributes:
        kind: of the requests.
        measured: for each step, the factors of its forecast; None for a full step.
        checks: the forecasts that full steps are compared with.
        error: the error of the loop that was learnt from, in the unit of ``Auto.error``; of several, the largest one.

    Raises:
        PolicyError: the steps do not fit together.
    """

    kind: RequestKind
    measured: tuple[FittedFactors | None, ...]
    checks: tuple[Check, ...]
    error: float

    def __post_init__(self) -> None:
        check_number("error", self.error, least=0)
        full = self.policy.full_steps
        if len(self.measured) != self.kind.steps or not {check.step for check in self.checks} <= {*full}:
            raise PolicyError(f"what was learnt of {self.kind} does not fit its {self.kind.steps} steps")

    @cached_property
    def policy(self) -> Calibrated:
        """The same as a policy, for requests of this kind alone."""
        orders = max((len(each.factors) for each in (*self.measured, *self._checked) if each is not None), default=1)
        return Calibrated(self.measured, max(1, orders), self.error)

    @property
    def _checked(self) -> tuple[FittedFactors, ...]:
        return tuple(check.forecast for check in self.checks)

    @property
    def caches(self) -> bool:
        """Whether any step is forecast."""
        return any(each is not None for each in self.measured)

    def check_at(self, step: int) -> Check | None:
        """The check of a step; None if there is none."""
        return next((check for check in self.checks if check.step == step), None)


@dataclass(frozen=True)
class Auto(Policy):
    """Learns the schedule from the first request of each kind, which runs in full, and follows it in the next ones.

    The kind of a request is its number of steps, its scheduler and timesteps, its guidance passes and the shapes of
    their latents. Steps are full, or forecasts as in ``Calibrated``: the fewest full steps are taken with which the
    error stays below ``error``. Each later full step is compared with its forecast. Where these differ by much more
    than they should, the rest of the request is full, and the next request of the kind is learnt from, too.

    Attributes:
        error: the root mean square, over all steps of a loop, of the relative error of the model's output. Full steps
            count as 0.
        max_order: the highest order of difference used, 1 to 4. Caches hold this many more tensors for each stream.
        known: what was learnt before, as ``OptimizedModel.learnt`` returns it.

    Raises:
        PolicyError: an invalid parameter.
    """

    error: float = DEFAULT_ERROR
    max_order: int = 2
    known: tuple[Learnt, ...] = ()

    def __post_init__(self) -> None:
        check_number("error", self.error, least=0, most=1)
        check_whole("max_order", self.max_order, least=1, most=4)
        for i, each in enumerate(self.known):
            if not isinstance(each, Learnt):
                raise PolicyError(f"known[{i}]={each!r} is invalid: take all of it from OptimizedModel.learnt()")
            if each.policy.max_order > self.max_order:
                raise PolicyError(f"known[{i}] has forecasts of order {each.policy.max_order}, and max_order is less")

    @property
    def name(self) -> str:
        changed = [] if self.error == DEFAULT_ERROR else [f"error {self.error:g}"]
        changed += [] if self.max_order == 2 else [f"order {self.max_order}"]
        return f"auto ({', '.join(changed)})" if changed else "auto"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, lite=True, first=0)

    def steps(self, total: int | None) -> Iterator[Step]:
        """Those of a request that nothing was learnt for: all of them are full."""
        total = known_total("what policy='auto' learns depends", total)
        yield from repeat(PLAIN if total < FEWEST_STEPS else FULL, total)

    def planned(self, total: int | None) -> Iterator[Step]:
        """The same as ``steps``: caches are kept until the last step, which ends the request."""
        return self.steps(total)

    def to_compile(self, total: int | None) -> Iterator[Step]:
        yield from self.steps(total)
        if known_total("what policy='auto' learns depends", total) >= FEWEST_STEPS:
            yield FORECAST

    def known_of(self, steps: int, latent: tuple[int, ...]) -> tuple[Learnt, ...]:
        """What is known of requests of so many steps with a pass whose latent has this shape."""
        alike = (each for each in self.known if each.kind.steps == steps)
        return tuple(each for each in alike if any(one.latent == latent for one in each.kind.passes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy and what it knows to a JSON file, atomically; ``optimize(pipe, path)`` reads it.

        Raises:
            UsageError: the file cannot be written.
        """
        save_policy(self, path, {})


@dataclass(frozen=True)
class PassProducts:
    """What was recorded of one guidance pass of one loop, or of a stretch of it.

    Attributes:
        end: the products of the end of the residual stream.
        output: those of the model's output.
    """

    end: Products
    output: Products


def learnt_from(
    loops: Sequence[Sequence[PassProducts]], error: float, order: int
) -> tuple[tuple[FittedFactors | None, ...], tuple[Check, ...], float]:
    """The schedule with the fewest full steps whose error is small enough in each of some loops.

    Args:
        loops: the guidance passes of each; all of the same number of steps.
        error: the most that it may be, in the unit of ``Auto.error``.
        order: the highest order of difference.

    Returns:
        The factors of each step, None for full ones; the checks of full steps; and the error.
    """
    passes = [each for loop in loops for each in loop]
    steps = len(passes[0].end.squares)
    fitting = Fitting([each.end for each in passes], order, max(1, min(_BEAM, _BEAM * 50 // steps)))
    outputs = [each.output for each in passes]
    ran = np.isfinite(np.stack([each.squares for each in outputs]))
    ends = np.cumsum([len(loop) for loop in loops])
    of_loop = [slice(end - len(loop), end) for end, loop in zip(ends, loops, strict=True)]
    for chosen in fitting.placed(range(1, int(MOST_FULL * steps) + 1)):
        errors = fitting.errors_of(outputs, chosen)
        forecasts = [step for step in range(steps) if step not in chosen]
        worst = max(_mean(errors[rows], ran[rows])[forecasts].sum() for rows in of_loop)
        if worst <= steps * error**2:
            expected = _mean(errors, ran)
            checks = tuple(
                Check(
                    step, fitting.forecast(step, chosen), float(expected[step]), float(expected[last + 1 : step].sum())
                )
                for last, step in pairwise(chosen)
            )
            return fitting.with_full(chosen).measured, checks, float(np.sqrt(worst / steps))
    return (None,) * steps, (), 0.0


def _mean(errors: Array, ran: Array) -> Array:
    """For each step, the mean over the passes that ran."""
    mean: Array = errors.sum(0) / ran.sum(0).clip(1)
    return mean
