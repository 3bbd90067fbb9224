"""Sums the cached values that a forecast is made of, each times its factor."""

from __future__ import annotations

import torch
from torch import fx

from duca_compile.core.ports import FORECAST_FACTORS, FORECAST_START, Port, PortKind
from duca_compile.passes.base import VariantDraft
from duca_compile.passes.numbers import broadcast, clamped, number_input, precise, widened

aten = torch.ops.aten


class SeriesBuilder:
    """Builds forecasts from caches at the graph's insertion point; each factor is one input."""

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

    def sum_of_sums(self, cache: Port, sums: int, like: torch.Tensor) -> fx.Node:
        """The terms of all sums and, if the order is at least 1, of all differences from D_0 on.

        They are added in float32 or wider, since their factors have both signs.
        """
        call, wide = self._draft.graph.call_function, like.to(precise(like))
        ports = [Port(PortKind.SUM, i) for i in range(sums)]
        terms = [
            (self._draft.input(port, wide), self._factor(Port(PortKind.SUM_FACTOR, port.of), wide)) for port in ports
        ]
        orders = (FORECAST_START, *FORECAST_FACTORS[: self._order]) if self._order else ()
        for i, factor in enumerate(orders):
            difference = self._draft.input(cache.difference(i), like)
            terms.append((widened(self._draft, difference), self._factor(factor, wide)))
        first, *others = terms
        total = self._added(call(aten.mul.Tensor, first), others)
        return total if like.dtype is wide.dtype else call(aten.to.dtype, (total, like.dtype))

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
