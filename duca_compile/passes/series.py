"""Sums the cached differences that a forecast is made of."""

from __future__ import annotations

import torch
from torch import fx

from duca_compile.core.ports import FORECAST_FACTORS, Port
from duca_compile.passes.base import VariantDraft
from duca_compile.passes.numbers import broadcast, clamped, number_input

aten = torch.ops.aten


class SeriesBuilder:
    """Builds the series of caches at the graph's insertion point; each factor is one input."""

    def __init__(self, draft: VariantDraft, order: int) -> None:
        self._draft, self._order = draft, order
        self._factors: dict[tuple[Port, torch.dtype, int], fx.Node] = {}

    def sum_from(self, start: fx.Node, cache: Port, like: torch.Tensor) -> fx.Node:
        """``start``, which is D_0, plus the terms of all higher orders."""
        return self._added(start, self._terms(cache, like))

    def change(self, cache: Port, like: torch.Tensor) -> fx.Node:
        """The terms of all higher orders without D_0; the order must be at least 1."""
        first, *terms = self._terms(cache, like)
        return self._added(self._draft.graph.call_function(aten.mul.Tensor, first), terms)

    def _added(self, total: fx.Node, terms: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
        for difference, factor in terms:
            total = self._draft.graph.call_function(aten.addcmul.default, (total, difference, factor))
        return total

    def _terms(self, cache: Port, like: torch.Tensor) -> list[tuple[fx.Node, fx.Node]]:
        return [
            (self._draft.input(cache.difference(i), like), self._factor(factor, like))
            for i, factor in enumerate(FORECAST_FACTORS[: self._order], 1)
        ]

    def _factor(self, port: Port, like: torch.Tensor) -> fx.Node:
        """One node for all values of the same type and dimensions."""
        key = port, like.dtype, like.dim()
        if key not in self._factors:
            number = number_input(self._draft, port, like)
            self._factors[key] = broadcast(self._draft, clamped(self._draft, number, like.dtype), like)
        return self._factors[key]
