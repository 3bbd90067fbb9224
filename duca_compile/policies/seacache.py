"""SeaCache (arXiv 2602.18993): a residual gate that sees only what noise does not hide at a step's noise level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.core.steps import NoiseFilter, Probe, Restores, Step, StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import AdaptivePolicy, DecidePer, Decider, check_per
from duca_compile.policies.base import Series
from duca_compile.policies.checks import check_number, check_whole
from duca_compile.policies.gate import GateDecider


@dataclass(frozen=True)
class SeaCache(AdaptivePolicy):
    """A step is cheap as long as the filtered input of the first block has changed little since the last full step.

    The input, after norm and modulation, goes through a Wiener filter over the grid of its tokens. At high noise levels
    it keeps low frequencies alone; at low ones it keeps nearly all. The changes from step to step are relative, as in
    ``ResidualGate``, and add up. A cheap step adds what all blocks added at the last full step. For models that are
    trained by flow matching, where the noise level is the timestep's share of that of pure noise. Source: SeaCache,
    arXiv 2602.18993.

    Attributes:
        threshold: a step is full if the sum of changes is at least this.
        pure_noise: the timestep that stands for pure noise: 1000 for most models, 1 for those that are called with the
            noise level itself, such as FLUX.
        exponent: the power of a frequency by which the spectrum of a clean latent falls: 2 for images, 3 for videos.
        grid: layout of the tokens, (height, width) or (frames, height, width); needed only if the graph does not show
            it.
        first_full_steps: how many steps at the start are full.
        last_full: whether the last step is full, if the number of steps is known.
        decide_per: who decides. "batch": all batch rows together, by the largest change. "row": each row for itself.
            "pair": rows i and i + batch / 2 together, the two halves of guidance.

    Raises:
        PolicyError: an invalid parameter. When steps are planned: the grid is needed, and not known.
    """

    threshold: float = 0.3
    pure_noise: float = 1000.0
    exponent: float = 2.0
    grid: tuple[int, ...] | None = None
    first_full_steps: int = 1
    last_full: bool = True
    decide_per: DecidePer = "batch"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0)
        check_number("pure_noise", self.pure_noise, least=0)
        check_number("exponent", self.exponent, least=0)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        check_per(self.decide_per)
        if not self.pure_noise:
            raise PolicyError("pure_noise=0 is invalid: it is the timestep that stands for pure noise, such as 1000")
        if not isinstance(self.last_full, bool):
            raise PolicyError(f"last_full={self.last_full!r} is invalid: it must be True or False")
        if self.grid is not None:
            if len(self.grid) not in (2, 3):
                raise PolicyError(f"grid={self.grid!r} is invalid: it is (height, width) or (frames, height, width)")
            for i, size in enumerate(self.grid):
                check_whole(f"grid[{i}]", size, least=1)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        thresholds = (0.05, 0.1, 0.2, 0.3, 0.6, 1.0)
        return tuple(tuple(cls(threshold, pure_noise) for threshold in thresholds) for pure_noise in (1000.0, 1.0))

    @property
    def name(self) -> str:
        return f"SeaCache (threshold {self.threshold:g}, pure noise {self.pure_noise:g})"

    @property
    def restores(self) -> Restores:
        return "change"

    @property
    def measure(self) -> Probe:
        return Probe("modulated", filter=NoiseFilter(self.exponent, self.pure_noise, self.grid))

    @property
    def per(self) -> DecidePer:
        return self.decide_per

    @property
    def choices(self) -> tuple[Step, ...]:
        return Step(StepKind.FULL), Step(StepKind.SKIP)

    def decider(self, total: int | None) -> Decider:
        return GateDecider(StepKind.SKIP, self.threshold, total, self.first_full_steps, self.last_full)

    def steps(self, total: int | None) -> Iterator[Step]:
        decider = self.decider(total)
        for index in count() if total is None else range(total):
            yield decider.decide(index, decider.propose(index), None)
