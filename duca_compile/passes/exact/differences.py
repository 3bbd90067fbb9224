"""Makes full steps return the differences that forecasts are computed from (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.core.ports import FORECAST_GAP, FORECAST_ORDERS
from duca_compile.core.variants import Action, FullVariant, Series
from duca_compile.passes.base import ExactPass, VariantDraft, returned
from duca_compile.passes.filters import high_passed
from duca_compile.passes.numbers import broadcast, number_input

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitDifferences(ExactPass[VariantDraft]):
    """Returns D_1 to D_m alongside each emitted cache D_0: D_{i+1} = (D_i - D_i of the last full step) / gap.

    All orders are divided by the gap between these two steps, as published, even if earlier gaps differ. Orders that
    need more full steps than there have been are zero, whatever the old values are, so one variant serves every full
    step. The end's first difference may go through a filter; higher orders follow from it, so they do too. Of the
    emitted branch inputs only the first has differences, and only if a probe forecasts it.
    """

    requires = frozenset({"caches_emitted"})
    ensures = frozenset({"differences_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if not isinstance(spec, FullVariant) or not isinstance(spec.keeps, Series):
            return False
        order = spec.keeps.order
        kept = {*draft.facts.ends, *(b.slot for b in draft.branches(Action.COMPUTE))}
        if spec.after is not None and spec.after.of == "forecast":
            kept.add(draft.facts.first.input_slot)
        slots = [port for port in draft.results if port in kept and port.difference(order) not in draft.results]
        if not slots:
            return False
        emitted = dict(zip(draft.results, returned(draft.graph), strict=True))
        known: dict[tuple[torch.dtype, int], tuple[fx.Node, list[fx.Node]]] = {}  # by dtype and number of dimensions
        for slot in slots:
            now, like = emitted[slot], emitted[slot].meta["val"]
            kind = like.dtype, like.dim()
            if kind not in known:
                known[kind] = _gap_and_allowed(draft, order, like)
            gap, allowed = known[kind]
            for i in range(order):
                old = draft.input(slot.difference(i), like)
                with draft.graph.inserting_before(draft.graph.output_node()):
                    change = draft.graph.call_function(aten.sub.Tensor, (now, old))
                    slope = draft.graph.call_function(aten.div.Tensor, (change, gap))
                    if i == 0 and spec.keeps.high_pass is not None:
                        slope.meta["val"] = like
                        slope = high_passed(draft, slope, spec.keeps.high_pass)
                    now = draft.graph.call_function(aten.where.ScalarOther, (allowed[i], slope, 0.0))
                now.meta["val"] = like
                draft.add_result(slot.difference(i + 1), now)
        return True


def _gap_and_allowed(draft: VariantDraft, order: int, like: torch.Tensor) -> tuple[fx.Node, list[fx.Node]]:
    """The gap, and for each order whether there were enough full steps; both combine with values such as ``like``."""
    gap, orders = (broadcast(draft, number_input(draft, port, like), like) for port in (FORECAST_GAP, FORECAST_ORDERS))
    with draft.graph.inserting_before(draft.graph.output_node()):
        return gap, [draft.graph.call_function(aten.gt.Scalar, (orders, i)) for i in range(order)]
