"""Replaces operands that are read only for their shape, dtype or device by constants."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from duca_compile.frontend.operators import argument
from duca_compile.passes.base import Draft, ExactPass

aten = torch.ops.aten

_CREATED: dict[Any, Any] = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.empty_like.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.zeros_like.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.ones_like.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.full_like.default: aten.full.default,
}
_SHAPED: dict[Any, Any] = {  # these take the shape of their second operand
    aten.expand_as.default: aten.expand.default,
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
}


@dataclass(frozen=True)
class StaticShapes(ExactPass[Draft]):
    """``x.new_zeros(...)``, ``zeros_like(x)`` and ``y.expand_as(x)`` do not depend on the values of ``x``.

    Without this, everything computed from them would count as latent-dependent, and tokens would seem to mix.
    """

    def apply(self, draft: Draft) -> bool:
        changed = False
        for node in list(draft.graph.nodes):
            rewrite = _rewrite(node)
            if rewrite is not None:
                rewrite(draft.graph, node)
                changed = True
        return changed


def _rewrite(node: fx.Node) -> Callable[[fx.Graph, fx.Node], None] | None:
    if node.target in _CREATED and node.meta["val"].is_contiguous():
        fill = argument(node, "fill_value")
        return None if isinstance(fill, fx.Node) else _create
    if node.target in _SHAPED:
        return _shape
    return _broadcast if node.target is aten.broadcast_tensors.default else None


def _create(_: fx.Graph, node: fx.Node) -> None:
    value, fill = node.meta["val"], argument(node, "fill_value")
    node.target = _CREATED[node.target]
    node.args = (list(value.shape),) if fill is None else (list(value.shape), fill)
    node.kwargs = {"dtype": value.dtype, "device": value.device}


def _shape(_: fx.Graph, node: fx.Node) -> None:
    node.target = _SHAPED[node.target]
    node.args = (node.args[0], list(node.meta["val"].shape))


def _broadcast(graph: fx.Graph, node: fx.Node) -> None:
    """Each result is one operand, expanded."""
    (operands,) = node.args
    for user in list(node.users):
        if user.target is not operator.getitem:
            continue
        operand = operands[user.args[1]]  # type: ignore[index]
        user.target, user.args = aten.expand.default, (operand, list(user.meta["val"].shape))
    if not node.users:
        graph.erase_node(node)
