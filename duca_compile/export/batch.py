"""Leaves the batch size of a graph open, by comparing what it looks like at two of them.

Captured graphs have every size built in as a number. The same model called with another batch gives the same graph
with other numbers, and those that differ are sizes that grow with the batch: each becomes an expression of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from duca_compile.artifact.manifest import BATCH, Size, TensorSpec
from duca_compile.core.fx_utils import copy_graph
from duca_compile.core.ports import Port
from duca_compile.errors import ExportError, InternalError, first_line
from duca_compile.passes.base import returned

aten = torch.ops.aten


@dataclass(frozen=True)
class OpenGraph:
    """A graph of flat tensors whose batch size, and whose numbers of recomputed tokens, are open.

    It has no side effects: what a variant writes in place is an output here. ``in_place`` names these outputs with the
    inputs whose memory they may take, since nothing else reads them.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    in_place: Mapping[str, str]

    def example(self) -> tuple[Tensor, ...]:
        """Zeros of the kinds of the inputs, at the batch that was traced."""
        kinds = [node.meta["val"] for node in self.module.graph.find_nodes(op="placeholder")]
        return tuple(torch.zeros(kind.shape, dtype=kind.dtype, device=_device(kind)) for kind in kinds)

    def program(self) -> torch.export.ExportedProgram:
        """It as torch.export's program, with symbolic sizes.

        Raises:
            ExportError: an operator in it fixes a size.
        """
        known: dict[str, Any] = {}
        shapes = [
            {axis: _dim(size, known) for axis, size in enumerate(spec.shape) if isinstance(size, Size)} or None
            for spec in self.inputs
        ]
        try:
            with torch.no_grad():
                return torch.export.export(self.module, self.example(), dynamic_shapes=tuple(shapes), strict=False)
        except Exception as error:
            raise ExportError(f"graph {self.name!r}: its sizes cannot stay open: {first_line(error)}") from error


def _device(kind: Tensor) -> torch.device:
    """Of an input; those that passes add without one are indices, which go where they are used."""
    return torch.device("cpu") if kind.device.type == "meta" else kind.device


def _dim(size: Size, known: dict[str, Any]) -> Any:
    dim = known.setdefault(size.name, Dim(size.name))
    scaled = dim if size.factor == 1 else size.factor * dim
    return scaled + size.plus if size.plus else scaled


@dataclass(frozen=True)
class Seen:
    """One graph at one batch size, with the names that files have for its flat inputs and outputs."""

    batch: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: frozenset[str] = frozenset()  # inputs whose second dimension is a number of tokens

    @staticmethod
    def of(
        batch: int,
        module: fx.GraphModule,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        dynamic: Sequence[Port] = (),
    ) -> Seen:
        """The same with ports for names."""
        names, results = (tuple(port.input_name for port in inputs), tuple(port.result_name for port in outputs))
        return Seen(batch, module, names, results, frozenset(port.input_name for port in dynamic))


def open_graph(name: str, one: Seen, other: Seen) -> OpenGraph:
    """The graph that both are at their batch sizes. Where these are the same, all sizes stay numbers.

    Raises:
        ExportError: the two are not the same graph, or something else than a size depends on the batch.
    """
    mine, theirs = list(one.module.graph.nodes), list(other.module.graph.nodes)
    if [(n.op, n.target) for n in mine] != [(n.op, n.target) for n in theirs]:
        raise ExportError(f"graph {name!r} has other operators at batch {one.batch} than at batch {other.batch}")
    fit = Fit(name, one.batch, other.batch)
    nodes = {n.name: n for n in theirs}
    for node in mine:
        if node.op == "get_attr":
            fit.same_constant(str(node.target), one.module, other.module)
    graph = copy_graph(one.module.graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    names = dict(zip(inputs, one.inputs, strict=True))
    specs = tuple(_spec(fit, n, nodes[n.name], name, name in one.dynamic) for n, name in names.items())
    expressions = _Expressions(graph, inputs, specs)
    for node in list(graph.nodes):
        if node.name not in nodes or node.op == "placeholder":
            continue
        found = nodes[node.name]
        node.args = fit.both(node.args, found.args, expressions.node)
        node.kwargs = fit.both(node.kwargs, found.kwargs, expressions.node)
    outputs = tuple(zip(one.outputs, returned(one.module.graph), returned(other.module.graph), strict=True))
    _drop_idle_squeezes(graph)
    in_place = _functional(graph, names, one.outputs)
    graph.lint()
    return OpenGraph(
        name=name,
        module=fx.GraphModule(one.module, graph),
        inputs=specs,
        outputs=tuple(_spec(fit, mine, theirs, result) for result, mine, theirs in outputs),
        in_place=in_place,
    )


def _spec(fit: Fit, mine: fx.Node, theirs: fx.Node, name: str, tokens: bool = False) -> TensorSpec:
    one, other = mine.meta["val"], theirs.meta["val"]
    shape = [fit.size(a, b, mine.name) for a, b in zip(one.shape, other.shape, strict=True)]
    if tokens:
        shape[1] = Size(name)
    return TensorSpec(name, str(one.dtype).removeprefix("torch."), tuple(shape))


class Fit:
    """Tells what a number that differs between two batch sizes is at any."""

    def __init__(self, graph: str, one: int, other: int) -> None:
        self._graph, self._one, self._other = graph, one, other

    def size(self, mine: int, theirs: int, place: str) -> int | Size:
        if mine == theirs:
            return mine
        factor, rest = divmod(theirs - mine, self._other - self._one) if self._other != self._one else (0, 1)
        plus = mine - factor * self._one
        if rest or factor < 0 or plus < 0:
            raise ExportError(
                f"{self._graph!r}: at {place} there is {mine} at batch {self._one} and {theirs} at batch "
                f"{self._other}, which is no multiple of it; export with one batch size (dynamic_batch=False)"
            )
        return Size(BATCH, factor, plus)

    def both(self, mine: Any, theirs: Any, open_size: Callable[[Size], fx.Node]) -> Any:
        """``mine``, with what ``open_size`` makes of each number that differs from ``theirs``."""
        if isinstance(mine, fx.Node):
            return mine
        if isinstance(mine, tuple | list):
            pairs = zip(mine, theirs, strict=True)
            return type(mine)(self.both(a, b, open_size) for a, b in pairs)
        if isinstance(mine, dict):
            return {key: self.both(each, theirs[key], open_size) for key, each in mine.items()}
        if mine == theirs:
            return mine
        if type(mine) is not int or type(theirs) is not int:
            raise ExportError(f"graph {self._graph!r}: {mine!r} becomes {theirs!r} at batch {self._other}")
        size = self.size(mine, theirs, "an argument")
        return open_size(size) if isinstance(size, Size) else size

    def same_constant(self, target: str, one: fx.GraphModule, other: fx.GraphModule) -> None:
        a, b = attrgetter(target)(one), attrgetter(target)(other)
        if a is not b and (a.shape != b.shape or not torch.equal(a, b)):
            raise ExportError(
                f"graph {self._graph!r}: the constant {target!r} depends on the batch; export with one batch size "
                "(dynamic_batch=False)"
            )


class _Expressions:
    """Nodes at the start of a graph that compute sizes from the batch, each once."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[fx.Node], specs: Sequence[TensorSpec]) -> None:
        self._graph, self._last = graph, inputs[-1] if inputs else None
        self._made: dict[Size, fx.Node] = {}
        self._sources = [
            (size, node, axis)
            for node, spec in zip(inputs, specs, strict=True)
            for axis, size in enumerate(spec.shape)
            if isinstance(size, Size) and size.name == BATCH
        ]

    def node(self, size: Size) -> fx.Node:
        if size not in self._made:
            batch = self._batch() if size != Size(BATCH) else None
            self._made[size] = self._batch() if batch is None else self._scaled(batch, size)
        return self._made[size]

    def _batch(self) -> fx.Node:
        plain = Size(BATCH)
        if plain not in self._made:
            if not self._sources:
                raise ExportError("a size depends on the batch, but no input of the graph does")
            size, node, axis = min(self._sources, key=lambda source: (source[0].factor, source[0].plus))
            self._made[plain] = self._add(aten.sym_size.int, node, axis)
            if size.plus:
                self._made[plain] = self._add(operator.sub, self._made[plain], size.plus)
            if size.factor != 1:
                self._made[plain] = self._add(operator.floordiv, self._made[plain], size.factor)
        return self._made[plain]

    def _scaled(self, batch: fx.Node, size: Size) -> fx.Node:
        node = batch if size.factor == 1 else self._add(operator.mul, batch, size.factor)
        return self._add(operator.add, node, size.plus) if size.plus else node

    def _add(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        if self._last is None:
            raise InternalError("a graph without inputs has no size that depends on the batch")
        with self._graph.inserting_after(self._last):
            self._last = self._graph.call_function(target, args)
        return self._last


def _drop_idle_squeezes(graph: fx.Graph) -> None:
    """torch leaves a dimension that is not 1 as it is, where ONNX's operator refuses it."""
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.dim):
        above, dim = node.args
        if isinstance(above, fx.Node) and "val" in above.meta and above.meta["val"].shape[dim] != 1:
            node.replace_all_uses_with(above)
            graph.erase_node(node)


def _functional(graph: fx.Graph, inputs: Mapping[fx.Node, str], outputs: Sequence[str]) -> dict[str, str]:
    """Makes writes into caches new values; the outputs that may take an input's memory, with that input."""
    found: dict[str, str] = {}
    for node in graph.find_nodes(op="call_function", target=aten.index_put_.default):
        node.target = aten.index_put.default
        cache = node.args[0]
        if cache in inputs and len(cache.users) == 1:
            found |= {
                name: inputs[cache] for name, result in zip(outputs, returned(graph), strict=True) if result is node
            }
    return found
