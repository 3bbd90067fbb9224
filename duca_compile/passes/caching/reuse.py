"""Replaces branch outputs by their cached values; the gates are computed afresh (FORA, arXiv 2407.01425)."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.variants import Action, SkipVariant
from duca_compile.passes.base import CachingPass, VariantDraft


@dataclass(frozen=True)
class ReuseBranches(CachingPass):
    """Not in skip steps: these restore the streams, and read no other cache, whatever the model returns."""

    def apply(self, draft: VariantDraft) -> bool:
        if isinstance(draft.spec, SkipVariant):
            return False
        reused = [b for b in draft.branches(Action.REUSE) if draft.node(b.core).users]
        for branch in reused:
            core = draft.node(branch.core)
            core.replace_all_uses_with(draft.input(branch.slot, core.meta["val"]))
        return bool(reused)
