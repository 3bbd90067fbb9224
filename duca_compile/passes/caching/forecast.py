"""Replaces cached values by their forecast from the last full steps (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.variants import Action, ForecastVariant
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.series import SeriesBuilder

aten = torch.ops.aten


@dataclass(frozen=True)
class Forecast(CachingPass):
    """Replaces branch outputs, or the ends of streams if only these are cached, by D_0 plus the sum of all f_i * D_i.

    D_i is the cached difference of order i. The factors f_i are inputs, so no step distance is built into the graph.
    In a Taylor series f_i is x^i / i!, where x is the number of steps since the caches were filled. Where full steps
    keep weighted sums S_m, it is the sum of all a_m * S_m instead, plus f_0 * D_0 + f_1 * D_1 + ... if they keep both.
    """

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if not isinstance(spec, ForecastVariant) or spec.series.of == "inputs":
            return False
        if spec.series.of == "end":
            wanted = dict(draft.facts.ends)
        else:
            wanted = {branch.slot: branch.core for branch in draft.branches(Action.FORECAST)}
        values = {slot: node for slot, name in wanted.items() if (node := draft.node(name)).users}
        if not values:
            return False
        series = SeriesBuilder(draft, spec.series.order)
        for slot, value in values.items():
            like = value.meta["val"]
            start = None if spec.series.sums else draft.input(slot, like)
            with draft.graph.inserting_before(value):
                if start is None:
                    total = series.sum_of_sums(slot, spec.series.sums, like)
                else:
                    total = series.sum_from(start, slot, like)
            total.meta["val"] = like
            value.replace_all_uses_with(total)
        return True
