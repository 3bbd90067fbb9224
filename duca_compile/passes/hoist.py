"""Moves loop-invariant values out of the step: they are computed once per request and become inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.graph import Facts, Variance, copy_graph
from duca_compile.passes.base import ExactPass, VariantDraft


def hoisted_input(name: str) -> str:
    """Name of the placeholder that carries the hoisted value of node ``name``."""
    return f"hoisted_{name}"


def frontier(graph: fx.Graph, facts: Facts) -> list[fx.Node]:
    """The loop-invariant tensors that the loop itself reads."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and facts.variance[node.name] is Variance.INVARIANT
        and isinstance(node.meta.get("val"), torch.Tensor)
        and any(user.op == "output" or facts.variance[user.name] > Variance.INVARIANT for user in node.users)
    ]


def invariant_graph(graph: fx.Graph, facts: Facts) -> fx.Graph:
    """The graph that computes the frontier from the call's loop-invariant inputs, in the frontier's order."""
    prologue = copy_graph(graph)
    by_name = {n.name: n for n in prologue.nodes}
    prologue.output_node().args = (tuple(by_name[n.name] for n in frontier(graph, facts)),)
    return prologue


@dataclass(frozen=True)
class HoistInvariants(ExactPass[VariantDraft]):
    """Reads each value of the frontier from an input; ``invariant_graph`` computes them."""

    ensures = frozenset({"invariants_hoisted"})

    def apply(self, draft: VariantDraft) -> bool:
        nodes = frontier(draft.graph, draft.facts)
        for node in nodes:
            node.replace_all_uses_with(draft.add_input(hoisted_input(node.name), node.meta["val"]))
        return bool(nodes)
