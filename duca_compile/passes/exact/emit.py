"""Makes a variant return what later steps reuse: branch outputs before the gate, and the ends of the streams."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.ports import Port
from duca_compile.core.steps import CacheKinds
from duca_compile.core.variants import (
    Action,
    Boundary,
    Changes,
    ForecastVariant,
    PredictVariant,
    ProbeVariant,
    SkipVariant,
)
from duca_compile.passes.base import ExactPass, VariantDraft


@dataclass(frozen=True)
class EmitCaches(ExactPass[VariantDraft]):
    """Returns the output of every computed branch, and the ends of the streams unless these come from the cache.

    Only those that later steps read are returned, as the spec says. If features are forecast, these are either the
    branches or the ends, whichever the forecasts read, and the branches' inputs if their movement scales the forecasts.
    If only changes or sums are cached, nothing is returned here.
    """

    ensures = frozenset({"caches_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        wanted = _wanted(draft)
        new = {slot: name for slot, name in wanted.items() if slot not in draft.results}
        for slot, name in new.items():
            draft.add_result(slot, draft.node(name))
        return bool(new)


def _wanted(draft: VariantDraft) -> dict[Port, str]:
    """The caches to return, and the nodes that they hold."""
    spec, computed = draft.spec, draft.branches(Action.COMPUTE)
    if isinstance(spec, ForecastVariant | PredictVariant | ProbeVariant) or isinstance(spec.keeps, Changes | Boundary):
        return {}
    outputs = {branch.slot: branch.core for branch in computed}
    end = dict(draft.facts.ends)
    if isinstance(spec.keeps, CacheKinds):
        restored = isinstance(spec, SkipVariant)
        return (outputs if spec.keeps.branches else {}) | (end if spec.keeps.end and not restored else {})
    if not spec.keeps.differences:
        return {}
    inputs = {branch.input_slot: branch.input for branch in computed}
    return {"branches": outputs, "inputs": outputs | inputs, "end": end}[spec.keeps.of]
