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
    """The loop-invariant tensors that are computed once per request and that the loop itself reads."""
    hoisted = _hoisted(graph, facts)
    return [
        node
        for node in graph.nodes
        if node in hoisted
        and isinstance(node.meta.get("val"), torch.Tensor)
        and any(user not in hoisted for user in node.users)
    ]


def _hoisted(graph: fx.Graph, facts: Facts) -> set[fx.Node]:
    """The loop-invariant nodes, less those that would hold weights twice.

    What is computed from weights alone stays in the loop unless it is smaller than they are: a quantized weight that
    is widened for a product would else be kept at full width.
    """
    weights: dict[fx.Node, frozenset[fx.Node] | None] = {}  # what a node is computed from; None where arguments too
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            weights[node] = frozenset((node,))
        elif node.op != "call_function" or facts.variance[node.name] is not Variance.INVARIANT:
            weights[node] = None
        else:
            above = [weights[n] for n in node.all_input_nodes]
            own = weights[node] = None if None in above else frozenset[fx.Node]().union(*filter(None, above))
            if not own or _bytes(node) < sum(map(_bytes, own)):
                found.add(node)
    return found


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0


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
