"""How far a branch has moved, by how far its input has (relational feature caching, arXiv 2602.19506)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from duca_compile.graph import FORECAST_ORDERS, Action, cache_input
from duca_compile.passes.base import CachingPass, ExactPass, VariantDraft
from duca_compile.passes.forecast import Series
from duca_compile.passes.rows import limited

aten = torch.ops.aten

EPSILON = 1e-6  # the least length that is divided by


@dataclass(frozen=True)
class EmitRelations(ExactPass[VariantDraft]):
    """Returns beside each emitted branch s = ||O - O'|| / ||I - I'||, of shape (rows,).

    O is its output and I its input, O' and I' are those of the last full step; lengths are L2 norms over a row, in
    float32 at least. Where there is no last full step, s is zero.
    """

    requires = frozenset({"differences_emitted"})
    ensures = frozenset({"relations_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        branches = [b for b in draft.branches(Action.COMPUTE) if b.scale_slot not in draft.results]
        if not draft.spec.relational or not draft.spec.emit or not branches:
            return False
        graph = draft.graph
        with graph.inserting_before(graph.output_node()):
            known = graph.call_function(aten.gt.Scalar, (draft.node(FORECAST_ORDERS), 0))
        for branch in branches:
            output, given = draft.node(branch.core), draft.node(branch.input)
            old_output = draft.cache(branch.slot, output.meta["val"])
            old_given = draft.cache(branch.input_slot, given.meta["val"])
            with graph.inserting_before(graph.output_node()):
                lengths = _distance(draft, output, old_output), _distance(draft, given, old_given)
                scale = graph.call_function(aten.where.ScalarOther, (known, ratio(draft, *lengths), 0.0))
            scale.meta["val"] = row_numbers(output)
            draft.add_result(branch.scale_slot, scale)
        return True


@dataclass(frozen=True)
class ForecastFromInputs(CachingPass):
    """A branch's value is O + s ||I_now - I|| D / ||D||, where D is the Taylor series of O's differences, without O.

    I_now is computed from the stream of this step; O, I, s and the differences are the caches.
    """

    def apply(self, draft: VariantDraft) -> bool:
        branches = [b for b in draft.branches(Action.FORECAST) if draft.node(b.core).users]
        if not draft.spec.relational or not branches:
            return False
        graph, series = draft.graph, Series(draft)
        for branch in branches:
            output, given = draft.node(branch.core), draft.node(branch.input)
            like = output.meta["val"]
            start, old_given = draft.cache(branch.slot, like), draft.cache(branch.input_slot, given.meta["val"])
            scale = draft.add_input(cache_input(branch.scale_slot), row_numbers(output))
            with graph.inserting_before(output):
                direction = series.change(branch.slot, like)
                moved = graph.call_function(aten.mul.Tensor, (scale, _distance(draft, given, old_given)))
                factor = ratio(draft, moved, row_norm(draft, direction, like))
            factor = limited(draft, factor, like.dtype)
            with graph.inserting_before(output):
                factor = graph.call_function(aten.reshape.default, (factor, [-1] + [1] * (like.dim() - 1)))
                factor = graph.call_function(aten.to.dtype, (factor, like.dtype))
                total = graph.call_function(aten.addcmul.default, (start, direction, factor))
            total.meta["val"] = like
            output.replace_all_uses_with(total)
        return True


def row_numbers(node: fx.Node) -> Tensor:
    """One number for each row of what ``node`` yields."""
    value = node.meta["val"]
    return value.new_empty(value.shape[:1], dtype=precise(value))  # type: ignore[no-any-return]


def precise(value: Tensor) -> torch.dtype:
    """The type that lengths are computed in."""
    return torch.promote_types(value.dtype, torch.float32)


def ratio(draft: VariantDraft, over: fx.Node, under: fx.Node) -> fx.Node:
    """The quotient of two lengths; finite, whatever they are."""
    least = draft.graph.call_function(aten.clamp_min.default, (under, EPSILON))
    return draft.graph.call_function(aten.div.Tensor, (over, least))


def _distance(draft: VariantDraft, now: fx.Node, before: fx.Node) -> fx.Node:
    change = draft.graph.call_function(aten.sub.Tensor, (now, before))
    return row_norm(draft, change, now.meta["val"])


def row_norm(draft: VariantDraft, node: fx.Node, like: Tensor, power: int = 2) -> fx.Node:
    """The L1 or L2 norm of each row of ``node``, whose values are as ``like``; shape (rows,)."""
    arguments: tuple[Any, ...] = (node, power, list(range(1, like.dim())))
    return draft.graph.call_function(aten.linalg_vector_norm.default, arguments, {"dtype": precise(like)})
