"""Runs the graphs that were written in an engine, on the example's values, and compares them with the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from duca_compile.artifact.engines import open_engine
from duca_compile.artifact.engines.base import Engine, Options
from duca_compile.artifact.manifest import Graph, Manifest, TensorSpec
from duca_compile.core.ports import PortKind, named_input, named_result
from duca_compile.errors import ExportError
from duca_compile.export.batch import OpenGraph, Seen
from duca_compile.export.reasons import describe, plain

if TYPE_CHECKING:
    from duca_compile.export.onnx import Translation

DIFFERENCE = 1e-4  # of a result, relative to its norm: what another order of additions may make
ROUNDING = 4  # times the rounding of the eager graph, where that is more
_HUGE = 1e30  # numbers from here on, as in masks, would hide all others in a norm
_STATE = {PortKind.GAP: 2.0, PortKind.ORDERS: 2.0, PortKind.FACTOR: 0.5}  # of a forecast


@dataclass(frozen=True)
class Written:
    """An artifact that is complete but for the file of its manifest.

    Attributes:
        graphs: what was written. A graph comes after those whose results it reads in the same step.
        translations: how the values in the files are called, where files hold values, by graph.
    """

    folder: Path
    manifest: Manifest
    graphs: Sequence[OpenGraph]
    translations: Mapping[str, Translation]


def check(written: Written, calls: Mapping[int, Mapping[str, Tensor]], backend: str) -> None:
    """Runs each graph in an engine and compares its results with those of the eager graph.

    Args:
        calls: for each batch size, the tensors of a call by input.
        backend: the engine.

    Raises:
        ExportError: the engine cannot run a graph, or gives other values; names the graph and the result, and where
            they begin to differ the operator and its source line.
        BackendError: the engine is not installed.
    """
    engine = open_engine(backend, written.folder, written.manifest, Options())
    runners = [_Runner(written, graph, engine, backend) for graph in written.graphs]
    with torch.no_grad():
        for batch, call in calls.items():
            values = _Values(call)
            for runner in runners:
                seen = next(each for each in runner.graph.seen if each.batch == batch)
                inputs = values.inputs(seen)
                values.add(dict(zip(seen.outputs, runner.check(seen, inputs), strict=True)))


class _Values:
    """The values of inputs by name: those of a call, results of graphs that ran, and made-up ones."""

    def __init__(self, call: Mapping[str, Tensor]) -> None:
        self._known = dict(call)
        self._random = torch.Generator().manual_seed(0)
        self._device = next(iter(call.values())).device

    def inputs(self, seen: Seen) -> list[Tensor]:
        nodes = seen.module.graph.find_nodes(op="placeholder")
        return [self._value(name, node.meta["val"]) for name, node in zip(seen.inputs, nodes, strict=True)]

    def add(self, results: Mapping[str, Tensor]) -> None:
        """Results, which later graphs may read; the first of each name counts."""
        for name, result in results.items():
            port = named_result(name)
            if port is not None and not port.order:  # the same values again have no differences
                self._known.setdefault(port.input_name, result)

    def _value(self, name: str, like: Tensor) -> Tensor:
        if name in self._known:
            return self._known[name]
        device = self._device if like.device.type == "meta" else like.device
        return self._made_up(name, like).to(device, like.dtype)

    def _made_up(self, name: str, like: Tensor) -> Tensor:
        port = named_input(name)
        if port is not None and port.kind is PortKind.TOKENS:
            return self._tokens(*like.shape)
        if port is not None and port.kind in _STATE:
            return torch.full(like.shape, _STATE[port.kind])
        if like.dtype is torch.bool:  # the rows that a full step refreshes
            return (torch.arange(like.numel()) % 2 == 0).reshape(like.shape)
        return torch.randn(like.shape, generator=self._random)

    def _tokens(self, rows: int, tokens: int) -> Tensor:
        """Half of the tokens, others in each row."""
        half = max(1, tokens // 2)
        return torch.stack([torch.randperm(tokens, generator=self._random)[:half].sort().values for _ in range(rows)])


@dataclass(frozen=True)
class _Runner:
    """Runs one graph as it was written."""

    written: Written
    graph: OpenGraph
    engine: Engine
    backend: str

    def check(self, seen: Seen, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results of the eager graph. Raises ExportError where those of the engine are others."""
        expected = _run(fx.Interpreter(seen.module), inputs)
        found = self._outputs(self.written.manifest.graphs[self.graph.name], inputs)
        exact: Sequence[Tensor] | None = None
        for place, name in enumerate(seen.outputs):
            if distance(found[place], expected[place]) <= DIFFERENCE:
                continue
            exact = _run(_Wide(seen.module), inputs) if exact is None else exact
            if problem := _problem(found[place], expected[place], exact[place]):
                raise ExportError(
                    f"graph {self.graph.name!r}: under {self.backend}, {name!r} {problem}{self._where(inputs)}. "
                    "To write the artifact all the same, export with check=False"
                )
        return expected

    def _outputs(self, graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the engine gives. Raises ExportError where it cannot run the graph."""
        try:
            outputs = self.engine.function(self.graph.name, graph)(*[_given(each, self.backend) for each in inputs])
        except Exception as error:
            message = plain(str(error))
            at = next((f" ({describe(node)})" for node in self._named_in(message)), "")
            raise ExportError(
                f"graph {self.graph.name!r} does not run here under {self.backend}{at}: {message}. If it is for "
                "another engine or provider, export with check=False"
            ) from error
        return [_returned(value, spec) for value, spec in zip(outputs, graph.outputs, strict=True)]

    def _named_in(self, message: str) -> Iterator[fx.Node]:
        """The nodes of the graph that a message of the engine names."""
        translation = self.written.translations.get(self.graph.name)
        words = {word.strip("'\".,:;()[]") for word in message.split()}
        if translation is not None:
            yield from (node for name, node in translation.sources.items() if name in words)

    def _where(self, inputs: Sequence[Tensor]) -> str:
        """Where the values begin to differ, if that can be told."""
        translation = self.written.translations.get(self.graph.name)
        try:
            return "" if translation is None else self._first_wrong(translation, inputs)
        except ExportError:  # the engine fuses what it cannot run by itself
            return ""

    def _first_wrong(self, translation: Translation, inputs: Sequence[Tensor]) -> str:
        narrow, wide = (translation.values(inputs, kind) for kind in (fx.Interpreter, _Wide))
        with translation.with_outputs(narrow) as (file, names):
            specs = [TensorSpec(name, _dtype(narrow[node]), tuple(narrow[node].shape)) for name, node in names.items()]
            graph = self.written.manifest.graphs[self.graph.name]
            extended = replace(graph, file=file, outputs=(*graph.outputs, *specs))
            outputs = [translation.same.get(spec.name) for spec in graph.outputs]
            found = dict(zip([*outputs, *names.values()], self._outputs(extended, inputs), strict=True))
        for node in narrow:
            if node in found and (problem := _problem(found[node], narrow[node], wide[node])):
                return f"; it begins at {describe(node)}, whose result {problem}"
        return ""


def _problem(found: Tensor, expected: Tensor, exact: Tensor) -> str | None:
    """What is wrong with a result, in words that follow its name; None if it is as right as the expected one.

    Args:
        exact: the expected one in a wider type, which tells how much of a difference is rounding.
    """
    exact = torch.where(expected.isfinite(), exact, expected)  # where a narrow type overflows, so may the engine's
    rounding, error = distance(expected, exact), distance(found, exact)
    if not isfinite(rounding):
        rounding, error = 0.0, distance(found, expected)
    if error <= max(DIFFERENCE, ROUNDING * rounding):
        return None
    if isfinite(error):
        return f"differs from the model's by {error:.1e} of its norm, where rounding makes {rounding:.1e}"
    wrong = expected.isfinite() & ~found.isfinite() if found.shape == expected.shape else None
    if wrong is None:
        return f"has the shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    return f"is NaN or infinite in {int(wrong.sum())} of {wrong.numel()} places where the model's is finite"


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of ``expected``.

    Infinite where the shapes differ, or where one is NaN, infinite or huge and the other is not.
    """
    if found.shape != expected.shape:
        return inf
    one, other = (tensor.detach().to("cpu", _WIDE) for tensor in (found, expected))
    extreme = ~(other.abs() < _HUGE)
    if not torch.allclose(one[extreme], other[extreme], rtol=1e-3, equal_nan=True):
        return inf
    one, other = one[~extreme], other[~extreme]
    if not one.isfinite().all():
        return inf
    difference, norm = float((one - other).norm()), float(other.norm())
    return difference / norm if norm else difference


_WIDE = torch.float64


class _Wide(fx.Interpreter):
    """Runs a graph with float64 for every floating type, and with the same integers and booleans."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _widened(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _widened(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_aggregate((args, kwargs), _widened)
        return super().call_function(target, args, kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDE) if value.dtype.is_floating_point else value
    return _WIDE if isinstance(value, torch.dtype) and value.is_floating_point else value


def _run(interpreter: fx.Interpreter, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The results; inputs that the graph writes to are copied before."""
    return tuple(interpreter.run(*[tensor.clone() for tensor in inputs]))


# ---- values as engines have them


def _given(tensor: Tensor, backend: str) -> Any:
    dense = tensor.detach().cpu().contiguous()
    if dense.dtype is not torch.bfloat16:
        return dense.numpy().copy()  # the engine may write to it
    return dense.view(torch.int16).numpy().copy() if backend == "openvino" else dense.clone()


def _returned(value: Any, spec: TensorSpec) -> Tensor:
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.utils.dlpack.from_dlpack(value)
    dtype = getattr(torch, spec.dtype)
    if dtype is torch.bfloat16 and tensor.dtype is torch.int16:  # in which OpenVINO's are kept
        return tensor.view(dtype)
    return tensor.to(dtype)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
