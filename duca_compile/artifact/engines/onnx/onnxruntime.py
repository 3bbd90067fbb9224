"""Runs the graphs of an artifact with ONNX Runtime; values stay in its memory from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duca_compile.artifact.engines.base import GraphFunction, Options, is_for_host
from duca_compile.artifact.manifest import Graph, Manifest, inside
from duca_compile.core.tensors import Array
from duca_compile.errors import ArtifactError, BackendError, UsageError, first_line, missing_package

with missing_package("export"):
    import onnxruntime as ort

CPU = "CPUExecutionProvider"
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}  # where values stay between graphs
_NUMPY = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}


def open_engine(folder: Path, manifest: Manifest, options: Options) -> OnnxEngine:
    """ONNX Runtime for an artifact."""
    del manifest
    return OnnxEngine(folder, options.providers, options.threads, options.share_weights)


class OnnxEngine:
    """One session for each graph; all sessions read the artifact's one file of weights.

    Raises:
        UsageError: a provider is unknown to this build of ONNX Runtime.
    """

    def __init__(self, folder: Path, providers: Sequence[str] | None, threads: int | None, share_weights: bool) -> None:
        self._folder = folder
        self._providers = list(providers or [CPU])
        unknown = sorted({*self._providers} - {*ort.get_available_providers()})
        if unknown:
            raise UsageError(f"providers {unknown} are not in this onnxruntime; it has {ort.get_available_providers()}")
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        if threads is not None:
            self._options.intra_op_num_threads = threads
        # Sessions take turns, so the threads of one must not spin while another runs.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        self._options.add_session_config_entry("session.disable_prepacking", str(int(share_weights)))

    def function(self, name: str, graph: Graph) -> GraphFunction:
        del name
        path = inside(self._folder, graph.file)
        try:
            session = ort.InferenceSession(path, self._options, self._providers)
        except Exception as error:
            kind = ArtifactError if self._providers == [CPU] else BackendError  # others may lack a library or memory
            raise kind(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error
        missing = sorted({*self._providers} - {*session.get_providers()})
        if missing:
            raise BackendError(
                f"ONNX Runtime cannot use {missing} here and would run {path.name} on {session.get_providers()}; "
                "install what these need (for CUDA: its libraries and cuDNN), or ask for other providers"
            )
        return _Function(session, graph, _DEVICES.get(self._providers[0], "cpu"))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))


class _Function:
    """Runs one graph; each result has its own memory, or that of an input that may be overwritten."""

    def __init__(self, session: Any, graph: Graph, device: str) -> None:
        self._session, self._graph, self._device = session, graph, device
        self._inputs = [spec.name for spec in graph.inputs]
        self._results = [
            (
                spec,
                self._inputs.index(graph.in_place[spec.name]) if spec.name in graph.in_place else None,
                is_for_host(spec.name) and spec.dtype in _NUMPY,
            )
            for spec in graph.outputs
        ]

    def __call__(self, *values: Array) -> list[Array]:
        binding = self._session.io_binding()
        inputs = [value if isinstance(value, ort.OrtValue) else _shared(value) for value in values]
        for name, value in zip(self._inputs, inputs, strict=True):
            binding.bind_ortvalue_input(name, value)
        arrays: dict[int, np.ndarray] = {}
        for i, (spec, place, for_host) in enumerate(self._results):
            if place is not None:
                binding.bind_ortvalue_output(spec.name, inputs[place])
            elif for_host:
                arrays[i] = np.empty(spec.at(self._graph.batch([value.shape() for value in inputs])), spec.dtype)
                binding.bind_ortvalue_output(spec.name, _shared(arrays[i]))
            else:
                binding.bind_output(spec.name, self._device)
        self._session.run_with_iobinding(binding)
        results = binding.get_outputs()
        return [arrays.get(i, result) for i, result in enumerate(results)]


def _shared(array: Array) -> ort.OrtValue:
    """The same memory as a value of the runtime."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:  # numpy exports no read-only memory
        array = array.copy()
    return ort.OrtValue.from_dlpack(array)
