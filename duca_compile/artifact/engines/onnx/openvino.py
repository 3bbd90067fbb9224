"""Runs the graphs of an artifact with OpenVINO on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from duca_compile.artifact.engines.base import GraphFunction, Options, is_for_host, map_pool
from duca_compile.artifact.manifest import File, Graph, Manifest, inside
from duca_compile.core.tensors import Array
from duca_compile.errors import ArtifactError, BackendError, DucaError, missing_package
from duca_compile.runtime.openvino import InferRequests, cpu_options, reason

with missing_package("openvino"):
    import openvino

_BITS = np.dtype(np.int16)  # stands in for bfloat16, which numpy lacks; nothing else here has this type


def open_engine(folder: Path, manifest: Manifest, options: Options) -> OpenVINOEngine:
    """OpenVINO for an artifact. Raises UsageError for providers, which it does not have."""
    options.check_no_providers("openvino")
    return OpenVINOEngine(folder, manifest.weights.file, options.threads, options.share_weights)


class OpenVINOEngine:
    """One compiled model for each graph.

    With ``share_weights``, the weights of matrix products are inputs, mapped from the artifact's file and held once.
    Otherwise OpenVINO copies them for each graph, in the layout that it prefers.
    """

    def __init__(self, folder: Path, pool: File, threads: int | None, share_weights: bool) -> None:
        self._folder = folder
        self._pool = map_pool(inside(folder, pool)) if share_weights else None
        self._core, self._options = openvino.Core(), cpu_options(threads)

    def function(self, name: str, graph: Graph) -> GraphFunction:
        del name
        path = inside(self._folder, graph.file)
        for spec in graph.outputs:
            if spec.dtype == "bfloat16" and is_for_host(spec.name):
                raise BackendError(f"{path.name} returns bfloat16, which numpy lacks; export a float32 model")
        model, weights = self._read(path)
        try:
            compiled = self._core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot compile {path}: {reason(error)}") from error
        return _Function(compiled, graph, weights)

    def _read(self, path: Path) -> tuple[Any, dict[str, Any]]:
        """The model, and the weights that are its inputs, by name."""
        try:
            if self._pool is None:
                return self._core.read_model(path), {}
            with missing_package("export"):
                from duca_compile.artifact.lowered import lower
            lowered = lower(path, "float32")
            weights = {w.name: openvino.Tensor(w.array(self._pool), shared_memory=True) for w in lowered.weights}
            return self._core.read_model(lowered.serialized()), weights
        except DucaError:
            raise
        except Exception as error:  # the readers of ONNX raise whatever a wrong file leads to
            raise ArtifactError(f"OpenVINO cannot read {path}: {reason(error)}") from error

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, _numpy(dtype))


class _Function:
    """Runs one graph; each result has its own memory."""

    def __init__(self, model: Any, graph: Graph, weights: dict[str, Any]) -> None:
        self._requests, self._graph = InferRequests(model), graph
        names = [spec.name for spec in graph.inputs]
        places = {name: i for i, port in enumerate(model.inputs) for name in port.get_names()}
        self._inputs = [(places[name], i) for i, name in enumerate(names) if name in places]  # the compiled model's own
        self._weights = [(places[name], tensor) for name, tensor in weights.items()]

    def __call__(self, *values: Array) -> list[Array]:
        arrays = [np.asarray(value, order="C") for value in values]
        batch = self._graph.batch([array.shape for array in arrays])
        results = [np.empty(spec.at(batch), _numpy(spec.dtype)) for spec in self._graph.outputs]
        inputs = [(place, _shared(arrays[i])) for place, i in self._inputs]
        outputs = map(_shared, results)
        self._requests.run(inputs, outputs, address=0, bind=self._bind)
        return results

    def _bind(self, request: Any) -> None:
        for place, tensor in self._weights:
            request.set_input_tensor(place, tensor)


def _numpy(dtype: str) -> np.dtype:
    """numpy's type of this name; for bfloat16, which numpy lacks and caches may be, a type of as many bits."""
    return np.dtype(_BITS if dtype == "bfloat16" else dtype)


def _shared(array: np.ndarray) -> Any:
    """The same memory as an ``openvino.Tensor``."""
    if array.dtype == _BITS:
        return openvino.Tensor(array, array.shape, openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)
