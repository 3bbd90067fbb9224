"""EasyCache (arXiv 2507.02860): the latent's own change says when the model's output must be computed again."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.steps import Probe, Restores
from duca_compile.policies.adaptive import DecidePer
from duca_compile.policies.base import Series
from duca_compile.policies.gate import SkipGate


@dataclass(frozen=True)
class EasyCache(SkipGate):
    """A step is cheap as long as the output, judged by how far the latent has moved, has changed little.

    Between the last two full steps, the output moved k times as far as the latent. So a move of the latent x from one
    step to the next changes the output v by about k mean |x - x_before| / mean |v|, relative to the output of the last
    full step. These changes add up. A cheap step runs nothing of the model: its output is x plus v - x of the last full
    step. The output must have the latent's shape. Source: arXiv 2507.02860.

    Attributes:
        threshold: a step is full if the sum of changes is at least this.
        first_full_steps: how many steps at the start are full, at least 2.
        last_full: whether the last step is full, if the number of steps is known.
        decide_per: who decides. "batch": all batch rows together, by the largest change. "row": each row for itself.
            "pair": rows i and i + batch / 2 together, the two halves of guidance.

    Raises:
        PolicyError: an invalid parameter. When steps are planned: the output has another shape than the latent.
    """

    threshold: float = 0.05
    first_full_steps: int = 5
    last_full: bool = True
    decide_per: DecidePer = "batch"

    def __post_init__(self) -> None:
        self._check(least_full=2)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        return (tuple(cls(threshold) for threshold in (0.02, 0.05, 0.1, 0.2, 0.4)),)

    @property
    def name(self) -> str:
        return f"EasyCache (threshold {self.threshold:g})"

    @property
    def restores(self) -> Restores:
        return "output"

    @property
    def measure(self) -> Probe:
        return Probe("latent")
