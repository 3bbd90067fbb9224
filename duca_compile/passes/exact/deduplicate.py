"""Computes equal expressions once: diffusers' DiT embeds the timestep again in every block."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx

from duca_compile.frontend.operators import is_random
from duca_compile.passes.base import Draft, ExactPass


@dataclass(frozen=True)
class Deduplicate(ExactPass[Draft]):
    """Merges nodes with the same operator and operands; random operators stay apart."""

    requires = frozenset({"clean"})

    def apply(self, draft: Draft) -> bool:
        seen: dict[Hashable, fx.Node] = {}
        changed = False
        for node in list(draft.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                draft.graph.erase_node(node)
                changed = True
        return changed


def _key(node: fx.Node) -> Hashable | None:
    if node.op not in ("call_function", "get_attr") or is_random(node):
        return None
    return (node.op, str(node.target), _freeze(node.args), _freeze(node.kwargs))


def _freeze(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(_freeze(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in value.items())
    if isinstance(value, fx.Node):
        return value
    return (type(value).__name__, repr(value))  # 1, 1.0 and True are different operands
