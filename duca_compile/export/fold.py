"""Computes small constants by torch, so that engines start from the same numbers as the model.

The frequencies of an embedding are one: engines have other roundings of ``exp`` and ``pow``, and a large timestep
multiplies them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from duca_compile.analysis.closure import ancestors

LARGEST = 4096  # numbers in a constant; larger ones, such as masks, are smaller as operators than as values


def fold_constants(module: fx.GraphModule) -> None:
    """Replaces each small floating-point value that is computed from nothing at all by a constant of the module."""
    graph = module.graph
    constant = _constant(graph)
    ends = [node for node in constant if any(user not in constant for user in node.users) and _fits(node)]
    values = _values(module, constant)
    for node in ends:
        name = f"folded_{node.name}"
        module.register_buffer(name, values[node].contiguous())
        with graph.inserting_before(node):
            folded = graph.get_attr(name)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
    for node in reversed(constant):
        if not node.users:
            graph.erase_node(node)
    module.recompile()


def _constant(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that depend on no input, weight or random number, and that nothing writes to."""
    written = {
        source
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for operand in node.all_input_nodes
        for source in (operand, *ancestors(operand))
    }
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or node in written:
            continue
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            continue
        if all(source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)


def _fits(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() <= LARGEST


def _values(module: fx.GraphModule, constant: list[fx.Node]) -> dict[fx.Node, Tensor]:
    values: dict[fx.Node, Tensor] = {}
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    with torch.no_grad():
        for node in constant:
            interpreter.env[node] = values[node] = interpreter.run_node(node)
    return values
