"""Copies only tensors of the shape that they are copied to, since ONNX's form of a copy does not broadcast."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.fx_utils import node_operand
from duca_compile.passes.base import Draft, PortablePass

aten = torch.ops.aten


@dataclass(frozen=True)
class WholeCopies(PortablePass):
    """``x.copy_(y)``, which ``x[:] = y`` becomes, is ``x.copy_(y.expand(x.shape))``."""

    def apply(self, draft: Draft) -> bool:
        changed = False
        for node in draft.graph.nodes:
            if node.target not in (aten.copy_.default, aten.copy.default):
                continue
            source, shape = node_operand(node, 1), list(node.meta["val"].shape)
            if list(source.meta["val"].shape) == shape:
                continue
            with draft.graph.inserting_before(node):
                expanded = draft.graph.call_function(aten.expand.default, (source, shape))
            expanded.meta = {**node.meta, "val": source.meta["val"].expand(shape)}
            node.update_arg(1, expanded)
            changed = True
        return changed
