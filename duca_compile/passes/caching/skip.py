"""Restores the ends of residual streams from the cache: only embedding and head are run (DuCa's aggressive step)."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.variants import SkipVariant
from duca_compile.passes.base import CachingPass, VariantDraft


@dataclass(frozen=True)
class SkipBlocks(CachingPass):
    def apply(self, draft: VariantDraft) -> bool:
        if not isinstance(draft.spec, SkipVariant) or draft.spec.restores != "end":
            return False
        ends = {port: end for port, name in draft.facts.ends.items() if (end := draft.node(name)).users}
        for port, end in ends.items():
            end.replace_all_uses_with(draft.input(port, end.meta["val"]))
        return bool(ends)
