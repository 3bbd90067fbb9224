"""Moves cache writes and other work on all tokens to the end of partial steps, so that all tokens are read once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.passes.base import Draft, ExactPass

_WRITE = torch.ops.aten.index_put_.default


@dataclass(frozen=True)
class WriteLast(ExactPass[Draft]):
    """Moves everything but the ancestors of what is written into caches to the end of the graph.

    This is done only if no chosen token depends on a written cache, that is, if all branches recompute the same tokens.
    """

    def apply(self, draft: Draft) -> bool:
        graph = draft.graph
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        first = {n.args[2] for n in nodes if n.target is _WRITE}
        for node in reversed(nodes):
            if node in first:
                first.update(node.all_input_nodes)
        if any(n.target is _WRITE for n in first):
            return False
        order = sorted(nodes, key=lambda n: n not in first)
        if order == nodes:
            return False
        end = graph.output_node()
        for node in order:
            end.prepend(node)
        return True
