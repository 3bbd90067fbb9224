"""Replaces cached values by their Taylor forecast from the last full steps (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.ports import STREAM_END
from duca_compile.core.variants import Action
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.series import Series

aten = torch.ops.aten


@dataclass(frozen=True)
class Forecast(CachingPass):
    """A branch's output, or in a skip variant the end of the stream, is D_0 and the sum of f_i * D_i over all orders i.

    D_i are the caches, and f_i are inputs: no distance is built into the graph. In a Taylor series f_i is x^i / i!,
    where x is the steps since the caches were made.
    """

    def apply(self, draft: VariantDraft) -> bool:
        branches = draft.branches(Action.FORECAST)
        if draft.spec.relational:
            return False
        wanted = {branch.slot: branch.core for branch in branches}
        if branches and draft.spec.skip:
            wanted = {STREAM_END: draft.facts.stream_end}
        values = {slot: node for slot, name in wanted.items() if (node := draft.node(name)).users}
        if not values:
            return False
        series = Series(draft)
        for slot, value in values.items():
            like = value.meta["val"]
            start = draft.input(slot, like)
            with draft.graph.inserting_before(value):
                total = series.behind(start, slot, like)
            total.meta["val"] = like
            value.replace_all_uses_with(total)
        return True
