"""Adds the cached change of each stream to its start, in place of all blocks (TeaCache, arXiv 2411.19108)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.ports import Port, PortKind
from duca_compile.core.variants import SkipVariant
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.exact.changes import stretches

aten = torch.ops.aten


@dataclass(frozen=True)
class AddChanges(CachingPass):
    """The end of a stream is its start in this step plus what the blocks added to it at the last full step."""

    def apply(self, draft: VariantDraft) -> bool:
        if not isinstance(draft.spec, SkipVariant) or draft.spec.restores != "change":
            return False
        ports = {index: Port(PortKind.CHANGE, index) for index in range(len(draft.facts.branches))}
        new = {i: ends for i, ends in stretches(draft).items() if draft.find_input(ports[i]) is None}
        # Backwards, since a stretch may start at the end of an earlier one, which is then replaced too.
        for index, (start, end) in sorted(new.items(), reverse=True):
            change = draft.input(ports[index], end.meta["val"])
            with draft.graph.inserting_before(end):
                restored = draft.graph.call_function(aten.add.Tensor, (start, change))
            restored.meta["val"] = end.meta["val"]
            end.replace_all_uses_with(restored)
        return bool(new)
