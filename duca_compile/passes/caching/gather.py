"""Gathers chosen tokens of values, however these are laid out, and writes them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import fx

from duca_compile.analysis.tokens import ELEMENTWISE, holds_tokens, tracked
from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import OTHER, ROWS, Place, Span, TokenLayout

aten = torch.ops.aten


class TokenIndex:
    """The chosen tokens, (rows, k), and what is computed from them, each once."""

    def __init__(self, graph: fx.Graph, index: fx.Node) -> None:
        self._graph, self.node = graph, index
        self.rows = (value_shape(index) or (1,))[0]
        self._batch_rows: fx.Node | None = None
        self._shifted: dict[tuple[fx.Node, int], fx.Node] = {}
        self._along: dict[tuple[int, int, bool], fx.Node] = {}

    def batch_rows(self) -> fx.Node:
        """The numbers of the batch rows, (rows, 1)."""
        if self._batch_rows is None:
            options = {"device": self.node.meta["val"].device}
            rows = self._graph.call_function(aten.arange.default, (self.rows,), options)
            self._batch_rows = self._graph.call_function(aten.unsqueeze.default, (rows, 1))
        return self._batch_rows

    def shifted(self, index: fx.Node, start: int) -> fx.Node:
        """``index`` counted from ``start`` entries before."""
        key = index, start
        if start and key not in self._shifted:
            self._shifted[key] = self._graph.call_function(aten.add.Tensor, key)
        return self._shifted.get(key, index)

    def along(self, axis: int, grid: Sequence[int]) -> fx.Node:
        """The chosen tokens' indices along one axis of the grid."""
        key = behind, size, first = prod(grid[axis:]), grid[axis - 1], axis == 1
        if key not in self._along:
            index = self.node
            if behind > 1:
                index = self._graph.call_function(aten.div.Tensor_mode, (index, behind), {"rounding_mode": "floor"})
            if not first:
                index = self._graph.call_function(aten.remainder.Scalar, (index, size))
            self._along[key] = index
        return self._along[key]


class Gather:
    """Gathers the chosen tokens of values of one layout. Each value is gathered only once.

    A value of the chosen tokens has as many dimensions as before. They lie along the layout's ``lead`` axis; the
    tokens' other axes have size 1.

    ``early``: gather the operands of elementwise operators rather than their results, except for ``cores``, which
    caches replace.
    """

    def __init__(
        self, graph: fx.Graph, index: TokenIndex, layout: TokenLayout, early: bool, cores: frozenset[fx.Node]
    ) -> None:
        self._graph, self._index, self._layout, self._early, self._cores = graph, index, layout, early, cores
        self._gathered: dict[tuple[fx.Node, Place], fx.Node] = {}
        self._written: dict[tuple[fx.Node, Place], fx.Node] = {}

    def __call__(self, value: fx.Node, place: Place) -> fx.Node:
        """The chosen tokens of ``value``.

        Its dimensions are aligned from the right with ``place``, which says where a value holds rows and tokens;
        dimensions of size 1 are broadcast.
        """
        place = tuple(dim if tracked(dim) else () for dim in place)
        key = (value, place)
        if key not in self._gathered:
            self._gathered[key] = self._build(value, place)
        return self._gathered[key]

    def chosen_shape(self, shape: Sequence[int], place: Place) -> list[int]:
        """The shape of a value with the chosen tokens alone; -1 is the dimension along which they lie."""
        return [self._chosen_size(size, dim) for size, dim in zip(shape, place, strict=True)]

    def _chosen_size(self, size: int, dim: Sequence[Span]) -> int:
        if any(span.axis == self._layout.lead for span in dim):
            return -1
        return prod(span.size for span in dim if span.axis <= ROWS) if holds_tokens(dim) else size

    def write(self, cache: fx.Node, tokens: fx.Node, place: Place) -> fx.Node:
        """Writes the chosen tokens into ``cache``, a value of the stream, in place, and returns it updated."""
        place = tuple(dim if tracked(dim) else () for dim in place)
        if self._token_dim(place) is not None:
            where, values = [self._index.batch_rows(), self._index.node], tokens
        else:
            where = [self._position(axes) for axes in self._layout.dims[:-1]]
            values = self._rows_first(tokens, value_shape(cache) or (), place)
        updated = self._graph.call_function(aten.index_put_.default, (cache, where, values))
        self._written[updated, place] = tokens
        return updated

    def _build(self, value: fx.Node, place: Place) -> fx.Node:
        if not self._early or len(value_shape(value) or ()) != len(place):
            return self._gather(value, place)
        if (value, place) in self._written:
            return self._written[value, place]
        if value in self._cores or op_name(value) not in ELEMENTWISE or not _has_tokens(value, place):
            return self._gather(value, place)
        operands = {n: self(n, place) for n in value.all_input_nodes if _has_tokens(n, place)}
        copy = self._graph.node_copy(value, lambda n: operands.get(n, n))
        copy.meta["some_of"] = value.name
        return copy

    def _gather(self, value: fx.Node, place: Place) -> fx.Node:
        if not any(map(holds_tokens, place)):
            return value  # there is one token, and it is chosen
        dim = self._token_dim(place)
        if dim is None:
            return self._indexed(value, place)
        graph, shape = self._graph, list(value_shape(value) or ())
        while len(shape) < len(place):
            value = graph.call_function(aten.unsqueeze.default, (value, 0))
            shape.insert(0, 1)
        extent = [self._index.rows, *shape[1:]]
        if shape[0] != self._index.rows:
            value = graph.call_function(aten.expand.default, (value, extent))
        index = self._index.shifted(self._index.node, place[dim][0].start)
        for other in range(1, len(place)):
            if other != dim:
                index = graph.call_function(aten.unsqueeze.default, (index, other))
        extent[dim] = -1
        index = graph.call_function(aten.expand.default, (index, extent))
        return graph.call_function(aten.gather.default, (value, dim, index))

    def _token_dim(self, place: Place) -> int | None:
        """The dimension of the tokens, if the batch is the first one and no dimension holds anything else besides."""
        spans = [span for dim in place for span in dim]
        rows = (Span(ROWS, self._index.rows),) if self._index.rows > 1 else ()
        if len(self._layout.grid) > 1 or place[0] != rows or len(spans) != len(rows) + 1:
            return None
        return next((i for i, dim in enumerate(place) if holds_tokens(dim)), None)

    def _indexed(self, value: fx.Node, place: Place) -> fx.Node:
        """Any layout: axes get dimensions of their own, rows and tokens in front, and are merged again afterwards."""
        shape = list(value_shape(value) or ())
        shape = [1] * (len(place) - len(shape)) + shape
        kept = [dim if size > 1 and dim else _untracked(size) for dim, size in zip(place, shape, strict=True)]
        spans = [span for dim in kept for span in dim]
        value = self._reshaped(value, value_shape(value) or (), [span.size for span in spans])
        front = sorted((i for i, span in enumerate(spans) if span.axis != OTHER), key=lambda i: spans[i].axis)
        value = self._permuted(value, [*front, *(i for i, span in enumerate(spans) if span.axis == OTHER)])
        where = [self._entry(spans[i]) for i in front]
        value = self._graph.call_function(aten.index.Tensor, (value, where))
        return self._in_place(value, place, kept)

    def _entry(self, span: Span) -> fx.Node:
        """Where a span has the chosen tokens: (rows, k), or (rows, 1) for the batch."""
        if span.axis == ROWS:
            return self._index.batch_rows()
        return self._index.shifted(self._index.along(span.axis, self._layout.grid), span.start)

    def _in_place(self, value: fx.Node, place: Place, kept: Sequence[Sequence[Span]]) -> fx.Node:
        """From (rows, k, all else) to the dimensions of ``place``, of which the value itself had those ``kept``."""
        lead, others = self._layout.lead, iter(range(2, 2 + sum(s.axis == OTHER for dim in kept for s in dim)))
        order: list[int] = []
        sizes: list[int] = []
        for dim, own in zip(place, kept, strict=True):
            size = 1
            for span in dim if tracked(dim) else own:
                if span.axis == ROWS:
                    order.append(0)
                elif span.axis == lead:
                    order.append(1)
                elif span.axis == OTHER:
                    order.append(next(others))
                size *= span.size if span.axis <= ROWS else -1 if span.axis == lead else 1
            sizes.append(-1 if size < 0 else size)
        if 0 not in order:  # a single row, which has no dimension of its own
            order = [0, *order]
        value = self._permuted(value, order)
        rest = [span.size for dim in kept for span in dim if span.axis == OTHER]
        return self._reshaped(value, [self._index.rows, -1, *rest] if order == sorted(order) else None, sizes)

    def _rows_first(self, tokens: fx.Node, shape: Sequence[int], place: Place) -> fx.Node:
        """The chosen tokens of a value of the stream as (rows, k, channels)."""
        lead, rows, channels = self._layout.lead, self._index.rows, shape[-1]
        order = [span.axis for dim in place for span in dim if span.axis in (ROWS, lead)]
        if order == [lead, ROWS]:
            return self._permuted(self._reshaped(tokens, None, [-1, rows, channels]), [1, 0, 2])
        return self._reshaped(tokens, None, [rows, -1, channels])

    def _position(self, axes: Sequence[int]) -> fx.Node:
        """Where the chosen tokens are along a dimension of the stream that enumerates these axes."""
        entries = [self._entry(Span(axis, self._layout.sizes[axis])) for axis in axes]
        position = entries[0]
        for axis, entry in zip(axes[1:], entries[1:], strict=True):
            scaled = self._graph.call_function(aten.mul.Tensor, (position, self._layout.sizes[axis]))
            position = self._graph.call_function(aten.add.Tensor, (scaled, entry))
        return position

    def _permuted(self, value: fx.Node, order: Sequence[int]) -> fx.Node:
        if list(order) == sorted(order):
            return value
        return self._graph.call_function(aten.permute.default, (value, list(order)))

    def _reshaped(self, value: fx.Node, before: Sequence[int] | None, after: Sequence[int]) -> fx.Node:
        """The value with another shape, unless its own, ``before``, is known to be the same."""
        if before is not None and list(before) == list(after):
            return value
        return self._graph.call_function(aten.reshape.default, (value, list(after)))


def _untracked(size: int) -> tuple[Span, ...]:
    return (Span(OTHER, size),) if size > 1 else ()


def _has_tokens(operand: fx.Node, place: Place) -> bool:
    """Whether this operand of an elementwise operator has more than one token.

    Any other operand is broadcast along the tokens.
    """
    return any(size != 1 and holds_tokens(dim) for size, dim in _aligned(value_shape(operand) or (), place))


def _aligned(shape: Sequence[int], place: Place) -> Iterator[tuple[int, tuple[Span, ...]]]:
    """The sizes of an operand, which is broadcast from the right, each with the dimension of ``place``."""
    return zip(reversed(shape), reversed(place), strict=False)
