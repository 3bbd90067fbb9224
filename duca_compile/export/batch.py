"""Makes the batch size of a graph dynamic, by comparing captures at two batch sizes.

A captured graph has every size built in as a number. The same model called with another batch size gives the same graph
with different numbers. Those that differ are sizes that grow with the batch, and become expressions of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from duca_compile.artifact.manifest import BATCH, Size, TensorSpec
from duca_compile.core.fx_utils import add_placeholder, copy_graph
from duca_compile.core.ports import Port, argument
from duca_compile.errors import ExportError, InternalError
from duca_compile.export.fold import fold_constants
from duca_compile.export.reasons import describe, reason
from duca_compile.passes.base import returned

aten = torch.ops.aten


class BatchError(ExportError):
    """The batch size of a graph cannot be left open; with that of the example, the model may well be exported."""


class NoBatchError(BatchError):
    """Something in a graph depends on the batch size, and none of its inputs has it."""


@dataclass(frozen=True)
class OpenGraph:
    """A graph of flat tensors with a dynamic batch size and dynamic numbers of recomputed tokens.

    It has no side effects: what a variant writes in place is an output here. ``in_place`` maps the names of these
    outputs to those of the inputs whose memory they may take, since nothing else reads it. ``seen`` holds the captures
    that it was made from.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    in_place: Mapping[str, str]
    seen: tuple[Seen, Seen]

    def example(self) -> tuple[Tensor, ...]:
        """Zeros with the shapes and dtypes of the inputs, at the first captured batch size."""
        kinds = [node.meta["val"] for node in self.module.graph.find_nodes(op="placeholder")]
        return tuple(torch.zeros(kind.shape, dtype=kind.dtype, device=_device(kind)) for kind in kinds)

    def program(self) -> torch.export.ExportedProgram:
        """The graph as a program of torch.export, with symbolic sizes.

        Raises:
            BatchError: an operator fixes one of the sizes.
        """
        known: dict[str, Any] = {}
        shapes = [
            {axis: _dim(size, known) for axis, size in enumerate(spec.shape) if isinstance(size, Size)} or None
            for spec in self.inputs
        ]
        try:
            return _export(self.module, self.example(), tuple(shapes))
        except Exception as error:
            cause = self._failure(tuple(shapes)) or error
            raise BatchError(f"graph {self.name!r}: its sizes cannot be dynamic: {reason(cause)}") from error

    def _failure(self, shapes: tuple[Any, ...]) -> Exception | None:
        """What fails when each node is run by itself, which tells the node."""
        try:
            _export(_NodeByNode(self.module), self.example(), (shapes,))
        except Exception as error:
            return error
        return None


def _export(module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


class _NodeByNode(nn.Module):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return fx.Interpreter(self.module).run(*inputs)


def _device(kind: Tensor) -> torch.device:
    """The device of an input. Index inputs, which passes add on the meta device, go to the device that uses them."""
    return torch.device("cpu") if kind.device.type == "meta" else kind.device


def _dim(size: Size, known: dict[str, Any]) -> Any:
    dim = known.setdefault(size.name, Dim(size.name))
    scaled = dim if size.factor == 1 else size.factor * dim
    return scaled + size.plus if size.plus else scaled


@dataclass(frozen=True)
class Seen:
    """One graph at one batch size, with the names of its flat inputs and outputs in files."""

    batch: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: frozenset[str] = frozenset()  # inputs whose second dimension is a number of tokens

    def reading(self, name: str, like: Tensor) -> Seen:
        """The same with one more input, which nothing in the graph reads."""
        graph = copy_graph(self.module.graph)
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            add_placeholder(graph, argument(name), like)
        return replace(self, module=fx.GraphModule(self.module, graph), inputs=(name, *self.inputs))

    @staticmethod
    def of(
        batch: int,
        module: fx.GraphModule,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        dynamic: Sequence[Port] = (),
    ) -> Seen:
        """The same, named by ports."""
        names, results = (tuple(port.input_name for port in inputs), tuple(port.result_name for port in outputs))
        return Seen(batch, module, names, results, frozenset(port.input_name for port in dynamic))


def open_graph(name: str, one: Seen, other: Seen) -> OpenGraph:
    """The one graph behind two captures at different batch sizes. If the sizes are equal, they stay numbers.

    Raises:
        BatchError: the two are not the same graph, or something other than a size depends on the batch.
    """
    one_nodes, other_nodes = list(one.module.graph.nodes), list(other.module.graph.nodes)
    if [(n.op, n.target) for n in one_nodes] != [(n.op, n.target) for n in other_nodes]:
        raise BatchError(f"graph {name!r} has different operators at batch size {one.batch} and {other.batch}")
    fit = Fit(name, one.batch, other.batch)
    counterparts = {n.name: n for n in other_nodes}
    constants = {n.name: fit.constant(n, one.module, other.module) for n in one_nodes if n.op == "get_attr"}
    graph = copy_graph(one.module.graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    names = dict(zip(inputs, one.inputs, strict=True))
    specs = tuple(_spec(fit, n, counterparts[n.name], name, name in one.dynamic) for n, name in names.items())
    expressions = _Expressions(graph, inputs, specs)
    for node in list(graph.nodes):
        if node.name not in counterparts or node.op == "placeholder":
            continue
        if (repeats := constants.get(node.name)) is not None:
            repeats.insert(graph, node, expressions.node(Size(BATCH)))
        counterpart = counterparts[node.name]
        node.args = fit.merge(node.args, counterpart.args, expressions.node)
        node.kwargs = fit.merge(node.kwargs, counterpart.kwargs, expressions.node)
    outputs = tuple(zip(one.outputs, returned(one.module.graph), returned(other.module.graph), strict=True))
    _drop_no_op_squeezes(graph)
    in_place = _functionalize(graph, names, one.outputs)
    graph.lint()
    module = fx.GraphModule(one.module, graph)
    fold_constants(module)
    return OpenGraph(
        name=name,
        module=module,
        inputs=specs,
        outputs=tuple(_spec(fit, a, b, result) for result, a, b in outputs),
        in_place=in_place,
        seen=(one, other),
    )


def _spec(fit: Fit, node: fx.Node, counterpart: fx.Node, name: str, tokens: bool = False) -> TensorSpec:
    one, other = node.meta["val"], counterpart.meta["val"]
    shape = [fit.size(a, b, node.name) for a, b in zip(one.shape, other.shape, strict=True)]
    if tokens:
        shape[1] = Size(name)
    return TensorSpec(name, str(one.dtype).removeprefix("torch."), tuple(shape))


class Fit:
    """Expresses numbers that differ between two batch sizes by the batch size."""

    def __init__(self, graph: str, one_batch: int, other_batch: int) -> None:
        self._graph, self._one_batch, self._other_batch = graph, one_batch, other_batch

    def size(self, one: int, other: int, place: str) -> int | Size:
        if one == other:
            return one
        growth = self._other_batch - self._one_batch
        factor, rest = divmod(other - one, growth) if growth else (0, 1)
        plus = one - factor * self._one_batch
        if rest or factor < 0 or plus < 0:
            raise BatchError(
                f"graph {self._graph!r}: a size at {place} is {one} at batch size {self._one_batch} but {other} at "
                f"{self._other_batch}, which is not linear in it"
            )
        return Size(BATCH, factor, plus)

    def merge(self, one: Any, other: Any, open_size: Callable[[Size], fx.Node]) -> Any:
        """``one``, with each number that differs from ``other`` replaced by what ``open_size`` makes of it."""
        if isinstance(one, fx.Node):
            return one
        if isinstance(one, tuple | list):
            pairs = zip(one, other, strict=True)
            return type(one)(self.merge(a, b, open_size) for a, b in pairs)
        if isinstance(one, dict):
            return {key: self.merge(value, other[key], open_size) for key, value in one.items()}
        if one == other:
            return one
        if type(one) is not int or type(other) is not int:
            raise BatchError(f"graph {self._graph!r}: {one!r} becomes {other!r} at batch size {self._other_batch}")
        size = self.size(one, other, "an argument")
        return open_size(size) if isinstance(size, Size) else size

    def constant(self, node: fx.Node, one: fx.GraphModule, other: fx.GraphModule) -> _Repeats | None:
        """How a constant, which may repeat with the batch rows, depends on the batch size; None where it does not."""
        get = attrgetter(str(node.target))
        a, b = get(one), get(other)
        if a is b or (a.shape == b.shape and torch.equal(a, b)):
            return None
        repeats = _Repeats.of(a, self._one_batch)
        if repeats is None or not torch.equal(repeats.at(a, self._other_batch), b):
            user = next(iter(node.users), node)
            raise BatchError(f"graph {self._graph!r}: the constant that {describe(user)} reads depends on the batch")
        return repeats


@dataclass(frozen=True)
class _Repeats:
    """A constant whose first ``length`` entries along an axis are there once for each batch row."""

    axis: int
    length: int

    @staticmethod
    def of(value: Tensor, batch: int) -> _Repeats | None:
        for axis, size in enumerate(value.shape):
            repeats = _Repeats(axis, size // batch)
            if size and size % batch == 0 and torch.equal(repeats.at(value, batch), value):
                return repeats
        return None

    def at(self, value: Tensor, batch: int) -> Tensor:
        """The constant at another batch size."""
        return value.narrow(self.axis, 0, self.length).repeat(self._counts(value.dim(), batch))

    def insert(self, graph: fx.Graph, constant: fx.Node, batch: fx.Node) -> None:
        """Has all that reads ``constant`` read as many repetitions of it as ``batch`` says."""
        users = list(constant.users)
        with graph.inserting_before(next(node for node in graph.nodes if node in constant.users)):
            once = graph.call_function(aten.slice.Tensor, (constant, self.axis, 0, self.length))
            counts = self._counts(constant.meta["val"].dim(), batch)
            repeated = graph.call_function(aten.repeat.default, (once, counts))
        for user in users:
            user.replace_input_with(constant, repeated)

    def _counts(self, dims: int, batch: Any) -> list[Any]:
        return [batch if axis == self.axis else 1 for axis in range(dims)]


class _Expressions:
    """Nodes at the start of a graph that compute each size from the batch size, once."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[fx.Node], specs: Sequence[TensorSpec]) -> None:
        self._graph, self._last = graph, inputs[-1] if inputs else None
        self._nodes: dict[Size, fx.Node] = {}
        self._sources = [
            (size, node, axis)
            for node, spec in zip(inputs, specs, strict=True)
            for axis, size in enumerate(spec.shape)
            if isinstance(size, Size) and size.name == BATCH
        ]

    def node(self, size: Size) -> fx.Node:
        if size not in self._nodes:
            batch = self._batch() if size != Size(BATCH) else None
            self._nodes[size] = self._batch() if batch is None else self._scaled(batch, size)
        return self._nodes[size]

    def _batch(self) -> fx.Node:
        plain = Size(BATCH)
        if plain not in self._nodes:
            if not self._sources:
                raise NoBatchError("a size depends on the batch, but no input of the graph does")
            size, node, axis = min(self._sources, key=lambda source: (source[0].factor, source[0].plus))
            self._nodes[plain] = self._add(aten.sym_size.int, node, axis)
            if size.plus:
                self._nodes[plain] = self._add(operator.sub, self._nodes[plain], size.plus)
            if size.factor != 1:
                self._nodes[plain] = self._add(operator.floordiv, self._nodes[plain], size.factor)
        return self._nodes[plain]

    def _scaled(self, batch: fx.Node, size: Size) -> fx.Node:
        node = batch if size.factor == 1 else self._add(operator.mul, batch, size.factor)
        return self._add(operator.add, node, size.plus) if size.plus else node

    def _add(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        if self._last is None:
            raise InternalError("a graph without inputs has no size that depends on the batch")
        with self._graph.inserting_after(self._last):
            self._last = self._graph.call_function(target, args)
        return self._last


def _drop_no_op_squeezes(graph: fx.Graph) -> None:
    """Removes squeezes of dimensions other than 1: torch ignores them, but ONNX rejects them."""
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.dim):
        above, dim = node.args
        if isinstance(above, fx.Node) and "val" in above.meta and above.meta["val"].shape[dim] != 1:
            node.replace_all_uses_with(above)
            graph.erase_node(node)


def _functionalize(graph: fx.Graph, inputs: Mapping[fx.Node, str], outputs: Sequence[str]) -> dict[str, str]:
    """Replaces writes into caches by new values; returns which outputs may take the memory of which input."""
    in_place: dict[str, str] = {}
    for node in graph.find_nodes(op="call_function", target=aten.index_put_.default):
        node.target = aten.index_put.default
        cache = node.args[0]
        if cache in inputs and len(cache.users) == 1:
            in_place |= {
                name: inputs[cache] for name, result in zip(outputs, returned(graph), strict=True) if result is node
            }
    return in_place
