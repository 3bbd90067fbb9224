"""Recomputes chosen tokens of pointwise branches and writes them into the cache (ToCa, arXiv 2410.05317, Alg. 1)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.analysis.tokens import ELEMENTWISE, EXPANDS, RESHAPES, cuts_tokens, joins_tokens, per_token_operands
from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import Branch, TokenPlace
from duca_compile.core.ports import Port
from duca_compile.core.variants import Action
from duca_compile.errors import InternalError
from duca_compile.passes.base import CachingPass, VariantDraft

aten = torch.ops.aten


@dataclass(frozen=True)
class RecomputeTokens(CachingPass):
    """Gathers the chosen tokens of the stream, runs each partial branch on them, and writes them into its cache.

    The cache is updated in place, since nothing else reads it; it replaces the branch's output and is returned. The
    number of tokens stays dynamic. Branches share an index input or have one each, as the spec says. If they share it,
    the stream between them is computed at the chosen tokens only, and at all tokens just once, at its end.
    """

    def apply(self, draft: VariantDraft) -> bool:
        partial = [b for b in draft.branches(Action.PARTIAL) if draft.node(b.core).users]
        readers = Counter(draft.spec.tokens_input(b.index) for b in partial)
        cores = frozenset(draft.node(b.core) for b in draft.facts.branches)
        gathers: dict[Port, _Gather] = {}
        for branch in partial:
            tokens = draft.spec.tokens_input(branch.index)
            if tokens not in gathers:
                value = draft.node(branch.core).meta["val"].new_empty(branch.shape[:2], dtype=torch.int64)
                gathers[tokens] = _Gather(draft.graph, draft.input(tokens, value), readers[tokens] > 1, cores)
            _recompute(draft, branch, gathers[tokens])
        return bool(partial)


def _recompute(draft: VariantDraft, branch: Branch, gather: _Gather) -> None:
    places = branch.token_places
    if places is None:
        raise InternalError(f"branch {branch.index} ({branch.path}) is not pointwise along its tokens")
    graph, core = draft.graph, draft.node(branch.core)
    cache = draft.input(branch.slot, core.meta["val"])
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(core):
        stream = draft.node(branch.stream)
        copies[stream] = gather(stream, 3, places[stream.name])
        for node in [n for n in graph.nodes if n.name in branch.body]:
            place = places[node.name]
            if joins_tokens(node, places) or cuts_tokens(node, places):
                # The chosen tokens are neither joined with others nor cut out of them: they are passed on unchanged.
                copies[node] = next(copies[n] for n in node.all_input_nodes if n in copies)
                continue
            operands = dict(copies)
            for other in per_token_operands(node, places):
                like = node if op_name(node) in ELEMENTWISE else next(n for n in node.all_input_nodes if n in copies)
                operands[other] = gather(other, len(value_shape(like) or ()), places[like.name])
            copy = graph.node_copy(node, lambda n, operands=operands: operands.get(n, n))  # type: ignore[misc]
            copy.meta["tokens_of"] = (branch.index, node.name)
            if op_name(node) in RESHAPES | EXPANDS:
                shape = list(value_shape(node) or ())
                shape[place.axis] = -1
                copy.target = aten.reshape.default if op_name(node) in RESHAPES else aten.expand.default
                copy.args, copy.kwargs = (copy.args[0], shape), {}
            copies[node] = copy
        updated = gather.write(cache, copies[core])
    updated.meta["val"] = core.meta["val"]
    core.replace_all_uses_with(updated)
    draft.add_result(branch.slot, updated)


class _Gather:
    """Gathers the chosen tokens of values. Each value is gathered, and each offset added to the indices, only once.

    ``early``: gather the operands of elementwise operators rather than their results, except for ``cores``, which
    caches replace.
    """

    def __init__(self, graph: fx.Graph, index: fx.Node, early: bool, cores: frozenset[fx.Node]) -> None:
        self._graph, self._index, self._early, self._cores = graph, index, early, cores
        self._batch = (value_shape(index) or (1,))[0]
        self._batch_rows: fx.Node | None = None
        self._shifted: dict[int, fx.Node] = {0: index}
        self._gathered: dict[tuple[fx.Node, int, TokenPlace], fx.Node] = {}
        self._written: dict[fx.Node, fx.Node] = {}

    def __call__(self, value: fx.Node, rank: int, place: TokenPlace) -> fx.Node:
        """The chosen tokens, at ``place``, of ``value`` broadcast to ``rank`` dimensions with the batch first."""
        key = (value, rank, place)
        if key not in self._gathered:
            self._gathered[key] = self._build(value, rank, place)
        return self._gathered[key]

    def write(self, cache: fx.Node, tokens: fx.Node) -> fx.Node:
        """Writes the chosen tokens into ``cache`` (batch, tokens, channels) in place, and returns it updated."""
        graph = self._graph
        if self._batch_rows is None:
            rows = graph.call_function(aten.arange.default, (self._batch,), {"device": cache.meta["val"].device})
            self._batch_rows = graph.call_function(aten.unsqueeze.default, (rows, 1))
        updated = graph.call_function(aten.index_put_.default, (cache, [self._batch_rows, self._index], tokens))
        self._written[updated] = tokens
        return updated

    def _build(self, value: fx.Node, rank: int, place: TokenPlace) -> fx.Node:
        if not self._early or len(value_shape(value) or ()) != rank:
            return self._gather(value, rank, place)
        if value in self._written and place[:2] == (1, 0):
            return self._written[value]
        if value in self._cores or op_name(value) not in ELEMENTWISE or not _has_tokens(value, rank, place):
            return self._gather(value, rank, place)
        operands = {n: self(n, rank, place) for n in value.all_input_nodes if _has_tokens(n, rank, place)}
        copy = self._graph.node_copy(value, lambda n: operands.get(n, n))
        copy.meta["some_of"] = value.name
        return copy

    def _gather(self, value: fx.Node, rank: int, place: TokenPlace) -> fx.Node:
        graph, shape = self._graph, list(value_shape(value) or ())
        while len(shape) < rank:
            value = graph.call_function(aten.unsqueeze.default, (value, 0))
            shape.insert(0, 1)
        extent = [self._batch, *shape[1:]]
        if shape[0] != self._batch:
            value = graph.call_function(aten.expand.default, (value, extent))
        index = self._shifted_index(place.start)
        for dim in range(1, rank):
            if dim != place.axis:
                index = graph.call_function(aten.unsqueeze.default, (index, dim))
        extent[place.axis] = -1
        index = graph.call_function(aten.expand.default, (index, extent))
        return graph.call_function(aten.gather.default, (value, place.axis, index))

    def _shifted_index(self, start: int) -> fx.Node:
        if start not in self._shifted:
            self._shifted[start] = self._graph.call_function(aten.add.Tensor, (self._index, start))
        return self._shifted[start]


def _has_tokens(operand: fx.Node, rank: int, place: TokenPlace) -> bool:
    """Whether this operand of an elementwise operator, whose result has ``rank`` dimensions, has the token axis.

    An operand without it is broadcast along the tokens.
    """
    shape = value_shape(operand) or ()
    axis = place.axis - (rank - len(shape))  # operands broadcast from the right
    return axis >= 0 and shape[axis] == place.length
