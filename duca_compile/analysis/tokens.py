"""Whether a branch is pointwise along its stream's tokens, by one rule per operator.

A body is pointwise along tokens where f(x[idx]) = f(x)[idx]: each output token depends on the same input token only.
The rules follow the axes of batch rows and tokens from the stream to the branch's output; the first operator that mixes
them, or that has no rule, ends the walk with a reason.

An axis may share a dimension with others, as where heads are merged with the batch, and the stream's tokens may be part
of a longer axis for a while: joined with the text's, and cut out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from duca_compile.core.fx_utils import int_operand, node_operand, op_name, value_shape
from duca_compile.core.ir import OTHER, ROWS, Behaviour, Place, Span
from duca_compile.errors import InternalError
from duca_compile.frontend.opaque import opaque, site_of
from duca_compile.frontend.operators import argument, operator_name

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
    """Tokens mix at ``node``, or, unless ``certain``, may do so."""

    def __init__(self, node: fx.Node, why: str, certain: bool = False) -> None:
        super().__init__(f"{operator_name(node)}: {why}")
        self.node, self.certain = node, certain


Places = dict[str, Place]


def follow_tokens(stream: fx.Node, body: list[fx.Node], core: fx.Node, whole: Place, layout: str) -> Places:
    """Where ``stream`` and every node of ``body`` (in graph order) hold the rows and tokens, by node name.

    Args:
        stream: the value that the body reads.
        body: what is computed from it, in graph order.
        core: the last value of the body.
        whole: where the stream holds them.
        layout: the stream's dimensions in words.

    Raises:
        Mixing: tokens or rows mix, or an operator has no rule; the message says which operator, and why.
    """
    places: Places = {stream.name: whole}
    for node in body:
        place = places[node.name] = _place_of(node, places)
        shape = value_shape(node)
        if shape is not None and [_length(dim) for dim in place] != list(shape):
            raise Mixing(node, f"its result {shape} holds the tokens in an unknown way")
        if len(_axes(place)) > len(set(_axes(place))):
            raise Mixing(node, "its operands hold tokens in different places")
    if places[core.name] != whole:
        raise Mixing(core, f"the branch does not end as {layout}")
    return places


def _place_of(node: fx.Node, places: Places) -> Place:
    if node.target is opaque:
        return _opaque_module(node, places)
    if (behaviour := observed(node)) is not None:
        return _observed_place(node, _main_result(behaviour), behaviour, places)
    if op_name(node) == "getitem" and (behaviour := observed(source := node_operand(node, 0))) is not None:
        return _observed_place(source, int_operand(node, 1), behaviour, places)
    if cuts_tokens(node, places):
        return _cut(node, places)
    if joins_tokens(node, places):
        return _join(node, places)
    name = op_name(node)
    rule = _elementwise if name in ELEMENTWISE else _RULES.get(name)
    if rule is None:
        raise Mixing(node, "no rule says how this operator treats tokens")
    return rule(node, places)


def tracked(dim: Iterable[Span]) -> bool:
    """Whether a dimension holds batch rows or tokens."""
    return any(span.axis != OTHER for span in dim)


def holds_tokens(dim: Iterable[Span]) -> bool:
    """Whether a dimension holds tokens."""
    return any(span.axis > ROWS for span in dim)


def _axes(place: Place) -> list[int]:
    return [span.axis for dim in place for span in dim if span.axis != OTHER]


def _length(dim: Iterable[Span]) -> int:
    return prod(span.size for span in dim)


def _others(size: int) -> tuple[Span, ...]:
    """A dimension of ``size`` that holds neither rows nor tokens."""
    return (Span(OTHER, size),) if size != 1 else ()


def _resized(node: fx.Node, dims: Iterable[tuple[Span, ...]]) -> Place:
    """The place with these dimensions, where those without rows and tokens have the sizes that the node's value has."""
    dims, shape = tuple(dims), value_shape(node)
    if shape is None or len(shape) != len(dims):
        return dims
    return tuple(dim if tracked(dim) else _others(size) for dim, size in zip(dims, shape, strict=True))


# ---- operators that no rule can know


def observed(node: fx.Node) -> Behaviour | None:
    """What the values of an operator that is not PyTorch's own show of it, if they were looked at."""
    behaviour: Behaviour | None = node.meta.get("behaviour")
    return behaviour


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, each as often as it is passed."""
    return [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def mixed_operands(node: fx.Node, behaviour: Behaviour) -> list[fx.Node]:
    """The operands of which an entry has effect at other indices than its own, along any dimension but the last."""
    operands = tensor_operands(node)
    return [operands[i] for (i, _), links in behaviour.links.items() if None in links[:-1]]


def _main_result(behaviour: Behaviour) -> int:
    """The first result on which any operand has an effect: attention also returns logarithms of sums, for example."""
    return min((result for _, result in behaviour.links), default=0)


def _observed_place(node: fx.Node, result: int, behaviour: Behaviour, places: Mapping[str, Place]) -> Place:
    value, operands = node.meta["val"], tensor_operands(node)
    shape = tuple((value[result] if isinstance(value, list | tuple) else value).shape)
    dims: dict[int, tuple[Span, ...]] = {}
    expected: set[int] = set()
    for i, operand in enumerate(operands):
        if operand.name not in places:
            continue
        expected.update(_axes(places[operand.name]))
        for dim, to in zip(places[operand.name], behaviour.links.get((i, result), ()), strict=False):
            if not tracked(dim):
                continue
            if to is None:
                raise Mixing(node, f"its values show that it mixes tokens of its operand {i + 1}", len(dim) == 1)
            if dims.setdefault(to, dim) != dim:
                raise Mixing(node, "its operands hold tokens in different places")
    place = tuple(dims.get(i) or _others(size) for i, size in enumerate(shape))
    if expected != set(_axes(place)) and not isinstance(value, list | tuple):  # other results may be unused
        raise Mixing(node, "its values show that it loses the tokens")
    if any(map(holds_tokens, place)) and result == _main_result(behaviour):
        _check_observed(node, behaviour, place, places)
    return place


def _check_observed(node: fx.Node, behaviour: Behaviour, place: Place, places: Mapping[str, Place]) -> None:
    """Raises Mixing where operands outside of the stream may say something of its tokens that cannot be gathered."""
    for operand in tensor_operands(node):
        if operand.name not in places and operand.meta["val"].dtype in (torch.int32, torch.int64):
            raise Mixing(node, f"integers ({operand.name}) may tell it where tokens are")
    for operand, own in _observed_operands(node, behaviour, place, places).items():
        if set(_axes(own)) != set(_axes(place)):
            raise Mixing(node, f"its operand {operand.name} may differ by token")


def _opaque_module(node: fx.Node, places: Places) -> Place:
    """An opaque module counts as pointwise where its shapes allow it; verification.py checks that on values."""
    operands, values = node.all_input_nodes, node.meta["val"]
    sources = {places[n.name] for n in operands if n.name in places}
    if not site_of(node).may_be_pointwise or len(sources) != 1:
        raise Mixing(node, "an opaque module")
    place = next(iter(sources))
    for dim, spans in enumerate(place):
        sizes = {value.shape[dim : dim + 1] for value in values}
        others = [(value_shape(n) or ())[dim : dim + 1] for n in operands if n.name not in places]
        size = (_length(spans),)
        if holds_tokens(spans) and (sizes != {size} or size in others):
            raise Mixing(node, "an opaque module whose results have other shapes")
    return place


# ---- parts of the token axis


def joins_tokens(node: fx.Node, places: Mapping[str, Place]) -> bool:
    """Whether the node concatenates the stream's tokens with others along their axis."""
    if op_name(node) not in CONCATENATIONS:
        return False
    place = next(places[n.name] for n in _pieces(node) if n.name in places)
    return any(tracked(place[dim]) for dim in _dims(node, "dim", _rank(node)) or [0])


def _join(node: fx.Node, places: Places) -> Place:
    pieces = _pieces(node)
    positions = [i for i, piece in enumerate(pieces) if piece.name in places]
    if len(positions) != 1:
        raise Mixing(node, "it joins the tokens with others that depend on them")
    place = list(places[pieces[positions[0]].name])
    (dim,) = _dims(node, "dim", _rank(node)) or [0]
    span = _only_tokens(node, place[dim], "it joins rows, or parts of several tokens, with others")
    sizes = [(value_shape(piece) or ())[dim] for piece in pieces]
    place[dim] = (Span(span.axis, sum(sizes), sum(sizes[: positions[0]]) + span.start),)
    return tuple(place)


def _only_tokens(node: fx.Node, dim: tuple[Span, ...], why: str) -> Span:
    """The one axis of tokens that makes up a dimension; raises Mixing, with ``why``, if there is anything else."""
    if len(dim) != 1 or dim[0].axis == ROWS:
        raise Mixing(node, why)
    return dim[0]


def cuts_tokens(node: fx.Node, places: Mapping[str, Place]) -> bool:
    """Whether the node takes a part of the token axis: a slice, or one piece of a split."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.name not in places:
        return False
    if op_name(node) == "getitem":
        return op_name(source) in _SPLITS and cuts_tokens(source, places)
    if op_name(node) != "slice" and op_name(node) not in _SPLITS:
        return False
    dims = _dims(node, "dim", _rank(source)) or [0]
    return value_shape(source) != value_shape(node) and any(tracked(places[source.name][dim]) for dim in dims)


def _cut(node: fx.Node, places: Places) -> Place:
    source = node_operand(node, 0)
    if op_name(node) in _SPLITS:
        return places[source.name]  # getitem takes one of its pieces
    place = list(places[source.name])
    split = source if op_name(node) == "getitem" else node
    (dim,) = _dims(split, "dim", len(place)) or [0]
    span = _only_tokens(node, place[dim], "it takes some of the rows, or parts of several tokens, and not others")
    first, after = _range(node, source, span.size)
    if argument(node, "step") not in (None, 1) or not first <= span.start <= span.start + _own(span, places) <= after:
        raise Mixing(node, "it takes some of the tokens and not others")
    place[dim] = (Span(span.axis, after - first, span.start - first),)
    return tuple(place)


def _own(span: Span, places: Places) -> int:
    """The number of the stream's own entries along an axis: the stream is the first value."""
    whole = next(iter(places.values()))
    return next(each.size for dim in whole for each in dim if each.axis == span.axis)


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


# ---- operands outside of the stream


def per_token_operands(node: fx.Node, places: Mapping[str, Place]) -> dict[fx.Node, Place]:
    """Operands outside of the stream with values for each token, which must be gathered for the chosen tokens.

    Each comes with the place with which its dimensions are aligned from the right.
    """
    if (behaviour := observed(node)) is not None:
        own = _observed_place(node, _main_result(behaviour), behaviour, places)
        return _observed_operands(node, behaviour, own, places)
    if op_name(node) in JOINS:
        place = next(places[n.name] for n in _pieces(node) if n.name in places)
    elif op_name(node) in ELEMENTWISE:
        place = places[node.name]
    else:
        return {}
    others = [n for n in node.all_input_nodes if n.name not in places]
    return {other: place for other in others if any(holds_tokens(dim) for _, dim in _broad_dims(other, place))}


def _broad_dims(operand: fx.Node, place: Place) -> list[tuple[int, tuple[Span, ...]]]:
    """The sizes other than 1 of an operand, each with the dimension of ``place`` that is aligned with it."""
    sizes = reversed(value_shape(operand) or ())
    return [(size, dim) for size, dim in zip(sizes, reversed(place), strict=False) if size != 1]


def _check_operands(node: fx.Node, place: Place, places: Places) -> None:
    """Raises Mixing where an operand outside of the stream has values for each token that cannot be gathered.

    That is where it is broadcast along a dimension that holds several things: gathered, it would differ by row there.
    """
    for operand, like in per_token_operands(node, {**places, node.name: place}).items():
        broad = {id(dim) for _, dim in _broad_dims(operand, like)}
        if any(len(dim) > 1 and tracked(dim) and id(dim) not in broad for dim in like):
            raise Mixing(node, "its second operand may differ by token")


def _observed_operands(
    node: fx.Node, behaviour: Behaviour, own: Place, places: Mapping[str, Place]
) -> dict[fx.Node, Place]:
    found: dict[fx.Node, Place] = {}
    for i, operand in enumerate(tensor_operands(node)):
        shape, links = value_shape(operand) or (), behaviour.links.get((i, _main_result(behaviour)), ())
        if operand.name in places or len(links) != len(shape):
            continue
        spans = [() if to is None or to < 0 else own[to] for to in links]
        place = tuple(
            dim if _length(dim) == size and tracked(dim) else _others(size)
            for dim, size in zip(spans, shape, strict=True)
        )
        if any(map(holds_tokens, place)):
            found[operand] = place
    return found


# ---- rules


def _elementwise(node: fx.Node, places: Places) -> Place:
    """Each dimension, counted from the right, is that of every operand, by the rules of broadcasting."""
    rank = _rank(node)
    aligned = [((),) * (rank - _rank(n)) + places[n.name] for n in node.all_input_nodes if n.name in places]
    place = _resized(node, [_common(node, dims) for dims in zip(*aligned, strict=True)])
    _check_operands(node, place, places)
    return place


def _common(node: fx.Node, dims: tuple[tuple[Span, ...], ...]) -> tuple[Span, ...]:
    """What operands hold in one dimension."""
    found = {dim for dim in dims if tracked(dim)}
    if len(found) > 1:
        raise Mixing(node, "its operands hold tokens in different places")
    return found.pop() if found else ()


def _rank(node: fx.Node) -> int:
    return len(value_shape(node) or ())


def _source(node: fx.Node, places: Places, position: int = 0) -> Place:
    """The place of the operand at ``position``, which must be the only one in the stream."""
    source = node.args[position] if len(node.args) > position else None
    if not isinstance(source, fx.Node) or source.name not in places:
        raise Mixing(node, f"the stream is not its {('first', 'second')[position]} operand")
    if any(n.name in places for n in node.all_input_nodes if n is not source):
        raise Mixing(node, "a second operand depends on the stream")
    return places[source.name]


def _dims(node: fx.Node, argument_name: str, rank: int) -> list[int] | None:
    """The dimensions given as an argument, counted from the front; None where the argument is left out."""
    dims = argument(node, argument_name)
    if dims is None:
        return None
    return [int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]


def _join_channels(node: fx.Node, places: Places) -> Place:
    """Concatenation along a dimension other than the tokens'."""
    (dim,) = _dims(node, "dim", _rank(node)) or [0]
    found = {places[n.name][:dim] + places[n.name][dim + 1 :] for n in _pieces(node) if n.name in places}
    if len(found) != 1:
        raise Mixing(node, "its operands hold tokens in different places")
    rest = found.pop()
    return _resized(node, (*rest[:dim], (), *rest[dim:]))


def _stack(node: fx.Node, places: Places) -> Place:
    found = {places[n.name] for n in _pieces(node) if n.name in places}
    if len(found) != 1:
        raise Mixing(node, "its operands hold tokens in different places")
    place = found.pop()
    (dim,) = _dims(node, "dim", _rank(node)) or [0]
    return _resized(node, (*place[:dim], (), *place[dim:]))


def _expand(node: fx.Node, places: Places) -> Place:
    place = _source(node, places)
    return _resized(node, ((),) * (_rank(node) - len(place)) + place)


def _product(node: fx.Node, places: Places) -> Place:
    position = int(op_name(node) in ("addmm", "baddbmm"))
    first, second = node_operand(node, position), node_operand(node, position + 1)
    if first.name in places and second.name in places and not position:
        return _product_of_two(node, places[first.name], places[second.name])
    place = _source(node, places, position)
    weight = value_shape(second) or ()
    if tracked(place[-1]):
        raise Mixing(node, "it sums over the tokens", certain=True)
    batches = [1] * (len(place) - len(weight)) + list(weight[:-2])
    differs = any(holds_tokens(dim) and size != 1 for dim, size in zip(place, batches, strict=False))
    if position:  # the first operand is added
        differs = differs or any(holds_tokens(dim) for _, dim in _broad_dims(node_operand(node, 0), place))
    if differs or len(weight) > len(place):
        raise Mixing(node, "its second operand may differ by token")
    return _resized(node, (*place[: _rank(node) - 1], ()) if len(weight) > 1 else place[:-1])


def _product_of_two(node: fx.Node, one: Place, other: Place) -> Place:
    """A product of two values of the stream, as of queries and keys: pointwise along the batch of both at most."""
    if len(one) != len(other) or tracked(one[-1]) or any(map(tracked, other[-2:])):
        raise Mixing(node, "a second operand depends on the stream", certain=True)
    return _resized(node, [*(_common(node, dims) for dims in zip(one[:-2], other[:-2], strict=True)), one[-2], ()])


def _norm(node: fx.Node, places: Places) -> Place:
    place = _source(node, places)
    if any(map(tracked, place[len(place) - len(argument(node, "normalized_shape")) :])):
        raise Mixing(node, "it normalizes over the tokens")
    return place


def _along_dim(node: fx.Node, places: Places) -> Place:
    """Operators that act along one dimension given as an argument, which must not be the tokens'."""
    place = _source(node, places)
    if any(tracked(place[dim]) for dim in _dims(node, "dim", len(place)) or [0]):
        raise Mixing(node, "it acts along the tokens", certain=True)
    return place


def _flip(node: fx.Node, places: Places) -> Place:
    place = _source(node, places)
    if any(tracked(place[dim]) for dim in _dims(node, "dims", len(place)) or []):
        raise Mixing(node, "it reorders the tokens")
    return place


def _select(node: fx.Node, places: Places) -> Place:
    place = _along_dim(node, places)
    return _without(place, _dims(node, "dim", len(place)) or [0])


def _without(place: Place, dims: Iterable[int]) -> Place:
    return tuple(spans for dim, spans in enumerate(place) if dim not in dims)


def _unary(node: fx.Node, places: Places) -> Place:
    """Also a slice, which along the tokens is a cut."""
    return _resized(node, _source(node, places))


def _as_complex(node: fx.Node, places: Places) -> Place:
    return _source(node, places)[:-1]


def _as_real(node: fx.Node, places: Places) -> Place:
    return (*_source(node, places), _others(2))


def _reduce(node: fx.Node, places: Places) -> Place:
    place = _source(node, places)
    dims = _dims(node, "dim", len(place))
    if not dims:
        raise Mixing(node, "it reduces over every dimension")
    if any(tracked(place[dim]) for dim in dims):
        raise Mixing(node, "it reduces over the tokens")
    if argument(node, "keepdim"):
        return tuple(() if dim in dims else spans for dim, spans in enumerate(place))
    return _without(place, dims)


def _order(node: fx.Node, rank: int) -> list[int]:
    """For each dimension of a transposed or permuted value, its dimension before that."""
    if op_name(node) == "permute":
        return _dims(node, "dims", rank) or []
    order = list(range(rank))
    (a,), (b,) = (_dims(node, name, rank) or [0] for name in ("dim0", "dim1"))
    order[a], order[b] = b, a
    return order


def _permute(node: fx.Node, places: Places) -> Place:
    """Also transpose."""
    place = _source(node, places)
    return tuple(place[dim] for dim in _order(node, len(place)))


def _unsqueeze(node: fx.Node, places: Places) -> Place:
    place = _source(node, places)
    (dim,) = _dims(node, "dim", _rank(node)) or [0]
    return (*place[:dim], (), *place[dim:])


def _squeeze(node: fx.Node, places: Places) -> Place:
    place = _source(node, places)
    dims = _dims(node, "dim", len(place))
    if dims is None or any(tracked(place[dim]) for dim in dims):
        raise Mixing(node, "it may drop the tokens' dimension")
    return _without(place, [dim for dim in dims if not place[dim]])


def _reshape(node: fx.Node, places: Places) -> Place:
    """Row-major factors are dealt out to the dimensions of the result; rows and tokens may be merged, but not split."""
    factors = [span for dim in _source(node, places) for span in dim]
    after, before = value_shape(node) or (), value_shape(node_operand(node, 0)) or ()
    dims: list[tuple[Span, ...]] = []
    for size in after:
        dim: list[Span] = []
        while size > 1 and factors:
            span, taken = factors[0], _taken(factors, size)
            if taken is None:
                break
            dim.append(Span(span.axis, taken, span.start))
            size //= taken
        if size > 1:
            raise Mixing(node, f"the reshape {before} -> {after} merges or splits the tokens")
        dims.append(_merged(dim))
    return tuple(dims)


def _taken(factors: list[Span], size: int) -> int | None:
    """How much of ``size`` the first factors give, which are removed; None if the sizes do not fit."""
    span = factors[0]
    if span.axis != OTHER:
        return factors.pop(0).size if size % span.size == 0 else None
    while len(factors) > 1 and factors[1].axis == OTHER:
        factors[:2] = [Span(OTHER, factors[0].size * factors[1].size)]
    whole = factors[0].size
    if not whole:
        return None
    if size % whole == 0:
        return factors.pop(0).size
    if whole % size:
        return None
    factors[0] = Span(OTHER, whole // size)
    return size


def _merged(dim: list[Span]) -> tuple[Span, ...]:
    """The factors of one dimension; neighbours that are neither rows nor tokens are one."""
    merged: list[Span] = []
    for span in dim:
        if merged and span.axis == OTHER == merged[-1].axis:
            merged[-1] = Span(OTHER, merged[-1].size * span.size)
        else:
            merged.append(span)
    return tuple(merged)


def _type_as(node: fx.Node, places: Places) -> Place:
    """The second operand contributes only its type."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in places:
        raise Mixing(node, "the stream is not its first operand")
    return places[source.name]


def _attention(node: fx.Node, places: Places) -> Place:
    """Queries do not depend on each other, so cross-attention is pointwise along them."""
    query, *others = (node_operand(node, position) for position in range(3))
    mask, rank = argument(node, "attn_mask"), _rank(node)
    inner = [n for n in others if n.name in places]
    if any(tracked(dim) for n in inner for dim in places[n.name][-2:]):
        raise Mixing(node, "keys and values come from the stream, so every token sees every other", certain=True)
    if query.name not in places or (isinstance(mask, fx.Node) and mask.name in places):
        raise Mixing(node, "the stream is not its first operand")
    place = places[query.name]
    by_query = argument(node, "is_causal") or (mask is not None and (value_shape(mask) or (1, 1))[-2] != 1)
    if by_query and tracked(place[-2]):
        raise Mixing(node, "its mask differs by query")
    if tracked(place[-1]) or any(holds_tokens(dim) for _, dim in _broad_dims(others[0], place)[2:]):
        raise Mixing(node, "the queries are not along the tokens")
    aligned = [((),) * (rank - _rank(n)) + places[n.name][:-2] for n in inner]
    batches = [_common(node, dims) for dims in zip(place[:-2], *aligned, strict=True)]
    return _resized(node, [*batches, place[-2], ()])


_Rule = Callable[[fx.Node, Places], Place]
_SPECIAL: dict[str, _Rule] = {
    "linear": _product,
    "matmul": _product,
    "mm": _product,
    "bmm": _product,
    "addmm": _product,
    "baddbmm": _product,
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
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
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


def key_offset(attention: fx.Node, rows: int, tokens: int) -> int | None:
    """The index of the stream's first token among the keys of a self-attention; None where that is unclear.

    Joint attention concatenates the stream's tokens with the text's; they are the only piece as long as the stream.
    """
    value, axis = attention.args[2], 2
    shape = (value_shape(value) if isinstance(value, fx.Node) else None) or ()
    if len(shape) != 4 or shape[0] != rows:
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
