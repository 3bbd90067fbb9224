"""Removes nodes that no result needs, attention and dropout included, and inputs that became unused."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from duca_compile.frontend.operators import is_random
from duca_compile.passes.base import Draft, ExactPass


@dataclass(frozen=True)
class RemoveDeadCode(ExactPass[Draft]):
    """``draws``: whether unused random numbers are still drawn, since every later draw depends on them."""

    draws: bool = True
    ensures = frozenset({"no_dead_code"})

    def apply(self, draft: Draft) -> bool:
        before = len(draft.graph.nodes)
        # FX treats attention and dropout as impure. They are removed if their result is unused, although this changes
        # the draws after them; a draw without operands costs little, and stays.
        draft.graph.eliminate_dead_code(is_impure_node=self._stays)
        for node in list(draft.graph.nodes):
            if node.op == "placeholder" and not node.users:
                draft.graph.erase_node(node)
        return len(draft.graph.nodes) != before

    def _stays(self, node: fx.Node) -> bool:
        drawn = self.draws and is_random(node) and not node.all_input_nodes
        return drawn or node.op in ("placeholder", "output")
