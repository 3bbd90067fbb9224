"""Chooses between booleans by logic instead of by selection, which some engines lack for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from duca_compile.passes.base import Draft, PortablePass

aten = torch.ops.aten


@dataclass(frozen=True)
class LogicalSelect(PortablePass):
    """``where(mask, x, y)`` is ``(mask and x) or (not mask and y)``, and ``masked_fill`` is one half of that."""

    def apply(self, draft: Draft) -> bool:
        changed = False
        for node in list(draft.graph.nodes):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dtype is not torch.bool or node.target not in _REWRITES:
                continue
            with draft.graph.inserting_before(node):
                replacement = _REWRITES[node.target](_Logic(draft.graph, node), *node.args)
            if replacement is None:
                continue
            node.replace_all_uses_with(replacement)
            draft.graph.erase_node(node)
            changed = True
        return changed


@dataclass(frozen=True)
class _Logic:
    """Adds logical operators that come from the same line as ``like``."""

    graph: fx.Graph
    like: fx.Node

    def both(self, x: fx.Node, y: fx.Node) -> fx.Node:
        return self._add(aten.logical_and.default, x, y)

    def either(self, x: fx.Node, y: fx.Node) -> fx.Node:
        return self._add(aten.logical_or.default, x, y)

    def negation(self, x: fx.Node) -> fx.Node:
        return self._add(aten.logical_not.default, x)

    def _add(self, target: Callable[..., Any], *operands: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, operands)
        node.meta = dict(self.like.meta)
        node.meta["val"] = target(*[operand.meta["val"] for operand in operands])
        return node


def _where(logic: _Logic, mask: fx.Node, x: fx.Node, y: fx.Node) -> fx.Node | None:
    if not _are_booleans(mask, x, y):
        return None
    return logic.either(logic.both(mask, x), logic.both(logic.negation(mask), y))


def _masked_fill(logic: _Logic, x: fx.Node, mask: fx.Node, value: Any) -> fx.Node | None:
    if not isinstance(value, bool | int | float) or not _are_booleans(x, mask):
        return None
    return logic.either(x, mask) if value else logic.both(x, logic.negation(mask))


def _are_booleans(*nodes: Any) -> bool:
    return all(isinstance(node, fx.Node) and node.meta["val"].dtype is torch.bool for node in nodes)


_REWRITES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
}
