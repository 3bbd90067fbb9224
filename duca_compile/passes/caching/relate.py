"""Forecasts branch outputs, scaled by how far each branch's input has moved (RFC, arXiv 2602.19506)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.variants import Action, ForecastVariant
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.numbers import clamped, distance, ratio, row_norm, row_numbers
from duca_compile.passes.series import SeriesBuilder

aten = torch.ops.aten


@dataclass(frozen=True)
class ForecastFromInputs(CachingPass):
    """Replaces a branch's output by O + s ||I_now - I|| D / ||D||, where D is the Taylor series of O without O itself.

    I_now is computed from the stream of this step; O, I, s and the differences are caches.
    """

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if not isinstance(spec, ForecastVariant) or spec.series.of != "inputs":
            return False
        branches = [b for b in draft.branches(Action.FORECAST) if draft.node(b.core).users]
        graph, series = draft.graph, SeriesBuilder(draft, spec.series.order)
        for branch in branches:
            output, branch_input = draft.node(branch.core), draft.node(branch.input)
            like = output.meta["val"]
            start, cached_input = (
                draft.input(branch.slot, like),
                draft.input(branch.input_slot, branch_input.meta["val"]),
            )
            scale = draft.input(branch.scale_slot, row_numbers(output))
            with graph.inserting_before(output):
                direction = series.change(branch.slot, like)
                moved = graph.call_function(aten.mul.Tensor, (scale, distance(draft, branch_input, cached_input)))
                factor = ratio(draft, moved, row_norm(draft, direction, like))
            factor = clamped(draft, factor, like.dtype)
            with graph.inserting_before(output):
                factor = graph.call_function(aten.reshape.default, (factor, [-1] + [1] * (like.dim() - 1)))
                factor = graph.call_function(aten.to.dtype, (factor, like.dtype))
                total = graph.call_function(aten.addcmul.default, (start, direction, factor))
            total.meta["val"] = like
            output.replace_all_uses_with(total)
        return bool(branches)
