"""SeaCache (arXiv 2602.18993): a residual gate that sees only what noise does not hide at a step's noise level."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.steps import NoiseFilter, Probe, Restores
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import DecidePer
from duca_compile.policies.base import Series
from duca_compile.policies.checks import check_grid, check_number
from duca_compile.policies.gate import SkipGate


@dataclass(frozen=True)
class SeaCache(SkipGate):
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
        self._check(least_full=1)
        check_number("pure_noise", self.pure_noise, least=0)
        check_number("exponent", self.exponent, least=0)
        if not self.pure_noise:
            raise PolicyError("pure_noise=0 is invalid: it is the timestep that stands for pure noise, such as 1000")
        check_grid(self.grid)

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
