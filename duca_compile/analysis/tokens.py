"""Which part of a branch is pointwise along the token axis, by one rule per operator.

A body is pointwise along tokens where f(x[idx]) = f(x)[idx]: each output token depends on the same input token
alone. The rules follow the token axis from the stream to the branch's output; the first operator that mixes
tokens, or that has no rule, ends the walk with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import fx

from duca_compile.graph import op_name, value_shape

BATCH_AXIS, TOKEN_AXIS = 0, 1

RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}
_ELEMENTWISE = {
    "abs", "add", "addcmul", "alias", "clamp", "clamp_max", "clamp_min", "clone", "contiguous", "cos", "detach",
    "div", "dropout", "elu", "erf", "exp", "gelu", "hardswish", "leaky_relu", "lerp", "log", "masked_fill", "maximum",
    "minimum", "mish", "mul", "neg", "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid", "silu", "sin",
    "softplus", "sqrt", "square", "sub", "tanh", "to", "type_as", "where", "_to_copy",
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
    for node in body:
        axes[node.name] = _axis_of(node, axes, shape[TOKEN_AXIS])
        own = value_shape(node)
        if own is not None and own[BATCH_AXIS] != shape[BATCH_AXIS]:
            raise Mixing(node, "the batch is not its first dimension")
    if axes[core.name] != TOKEN_AXIS:
        raise Mixing(core, "the branch does not end as (batch, tokens, channels)")
    return axes


def _axis_of(node: fx.Node, axes: Axes, tokens: int) -> int:
    name = op_name(node)
    if name in _ELEMENTWISE:
        return _elementwise(node, axes, tokens)
    rule = _RULES.get(name)
    if rule is None:
        raise Mixing(node, "no rule says how this operator treats tokens")
    return rule(node, axes)


def _elementwise(node: fx.Node, axes: Axes, tokens: int) -> int:
    """Operands broadcast from the right; those off the stream may be per-token (gathered too) or broadcast."""
    rank = len(value_shape(node) or ())
    places = {axes[n.name] + rank - _rank(n) for n in node.all_input_nodes if n.name in axes}
    if len(places) != 1:
        raise Mixing(node, "its operands hold tokens in different places")
    (axis,) = places
    for other in node.all_input_nodes:
        if other.name not in axes and external_axis(other, rank, axis) is not None:
            size = (value_shape(other) or ())[axis + _rank(other) - rank]
            if size not in (1, tokens):
                raise Mixing(node, f"an operand has {size} entries where there are {tokens} tokens")
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


def _linear(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    if axis == _rank(source) - 1:
        raise Mixing(node, "it sums over the tokens")
    return axis


def _norm(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    normalized = node.args[1]
    assert isinstance(normalized, list | tuple)
    if axis >= _rank(source) - len(normalized):
        raise Mixing(node, "it normalizes over the tokens")
    return axis


def _along_dim(node: fx.Node, axes: Axes, position: int, default: int = 0) -> int:
    """Operators that act within one dimension given as an argument: it must not be the tokens'."""
    source, axis = _first(node, axes)
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    assert isinstance(dim, int)
    if dim % _rank(source) == axis:
        raise Mixing(node, "it acts along the tokens")
    return axis


def _select(node: fx.Node, axes: Axes) -> int:
    axis = _along_dim(node, axes, 1)
    source, dim = _first(node, axes)[0], node.args[1]
    assert isinstance(dim, int)
    return axis - (dim % _rank(source) < axis)


def _slice(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    if value_shape(source) == value_shape(node):
        return axis
    return _along_dim(node, axes, 1)


def _reduce(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    dims = node.args[1] if len(node.args) > 1 else None
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    listed = [dims] if isinstance(dims, int) else dims
    if not isinstance(listed, list | tuple):
        raise Mixing(node, "it reduces over every dimension")
    reduced = {int(d) % _rank(source) for d in listed}  # type: ignore[arg-type]
    if axis in reduced:
        raise Mixing(node, "it reduces over the tokens")
    return axis if keep else axis - sum(d < axis for d in reduced)


def _transpose(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    a, b = (int(d) % _rank(source) for d in node.args[1:3])  # type: ignore[arg-type]
    return {a: b, b: a}.get(axis, axis)


def _permute(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    return [int(d) % _rank(source) for d in dims].index(axis)


def _unsqueeze(node: fx.Node, axes: Axes) -> int:
    axis = _first(node, axes)[1]
    dim = node.args[1]
    assert isinstance(dim, int)
    return axis + (dim % _rank(node) <= axis)


def _squeeze(node: fx.Node, axes: Axes) -> int:
    source, axis = _first(node, axes)
    dim = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dim, int):
        raise Mixing(node, "it drops every dimension of size one")
    return axis - (dim % _rank(source) < axis and _rank(node) < _rank(source))


def _reshape(node: fx.Node, axes: Axes) -> int:
    """The token dimension survives where one output dimension has its size and the same product before it."""
    source, axis = _first(node, axes)
    before, after = value_shape(source) or (), value_shape(node) or ()
    ahead = prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and prod(after[:place]) == ahead:
            return place
    raise Mixing(node, f"the reshape {before} -> {after} merges or splits the tokens")


def _item(node: fx.Node, axes: Axes) -> int:
    return _first(node, axes)[1]


def _attention(node: fx.Node, axes: Axes) -> int:
    """Each query attends on its own, so cross-attention is pointwise along the queries."""
    query, key, value = node.all_input_nodes[:3]
    if key.name in axes or value.name in axes:
        raise Mixing(node, "keys and values come from the stream, so every token sees every other")
    if len(node.all_input_nodes) > 3 and (value_shape(node.all_input_nodes[3]) or (1, 1))[-2] != 1:
        raise Mixing(node, "its mask differs by query")
    if axes[query.name] != _rank(query) - 2:
        raise Mixing(node, "the queries are not along the tokens")
    return axes[query.name]


_Rule = Callable[[fx.Node, Axes], int]
_SPECIAL: dict[str, _Rule] = {
    "linear": _linear,
    "matmul": _linear,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "softmax": lambda node, axes: _along_dim(node, axes, 1),
    "chunk": lambda node, axes: _along_dim(node, axes, 2),
    "split": lambda node, axes: _along_dim(node, axes, 2),
    "split_with_sizes": lambda node, axes: _along_dim(node, axes, 2),
    "unbind": _select,
    "select": _select,
    "slice": _slice,
    "mean": _reduce,
    "sum": _reduce,
    "var": _reduce,
    "linalg_vector_norm": _reduce,
    "transpose": _transpose,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "getitem": _item,
    "scaled_dot_product_attention": _attention,
}
_RULES: dict[str, _Rule] = {**_SPECIAL, **dict.fromkeys(RESHAPES, _reshape)}
