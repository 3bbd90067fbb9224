"""Clears memory that forward fills later, so that no graph returns, or is compared by, what lay there before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.passes.base import Draft, PortablePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ZeroMemory(PortablePass):
    """``empty(...)`` is ``zeros(...)``. Rotary embeddings that fill every other channel begin with it."""

    def apply(self, draft: Draft) -> bool:
        changed = False
        for node in draft.graph.find_nodes(op="call_function", target=aten.empty.memory_format):
            value = node.meta["val"]
            if not value.is_contiguous():
                continue
            node.target = aten.zeros.default
            node.args, node.kwargs = (list(value.shape),), {"dtype": value.dtype, "device": value.device}
            changed = True
        return changed
