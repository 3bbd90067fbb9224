"""Keeps the caches of batch rows that a full step does not refresh."""

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
    """Each cache that a full step returns has new values in the batch rows of ``full_rows`` and old ones elsewhere."""

    requires = frozenset(
        {"boundary_emitted", "caches_emitted", "changes_emitted", "differences_emitted", "sums_emitted"}
    )

    def apply(self, draft: VariantDraft) -> bool:
        output = draft.graph.output_node()
        results = returned(draft.graph)
        output_count = sum(port.kind is PortKind.OUTPUT for port in draft.results)
        if not isinstance(draft.spec, FullVariant) or not draft.by_row or len(results) == output_count:
            return False
        if draft.find_input(FULL_ROWS) is not None:
            return False
        emitted = results[output_count:]
        mask_like = emitted[0].meta["val"].new_empty(draft.facts.batch, dtype=torch.bool)
        mask = draft.input(FULL_ROWS, mask_like)
        merged = list(results[:output_count])
        for port, computed in zip(draft.results[output_count:], emitted, strict=True):
            like = computed.meta["val"]
            cached = draft.input(port, like)
            chosen = by_row(draft, mask, like)
            with draft.graph.inserting_before(output):
                value = draft.graph.call_function(aten.where.self, (chosen, computed, cached))
            value.meta["val"] = like
            merged.append(value)
        output.args = (tuple(merged),)
        return True
