"""Makes the variant that measures the start of the model before a step is decided (TeaCache, FirstBlockCache)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.core.fx_utils import op_name
from duca_compile.core.ir import Branch, Role
from duca_compile.core.ports import PROBE_CHANGE, PROBE_SEEN, PROBE_STREAM, RATE
from duca_compile.core.steps import Probe
from duca_compile.core.variants import ProbeVariant
from duca_compile.errors import PolicyError
from duca_compile.frontend.operators import carried_value
from duca_compile.passes.base import ExactPass, VariantDraft
from duca_compile.passes.filters import noise_filtered
from duca_compile.passes.numbers import ratio, row_norm, row_numbers
from duca_compile.passes.series import SeriesBuilder

aten = torch.ops.aten

# The products that a branch may begin with, after its norm and modulation.
_FIRST_PRODUCTS = {
    "addmm",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "einsum",
    "linear",
    "matmul",
    "mm",
    "scaled_dot_product_attention",
}


@dataclass(frozen=True)
class EmitProbe(ExactPass[VariantDraft]):
    """Returns how much the probed value has changed, this value, and the stream after the probe, but no model output.

    The change is the mean of |now - before| over the mean of |before|, for each batch row; both are summed in float32.
    """

    def apply(self, draft: VariantDraft) -> bool:
        if not isinstance(draft.spec, ProbeVariant) or PROBE_CHANGE in draft.results:
            return False
        probe = draft.spec.probe
        if probe.of == "forecast":
            return self._against_forecast(draft, draft.spec.order)
        if probe.of == "latent":
            return self._latent(draft)
        stream = carried_value(probed_stream(draft, probe)[1])
        seen = _modulated(draft) if probe.of == "modulated" else None
        call, output = draft.graph.call_function, draft.graph.output_node()
        if seen is not None and probe.filter is not None:
            with draft.graph.inserting_before(output):
                seen = noise_filtered(draft, seen, probe.filter)
        like = stream.meta["val"] if seen is None else seen.meta["val"]
        before = draft.input(PROBE_SEEN, like)
        with draft.graph.inserting_before(output):
            if seen is None:
                seen = call(aten.sub.Tensor, (stream, carried_value(draft.node(_first_branches(draft)[0].stream))))
                seen.meta["val"] = like
            moved = row_norm(draft, call(aten.sub.Tensor, (seen, before)), like, 1)
            change = call(aten.div.Tensor, (moved, row_norm(draft, before, like, 1)))
        change.meta["val"] = row_numbers(seen)
        output.args = ((change, seen, stream),)
        draft.results[:] = [PROBE_CHANGE, PROBE_SEEN, PROBE_STREAM]
        return True

    def _latent(self, draft: VariantDraft) -> bool:
        """The change is |x - x'| r for each batch row: x is the latent, x' that of the last step, r a cached rate."""
        latent, call = draft.node(draft.facts.latent), draft.graph.call_function
        like = latent.meta["val"]
        before, rate = draft.input(PROBE_SEEN, like), draft.input(RATE, row_numbers(latent))
        with draft.graph.inserting_before(draft.graph.output_node()):
            moved = row_norm(draft, call(aten.sub.Tensor, (latent, before)), like, 1)
            change, seen = call(aten.mul.Tensor, (moved, rate)), call(aten.clone.default, (latent,))
        change.meta["val"], seen.meta["val"] = row_numbers(latent), like
        draft.graph.output_node().args = ((change, seen),)
        draft.results[:] = [PROBE_CHANGE, PROBE_SEEN]
        return True

    def _against_forecast(self, draft: VariantDraft, order: int) -> bool:
        """The change is ||I - F||_1 / ||I||_1 for each batch row: I is the first branch's input, and F its forecast."""
        branch, graph = draft.facts.first, draft.graph
        branch_input = draft.node(branch.input)
        like = branch_input.meta["val"]
        start = draft.input(branch.input_slot, like)
        with graph.inserting_before(graph.output_node()):
            expected = SeriesBuilder(draft, order).sum_from(start, branch.input_slot, like)
            error = row_norm(draft, graph.call_function(aten.sub.Tensor, (branch_input, expected)), like, 1)
            change = ratio(draft, error, row_norm(draft, branch_input, like, 1))
        change.meta["val"] = row_numbers(branch_input)
        graph.output_node().args = ((change, carried_value(draft.node(branch.stream))),)
        draft.results[:] = [PROBE_CHANGE, PROBE_STREAM]
        return True


def probed_stream(draft: VariantDraft, probe: Probe) -> tuple[int, fx.Node]:
    """The number of the probed stream, and its value where the probe ends: at its start, or after the first block."""
    if probe.of == "forecast":
        return draft.facts.first.chain, draft.node(draft.facts.first.stream)
    branches = _first_branches(draft)
    name = branches[0].stream if probe.of == "modulated" else branches[-1].add
    return branches[0].chain, draft.node(name)


def _first_branches(draft: VariantDraft) -> list[Branch]:
    """The branches of the first block of the main stream."""
    main = [b for b in draft.facts.branches if b.role is Role.MAIN]
    return [b for b in main if (b.chain, b.block) == (main[0].chain, main[0].block)]


def _modulated(draft: VariantDraft) -> fx.Node:
    """The value that the first matrix product of the first branch reads: the stream after norm and modulation."""
    branch = _first_branches(draft)[0]
    stream = draft.node(branch.stream)
    for node in draft.graph.nodes:
        if node.name in branch.body and op_name(node) in _FIRST_PRODUCTS:
            operands: list[fx.Node] = [n for n in node.all_input_nodes if n is stream or n.name in branch.body]
            return operands[0]
    raise PolicyError(
        f"probe='modulated' needs a matrix product in {branch.path or 'the first branch'} at {branch.source} and finds "
        "none that it knows; use probe='first_block'"
    )
