"""Removes what the trace left behind: checks, dropout, casts and squeezes that change nothing, strides in views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from duca_compile.core.fx_utils import op_name
from duca_compile.passes.base import Draft, ExactPass

aten = torch.ops.aten

_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async"}


@dataclass(frozen=True)
class Clean(ExactPass[Draft]):
    ensures = frozenset({"clean"})

    def apply(self, draft: Draft) -> bool:
        changed = False
        for node in list(draft.graph.nodes):
            if op_name(node) in _CHECKS:
                draft.graph.erase_node(node)
            elif _is_identity(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                draft.graph.erase_node(node)
            elif node.target is aten.type_as.default and _device(node.args[1]) == _device(node.args[0]):
                node.target = aten.to.dtype  # only the dtype of the second operand matters
                node.args = (node.args[0], node.meta["val"].dtype)
            elif node.target is aten.view.default:
                node.target = aten.reshape.default  # the same where a view is possible, and valid elsewhere too
            else:
                continue
            changed = True
        return changed


def _device(value: Any) -> torch.device:
    device: torch.device = value.meta["val"].device
    return device


def _is_identity(node: fx.Node) -> bool:
    name = op_name(node)
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return not node.args[2]
    if name == "alias":
        return True
    if name == "squeeze":  # of a dimension whose size is not 1: a no-op in torch, but an error in ONNX
        return bool(node.all_input_nodes[0].meta["val"].shape == node.meta["val"].shape)
    if name not in ("to", "type_as") or len(node.args) > 2 or node.kwargs:
        return False
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)
