"""Which inputs are the latent: those from which the residual stream starts that ends in the model's result.

Conditions may be larger than the latent, or shaped more like the result. What tells them apart is how they reach the
result: a text is read by attention, a control joins the stream behind its start, tokens of a reference are cut off at
its end. Only where several inputs start the stream, shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import fx

from duca_compile.analysis.closure import Ancestors
from duca_compile.analysis.tokens import CONCATENATIONS, ELEMENTWISE
from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import CapturedGraph
from duca_compile.errors import StructureError, UsageError
from duca_compile.frontend.operators import argument

_SUMS = {"add", "addcmul", "lerp"}
_SLICES = {"slice", "narrow"}
_ALONG_CHANNELS = {"linear", "layer_norm", "rms_norm", "_fused_rms_norm", "native_layer_norm", "softmax", "_softmax"}
_KEY = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")


class _Part(NamedTuple):
    """Some entries of an axis, counted from the last: ``start`` up to and without ``stop``."""

    axis: int
    start: int
    stop: int


class _Value(NamedTuple):
    """A node's value, or only a part of it."""

    node: fx.Node
    part: _Part | None = None


def latent_arguments(captured: CapturedGraph, timestep: str, requested: str | None = None) -> tuple[str, ...]:
    """The inputs that are denoised: those of the latent behind the first result, then those behind other results.

    Args:
        captured: a prepared graph.
        timestep: the input that is the timestep.
        requested: the path of the latent's argument, such as ``"x"`` or ``"added.x"``, if the caller gave it.

    Raises:
        UsageError: ``requested`` is no floating-point tensor of the call.
        StructureError: there is no input of a floating-point type besides the timestep, or several may be the latent.
    """
    candidates = _candidates(captured, timestep)
    if requested is not None:
        return _names(_requested(candidates, captured, requested))
    if not candidates:
        raise StructureError(
            f"no latent among the tensor inputs {list(captured.inputs)}: besides the timestep {timestep!r} there is "
            "none of a floating-point type."
        )
    results = captured.graph.output_node().all_input_nodes
    first = _latent(candidates, results[:1], results)
    found = dict.fromkeys(_names(candidates[first]))
    for result in results[1:]:
        rest = {path: nodes for path, nodes in candidates.items() if not found.keys() & set(_names(nodes))}
        alike = [path for path, nodes in rest.items() if [value_shape(n) for n in nodes] == [value_shape(result)]]
        starting = [path for path in _starting(rest, [result]) if path in alike] if alike else []
        found |= dict.fromkeys(_names(rest[starting[0]])) if len(starting) == 1 else {}
    return tuple(found)


def rewritten_inputs(captured: CapturedGraph) -> list[str]:
    """The inputs that forward itself replaces at each call, in containers among its arguments."""
    labels = tuple(write.label for write in captured.writes)
    paths = zip(captured.inputs, captured.argument_paths, strict=True)
    return [name for name, path in paths if labels and path.startswith(labels)]


def readable_path(path: str) -> str:
    """A path among the arguments as users write it: ``added.x`` for ``added['x']``."""
    return _KEY.sub(lambda match: f".{match[1] or match[2] or match[3]}", path)


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _candidates(captured: CapturedGraph, timestep: str) -> dict[str, list[fx.Node]]:
    """The floating-point inputs but the timestep, by the path of their argument: a list of tensors is one argument."""
    paths = dict(zip(captured.inputs, captured.argument_paths, strict=True))
    paths = {name: path for name, path in paths.items() if name not in rewritten_inputs(captured)}
    found: dict[str, list[fx.Node]] = {}
    for node in captured.graph.nodes:
        is_argument = node.op == "placeholder" and node.name in paths and node.name != timestep
        if is_argument and node.meta["val"].is_floating_point():
            found.setdefault(paths[node.name], []).append(node)
    return found


def _requested(candidates: Mapping[str, list[fx.Node]], captured: CapturedGraph, requested: str) -> list[fx.Node]:
    for path, nodes in candidates.items():
        if requested in (path, readable_path(path)):
            return nodes
    listed = ", ".join(map(readable_path, candidates)) or f"none of {', '.join(captured.inputs)}"
    raise UsageError(f"latent={requested!r} is not a floating-point tensor argument of this call; these are: {listed}")


def _latent(candidates: Mapping[str, list[fx.Node]], first: list[fx.Node], results: list[fx.Node]) -> str:
    """The path of the latent behind the first result."""
    if len(candidates) == 1:
        return next(iter(candidates))
    starting = _starting(candidates, first)
    scores_in_turn = (_exactness, _similarity) if starting else (_exactness, _similarity, _elements)
    starting = starting or list(candidates)
    for score in scores_in_turn:
        scores = {path: score(candidates[path], results) for path in starting}
        starting = [path for path in starting if scores[path] == max(scores.values())]
    if len(starting) == 1:
        return starting[0]
    listed = " and ".join(map(readable_path, starting))
    raise StructureError(
        f"{listed} may each be the latent: all of them start the residual stream, and their shapes are equally like "
        f"that of the result. Name it: optimize(model, latent={readable_path(starting[0])!r})."
    )


def _exactness(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> tuple[int, int]:
    """Whether its tensors have the shapes of the first results."""
    shapes = [value_shape(node) for node in results[: len(nodes)]]
    return int([value_shape(node) for node in nodes] == shapes), 0


def _similarity(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> tuple[int, int]:
    """Whether it has as many dimensions as the first result, and how many sizes behind the first are equal."""
    shape, sizes = value_shape(results[0]) or () if results else (), value_shape(nodes[0]) or ()
    if not shape or len(sizes) != len(shape):
        return 0, 0
    return 1, sum(a == b for a, b in zip(sizes[1:], shape[1:], strict=True))


def _elements(nodes: Sequence[fx.Node], _: Sequence[fx.Node]) -> tuple[int, int]:
    return prod(value_shape(nodes[0]) or ()), 0


def _starting(candidates: Mapping[str, list[fx.Node]], results: list[fx.Node]) -> list[str]:
    """The candidates that the streams which end in ``results`` start from; none where there is no such stream.

    One that joins a stream behind additions that another one has passed is a condition of it.
    """
    follow = _Carried()
    readers: dict[_Value, list[_Value]] = {}
    waiting = [_Value(result) for result in results]
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        for source in follow(value):
            readers.setdefault(source, []).append(value)
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    passed = {path: _additions(nodes, seen, readers, follow) for path, nodes in candidates.items()}
    return [path for path, own in passed.items() if own and not any(own < other for other in passed.values())]


def _additions(
    nodes: Iterable[fx.Node], seen: Iterable[_Value], readers: Mapping[_Value, list[_Value]], follow: _Carried
) -> frozenset[fx.Node]:
    """The residual additions that carry these inputs on."""
    waiting = [value for value in seen if value.node in set(nodes)]
    reached = set(waiting)
    while waiting:
        new = [reader for reader in readers.get(waiting.pop(), ()) if reader not in reached]
        reached.update(new)
        waiting += new
    return frozenset(value.node for value in reached if follow.carried(value.node) is not None)


class _Carried:
    """Leads from a value to those that it carries on: not to what branches add, nor to tokens that are cut off."""

    def __init__(self) -> None:
        self._order: dict[fx.Node, int] = {}
        self._known: dict[fx.Node, fx.Node | None] = {}

    def carried(self, node: fx.Node) -> fx.Node | None:
        """The stream operand of a residual addition; None for any other node."""
        if op_name(node) not in _SUMS:
            return None
        if node not in self._known:
            self._known[node] = self._stream_operand(node)
        return self._known[node]

    def _stream_operand(self, node: fx.Node) -> fx.Node | None:
        self._order = self._order or {each: place for place, each in enumerate(node.graph.nodes)}
        same = [each for each in node.all_input_nodes if value_shape(each) == value_shape(node)]
        if len(same) < 2:
            return None
        above = {each: Ancestors(each, self._order) for each in same}
        for each in same:
            others = [above[other] for other in same if other is not each]
            if any(each in other for other in others):
                return each
        for each in same:  # parallel branches, x + f(x) + g(x)
            earlier = self.carried(each)
            while earlier is not None:
                if any(earlier in above[other] for other in same if other is not each):
                    return each
                earlier = self.carried(earlier)
        return None

    def __call__(self, value: _Value) -> list[_Value]:
        node, part = value
        stream = self.carried(node)
        if stream is not None:
            return [_Value(stream, part)]
        cut = _cut(node)
        if cut is not None:
            return [_composed(cut, part)]
        if part is None:
            return [_Value(each) for each in node.all_input_nodes]
        if op_name(node) in CONCATENATIONS:
            return [*_pieces(node, part)]
        if op_name(node) in ELEMENTWISE:
            size = _size(node, part.axis)
            return [_Value(each, part if _size(each, part.axis) == size else None) for each in node.all_input_nodes]
        if op_name(node) in _ALONG_CHANNELS and part.axis != -1:
            return [_Value(each, part if i == 0 else None) for i, each in enumerate(node.all_input_nodes)]
        return [_Value(each) for each in node.all_input_nodes]


def _size(node: fx.Node, axis: int) -> int:
    shape = value_shape(node) or ()
    return shape[axis] if len(shape) >= -axis else 1


def _cut(node: fx.Node) -> _Value | None:
    """What a slice, or one piece of a split, takes of its operand; None for any other node."""
    sources = node.all_input_nodes
    if op_name(node) == "getitem":
        return _piece_of_split(node)
    if op_name(node) not in _SLICES or len(sources) != 1:
        return None
    shape = value_shape(sources[0]) or ()
    axis, start, step = (argument(node, name) for name in ("dim", "start", "step"))
    if step not in (None, 1) or not isinstance(axis, int) or not isinstance(start, int | None):
        return None
    start = (start or 0) % shape[axis] if (start or 0) < 0 else start or 0
    axis = axis % len(shape) - len(shape)
    return _Value(sources[0], _Part(axis, start, start + _size(node, axis)))


def _piece_of_split(node: fx.Node) -> _Value | None:
    split, number = node.args
    if not isinstance(split, fx.Node) or not isinstance(number, int) or not split.all_input_nodes:
        return None
    axis = argument(split, "dim")
    if op_name(split) not in ("chunk", "split", "split_with_sizes", "tensor_split") or not isinstance(axis, int):
        return None
    values = split.meta["val"]
    axis = axis % values[0].dim() - values[0].dim()
    sizes = [each.shape[axis] for each in values]
    start = sum(sizes[:number])
    return _Value(split.all_input_nodes[0], _Part(axis, start, start + sizes[number]))


def _composed(cut: _Value, part: _Part | None) -> _Value:
    """A part of what was cut out; where they are of two axes, all that was cut out."""
    inner = cut.part
    if part is None or inner is None or part.axis != inner.axis:
        return cut
    return _Value(cut.node, _Part(inner.axis, inner.start + part.start, inner.start + part.stop))


def _pieces(node: fx.Node, part: _Part) -> Iterator[_Value]:
    """The operands of a concatenation from which these entries come."""
    pieces = node.args[0]
    dim = argument(node, "dim")
    rank = len(value_shape(node) or ())
    if not isinstance(pieces, list | tuple) or not isinstance(dim, int) or dim % rank - rank != part.axis:
        yield from (_Value(each, part) for each in node.all_input_nodes)
        return
    start = 0
    for piece in pieces:
        if isinstance(piece, fx.Node):
            size = _size(piece, part.axis)
            low, high = max(part.start, start), min(part.stop, start + size)
            if low < high:
                yield _Value(piece, _Part(part.axis, low - start, high - start))
            start += size
