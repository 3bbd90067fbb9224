"""The OpenVINO backend for CPUs. The model's weights are inputs of each variant, so that all variants share them.

OpenVINO would repack constant weights, once for each variant. As inputs they are packed in each call, which takes
little time and no memory, and changes to them take effect. The weights of convolutions must be constants: they are
copied, and a variant is recompiled when they have changed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, export

from duca_compile.analysis.closure import ancestors
from duca_compile.backends.base import CompilingBackend, Lifted
from duca_compile.core.fx_utils import copy_graph
from duca_compile.core.lock import COMPILING
from duca_compile.core.tensors import version
from duca_compile.errors import BackendError, first_line, missing_package
from duca_compile.runtime.openvino import InferRequests, cpu_options

with missing_package("openvino"):
    import openvino

log = logging.getLogger("duca_compile")

aten = torch.ops.aten
_TRACED_COUNT = 3  # tokens in the example of an index input; the compiled code does not depend on it
_REPLACED = {
    aten.index_put_.default: aten.index_put.default,  # OpenVINO's graphs are functional
    aten.empty_like.default: aten.zeros_like.default,  # it has no rule for tensors without values
}
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)


class OpenVINOBackend(CompilingBackend):
    """OpenVINO's CPU plugin, with one model for each variant; other token counts do not recompile.

    It computes in float32, whatever the dtypes of the graph, on ``torch.get_num_threads()`` threads. Inputs and outputs
    are not copied; the caches that a partial step updates are new tensors.
    """

    name = "openvino"
    label = "OpenVINO"
    advice = "Ask for backend='inductor' or backend='eager'."

    def lower(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        devices = {str(t.device) for t in (*weights, *tensors)}
        if devices != {"cpu"}:
            raise BackendError(f"its tensors are on {sorted(devices)}, and this backend runs on the CPU")
        return _CompiledFunction(lifted, weights, tensors)

    def makes_unusable(self, error: Exception) -> bool:
        return isinstance(error, BackendError)  # tensors are not on the CPU

    def reason(self, error: Exception) -> str:
        """Why compiling failed: the operators without a conversion rule, if that is the reason."""
        rules = [line.lstrip("- ") for line in str(error).splitlines() if line.startswith("--")]
        return " ".join(rules) or first_line(error)


class _CompiledFunction:
    """A function of the weights, then the tensors; any number of threads may call it."""

    def __init__(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> None:
        self._graph, self._weights = lifted.graph, len(weights)
        self._dynamic = frozenset(self._weights + i for i in lifted.dynamic)
        self._constants = _constants(lifted.graph, self._weights)
        self._model = self._compile((*weights, *tensors))

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        model = self._model
        if model.stamp != self._stamp(arguments):
            log.info("weights that are constants in a variant have changed: OpenVINO recompiles it")
            with COMPILING:
                model = self._model = self._compile(arguments)
        return model.run(arguments)

    def _compile(self, arguments: Sequence[Tensor]) -> _Model:
        compiled = _compiled(self._graph, arguments, self._dynamic, self._constants)
        return _Model(compiled, self._weights, self._stamp(arguments))

    def _stamp(self, arguments: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Address and version of each constant: it differs if a constant was replaced or written in place."""
        return [(arguments[i].data_ptr(), version(arguments[i])) for i in self._constants]


@dataclass(frozen=True)
class _Compiled:
    model: Any  # openvino.CompiledModel
    inputs: list[int]  # indices of the arguments that are its inputs
    outputs: list[Tensor]  # on the meta device: their shapes and dtypes


class _Model:
    """Runs a compiled variant; ``stamp`` identifies the constants that it was compiled with."""

    def __init__(self, compiled: _Compiled, weights: int, stamp: list[tuple[int, int]]) -> None:
        self._requests, self._outputs, self.stamp = InferRequests(compiled.model), compiled.outputs, stamp
        inputs = list(enumerate(compiled.inputs))
        self._weights = [(i, argument) for i, argument in inputs if argument < weights]
        self._tensors = [(i, argument) for i, argument in inputs if argument >= weights]

    def run(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def bind(request: Any) -> None:
            for i, argument in self._weights:
                request.set_input_tensor(i, _shared(arguments[argument]))

        results = tuple(torch.empty(like.shape, dtype=like.dtype) for like in self._outputs)
        self._requests.run(
            [(i, _shared(arguments[argument])) for i, argument in self._tensors],
            map(_shared, results),
            [arguments[argument].data_ptr() for _, argument in self._weights],
            bind,
        )
        return results


def _shared(tensor: Tensor) -> Any:
    """An ``openvino.Tensor`` that shares the memory of a contiguous tensor on the CPU."""
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        return openvino.Tensor(tensor.detach().view(torch.int16).numpy(), tensor.shape, openvino.Type.bf16)
    return openvino.Tensor(tensor.detach().numpy(), shared_memory=True)


def _constants(graph: fx.Graph, count: int) -> tuple[int, ...]:
    """Indices of those of the first ``count`` inputs, the weights, that convolution kernels are computed from."""
    kernels = {n.args[1] for n in graph.nodes if getattr(n.target, "overloadpacket", None) in _CONVOLUTIONS}
    sources = {source for kernel in kernels for source in (kernel, *ancestors(kernel))}
    weights = graph.find_nodes(op="placeholder")[:count]
    return tuple(i for i, node in enumerate(weights) if node in sources)


def _with_constants(graph: fx.Graph, constants: Mapping[int, Tensor]) -> fx.GraphModule:
    """The functional form of a graph, with some of its inputs replaced by constants."""
    functional = copy_graph(graph)
    for node in functional.nodes:
        node.target = _REPLACED.get(node.target, node.target)
    inputs = functional.find_nodes(op="placeholder")
    for i in constants:
        with functional.inserting_after(inputs[-1]):
            constant = functional.create_node("get_attr", f"constant_{i}")
        inputs[i].replace_all_uses_with(constant)
        functional.erase_node(inputs[i])
    return fx.GraphModule({f"constant_{i}": tensor for i, tensor in constants.items()}, functional)


def _compiled(
    graph: fx.Graph, arguments: Sequence[Tensor], dynamic: frozenset[int], constants: tuple[int, ...]
) -> _Compiled:
    """Compiles a graph for arguments of these shapes; the second dimension of those in ``dynamic`` may vary."""
    module = _with_constants(graph, {i: arguments[i].detach() for i in constants})
    inputs = [i for i in range(len(arguments)) if i not in constants]
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    examples = tuple(
        arguments[i].new_zeros(len(arguments[i]), _TRACED_COUNT) if i in dynamic else arguments[i].detach()
        for i in inputs
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by the converter
        program = export(
            module, examples, dynamic_shapes=tuple({1: Dim.DYNAMIC} if i in dynamic else None for i in inputs)
        )
        model = openvino.convert_model(program)
    by_name = dict(zip(names, inputs, strict=True))
    # Inputs that nothing reads are gone.
    kept = [by_name[name] for port in model.inputs for name in port.get_names() & by_name.keys()]
    model.reshape(
        {i: [*arguments[p].shape[:1], -1] if p in dynamic else [*arguments[p].shape] for i, p in enumerate(kept)}
    )
    (results,) = program.graph.output_node().args
    outputs = [torch.empty_like(node.meta["val"], device="meta") for node in results]
    return _Compiled(openvino.Core().compile_model(model, "CPU", cpu_options(torch.get_num_threads())), kept, outputs)
