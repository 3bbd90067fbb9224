"""Restores the end of the residual stream from the cache: only embedding and head are run (DuCa's aggressive step)."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.ports import STREAM_END
from duca_compile.core.variants import SkipVariant
from duca_compile.passes.base import CachingPass, VariantDraft


@dataclass(frozen=True)
class SkipBlocks(CachingPass):
    def apply(self, draft: VariantDraft) -> bool:
        end = draft.node(draft.facts.stream_end)
        if not isinstance(draft.spec, SkipVariant) or draft.spec.restores != "end" or not end.users:
            return False
        end.replace_all_uses_with(draft.input(STREAM_END, end.meta["val"]))
        return True
