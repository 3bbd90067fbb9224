"""Variants under OpenVINO on a CPU: the model's live weights are inputs, so all variants share them.

OpenVINO repacks weights that are constants, once for each variant. As inputs they are packed in each call, which takes
a little time and no memory, and what is done to them takes effect. Weights of convolutions must be constants: these
are copied, and the variant is compiled anew where they were changed.
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
_TRACED_COUNT = 3  # tokens in the example of an index input; no code depends on it
_REPLACED = {
    aten.index_put_.default: aten.index_put.default,  # OpenVINO's graphs are functional
    aten.empty_like.default: aten.zeros_like.default,  # it knows nothing without a value
}
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)


class OpenVINOBackend(CompilingBackend):
    """OpenVINO's CPU plugin, one model per variant, no recompilation for other token counts.

    It computes in float32 whatever the types of the graph, on ``torch.get_num_threads()`` threads. Tensors go in and
    out without a copy; the caches that a partial step updates are new tensors.
    """

    name = "openvino"
    label = "OpenVINO"
    advice = "Ask for backend='inductor' or backend='eager'."

    def lower(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        devices = {str(t.device) for t in (*weights, *tensors)}
        if devices != {"cpu"}:
            raise BackendError(f"its tensors are on {sorted(devices)}, and this backend runs on the CPU")
        return _Program(lifted, weights, tensors)

    def makes_unusable(self, error: Exception) -> bool:
        return isinstance(error, BackendError)  # of tensors that are not on the CPU

    def reason(self, error: Exception) -> str:
        """Of a failed conversion, the lines with the operators that it has no rule for."""
        rules = [line.lstrip("- ") for line in str(error).splitlines() if line.startswith("--")]
        return " ".join(rules) or first_line(error)


class _Program:
    """A function of the weights and then the tensors; any number of threads may call it."""

    def __init__(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> None:
        self._graph, self._weights = lifted.graph, len(weights)
        self._dynamic = frozenset(self._weights + place for place in lifted.dynamic)
        self._constants = _constants(lifted.graph, self._weights)
        self._model = self._compile((*weights, *tensors))

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        model = self._model
        if model.seen != self._stamp(arguments):
            log.info("weights that are constants in a variant were changed: OpenVINO compiles it again")
            with COMPILING:
                model = self._model = self._compile(arguments)
        return model.run(arguments)

    def _compile(self, arguments: Sequence[Tensor]) -> _Model:
        compiled = _compiled(self._graph, arguments, self._dynamic, self._constants)
        return _Model(compiled, self._weights, self._stamp(arguments))

    def _stamp(self, arguments: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Differs where another tensor has come in a constant's place, or where it was written to."""
        return [(arguments[place].data_ptr(), version(arguments[place])) for place in self._constants]


@dataclass(frozen=True)
class _Compiled:
    model: Any  # openvino.CompiledModel
    inputs: list[int]  # the arguments that are its inputs
    outputs: list[Tensor]  # on the meta device: their shapes and dtypes


class _Model:
    """Runs a compiled variant; ``seen`` tells what the weights that are constants in it were then."""

    def __init__(self, compiled: _Compiled, weights: int, seen: list[tuple[int, int]]) -> None:
        self._requests, self._outputs, self.seen = InferRequests(compiled.model), compiled.outputs, seen
        places = list(enumerate(compiled.inputs))
        self._weights = [(i, place) for i, place in places if place < weights]
        self._tensors = [(i, place) for i, place in places if place >= weights]

    def run(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def bind(request: Any) -> None:
            for i, place in self._weights:
                request.set_input_tensor(i, _shared(arguments[place]))

        results = tuple(torch.empty(like.shape, dtype=like.dtype) for like in self._outputs)
        self._requests.run(
            [(i, _shared(arguments[place])) for i, place in self._tensors],
            map(_shared, results),
            [arguments[place].data_ptr() for _, place in self._weights],
            bind,
        )
        return results


def _shared(tensor: Tensor) -> Any:
    """An ``openvino.Tensor`` over the same memory; of a contiguous tensor on the CPU."""
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        return openvino.Tensor(tensor.detach().view(torch.int16).numpy(), tensor.shape, openvino.Type.bf16)
    return openvino.Tensor(tensor.detach().numpy(), shared_memory=True)


def _constants(graph: fx.Graph, count: int) -> tuple[int, ...]:
    """Which of the first ``count`` inputs, the weights, convolutions take their kernels from."""
    kernels = {n.args[1] for n in graph.nodes if getattr(n.target, "overloadpacket", None) in _CONVOLUTIONS}
    sources = {source for kernel in kernels for source in (kernel, *ancestors(kernel))}
    weights = graph.find_nodes(op="placeholder")[:count]
    return tuple(place for place, node in enumerate(weights) if node in sources)


def _with_constants(graph: fx.Graph, constants: Mapping[int, Tensor]) -> fx.GraphModule:
    """The functional form of a graph, with some of its inputs as constants."""
    functional = copy_graph(graph)
    for node in functional.nodes:
        node.target = _REPLACED.get(node.target, node.target)
    inputs = functional.find_nodes(op="placeholder")
    for place in constants:
        with functional.inserting_after(inputs[-1]):
            constant = functional.create_node("get_attr", f"constant_{place}")
        inputs[place].replace_all_uses_with(constant)
        functional.erase_node(inputs[place])
    return fx.GraphModule({f"constant_{place}": tensor for place, tensor in constants.items()}, functional)


def _compiled(
    graph: fx.Graph, arguments: Sequence[Tensor], dynamic: frozenset[int], constants: tuple[int, ...]
) -> _Compiled:
    """Compiles a graph for arguments like these; the second dimension of those in ``dynamic`` is left open."""
    module = _with_constants(graph, {place: arguments[place].detach() for place in constants})
    inputs = [place for place in range(len(arguments)) if place not in constants]
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    examples = tuple(
        arguments[i].new_zeros(len(arguments[i]), _TRACED_COUNT) if i in dynamic else arguments[i].detach()
        for i in inputs
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the converter uses
        program = export(
            module, examples, dynamic_shapes=tuple({1: Dim.DYNAMIC} if i in dynamic else None for i in inputs)
        )
        model = openvino.convert_model(program)
    places = dict(zip(names, inputs, strict=True))
    kept = [places[name] for each in model.inputs for name in each.get_names() & places.keys()]  # those that are read
    model.reshape(
        {i: [*arguments[p].shape[:1], -1] if p in dynamic else [*arguments[p].shape] for i, p in enumerate(kept)}
    )
    (results,) = program.graph.output_node().args
    outputs = [torch.empty_like(node.meta["val"], device="meta") for node in results]
    return _Compiled(openvino.Core().compile_model(model, "CPU", cpu_options(torch.get_num_threads())), kept, outputs)
