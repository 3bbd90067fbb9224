"""Keeps the caches of the rows that a full step is not for; and numbers that differ by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.ports import FULL_ROWS, PortKind
from duca_compile.core.variants import FullVariant
from duca_compile.passes.base import CachingPass, VariantDraft, returned
from duca_compile.passes.numbers import by_row

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepRows(CachingPass):
    """Each cache that a full step returns holds the new value in the rows that are ``full_rows``, else the old one."""

    requires = frozenset({"caches_emitted", "changes_emitted", "differences_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        output = draft.graph.output_node()
        results = returned(draft.graph)
        own = sum(port.kind is PortKind.OUTPUT for port in draft.results)
        if not isinstance(draft.spec, FullVariant) or not draft.by_row or len(results) == own:
            return False
        if draft.find_input(FULL_ROWS) is not None:
            return False
        emitted = results[own:]
        kind = emitted[0].meta["val"].new_empty(draft.facts.batch, dtype=torch.bool)
        rows = draft.input(FULL_ROWS, kind)
        kept = list(results[:own])
        for port, new in zip(draft.results[own:], emitted, strict=True):
            like = new.meta["val"]
            old = draft.input(port, like)
            chosen = by_row(draft, rows, like)
            with draft.graph.inserting_before(output):
                merged = draft.graph.call_function(aten.where.self, (chosen, new, old))
            merged.meta["val"] = like
            kept.append(merged)
        output.args = (tuple(kept),)
        return True
