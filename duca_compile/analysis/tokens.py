"""Whether a branch is pointwise along the token axis, by one rule per operator.

A body is pointwise along tokens where f(x[idx]) = f(x)[idx]: each output token depends on the same input token only.
The rules follow the token axis from the stream to the branch's output; the first operator that mixes tokens, or that
has no rule, ends the walk with a reason.

The stream's tokens may be part of a longer axis for a while: joined with the text's, and cut out again. An axis of 0
means that they are merged with the batch into the first dimension, as some linear layers do and undo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from torch import fx

from duca_compile.core.fx_utils import int_operand, node_operand, op_name, value_shape
from duca_compile.core.ir import TokenPlace
from duca_compile.errors import InternalError
from duca_compile.frontend.opaque import opaque, site_of
from duca_compile.frontend.operators import argument

BATCH_AXIS, TOKEN_AXIS = 0, 1
MERGED = 0
CONCATENATIONS = {"cat", "concat", "concatenate"}
JOINS = CONCATENATIONS | {"stack"}
EXPANDS = {"expand", "expand_as"}
_SPLITS = {"chunk", "split", "split_with_sizes"}
RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}
ELEMENTWISE = {
    "_to_copy", "abs", "add", "addcdiv", "addcmul", "alias", "clamp", "clamp_max", "clamp_min", "clip", "clone",
    "complex", "contiguous", "cos", "detach", "div", "dropout", "elu", "erf", "exp", "gelu", "hardswish",
    "leaky_relu", "lerp", "log", "masked_fill", "maximum", "minimum", "mish", "mul", "neg", "pow", "reciprocal",
    "relu", "rsqrt", "rsub", "sigmoid", "silu", "sin", "softplus", "sqrt", "square", "sub", "tanh", "to", "where",
}  # fmt: skip


class Mixing(Exception):  # noqa: N818 - a verdict, not a failure
    """Tokens mix at ``node``, or may do so."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{op_name(node)}: {why}")
        self.node = node


Axes = dict[str, int]
Places = dict[str, TokenPlace]


def follow_tokens(stream: fx.Node, body: list[fx.Node], core: fx.Node) -> Places:
    """Where ``stream`` and every node of ``body`` (in graph order) hold the tokens, by node name.

    Raises:
        Mixing: tokens mix, or an operator has no rule; the message says which operator, and why.
    """
    shape = value_shape(stream) or ()
    if len(shape) != 3:
        raise Mixing(stream, f"the stream is not (batch, tokens, channels) but {shape}")
    whole = TokenPlace(TOKEN_AXIS, 0, shape[TOKEN_AXIS])
    places: Places = {stream.name: whole}
    for node in body:
        place = places[node.name] = _place_of(node, places, shape[TOKEN_AXIS])
        node_shape = value_shape(node)
        if node_shape is None:
            continue
        first = shape[BATCH_AXIS] * (place.length if place.axis == MERGED else 1)
        if node_shape[BATCH_AXIS] != first:
            raise Mixing(node, "the batch is not its first dimension")
        if place.axis != MERGED and node_shape[place.axis] != place.length:
            raise Mixing(node, f"it has {node_shape[place.axis]} entries where there are {place.length} tokens")
    if places[core.name] != whole:
        raise Mixing(core, "the branch does not end as (batch, tokens, channels)")
    return places


def _place_of(node: fx.Node, places: Places, tokens: int) -> TokenPlace:
    if node.target is opaque:
        return _opaque_module(node, places)
    if cuts_tokens(node, places):
        return _cut(node, places, tokens)
    if joins_tokens(node, places):
        return _join(node, places)
    sources = {(place.start, place.length) for n in node.all_input_nodes if (place := places.get(n.name))}
    if len(sources) != 1:
        raise Mixing(node, "its operands hold tokens in different places")
    name = op_name(node)
    rule = _elementwise if name in ELEMENTWISE else _RULES.get(name)
    if rule is None:
        raise Mixing(node, "no rule says how this operator treats tokens")
    return TokenPlace(rule(node, {name: place.axis for name, place in places.items()}), *sources.pop())


def _opaque_module(node: fx.Node, places: Places) -> TokenPlace:
    """An opaque module counts as pointwise where its shapes allow it; verification.py checks that on values."""
    operands, values = node.all_input_nodes, node.meta["val"]
    sources = {places[n.name] for n in operands if n.name in places}
    if not site_of(node).may_be_pointwise or len(sources) != 1:
        raise Mixing(node, "an opaque module")
    place = next(iter(sources))
    sizes = [value.shape[place.axis : place.axis + 1] for value in values]
    others = [(value_shape(n) or ())[place.axis : place.axis + 1] for n in operands if n.name not in places]
    size = (value_shape(next(n for n in operands if n.name in places)) or ())[place.axis]
    if any(each != (size,) for each in sizes) or (size,) in others:
        raise Mixing(node, "an opaque module whose results have other shapes")
    return place


def joins_tokens(node: fx.Node, places: Mapping[str, TokenPlace]) -> bool:
    """Whether the node concatenates the stream's tokens with others along their axis."""
    if op_name(node) not in CONCATENATIONS:
        return False
    return _dims(node, "dim", _rank(node)) == [next(places[n.name].axis for n in _pieces(node) if n.name in places)]


def _join(node: fx.Node, places: Places) -> TokenPlace:
    pieces = _pieces(node)
    positions = [i for i, piece in enumerate(pieces) if piece.name in places]
    if len(positions) != 1:
        raise Mixing(node, "it joins the tokens with others that depend on them")
    axis, start, _ = places[pieces[positions[0]].name]
    sizes = [(value_shape(piece) or ())[axis] for piece in pieces]
    return TokenPlace(axis, sum(sizes[: positions[0]]) + start, sum(sizes))


def cuts_tokens(node: fx.Node, places: Mapping[str, TokenPlace]) -> bool:
    """Whether the node takes a part of the token axis: a slice, or one piece of a split."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.name not in places:
        return False
    if op_name(node) == "getitem":
        return op_name(source) in _SPLITS and cuts_tokens(source, places)
    if op_name(node) != "slice" and op_name(node) not in _SPLITS:
        return False
    return value_shape(source) != value_shape(node) and _dims(node, "dim", _rank(source)) == [places[source.name].axis]


def _cut(node: fx.Node, places: Places, tokens: int) -> TokenPlace:
    source = node_operand(node, 0)
    axis, start, length = places[source.name]
    if op_name(node) in _SPLITS:
        return places[source.name]  # getitem takes one of its pieces
    first, after = _range(node, source, length)
    if argument(node, "step") not in (None, 1) or not first <= start <= start + tokens <= after:
        raise Mixing(node, "it takes some of the tokens and not others")
    return TokenPlace(axis, start - first, after - first)


def _range(node: fx.Node, source: fx.Node, length: int) -> tuple[int, int]:
    """The entries that a slice, or a piece of a split, takes of the token axis, which has ``length`` entries."""
    if op_name(node) == "slice":
        first, after = argument(node, "start") or 0, argument(node, "end")
        span = range(length)[first:after]
        return span.start, span.stop
    index = int_operand(node, 1)
    (dim,) = _dims(source, "dim", _rank(source.all_input_nodes[0])) or [0]
    sizes = [piece.shape[dim] for piece in source.meta["val"]]
    return sum(sizes[:index]), sum(sizes[: index + 1])


def overlapped(cut: fx.Node, joined: fx.Node) -> list[fx.Node]:
    """The operands of the concatenation ``joined`` from which the slice ``cut`` of its result takes entries."""
    dims = _dims(joined, "dim", _rank(joined)) or []
    if dims != _dims(cut, "dim", _rank(cut)):
        return _pieces(joined)
    sizes = [(value_shape(piece) or ())[dims[0]] for piece in _pieces(joined)]
    first, after = _range(cut, joined, sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [p for p, at, n in zip(_pieces(joined), starts, sizes, strict=True) if at < after and at + n > first]


def _pieces(node: fx.Node) -> list[fx.Node]:
    pieces = node.args[0]
    if not isinstance(pieces, list | tuple):
        raise InternalError(f"the first argument of {node.format_node()} is not a list")
    return [piece for piece in pieces if isinstance(piece, fx.Node)]


def _elementwise(node: fx.Node, axes: Axes) -> int:
    """The axis counted from the right is that of every operand, by the rules of broadcasting."""
    rank = _rank(node)
    places = {axes[n.name] + rank - _rank(n) for n in node.all_input_nodes if n.name in axes}
    if len(places) != 1:
        raise Mixing(node, "its operands hold tokens in different places")
    axis = places.pop()
    others = [n for n in node.all_input_nodes if n.name not in axes and _rank(n) == rank]
    if axis == MERGED and any((value_shape(n) or (1,))[0] != 1 for n in others):
        raise Mixing(node, "its second operand may differ by token")
    return axis


def per_token_operands(node: fx.Node, places: Mapping[str, TokenPlace]) -> list[fx.Node]:
    """Operands outside of the stream with one value per token, which must be gathered for the chosen tokens."""
    others = [n for n in node.all_input_nodes if n.name not in places]
    if op_name(node) in JOINS:
        return others
    if op_name(node) not in ELEMENTWISE:
        return []
    axis, rank = places[node.name].axis, _rank(node)
    found = []
    for other in others:
        other_axis, shape = axis + _rank(other) - rank, value_shape(other)  # operands broadcast from the right
        if shape is not None and other_axis >= 0 and shape[other_axis] != 1:
            found.append(other)
    return found


def _rank(node: fx.Node) -> int:
    return len(value_shape(node) or ())


def _first(node: fx.Node, axes: Axes) -> tuple[fx.Node, int]:
    """The first operand, which must be the only one in the stream, and its token axis."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in axes:
        raise Mixing(node, "the stream is not its first operand")
    if any(n.name in axes for n in node.all_input_nodes if n is not source):
        raise Mixing(node, "a second operand depends on the stream")
    return source, axes[source.name]


def _dims(node: fx.Node, argument_name: str, rank: int) -> list[int] | None:
    """The dimensions given as an argument, counted from the front; None where the argument is left out."""
    dims = argument(node, argument_name)
    if dims is None:
        return None
    return [int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]


def _join_channels(node: fx.Node, axes: Axes) -> int:
    """Concatenation along a dimension other than the tokens'."""
    axis = next(axes[n.name] for n in _pieces(node) if n.name in axes)
    if any(axes.get(n.name, axis) != axis for n in _pieces(node)):
        raise Mixing(node, "its operands hold tokens in different places")
    if axis == MERGED and any(n.name not in axes for n in _pieces(node)):
        raise Mixing(node, "its second operand may differ by token")
    return axis


def _stack(node: fx.Node, axes: Axes) -> int:
    axis = _join_channels(node, axes)
    (dim,) = _dims(node, "dim", _rank(node)) or [0]
    if dim == BATCH_AXIS:
        raise Mixing(node, "the batch is not its first dimension")
    return axis + (dim <= axis)


def _expand(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    return axis + _rank(node) - _rank(source)


def _product(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    weight = node_operand(node, 1)
    if axis == _rank(source) - 1:
        raise Mixing(node, "it sums over the tokens")
    if _rank(weight) > 2 and (axis != _rank(source) - 2 or _rank(weight) > _rank(source)):
        raise Mixing(node, "its second operand may differ by token")
    return axis


def _norm(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    if axis >= _rank(source) - len(argument(node, "normalized_shape")):
        raise Mixing(node, "it normalizes over the tokens")
    return axis


def _along_dim(node: fx.Node, axes: Axes) -> int:
    """Operators that act along one dimension given as an argument, which must not be the tokens'."""
    source, axis = _first(node, axes)
    if axis in (_dims(node, "dim", _rank(source)) or []):
        raise Mixing(node, "it acts along the tokens")
    return axis


def _flip(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    if axis in (_dims(node, "dims", _rank(source)) or []):
        raise Mixing(node, "it reorders the tokens")
    return axis


def _select(node: fx.Node, axes: Axes) -> int:
    axis = _along_dim(node, axes)
    dims = _dims(node, "dim", _rank(_first(node, axes)[0])) or []
    return axis - sum(d < axis for d in dims)


def _unary(node: fx.Node, axes: Axes) -> int:
    """Also a slice, which along the tokens is a cut."""
    return _first(node, axes)[1]


def _reduce(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    dims = _dims(node, "dim", _rank(source))
    if not dims:
        raise Mixing(node, "it reduces over every dimension")
    if axis in dims:
        raise Mixing(node, "it reduces over the tokens")
    return axis if argument(node, "keepdim") else axis - sum(d < axis for d in dims)


def _order(node: fx.Node, rank: int) -> list[int]:
    """For each dimension of a transposed or permuted value, its dimension before that."""
    if op_name(node) == "permute":
        return _dims(node, "dims", rank) or []
    order = list(range(rank))
    (a,), (b,) = (_dims(node, name, rank) or [0] for name in ("dim0", "dim1"))
    order[a], order[b] = b, a
    return order


def _permute(node: fx.Node, axes: Axes) -> int:
    """Also transpose. The batch must stay first, or gathered operands would not line up with it."""
    source, axis = _first(node, axes)
    order = _order(node, _rank(source))
    if order[BATCH_AXIS] != BATCH_AXIS:
        raise Mixing(node, "the batch is not its first dimension")
    return order.index(axis)


def _unsqueeze(node: fx.Node, axes: Axes) -> int:
    axis = _first(node, axes)[1]
    (dim,) = _dims(node, "dim", _rank(node)) or [0]
    return axis + (dim <= axis)


def _squeeze(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    dims = _dims(node, "dim", _rank(source))
    if dims is None or axis in dims:
        raise Mixing(node, "it may drop the tokens' dimension")
    shape = value_shape(source) or ()
    return axis - sum(d < axis and shape[d] == 1 for d in dims)


def _reshape(node: fx.Node, axes: Axes) -> int:
    """The token dimension survives where an output dimension has its size and the same product of sizes before it.

    It may also be merged with the batch, and split from it again.
    """
    source, axis = _first(node, axes)
    before, after = value_shape(source) or (), value_shape(node) or ()
    if axis == TOKEN_AXIS and after[0] == prod(before[:2]):
        return MERGED
    if axis == MERGED and prod(after[:2]) == before[0] != after[0]:
        return TOKEN_AXIS
    ahead = prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and prod(after[:place]) == ahead:
            return place
    raise Mixing(node, f"the reshape {before} -> {after} merges or splits the tokens")


def _type_as(node: fx.Node, axes: Axes) -> int:
    """The second operand contributes only its type."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in axes:
        raise Mixing(node, "the stream is not its first operand")
    return axes[source.name]


def _attention(node: fx.Node, axes: Axes) -> int:
    """Queries do not depend on each other, so cross-attention is pointwise along them."""
    query, key, value = (node_operand(node, position) for position in range(3))
    mask = argument(node, "attn_mask")
    if key.name in axes or value.name in axes:
        raise Mixing(node, "keys and values come from the stream, so every token sees every other")
    if argument(node, "is_causal") or (mask is not None and (value_shape(mask) or (1, 1))[-2] != 1):
        raise Mixing(node, "its mask differs by query")
    if axes[query.name] != _rank(query) - 2:
        raise Mixing(node, "the queries are not along the tokens")
    return axes[query.name]


_Rule = Callable[[fx.Node, Axes], int]
_SPECIAL: dict[str, _Rule] = {
    "linear": _product,
    "matmul": _product,
    "mm": _product,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "softmax": _along_dim,
    "chunk": _along_dim,
    "split": _along_dim,
    "split_with_sizes": _along_dim,
    "unbind": _select,
    "select": _select,
    "slice": _unary,
    "mean": _reduce,
    "sum": _reduce,
    "var": _reduce,
    "linalg_vector_norm": _reduce,
    "transpose": _permute,
    "permute": _permute,
    "stack": _stack,
    "flip": _flip,
    "view_as_complex": _unary,
    "view_as_real": _unary,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "getitem": _unary,
    "type_as": _type_as,
    "scaled_dot_product_attention": _attention,
}
_RULES: dict[str, _Rule] = {
    **_SPECIAL,
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(CONCATENATIONS, _join_channels),
    **dict.fromkeys(EXPANDS, _expand),
}


def key_offset(attention: fx.Node, batch: int, tokens: int) -> int | None:
    """The index of the stream's first token among the keys of a self-attention; None where that is unclear.

    Joint attention concatenates the stream's tokens with the text's; they are the only piece as long as the stream.
    """
    value, axis = attention.args[2], 2
    shape = (value_shape(value) if isinstance(value, fx.Node) else None) or ()
    if len(shape) != 4 or shape[BATCH_AXIS] != batch:
        return None
    if shape[axis] == tokens:
        return 0
    while isinstance(value, fx.Node) and op_name(value) in ("transpose", "permute", "to", "contiguous", "clone"):
        if op_name(value) in ("transpose", "permute"):
            axis = _order(value, len(shape))[axis]
        value = value.args[0]
    if not isinstance(value, fx.Node) or op_name(value) != "cat" or _dims(value, "dim", len(shape)) != [axis]:
        return None
    sizes = [(value_shape(piece) or ())[axis] for piece in _pieces(value)]
    return sum(sizes[: sizes.index(tokens)]) if sizes.count(tokens) == 1 else None
