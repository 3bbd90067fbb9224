"""Makes full steps return how far each branch has moved relative to its input (RFC, arXiv 2602.19506)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.ports import FORECAST_ORDERS
from duca_compile.core.variants import Action, FullVariant, Series
from duca_compile.passes.base import ExactPass, VariantDraft
from duca_compile.passes.numbers import distance, number_input, ratio, row_numbers

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitRelations(ExactPass[VariantDraft]):
    """Returns s = ||O - O'|| / ||I - I'||, of shape (rows,), alongside each emitted branch.

    O and I are its output and input, O' and I' those of the last full step. Lengths are L2 norms over a batch row, in
    float32 or wider. If there was no earlier full step, s is zero.
    """

    requires = frozenset({"differences_emitted"})
    ensures = frozenset({"relations_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if not isinstance(spec, FullVariant) or not isinstance(spec.keeps, Series) or spec.keeps.of != "inputs":
            return False
        branches = [b for b in draft.branches(Action.COMPUTE) if b.scale_slot not in draft.results]
        if not branches:
            return False
        graph = draft.graph
        with graph.inserting_before(graph.output_node()):
            orders = number_input(draft, FORECAST_ORDERS, draft.node(branches[0].core).meta["val"])
            known = graph.call_function(aten.gt.Scalar, (orders, 0))
        for branch in branches:
            output, branch_input = draft.node(branch.core), draft.node(branch.input)
            cached_output = draft.input(branch.slot, output.meta["val"])
            cached_input = draft.input(branch.input_slot, branch_input.meta["val"])
            with graph.inserting_before(graph.output_node()):
                lengths = distance(draft, output, cached_output), distance(draft, branch_input, cached_input)
                scale = graph.call_function(aten.where.ScalarOther, (known, ratio(draft, *lengths), 0.0))
            scale.meta["val"] = row_numbers(output)
            draft.add_result(branch.scale_slot, scale)
        return True
