"""Replaces cached values by their Taylor forecast from the last full steps (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import torch

from duca_compile.errors import InternalError
from duca_compile.graph import FORECAST_DISTANCE, STREAM_END, Action, cache_input, difference_slot
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.rows import beside, number_input

aten = torch.ops.aten


@dataclass(frozen=True)
class Forecast(CachingPass):
    """A branch's output, or in a skip variant the end of the stream, is the sum of D_i * x^i / i! over all orders i.

    D_i are the caches, and x, the steps since they were made, is an input: no distance is built into the graph.
    """

    def apply(self, draft: VariantDraft) -> bool:
        branches = draft.branches(Action.FORECAST)
        wanted = {branch.slot: branch.core for branch in branches}
        if branches and draft.spec.skip:
            wanted = {STREAM_END: draft.facts.stream_end}
        values = {slot: node for slot, name in wanted.items() if (node := draft.node(name)).users}
        if not values:
            return False
        if draft.spec.order is None:
            raise InternalError("a forecast needs to know its order")
        graph, orders = draft.graph, range(1, draft.spec.order + 1)
        powers = []
        if orders:
            powers = [number_input(draft, FORECAST_DISTANCE, next(iter(values.values())).meta["val"])]
        for slot, value in values.items():
            like = value.meta["val"]
            total = draft.add_input(cache_input(slot), like)
            differences = [draft.add_input(cache_input(difference_slot(slot, i)), like) for i in orders]
            while 0 < len(powers) < len(orders):
                with draft.behind(powers[-1]):
                    powers.append(graph.call_function(aten.mul.Tensor, (powers[-1], powers[0])))
            own = [beside(draft, power, like) for power in powers]
            with graph.inserting_before(value):
                for i, difference, power in zip(orders, differences, own, strict=True):
                    terms = (total, difference, power)
                    total = graph.call_function(aten.addcmul.default, terms, {"value": 1 / factorial(i)})
            total.meta["val"] = like
            value.replace_all_uses_with(total)
        return True
