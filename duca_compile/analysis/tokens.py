"""Which part of a branch is pointwise along the token axis, by one rule per operator.

A body is pointwise along tokens where f(x[idx]) = f(x)[idx]: each output token depends on the same input token
alone. The rules follow the token axis from the stream to the branch's output; the first operator that mixes
tokens, or that has no rule, ends the walk with a reason.

An axis of 0 says that batch and tokens are one dimension, the first: many a linear flattens them and restores them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import fx

from duca_compile.analysis.operators import argument
from duca_compile.graph import op_name, value_shape

BATCH_AXIS, TOKEN_AXIS = 0, 1
MERGED = 0

RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}
ELEMENTWISE = {
    "abs", "add", "addcmul", "alias", "clamp", "clamp_max", "clamp_min", "clone", "contiguous", "cos", "detach",
    "div", "dropout", "elu", "erf", "exp", "gelu", "hardswish", "leaky_relu", "lerp", "log", "masked_fill", "maximum",
    "minimum", "mish", "mul", "neg", "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid", "silu", "sin",
    "softplus", "sqrt", "square", "sub", "tanh", "to", "where", "_to_copy",
}  # fmt: skip


class Mixing(Exception):  # noqa: N818 - a verdict, not a failure
    """Tokens mix at ``node``."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{op_name(node)}: {why}")
        self.node = node


Axes = dict[str, int]


def follow_tokens(stream: fx.Node, body: list[fx.Node], core: fx.Node) -> Axes:
    """The token axis of ``stream`` and of every node of ``body`` (in graph order), by name.

    Raises:
        Mixing: tokens mix, or an operator has no rule; says which and why.
    """
    shape = value_shape(stream) or ()
    if len(shape) != 3:
        raise Mixing(stream, f"the stream is not (batch, tokens, channels) but {shape}")
    axes: Axes = {stream.name: TOKEN_AXIS}
    batch, tokens = shape[BATCH_AXIS], shape[TOKEN_AXIS]
    for node in body:
        axis = axes[node.name] = _axis_of(node, axes)
        own = value_shape(node)
        if own is not None and own[BATCH_AXIS] != (batch * tokens if axis == MERGED else batch):
            raise Mixing(node, "the batch is not its first dimension")
        if own is not None and axis != MERGED and own[axis] != tokens:
            raise Mixing(node, f"it has {own[axis]} entries where there are {tokens} tokens")
    if axes[core.name] != TOKEN_AXIS:
        raise Mixing(core, "the branch does not end as (batch, tokens, channels)")
    return axes


def _axis_of(node: fx.Node, axes: Axes) -> int:
    name = op_name(node)
    rule = _elementwise if name in ELEMENTWISE else _RULES.get(name)
    if rule is None:
        raise Mixing(node, "no rule says how this operator treats tokens")
    return rule(node, axes)


def _elementwise(node: fx.Node, axes: Axes) -> int:
    """Operands broadcast from the right; those off the stream may hold one value per token, which is gathered too."""
    rank = _rank(node)
    places = {axes[n.name] + rank - _rank(n) for n in node.all_input_nodes if n.name in axes}
    if len(places) != 1:
        raise Mixing(node, "its operands hold tokens in different places")
    axis = places.pop()
    others = [n for n in node.all_input_nodes if n.name not in axes]
    if axis == MERGED and any(external_axis(n, rank, axis) is not None for n in others):
        raise Mixing(node, "its second operand may differ by token")
    return axis


def external_axis(other: fx.Node, rank: int, axis: int) -> int | None:
    """Where the token axis of a rank-``rank`` result falls in a broadcast operand; None where it is missing or 1."""
    own = axis + _rank(other) - rank
    shape = value_shape(other)
    return own if shape is not None and own >= 0 and shape[own] != 1 else None


def _rank(node: fx.Node) -> int:
    return len(value_shape(node) or ())


def _first(node: fx.Node, axes: Axes) -> tuple[fx.Node, int]:
    """The first operand, which must be the only one on the stream, and its token axis."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in axes:
        raise Mixing(node, "the stream is not its first operand")
    if any(n.name in axes for n in node.all_input_nodes if n is not source):
        raise Mixing(node, "a second operand depends on the stream")
    return source, axes[source.name]


def _dims(node: fx.Node, argument_name: str, rank: int) -> list[int] | None:
    """The dimensions given as an argument, counted from the front; None where it is left out."""
    given = argument(node, argument_name)
    if given is None:
        return None
    return [int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])]


def _product(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
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
    """Operators that act within one dimension given as an argument: it must not be the tokens'."""
    source, axis = _first(node, axes)
    if axis in (_dims(node, "dim", _rank(source)) or []):
        raise Mixing(node, "it acts along the tokens")
    return axis


def _select(node: fx.Node, axes: Axes) -> int:
    axis = _along_dim(node, axes)
    dims = _dims(node, "dim", _rank(_first(node, axes)[0])) or []
    return axis - sum(d < axis for d in dims)


def _slice(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    return axis if value_shape(source) == value_shape(node) else _along_dim(node, axes)


def _reduce(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    dims = _dims(node, "dim", _rank(source))
    if not dims:
        raise Mixing(node, "it reduces over every dimension")
    if axis in dims:
        raise Mixing(node, "it reduces over the tokens")
    return axis if argument(node, "keepdim") else axis - sum(d < axis for d in dims)


def _order(node: fx.Node, rank: int) -> list[int]:
    """For each dimension of a transposed or permuted value, the one it was before."""
    if op_name(node) == "permute":
        return _dims(node, "dims", rank) or []
    order = list(range(rank))
    (a,), (b,) = (_dims(node, name, rank) or [0] for name in ("dim0", "dim1"))
    order[a], order[b] = b, a
    return order


def _permute(node: fx.Node, axes: Axes) -> int:
    """Also transpose. The batch stays first, or gathered operands would not line up with it."""
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
    """The token dimension survives where one output dimension has its size and the same product before it.

    It may also become one with the batch, and be told from it again.
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


def _unary(node: fx.Node, axes: Axes) -> int:
    return _first(node, axes)[1]


def _type_as(node: fx.Node, axes: Axes) -> int:
    """The second operand lends nothing but its type."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in axes:
        raise Mixing(node, "the stream is not its first operand")
    return axes[source.name]


def _attention(node: fx.Node, axes: Axes) -> int:
    """Each query attends on its own, so cross-attention is pointwise along the queries."""
    query, key, value = node.args[:3]
    mask = argument(node, "attn_mask")
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
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
    "slice": _slice,
    "mean": _reduce,
    "sum": _reduce,
    "var": _reduce,
    "linalg_vector_norm": _reduce,
    "transpose": _permute,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "getitem": _unary,
    "type_as": _type_as,
    "scaled_dot_product_attention": _attention,
}
_RULES: dict[str, _Rule] = {**_SPECIAL, **dict.fromkeys(RESHAPES, _reshape)}


def own_keys(attention: fx.Node, batch: int, tokens: int) -> int | None:
    """Where the stream's tokens begin among the keys of a self-attention; None where that cannot be told.

    Joint attention concatenates them with the text's: they are the one piece that is as long as the stream.
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
    pieces = value.args[0]
    assert isinstance(pieces, list | tuple)
    sizes = [(value_shape(piece) or ())[axis] for piece in pieces if isinstance(piece, fx.Node)]
    return sum(sizes[: sizes.index(tokens)]) if sizes.count(tokens) == 1 else None
