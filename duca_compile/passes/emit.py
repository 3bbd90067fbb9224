"""Makes a variant return what later steps reuse: branch outputs before the gate, and the end of the stream."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.graph import STREAM_END, Action
from duca_compile.passes.base import ExactPass, VariantDraft


@dataclass(frozen=True)
class EmitCaches(ExactPass[VariantDraft]):
    """Returns the output of every computed branch, and the stream's end unless that comes from the cache."""

    ensures = frozenset({"caches_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        before = len(draft.results)
        for branch in draft.branches(Action.COMPUTE):
            draft.add_result(branch.slot, draft.node(branch.core))
        if not draft.spec.skip:
            draft.add_result(STREAM_END, draft.node(draft.facts.stream_end))
        return len(draft.results) != before
