"""Keeps the caches of the rows that a full step is not for; and numbers that differ by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.graph import FULL_ROWS, cache_input
from duca_compile.passes.base import CachingPass, VariantDraft

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepRows(CachingPass):
    """Each cache that a full step returns holds the new value in the rows that are ``full_rows``, else the old one."""

    requires = frozenset({"caches_emitted", "changes_emitted", "differences_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        output = draft.graph.output_node()
        (results,) = output.args
        assert isinstance(results, tuple)
        own = sum(name.startswith("output_") for name in draft.results)
        if not draft.spec.by_row or not draft.spec.emit or len(results) == own:
            return False
        known = {n.target: n for n in draft.graph.nodes if n.op == "placeholder"}
        if FULL_ROWS in known:
            return False
        emitted = [node for node in results[own:] if isinstance(node, fx.Node)]
        kind = emitted[0].meta["val"].new_empty(draft.facts.batch, dtype=torch.bool)
        rows = draft.add_input(FULL_ROWS, kind)
        kept = list(results[:own])
        for name, new in zip(draft.results[own:], emitted, strict=True):
            like = new.meta["val"]
            old = known.get(cache_input(name)) or draft.add_input(cache_input(name), like)
            chosen = by_row(draft, rows, like)
            with draft.graph.inserting_before(output):
                merged = draft.graph.call_function(aten.where.self, (chosen, new, old))
            merged.meta["val"] = like
            kept.append(merged)
        output.args = (tuple(kept),)
        return True


def number_input(draft: VariantDraft, name: str, like: torch.Tensor) -> fx.Node:
    """An input of 0 dimensions, or of one value for each row where the spec says that rows differ."""
    shape = (draft.facts.batch,) if draft.spec.by_row else ()
    return draft.shared_input(name, like.new_empty(shape, dtype=torch.float32))


def beside(draft: VariantDraft, number: fx.Node, like: torch.Tensor) -> fx.Node:
    """The number as it meets a value: of one for each row, (batch, 1, ...) in the value's dimensions.

    Unlike a number of no dimensions, one for each row would widen the value, so it takes the value's own type.
    """
    if not draft.spec.by_row:
        return number
    rows = by_row(draft, number, like)
    if like.dtype is torch.float32:
        return rows
    with draft.behind(rows):
        return draft.graph.call_function(aten.to.dtype, (rows, like.dtype))


def by_row(draft: VariantDraft, values: fx.Node, like: torch.Tensor) -> fx.Node:
    """(batch,) as (batch, 1, ...), of the dimensions of ``like``."""
    with draft.behind(values):
        return draft.graph.call_function(aten.reshape.default, (values, [draft.facts.batch, *[1] * (like.dim() - 1)]))


def limited(draft: VariantDraft, number: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``number`` as far as a narrower type holds it: infinity times a difference of zero would be no number."""
    if torch.finfo(dtype).smallest_normal <= torch.finfo(torch.float32).smallest_normal:
        return number  # it has float32's range
    with draft.behind(number):
        return draft.graph.call_function(aten.clamp.default, (number, torch.finfo(dtype).min, torch.finfo(dtype).max))
