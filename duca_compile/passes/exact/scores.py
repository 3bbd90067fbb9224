"""Makes computed attentions return one score per token, for the selection of tokens to recompute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from duca_compile.analysis.tokens import key_offset
from duca_compile.core.fx_utils import node_operand, value_shape
from duca_compile.core.ir import Branch
from duca_compile.core.variants import Action, ForecastVariant, PredictVariant, ProbeVariant, Scores
from duca_compile.errors import InternalError
from duca_compile.frontend.operators import argument
from duca_compile.passes.base import ExactPass, VariantDraft
from duca_compile.passes.numbers import precise

aten = torch.ops.aten

_LEAST = 1e-7  # added to a weight before taking its logarithm, as in the released code


@dataclass(frozen=True)
class EmitScores(ExactPass[VariantDraft]):
    """Returns a (batch, tokens) float32 tensor for each computed attention whose scores tokens are chosen by.

    ``v_norm``: sum over heads of 1 - ||v||2, so the smallest value vectors score highest (DuCa, arXiv 2412.18911,
    the released code's sign). ``attention``: attention received, summed over queries, mean over heads (ToCa's s1).
    ``entropy``: 1 + the entropy over the keys of a cross-attention's map, mean over heads (ToCa's s2). If they
    are paired, maps and norms are averaged over both halves of the batch. From the norms or the softmax on, everything
    is computed in float32 or wider.
    """

    ensures = frozenset({"scores_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if isinstance(spec, ForecastVariant | PredictVariant | ProbeVariant) or spec.scores is None:
            return False
        scores = spec.scores
        chosen = [b for b in draft.facts.branches if b.pointwise]
        wanted = {s.index for b in chosen if (s := draft.facts.score_source(b, scores.kind))}
        scored = [b for b in draft.branches(Action.COMPUTE) if b.index in wanted and b.score_slot not in draft.results]
        for branch in scored:
            with draft.graph.inserting_before(draft.graph.output_node()):
                score = _score(draft, branch, scores)
                if branch.dtype is torch.float64:
                    score = _call(draft, aten.to.dtype, score, torch.float32)
            score.meta["val"] = (
                draft.node(branch.core).meta["val"].new_empty((branch.rows, branch.tokens), dtype=torch.float32)
            )
            draft.add_result(branch.score_slot, score)
        return bool(scored)


def _score(draft: VariantDraft, branch: Branch, scores: Scores) -> fx.Node:
    attention = draft.node(branch.attention or "")
    if scores.kind == "entropy":
        weights = _mean_map(draft, attention)
        weights = _mean_of_halves(draft, weights, branch.rows) if scores.paired else weights
        entropy = _entropy(draft, weights)
        return _for_both_halves(draft, entropy) if scores.paired else entropy
    start = key_offset(attention, branch.rows, branch.tokens)
    if start is None:
        raise InternalError(f"the keys of {attention.name} are not the tokens of branch {branch.index}")
    if scores.kind == "v_norm":
        values = node_operand(attention, 2)
        norm = _call(draft, aten.linalg_vector_norm.default, values, 2, [-1], **_wide_dtype(values))
        score = _call(draft, aten.sum.dim_IntList, _call(draft, aten.rsub.Scalar, norm, 1), [1])
    else:
        score = _call(draft, aten.sum.dim_IntList, _mean_map(draft, attention), [1])
    score = _call(draft, aten.slice.Tensor, score, 1, start, start + branch.tokens)
    return _for_both_halves(draft, _mean_of_halves(draft, score, branch.rows)) if scores.paired else score


def _entropy(draft: VariantDraft, weights: fx.Node) -> fx.Node:
    log = _call(draft, aten.log.default, _call(draft, aten.add.Tensor, weights, _LEAST))
    entropy = _call(draft, aten.sum.dim_IntList, _call(draft, aten.mul.Tensor, weights, log), [-1])
    return _call(draft, aten.rsub.Scalar, entropy, 1)


def _mean_of_halves(draft: VariantDraft, value: fx.Node, batch: int) -> fx.Node:
    """The mean over both halves of the batch."""
    halves = [_call(draft, aten.slice.Tensor, value, 0, *part) for part in ((0, batch // 2), (batch // 2, batch))]
    return _call(draft, aten.mul.Tensor, _call(draft, aten.add.Tensor, *halves), 0.5)


def _for_both_halves(draft: VariantDraft, score: fx.Node) -> fx.Node:
    """The score of one half of the batch, repeated for the other."""
    return _call(draft, aten.cat.default, [score, score])


def _mean_map(draft: VariantDraft, attention: fx.Node) -> fx.Node:
    """The attention's weights, averaged over heads: (batch, queries, keys)."""
    query, key = node_operand(attention, 0), node_operand(attention, 1)
    mask = argument(attention, "attn_mask")
    scale = argument(attention, "scale") or (value_shape(query) or (1,))[-1] ** -0.5
    transposed = _call(draft, aten.transpose.int, key, -2, -1)
    if _wide_dtype(query):  # the largest products may overflow float16
        logits = _call(draft, aten.matmul.default, _call(draft, aten.mul.Tensor, query, scale), transposed)
    else:
        logits = _call(draft, aten.mul.Tensor, _call(draft, aten.matmul.default, query, transposed), scale)
    if mask is not None and mask.meta["val"].dtype is torch.bool:
        logits = _call(draft, aten.where.ScalarOther, mask, logits, float("-inf"))
    elif mask is not None:
        logits = _call(draft, aten.add.Tensor, logits, mask)
    return _call(draft, aten.mean.dim, _call(draft, aten.softmax.int, logits, -1, **_wide_dtype(query)), [1])


def _wide_dtype(value: fx.Node) -> dict[str, torch.dtype]:
    """The option that makes an operator compute in float32 if ``value`` is narrower."""
    dtype = value.meta["val"].dtype
    return {} if precise(value.meta["val"]) is dtype else {"dtype": torch.float32}


def _call(draft: VariantDraft, target: Any, *args: Any, **options: Any) -> fx.Node:
    return draft.graph.call_function(target, args, options)
