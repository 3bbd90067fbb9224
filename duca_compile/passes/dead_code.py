"""Removes nodes that no result needs, attention and dropout included, and inputs that became unused."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.passes.base import Draft, ExactPass


@dataclass(frozen=True)
class RemoveDeadCode(ExactPass[Draft]):
    ensures = frozenset({"no_dead_code"})

    def apply(self, draft: Draft) -> bool:
        before = len(draft.graph.nodes)
        # FX holds attention and dropout for impure; in an inference graph nothing observes their generator.
        draft.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        for node in list(draft.graph.nodes):
            if node.op == "placeholder" and not node.users:
                draft.graph.erase_node(node)
        return len(draft.graph.nodes) != before
