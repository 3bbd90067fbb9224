"""Holds a forecast to what the last block computes of it, within the forecast's own graph (SpeCa, arXiv 2509.11628)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.analysis.closure import ancestors, descendants
from duca_compile.graph import VERIFY_ERROR, Branch
from duca_compile.passes.base import ExactPass, VariantDraft

aten = torch.ops.aten

_LEAST = 1e-10  # added to what an error is relative to


@dataclass(frozen=True)
class VerifyForecast(ExactPass[VariantDraft]):
    """Returns a float32 error: the last block as forecast, against a copy that is computed.

    The copy reads the stream that the earlier blocks' forecasts lead to, as soon as these take their places. It changes
    nothing else.
    """

    def apply(self, draft: VariantDraft) -> bool:
        verify = draft.spec.verify
        if verify is None or VERIFY_ERROR in draft.results:
            return False
        block = _last_block(draft)
        forecast = draft.node(draft.facts.stream_end if verify.of == "stream" else block[-1].core)
        start = draft.node(block[0].stream)
        region = {start, *descendants(start)} & {forecast, *ancestors(forecast)} - {start}
        output, call = draft.graph.output_node(), draft.graph.call_function
        copies: dict[fx.Node, fx.Node] = {}
        with draft.graph.inserting_before(output):
            for node in [n for n in draft.graph.nodes if n in region]:
                copies[node] = draft.graph.node_copy(node, lambda n: copies.get(n, n))
                copies[node].meta["copy_of"] = node.name
            pair = [call(aten.to.dtype, (value, torch.float32)) for value in (forecast, copies[forecast])]
            whole = verify.metric == "relative_l1"
            error = (_relative_l1 if whole else _norm_ratio)(draft, *pair)
        like = forecast.meta["val"]
        error.meta["val"] = like.new_empty(1 if whole else like.shape[0], dtype=torch.float32)
        draft.add_result(VERIFY_ERROR, error)
        return True


def _last_block(draft: VariantDraft) -> list[Branch]:
    """The branches of the last block of the stream that leads to the output."""
    last = draft.facts.branches[-1]
    return [b for b in draft.facts.branches if (b.chain, b.block) == (last.chain, last.block)]


def _relative_l1(draft: VariantDraft, forecast: fx.Node, computed: fx.Node) -> fx.Node:
    """One value, (1,): the mean of |difference| / |computed| over every element, as released."""
    call = draft.graph.call_function
    difference = call(aten.abs.default, (call(aten.sub.Tensor, (forecast, computed)),))
    size = call(aten.add.Tensor, (call(aten.abs.default, (computed,)), _LEAST))
    mean = call(aten.mean.default, (call(aten.div.Tensor, (difference, size)),))
    return call(aten.reshape.default, (mean, [1]))


def _norm_ratio(draft: VariantDraft, forecast: fx.Node, computed: fx.Node) -> fx.Node:
    """One value for each row: the norm of the difference over the norm of what was computed."""
    call = draft.graph.call_function
    flat = [
        call(aten.flatten.using_ints, (node, 1)) for node in (call(aten.sub.Tensor, (forecast, computed)), computed)
    ]
    difference, size = (call(aten.linalg_vector_norm.default, (node, 2, [1])) for node in flat)
    return call(aten.div.Tensor, (difference, call(aten.add.Tensor, (size, _LEAST))))
