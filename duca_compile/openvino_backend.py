"""Variants under OpenVINO on a CPU: the model's live weights are inputs, so all variants share them.

OpenVINO repacks weights that are constants, once for each variant. As inputs they are packed in each call, which takes
a little time and no memory, and what is done to them takes effect. Weights of convolutions must be constants: these
are copied, and the variant is compiled anew where they were changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, export

from duca_compile.analysis.closure import ancestors
from duca_compile.backends import CompilingBackend, Lifted
from duca_compile.errors import BackendError, UsageError
from duca_compile.graph import copy_graph
from duca_compile.lock import COMPILING
from duca_compile.runtime.clock import version

try:
    import openvino
except ImportError as error:
    raise UsageError(
        "backend='openvino' needs the openvino package: pip install 'duca-compile[openvino]', or choose another backend"
    ) from error

aten = torch.ops.aten
_TRACED_COUNT = 3  # tokens in the example of an index input; no code depends on it
_IN_PLACE = {aten.index_put_.default: aten.index_put.default}  # OpenVINO's graphs are functional
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)


class OpenVINOBackend(CompilingBackend):
    """OpenVINO's CPU plugin, one model per variant, no recompilation for other token counts.

    It computes in float32 whatever the types of the graph, on ``torch.get_num_threads()`` threads. Tensors go in and
    out without a copy; the caches that a partial step updates are new tensors.
    """

    name = "openvino"
    label = "OpenVINO"
    advice = "Ask for backend='inductor' or backend='eager'."

    def lower(
        self,
        lifted: Lifted,
        weights: list[Tensor],
        tensors: tuple[Tensor, ...],
        dynamic: tuple[int, ...],
        cuts: frozenset[str],
    ) -> Callable[..., Any]:
        del cuts
        devices = {str(t.device) for t in (*weights, *tensors)}
        if devices != {"cpu"}:
            raise BackendError(f"its tensors are on {sorted(devices)}, and this backend runs on the CPU")
        return _Program(lifted, weights, tensors, dynamic)


class _Program:
    """A function of the weights and then the tensors; any number of threads may call it."""

    def __init__(
        self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...], dynamic: tuple[int, ...]
    ) -> None:
        self._graph, self._count, self._dynamic = lifted.graph, len(weights), dynamic
        self._constants = _constants(lifted.graph, self._count)
        self._model = self._compile((*weights, *tensors))

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        model = self._model
        if model.seen != _stamp(arguments[place] for place in self._constants):
            with COMPILING:
                model = self._model = self._compile(arguments)
        inputs = [tensor for place, tensor in enumerate(arguments) if place not in self._constants]
        count = self._count - len(self._constants)
        return model.run(inputs[:count], inputs[count:])

    def _compile(self, arguments: Sequence[Tensor]) -> _Model:
        weights = {place: arguments[place] for place in self._constants}
        inputs = [tensor for place, tensor in enumerate(arguments) if place not in weights]
        dynamic = [self._count - len(weights) + place for place in self._dynamic]
        module = _with_constants(self._graph, weights)
        return _Model(*_compiled(module, inputs, dynamic), _stamp(weights.values()))


@dataclass
class _Request:
    """One of the requests of a model: it has activations of its own, and may run beside others."""

    infer: Any  # openvino.InferRequest
    bound: list[int]  # the addresses of the weights among its inputs


class _Model:
    """A compiled variant, and what the weights that are constants in it were then."""

    def __init__(self, compiled: Any, outputs: list[Tensor], seen: list[tuple[int, int]]) -> None:
        self._compiled, self._outputs, self.seen = compiled, outputs, seen
        self._idle: list[_Request] = []

    def run(self, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = _Request(self._compiled.create_infer_request(), [])
        addresses = [weight.data_ptr() for weight in weights]
        if request.bound != addresses:
            request.bound = addresses
            for place, weight in enumerate(weights):
                request.infer.set_input_tensor(place, shared(weight))
        for place, tensor in enumerate(tensors, len(weights)):
            request.infer.set_input_tensor(place, shared(tensor))
        results = tuple(torch.empty(like.shape, dtype=like.dtype) for like in self._outputs)
        for place, result in enumerate(results):
            request.infer.set_output_tensor(place, shared(result))
        request.infer.infer()
        self._idle.append(request)
        return results


def shared(tensor: Tensor) -> Any:
    """An ``openvino.Tensor`` over the same memory; of a contiguous tensor on the CPU."""
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        return openvino.Tensor(tensor.detach().view(torch.int16).numpy(), tensor.shape, openvino.Type.bf16)
    return openvino.Tensor(tensor.detach().numpy(), shared_memory=True)


def cpu_options() -> dict[str, Any]:
    """How OpenVINO is to compile: for one call at a time, on torch's number of threads, in float32."""
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }


def _constants(graph: fx.Graph, count: int) -> frozenset[int]:
    """Which of the first ``count`` inputs, the weights, convolutions take their kernels from."""
    kernels = {n.args[1] for n in graph.nodes if getattr(n.target, "overloadpacket", None) in _CONVOLUTIONS}
    sources = {source for kernel in kernels for source in (kernel, *ancestors(kernel))}
    weights = graph.find_nodes(op="placeholder")[:count]
    return frozenset(place for place, node in enumerate(weights) if node in sources)


def _stamp(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Differs where another tensor is there, or where one was written to."""
    return [(weight.data_ptr(), version(weight)) for weight in weights]


def _with_constants(graph: fx.Graph, weights: Mapping[int, Tensor]) -> fx.GraphModule:
    """The functional form of a graph, with these of its inputs as constants."""
    functional = copy_graph(graph)
    for node in functional.nodes:
        node.target = _IN_PLACE.get(node.target, node.target)
    inputs = functional.find_nodes(op="placeholder")
    constants = {f"constant_{place}": weight for place, weight in weights.items()}
    for place in weights:
        with functional.inserting_after(inputs[-1]):
            constant = functional.create_node("get_attr", f"constant_{place}")
        inputs[place].replace_all_uses_with(constant)
        functional.erase_node(inputs[place])
    return fx.GraphModule(constants, functional)


def _compiled(module: fx.GraphModule, inputs: Sequence[Tensor], dynamic: Collection[int]) -> tuple[Any, list[Tensor]]:
    """The compiled model, and its outputs as meta tensors. The second dimension of ``dynamic`` inputs is left open."""
    examples = [
        tensor.new_zeros(tensor.shape[0], _TRACED_COUNT) if place in dynamic else tensor.detach()
        for place, tensor in enumerate(inputs)
    ]
    shapes = [{1: Dim.DYNAMIC} if place in dynamic else None for place in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the converter uses
        program = export(module, tuple(examples), dynamic_shapes=tuple(shapes))
        model = openvino.convert_model(program)
    sizes = {
        place: [tensor.shape[0], -1] if place in dynamic else list(tensor.shape) for place, tensor in enumerate(inputs)
    }
    model.reshape(sizes)
    (results,) = program.graph.output_node().args
    outputs = [torch.empty_like(node.meta["val"], device="meta") for node in results]
    return openvino.Core().compile_model(model, "CPU", cpu_options()), outputs
