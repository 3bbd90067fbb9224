"""Makes full steps return what the model was given and what it yields (EasyCache, arXiv 2507.02860)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.core.ports import LATENT, RATE, RESULT, PortKind
from duca_compile.core.variants import Boundary, FullVariant
from duca_compile.errors import PolicyError
from duca_compile.passes.base import ExactPass, VariantDraft, returned
from duca_compile.passes.numbers import ratio, row_norm, row_numbers

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitBoundary(ExactPass[VariantDraft]):
    """Returns a copy of the latent x and the output v, and (|v - v'| / |x - x'|) / |v| for each batch row.

    v' and x' are those of the last full step, and |.| is the sum of absolute values, in float32 or wider.
    """

    ensures = frozenset({"boundary_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        if not isinstance(draft.spec, FullVariant) or draft.spec.keeps != Boundary() or RATE in draft.results:
            return False
        latent, output = latent_and_output(draft)
        call = draft.graph.call_function
        old_latent, old_output = (
            draft.input(port, node.meta["val"]) for port, node in ((LATENT, latent), (RESULT, output))
        )
        with draft.graph.inserting_before(draft.graph.output_node()):
            copies = [call(aten.clone.default, (node,)) for node in (latent, output)]
            moved = [
                row_norm(draft, call(aten.sub.Tensor, (now, old)), now.meta["val"], 1)
                for now, old in ((output, old_output), (latent, old_latent))
            ]
            rate = ratio(draft, ratio(draft, *moved), row_norm(draft, output, output.meta["val"], 1))
        rate.meta["val"] = row_numbers(output)
        for port, node, source in zip((LATENT, RESULT), copies, (latent, output), strict=True):
            node.meta["val"] = source.meta["val"]
            draft.add_result(port, node)
        draft.add_result(RATE, rate)
        return True


def latent_and_output(draft: VariantDraft) -> tuple[fx.Node, fx.Node]:
    """The latent and the model's output.

    Raises:
        PolicyError: there are several outputs, or the output has another shape or type than the latent.
    """
    latent = draft.node(draft.facts.latent)
    outputs = [
        node for port, node in zip(draft.results, returned(draft.graph), strict=True) if port.kind is PortKind.OUTPUT
    ]
    x, y = latent.meta["val"], outputs[0].meta["val"]
    if len(outputs) > 1 or (x.shape, x.dtype) != (y.shape, y.dtype):
        found = [f"{tuple(node.meta['val'].shape)} {node.meta['val'].dtype}" for node in outputs]
        raise PolicyError(
            "EasyCache adds a change to the latent, so the model must return one tensor of the latent's shape and "
            f"type, {tuple(x.shape)} {x.dtype}; it returns {', '.join(found)}. ResidualGate and SeaCache work within "
            "the model"
        )
    return latent, outputs[0]
