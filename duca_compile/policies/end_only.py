"""A policy restricted to one cached tensor: steps that would read branch caches skip the blocks instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from duca_compile.core.steps import CacheKinds, Step, StepKind
from duca_compile.policies.base import Forecast, Policy


@dataclass(frozen=True)
class EndOnly(Policy):
    """The policy ``of`` with the end of the stream as its only cache; partial and reuse steps become skip steps."""

    of: Policy

    @property
    def name(self) -> str:
        return f"{self.of.name}, caching only the stream's end"

    @property
    def caches(self) -> bool:
        return self.of.caches

    @property
    def forecast(self) -> Forecast | None:
        return None if self.of.forecast is None else replace(self.of.forecast, lite=True, relational=False)

    def steps(self, total: int | None) -> Iterator[Step]:
        return map(self.replacement_for, self.of.planned(total))

    def replacement_for(self, step: Step) -> Step:
        """The step to run in place of a step of ``of``."""
        live = CacheKinds.END if step.live is not CacheKinds.NOTHING else CacheKinds.NOTHING
        step = replace(step, kept=CacheKinds.END, live=live)
        if step.kind in (StepKind.PARTIAL, StepKind.REUSE):
            return replace(step, kind=StepKind.SKIP, ratio=0.0, leading_full=0)
        return step
