"""Replaces cached values by their Taylor forecast from the last full steps (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import torch
from torch import fx

from duca_compile.errors import InternalError
from duca_compile.graph import FORECAST_DISTANCE, STREAM_END, Action, difference_slot
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.rows import beside, number_input

aten = torch.ops.aten


@dataclass(frozen=True)
class Forecast(CachingPass):
    """A branch's output, or in a skip variant the end of the stream, is the sum of D_i * x^i / i! over all orders i.

    D_i are the caches, and x, the steps since they were made, is an input: no distance is built into the graph.
    """

    def apply(self, draft: VariantDraft) -> bool:
        branches = draft.branches(Action.FORECAST)
        if draft.spec.relational:
            return False
        wanted = {branch.slot: branch.core for branch in branches}
        if branches and draft.spec.skip:
            wanted = {STREAM_END: draft.facts.stream_end}
        values = {slot: node for slot, name in wanted.items() if (node := draft.node(name)).users}
        if not values:
            return False
        series = Series(draft)
        for slot, value in values.items():
            like = value.meta["val"]
            start = draft.cache(slot, like)
            with draft.graph.inserting_before(value):
                total = series.behind(start, slot, like)
            total.meta["val"] = like
            value.replace_all_uses_with(total)
        return True


class Series:
    """Builds Taylor series of caches where the graph is inserted to; the powers of the distance are made once."""

    def __init__(self, draft: VariantDraft) -> None:
        if draft.spec.order is None:
            raise InternalError("a forecast needs to know its order")
        self._draft, self._orders = draft, range(1, draft.spec.order + 1)
        self._powers: list[fx.Node] = []

    def behind(self, start: fx.Node, slot: str, like: torch.Tensor) -> fx.Node:
        """``start``, which is D_0, and all that follows it."""
        total = start
        for i, (difference, power) in enumerate(self._terms(slot, like), 1):
            total = self._add(total, i, difference, power)
        return total

    def change(self, slot: str, like: torch.Tensor) -> fx.Node:
        """The same without D_0; of order 1 at least."""
        (difference, power), *terms = self._terms(slot, like)
        total = self._draft.graph.call_function(aten.mul.Tensor, (difference, power))
        for i, (each, power) in enumerate(terms, 2):
            total = self._add(total, i, each, power)
        return total

    def _add(self, total: fx.Node, order: int, difference: fx.Node, power: fx.Node) -> fx.Node:
        terms = (total, difference, power)
        return self._draft.graph.call_function(aten.addcmul.default, terms, {"value": 1 / factorial(order)})

    def _terms(self, slot: str, like: torch.Tensor) -> list[tuple[fx.Node, fx.Node]]:
        draft = self._draft
        differences = [draft.cache(difference_slot(slot, i), like) for i in self._orders]
        if differences and not self._powers:
            self._powers.append(number_input(draft, FORECAST_DISTANCE, like))
        while 0 < len(self._powers) < len(differences):
            with draft.behind(self._powers[-1]):
                product = draft.graph.call_function(aten.mul.Tensor, (self._powers[-1], self._powers[0]))
            self._powers.append(product)
        return [(d, beside(draft, power, like)) for d, power in zip(differences, self._powers, strict=True)]
