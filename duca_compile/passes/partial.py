"""Recomputes chosen tokens of pointwise branches and scatters them into the cache (ToCa, arXiv 2410.05317, Alg. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.analysis.tokens import ELEMENTWISE, RESHAPES, external_axis
from duca_compile.errors import InternalError
from duca_compile.graph import Action, Branch, cache_input, op_name, tokens_input, value_shape
from duca_compile.passes.base import CachingPass, VariantDraft

aten = torch.ops.aten


@dataclass(frozen=True)
class RecomputeTokens(CachingPass):
    """For each partial branch: gather the tokens of the stream, run the body on them, scatter into the cache.

    The updated cache takes the core's place and is returned. The number of tokens is left open in the graph, and
    each branch has an index input of its own, so it may differ by branch and from step to step.
    """

    def apply(self, draft: VariantDraft) -> bool:
        partial = [b for b in draft.branches(Action.PARTIAL) if draft.node(b.core).users]
        for branch in partial:
            _recompute(draft, branch)
        return bool(partial)


def _recompute(draft: VariantDraft, branch: Branch) -> None:
    if branch.token_axes is None:
        raise InternalError(f"branch {branch.index} ({branch.path}) is not pointwise along its tokens")
    graph, core = draft.graph, draft.node(branch.core)
    batch, tokens, width = branch.shape
    index = draft.add_input(tokens_input(branch.index), torch.empty(batch, tokens, dtype=torch.int64, device="meta"))
    cache = draft.add_input(cache_input(branch.slot), core.meta["val"])
    body = [n for n in graph.nodes if n.name in branch.body]
    copies: dict[fx.Node, fx.Node] = {}
    gathered: dict[tuple[fx.Node, int, int], fx.Node] = {}
    with graph.inserting_before(core):
        stream = draft.node(branch.stream)
        copies[stream] = _gather(graph, stream, index, rank=3, axis=1)
        for node in body:
            axis = branch.token_axes[node.name]
            rank = len(value_shape(node) or ())
            operands = dict(copies)
            for other in node.all_input_nodes if op_name(node) in ELEMENTWISE else ():
                if other not in copies and external_axis(other, rank, axis) is not None:
                    place = (other, rank, axis)
                    if place not in gathered:
                        gathered[place] = _gather(graph, other, index, rank, axis)
                    operands[other] = gathered[place]
            copy = _copy(graph, node, operands)
            copy.meta["tokens_of"] = (branch.index, node.name)
            if op_name(node) in RESHAPES:
                shape = list(value_shape(node) or ())
                shape[axis] = -1
                copy.target, copy.args, copy.kwargs = aten.reshape.default, (copy.args[0], shape), {}
            copies[node] = copy
        places = graph.call_function(aten.unsqueeze.default, (index, -1))
        places = graph.call_function(aten.expand.default, (places, [batch, -1, width]))
        updated = graph.call_function(aten.scatter.src, (cache, 1, places, copies[core]))
    updated.meta["val"] = core.meta["val"]
    core.replace_all_uses_with(updated)
    draft.add_result(branch.slot, updated)


def _copy(graph: fx.Graph, node: fx.Node, operands: dict[fx.Node, fx.Node]) -> fx.Node:
    return graph.node_copy(node, lambda n: operands.get(n, n))


def _gather(graph: fx.Graph, value: fx.Node, index: fx.Node, rank: int, axis: int) -> fx.Node:
    """``value``, broadcast to ``rank`` dimensions with the batch first, at the chosen tokens along ``axis``."""
    shape = list(value_shape(value) or ())
    while len(shape) < rank:
        value = graph.call_function(aten.unsqueeze.default, (value, 0))
        shape.insert(0, 1)
    batch = (value_shape(index) or (1,))[0]
    if shape[0] != batch:
        value = graph.call_function(aten.expand.default, (value, [batch, *shape[1:]]))
    places = index
    for place in range(1, rank):
        if place != axis:
            places = graph.call_function(aten.unsqueeze.default, (places, place))
    extent = [batch, *shape[1:]]
    extent[axis] = -1
    places = graph.call_function(aten.expand.default, (places, extent))
    return graph.call_function(aten.gather.default, (value, axis, places))
