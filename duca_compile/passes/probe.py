"""Makes a variant that computes nothing but how far the latent has moved from what was expected."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.graph import PROBE_ERROR
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.forecast import Series
from duca_compile.passes.relate import ratio, row_norm

aten = torch.ops.aten


@dataclass(frozen=True)
class ProbeInput(CachingPass):
    """Returns ||I - F||_1 / ||I||_1 and nothing else, where I is what the first branch reads and F is its forecast.

    One number for each row, shape (rows,), in float32 at least (relational cache scheduling, arXiv 2602.19506).
    """

    def apply(self, draft: VariantDraft) -> bool:
        if not draft.spec.probe:
            return False
        graph, branch = draft.graph, draft.facts.first
        given = draft.node(branch.input)
        like = given.meta["val"]
        start = draft.cache(branch.input_slot, like)
        with graph.inserting_before(graph.output_node()):
            expected = Series(draft).behind(start, branch.input_slot, like)
            error = row_norm(draft, graph.call_function(aten.sub.Tensor, (given, expected)), like, 1)
            relative = ratio(draft, error, row_norm(draft, given, like, 1))
        graph.output_node().args = ((relative,),)
        draft.results[:] = [PROBE_ERROR]
        return True
