"""Which dimensions of a stream are batch rows, and which are tokens.

Rows are what nothing mixes. Where attention tells, it decides; else the batch is the first dimension and channels are
the last, and a stream of two dimensions has tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import fx

from duca_compile.analysis.tokens import Mixing, Places, follow_tokens
from duca_compile.core.ir import OTHER, ROWS, Place, Span, TokenLayout


class Body(NamedTuple):
    """What one branch computes from its stream: ``nodes`` in graph order, of which ``core`` is the last value."""

    stream: fx.Node
    nodes: list[fx.Node]
    core: fx.Node


def default_layout(shape: Sequence[int]) -> TokenLayout:
    """(tokens, channels), (batch, tokens, channels), (batch, height, width, channels) and so on."""
    if len(shape) < 3:
        return TokenLayout(((1,), ())[: len(shape)], (1, *shape[: min(len(shape), 1)]))
    return _layout(shape, 0)


def find_layout(shape: Sequence[int], attentions: Iterable[Body], batch: int) -> TokenLayout:
    """The layout of a stream whose values have this shape.

    Args:
        shape: of the stream's values.
        attentions: the branches with an attention, or as many of them as tell the layout.
        batch: the number of batch rows of the latent.
    """
    usual, bodies = default_layout(shape), list(attentions)
    if len(shape) < 2 or not bodies:
        return usual
    rows = next((dim for dim in range(len(shape) - 1) if all(_survives(body, shape, dim) for body in bodies)), None)
    if rows is not None and not (len(shape) == 2 and rows == 0):
        return _layout(shape, rows)
    merged = TokenLayout(((ROWS, 1), *[()] * (len(shape) - 1)), (batch, shape[0] // batch))
    if len(shape) == 2 and 1 < batch < shape[0] and shape[0] % batch == 0 and _rows_survive(bodies, merged):
        return merged
    unknown = any(_verdict(body, shape, 0) is not False for body in bodies)
    return usual if unknown else _layout(shape, None)


def _layout(shape: Sequence[int], rows: int | None) -> TokenLayout:
    """The dimension ``rows`` is the batch, the last one the channels, and all others are tokens."""
    dims: list[tuple[int, ...]] = []
    sizes = [1 if rows is None else shape[rows]]
    for dim, size in enumerate(shape[:-1]):
        if dim == rows:
            dims.append((ROWS,))
        else:
            dims.append((len(sizes),))
            sizes.append(size)
    return TokenLayout((*dims, ()), tuple(sizes))


def _survives(body: Body, shape: Sequence[int], dim: int) -> bool:
    return _verdict(body, shape, dim) is True


def _verdict(body: Body, shape: Sequence[int], dim: int) -> bool | None:
    """Whether entries along one dimension of the stream do not mix in a branch; None where that is unknown."""
    place = [((Span(OTHER, size),) if size > 1 else ()) for size in shape]
    place[dim] = (Span(ROWS, shape[dim]),) if shape[dim] > 1 else ()
    return _followed(body, tuple(place))


def _rows_survive(bodies: list[Body], layout: TokenLayout) -> bool:
    """Whether no branch mixes the batch rows, in a layout that merges them with tokens into one dimension."""
    for body in bodies:
        place = layout.place(body.stream.meta["val"].shape)
        rows_only = tuple(tuple(span if span.axis == ROWS else Span(OTHER, span.size) for span in dim) for dim in place)
        if _followed(body, rows_only) is not True:
            return False
    return True


def _followed(body: Body, place: Place) -> bool | None:
    try:
        follow_tokens(*body, place, "")
    except Mixing as mixing:
        return False if mixing.certain else None
    return True


def follow(body: Body, layout: TokenLayout) -> Places:
    """Where each value of a branch holds rows and tokens. Raises Mixing."""
    shape = tuple(body.stream.meta["val"].shape)
    if len(shape) < 2:
        raise Mixing(body.stream, f"the stream {shape} has no tokens")
    return follow_tokens(*body, layout.place(shape), str(layout))
