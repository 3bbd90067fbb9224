"""Makes tensors without elements from nothing, and leaves them out of joins; engines and analyses stumble over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from duca_compile.passes.base import Draft, ExactPass

aten = torch.ops.aten


@dataclass(frozen=True)
class Empties(ExactPass[Draft]):
    """``x[indices]`` without indices is ``zeros(0, ...)``, and ``cat([x, empty])`` is ``cat([x])``.

    The part of a head that is not rotated is often empty, and so is what a mask leaves out of a whole prompt. A slice
    whose other half is empty would seem to take some of the tokens.
    """

    def apply(self, draft: Draft) -> bool:
        changed = False
        for node in list(draft.graph.nodes):
            if node.op == "call_function" and _is_empty(node) and node.target is not aten.zeros.default:
                _make(draft.graph, node)
                changed = True
            elif node.target is aten.cat.default:
                changed |= _join_full(node)
        return changed


def _is_empty(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(isinstance(size, int) and size == 0 for size in value.shape)


def _make(graph: fx.Graph, node: fx.Node) -> None:
    value = node.meta["val"]
    with graph.inserting_before(node):
        made = graph.call_function(
            aten.zeros.default, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
        )
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _join_full(node: fx.Node) -> bool:
    parts: Any = node.args[0]
    full = [part for part in parts if not _is_empty(part)]
    if len(full) == len(parts) or not full or len({part.meta["val"].dtype for part in parts}) > 1:
        return False
    node.update_arg(0, full)
    return True
