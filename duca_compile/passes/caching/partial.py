"""Recomputes chosen tokens of pointwise branches and writes them into the cache (ToCa, arXiv 2410.05317, Alg. 1)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.analysis.tokens import EXPANDS, RESHAPES, cuts_tokens, joins_tokens, per_token_operands
from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import Branch, TokenLayout
from duca_compile.core.ports import Port
from duca_compile.core.variants import Action
from duca_compile.errors import InternalError
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.caching.gather import Gather, TokenIndex

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
        indices: dict[Port, TokenIndex] = {}
        gathers: dict[tuple[Port, TokenLayout], Gather] = {}
        for branch in partial:
            tokens = draft.spec.tokens_input(branch.index)
            if tokens not in indices:
                value = draft.node(branch.core).meta["val"].new_empty((branch.rows, branch.tokens), dtype=torch.int64)
                indices[tokens] = TokenIndex(draft.graph, draft.input(tokens, value))
            if (tokens, branch.layout) not in gathers:
                gather = Gather(draft.graph, indices[tokens], branch.layout, readers[tokens] > 1, cores)
                gathers[tokens, branch.layout] = gather
            _recompute(draft, branch, gathers[tokens, branch.layout])
        return bool(partial)


def _recompute(draft: VariantDraft, branch: Branch, gather: Gather) -> None:
    places = branch.token_places
    if places is None:
        raise InternalError(f"branch {branch.index} ({branch.path}) is not pointwise along its tokens")
    graph, core = draft.graph, draft.node(branch.core)
    cache = draft.input(branch.slot, core.meta["val"])
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(core):
        stream = draft.node(branch.stream)
        copies[stream] = gather(stream, places[stream.name])
        for node in [n for n in graph.nodes if n.name in branch.body]:
            if joins_tokens(node, places) or cuts_tokens(node, places):
                # The chosen tokens are neither joined with others nor cut out of them: they are passed on unchanged.
                copies[node] = next(copies[n] for n in node.all_input_nodes if n in copies)
                continue
            others = per_token_operands(node, places)
            operands = {**copies, **{other: gather(other, place) for other, place in others.items()}}
            copy = graph.node_copy(node, lambda n, operands=operands: operands.get(n, n))  # type: ignore[misc]
            copy.meta["tokens_of"] = (branch.index, node.name)
            if op_name(node) in RESHAPES | EXPANDS:
                shape = gather.chosen_shape(value_shape(node) or (), places[node.name])
                copy.target = aten.reshape.default if op_name(node) in RESHAPES else aten.expand.default
                copy.args, copy.kwargs = (copy.args[0], shape), {}
            copies[node] = copy
        updated = gather.write(cache, copies[core], places[core.name])
    updated.meta["val"] = core.meta["val"]
    core.replace_all_uses_with(updated)
    draft.add_result(branch.slot, updated)
