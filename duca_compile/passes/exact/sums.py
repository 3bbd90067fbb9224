"""Makes full steps return weighted sums of the stream's end over all full steps (Spectrum, arXiv 2603.01623)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.ports import SUMMED, Port, PortKind
from duca_compile.core.variants import FullVariant, Series
from duca_compile.passes.base import ExactPass, VariantDraft, check_one_end
from duca_compile.passes.numbers import broadcast, number_input, precise, widened

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitSums(ExactPass[VariantDraft]):
    """Returns S_m = S_m of the last full step + w_m * h, in float32 or wider, where h is the end of the stream.

    The weights w_m are inputs. If there was no earlier full step, the old sums count as zero, whatever they are.
    """

    ensures = frozenset({"sums_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if not isinstance(spec, FullVariant) or not isinstance(spec.keeps, Series):
            return False
        sums = [port for i in range(spec.keeps.sums) if (port := Port(PortKind.SUM, i)) not in draft.results]
        if not sums:
            return False
        check_one_end(draft.facts, "Spectrum sums up", ", such as HiCache(lite=True)")
        end, call = draft.node(draft.facts.stream_end), draft.graph.call_function
        like = end.meta["val"].to(precise(end.meta["val"]))
        summed = broadcast(draft, number_input(draft, SUMMED, like), like)
        with draft.graph.inserting_before(draft.graph.output_node()):
            known, wide = call(aten.gt.Scalar, (summed, 0)), widened(draft, end)
        for port in sums:
            old = draft.input(port, like)
            weight = broadcast(draft, number_input(draft, Port(PortKind.SUM_WEIGHT, port.of), like), like)
            with draft.graph.inserting_before(draft.graph.output_node()):
                kept = call(aten.where.ScalarOther, (known, old, 0.0))
                total = call(aten.addcmul.default, (kept, wide, weight))
            total.meta["val"] = like
            draft.add_result(port, total)
        return True
