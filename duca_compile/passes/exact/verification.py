"""Compares a forecast with what its last block computes, within the forecast's own graph (SpeCa, arXiv 2509.11628)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.analysis.closure import ancestors, descendants
from duca_compile.core.ir import Branch
from duca_compile.core.ports import VERIFY_ERROR
from duca_compile.core.variants import ForecastVariant
from duca_compile.passes.base import ExactPass, VariantDraft
from duca_compile.passes.numbers import precise, row_norm

aten = torch.ops.aten

_LEAST = 1e-10  # added to divisors


@dataclass(frozen=True)
class VerifyForecast(ExactPass[VariantDraft]):
    """Returns the error of the last block's forecast against a computed copy of that block, in float32 or wider.

    The copy reads the stream that results from the forecasts of the earlier blocks, once later passes have put these in
    place. The other results do not change.
    """

    def apply(self, draft: VariantDraft) -> bool:
        verify = draft.spec.verify if isinstance(draft.spec, ForecastVariant) else None
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
            whole, like = verify.metric == "relative_l1", forecast.meta["val"]
            change = call(aten.sub.Tensor, (forecast, copies[forecast]))
            error = (_relative_l1 if whole else _norm_ratio)(draft, change, copies[forecast], like)
        error.meta["val"] = like.new_empty(1 if whole else like.shape[0], dtype=precise(like))
        draft.add_result(VERIFY_ERROR, error)
        return True


def _last_block(draft: VariantDraft) -> list[Branch]:
    """The branches of the last block of the stream that leads to the output."""
    last = draft.facts.branches[-1]
    return [b for b in draft.facts.branches if (b.chain, b.block) == (last.chain, last.block)]


def _relative_l1(draft: VariantDraft, change: fx.Node, computed: fx.Node, like: torch.Tensor) -> fx.Node:
    """One value, (1,): the mean of |change| / |computed| over every element, as in the released code.

    The divisor is widened: in a narrow dtype ``_LEAST`` would round to zero and quotients would overflow.
    """
    call = draft.graph.call_function
    wide = call(aten.to.dtype, (call(aten.abs.default, (computed,)), precise(like)))
    quotient = call(aten.div.Tensor, (call(aten.abs.default, (change,)), call(aten.add.Tensor, (wide, _LEAST))))
    return call(aten.reshape.default, (call(aten.mean.default, (quotient,)), [1]))


def _norm_ratio(draft: VariantDraft, change: fx.Node, computed: fx.Node, like: torch.Tensor) -> fx.Node:
    """One value for each batch row: the norm of the change over the norm of what was computed."""
    call = draft.graph.call_function
    difference, size = (row_norm(draft, node, like) for node in (change, computed))
    return call(aten.div.Tensor, (difference, call(aten.add.Tensor, (size, _LEAST))))
