"""Makes computed self-attentions return one score per token, for the selection of tokens to recompute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from duca_compile.analysis.operators import argument
from duca_compile.analysis.tokens import own_keys
from duca_compile.errors import InternalError
from duca_compile.graph import Action, value_shape
from duca_compile.passes.base import ExactPass, VariantDraft

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitScores(ExactPass[VariantDraft]):
    """Returns a (batch, tokens) float32 tensor per computed self-attention.

    ``v_norm``: sum over heads of 1 - ||v||2, so the smallest value vectors score highest (DuCa, arXiv 2412.18911,
    the released code's sign). ``attention``: attention received, summed over queries, mean over heads (ToCa's s1).
    """

    ensures = frozenset({"scores_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        build = {"v_norm": _value_norm, "attention": _attention_received, None: None}[draft.spec.scores]
        if build is None:
            return False
        chosen = [b for b in draft.facts.branches if b.pointwise]
        wanted = {s.index for b in chosen if (s := draft.facts.score_source(b))}
        scored = [b for b in draft.branches(Action.COMPUTE) if b.index in wanted and b.score_slot not in draft.results]
        for branch in scored:
            attention = draft.node(branch.attention or "")
            start = own_keys(attention, *branch.shape[:2])
            if start is None:
                raise InternalError(f"the keys of {attention.name} are not the tokens of branch {branch.index}")
            with draft.graph.inserting_before(draft.graph.output_node()):
                score = build(draft, attention)
                own = _call(draft, aten.slice.Tensor, score, 1, start, start + branch.tokens)
                if branch.dtype is not torch.float32:
                    own = _call(draft, aten.to.dtype, own, torch.float32)
            own.meta["val"] = draft.node(branch.core).meta["val"].new_empty(branch.shape[:2], dtype=torch.float32)
            draft.add_result(branch.score_slot, own)
        return bool(scored)


def _value_norm(draft: VariantDraft, attention: fx.Node) -> fx.Node:
    norm = _call(draft, aten.linalg_vector_norm.default, attention.args[2], 2, [-1])
    return _call(draft, aten.sum.dim_IntList, _call(draft, aten.rsub.Scalar, norm, 1), [1])


def _attention_received(draft: VariantDraft, attention: fx.Node) -> fx.Node:
    query, key = attention.args[:2]
    assert isinstance(query, fx.Node)
    mask = argument(attention, "attn_mask")
    scale = argument(attention, "scale") or (value_shape(query) or (1,))[-1] ** -0.5
    logits = _call(draft, aten.matmul.default, query, _call(draft, aten.transpose.int, key, -2, -1))
    logits = _call(draft, aten.mul.Tensor, logits, scale)
    if mask is not None and mask.meta["val"].dtype is torch.bool:
        logits = _call(draft, aten.where.ScalarOther, mask, logits, float("-inf"))
    elif mask is not None:
        logits = _call(draft, aten.add.Tensor, logits, mask)
    received = _call(draft, aten.sum.dim_IntList, _call(draft, aten.softmax.int, logits, -1), [2])
    return _call(draft, aten.mean.dim, received, [1])


def _call(draft: VariantDraft, target: Any, *args: Any) -> fx.Node:
    return draft.graph.call_function(target, args)
