"""Numbers in a graph: one for the whole batch, or one for each batch row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from duca_compile.core.ports import Port
from duca_compile.passes.base import VariantDraft

aten = torch.ops.aten

EPSILON = 1e-6  # the smallest length that is used as a divisor


def row_numbers(node: fx.Node) -> Tensor:
    """An empty tensor of one number for each batch row of what ``node`` yields."""
    value = node.meta["val"]
    return value.new_empty(value.shape[:1], dtype=precise(value))  # type: ignore[no-any-return]


def precise(value: Tensor) -> torch.dtype:
    """The dtype that lengths are computed in: that of ``value``, but float32 at least."""
    return torch.promote_types(value.dtype, torch.float32)


def widened(draft: VariantDraft, node: fx.Node) -> fx.Node:
    """``node`` in ``precise``: itself, unless its dtype is narrower."""
    value = node.meta["val"]
    if value.dtype is precise(value):
        return node
    wide = draft.graph.call_function(aten.to.dtype, (node, precise(value)))
    wide.meta["val"] = value.to(precise(value))
    return wide


def ratio(draft: VariantDraft, over: fx.Node, under: fx.Node) -> fx.Node:
    """The quotient of two lengths; the divisor is ``EPSILON`` at least."""
    least = draft.graph.call_function(aten.clamp_min.default, (under, EPSILON))
    return draft.graph.call_function(aten.div.Tensor, (over, least))


def distance(draft: VariantDraft, now: fx.Node, before: fx.Node) -> fx.Node:
    change = draft.graph.call_function(aten.sub.Tensor, (now, before))
    return row_norm(draft, change, now.meta["val"])


def row_norm(draft: VariantDraft, node: fx.Node, like: Tensor, power: int = 2) -> fx.Node:
    """The L1 or L2 norm (``power``) of each batch row of ``node``, a value such as ``like``; shape (rows,)."""
    arguments: tuple[Any, ...] = (node, power, list(range(1, like.dim())))
    return draft.graph.call_function(aten.linalg_vector_norm.default, arguments, {"dtype": precise(like)})


def number_input(draft: VariantDraft, port: Port, like: torch.Tensor) -> fx.Node:
    """A float32 input: 0-dimensional, or of shape (batch,) where batch rows differ."""
    shape = (draft.facts.batch,) if draft.by_row else ()
    return draft.input(port, like.new_empty(shape, dtype=torch.float32))


def broadcast(draft: VariantDraft, number: fx.Node, like: torch.Tensor) -> fx.Node:
    """The number in the form that combines with values such as ``like``: where batch rows differ, (batch, 1, ...).

    Unlike a 0-dimensional number, this would promote the values to its own dtype, so it is cast to theirs.
    """
    if not draft.by_row:
        return number
    rows = by_row(draft, number, like)
    if like.dtype is torch.float32:
        return rows
    with draft.inserting_after(rows):
        return draft.graph.call_function(aten.to.dtype, (rows, like.dtype))


def by_row(draft: VariantDraft, values: fx.Node, like: torch.Tensor) -> fx.Node:
    """Reshapes (batch,) to (batch, 1, ...), with as many dimensions as ``like``."""
    with draft.inserting_after(values):
        return draft.graph.call_function(aten.reshape.default, (values, [draft.facts.batch, *[1] * (like.dim() - 1)]))


def clamped(draft: VariantDraft, number: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``number`` clamped to the range of a narrower dtype: infinity times a difference of zero would be NaN."""
    if torch.finfo(dtype).smallest_normal <= torch.finfo(torch.float32).smallest_normal:
        return number  # the range is that of float32
    with draft.inserting_after(number):
        return draft.graph.call_function(aten.clamp.default, (number, torch.finfo(dtype).min, torch.finfo(dtype).max))
