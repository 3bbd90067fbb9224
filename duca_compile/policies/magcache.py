"""MagCache (arXiv 2506.09045): full steps where a recorded list of ratios says that residuals have changed enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from duca_compile.core.steps import Restores, Step, StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Policy
from duca_compile.policies.checks import check_number, check_whole, known_total


@dataclass(frozen=True)
class MagCache(Policy):
    """Skip steps add what all blocks added at the last full step; a recorded list says how long that is good enough.

    The list has the length of this residual at each step over that at the step before, which is nearly the same for all
    prompts. The product of these ratios since the last full step says by how much the residual has grown. Its distances
    from 1 add up, and once the sum is above the threshold, a step is full. Source: arXiv 2506.09045.

    Attributes:
        ratios: of the steps of a loop, the first of which does not count. ``residual_ratios`` measures them. A loop of
            another length uses the ratios of the nearest steps.
        threshold: the largest sum at a skip step.
        max_cached_steps: the most skip steps in a row.
        first_share: the share of the steps, at the start, that are full.
        always_full: places in ``ratios``, counted from 0, whose steps are full.

    Raises:
        PolicyError: an invalid parameter. When steps are planned: the number of steps is needed, and not known.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    max_cached_steps: int = 3
    first_share: float = 0.2
    always_full: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ratios:
            raise PolicyError("ratios=() is invalid: measure them with residual_ratios(model, sample)")
        for i, ratio in enumerate(self.ratios):
            check_number(f"ratios[{i}]", ratio, least=0)
        check_number("threshold", self.threshold, least=0)
        check_whole("max_cached_steps", self.max_cached_steps, least=1)
        check_number("first_share", self.first_share, least=0, most=1)
        for i, place in enumerate(self.always_full):
            check_whole(f"always_full[{i}]", place, least=0, most=len(self.ratios) - 1)

    @property
    def name(self) -> str:
        return f"MagCache (threshold {self.threshold:g}, at most {self.max_cached_steps} skipped)"

    @property
    def restores(self) -> Restores:
        return "change"

    def steps(self, total: int | None) -> Iterator[Step]:
        known = known_total("MagCache's schedule depends", total)
        first = max(1, int(self.first_share * known + 0.5))
        ratio, skipped, error = 1.0, 0, 0.0
        for index in range(known):
            place = round(index * (len(self.ratios) - 1) / max(1, known - 1))
            ratio *= self.ratios[place]
            skipped += 1
            error += abs(1 - ratio)
            kept = error <= self.threshold and skipped <= self.max_cached_steps
            if index >= first and kept and place not in self.always_full:
                yield Step(StepKind.SKIP)
            else:
                ratio, skipped, error = 1.0, 0, 0.0
                yield Step(StepKind.FULL)
