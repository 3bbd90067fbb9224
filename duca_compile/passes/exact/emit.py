"""Makes a variant return what later steps reuse: branch outputs before the gate, and the end of the stream."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.ports import STREAM_END
from duca_compile.core.variants import Action
from duca_compile.passes.base import ExactPass, VariantDraft


@dataclass(frozen=True)
class EmitCaches(ExactPass[VariantDraft]):
    """Returns the output of every computed branch, and the stream's end unless that comes from the cache.

    Only what later steps read of these, as the spec says.

    Where features are forecast it is either the branches or the end: whatever the forecasts read. Where inputs say how
    far they have moved, these too. Where the streams' change is cached it is neither.
    """

    ensures = frozenset({"caches_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if not spec.emit:
            return False
        whole = spec.lite or spec.change  # what is cached are whole streams, no branches
        branches = draft.branches(Action.COMPUTE) if spec.keeps.branches and not whole else []
        wanted = {branch.slot: branch.core for branch in branches}
        if spec.lite or (spec.order is None and not spec.skip and not spec.change and spec.keeps.end):
            wanted[STREAM_END] = draft.facts.stream_end
        if spec.relational:
            wanted |= {branch.input_slot: branch.input for branch in draft.branches(Action.COMPUTE)}
        new = {slot: name for slot, name in wanted.items() if slot not in draft.results}
        for slot, name in new.items():
            draft.add_result(slot, draft.node(name))
        return bool(new)
