"""Runs the TensorRT engines of an artifact on an NVIDIA GPU; values stay there from step to step."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from duca_compile.artifact.engines.base import GraphFunction, Options, is_score, map_pool
from duca_compile.artifact.manifest import Graph, Manifest, inside
from duca_compile.core.tensors import Array
from duca_compile.errors import ArtifactError, BackendError, UsageError, missing_package

with missing_package("export"):
    import torch

    from duca_compile.artifact.lowered import Weight
    from duca_compile.artifact.tensorrt_build import FOLDER, read_build

DEVICE = "cuda"


def open_engine(folder: Path, manifest: Manifest, options: Options) -> TensorRTEngine:
    """TensorRT for an artifact. Raises UsageError for providers or threads, which it does not have."""
    options.check_no_providers("tensorrt")
    options.check_no_threads("tensorrt")
    return TensorRTEngine(folder, manifest, verify=options.verify)


class TensorRTEngine:
    """One engine for each graph, built by ``duca_compile.export.tensorrt.build``; all share one copy of the weights.

    Raises:
        BackendError: the library is missing, or is not the version that built the engines.
        ArtifactError: there are no engines, they are damaged, or they are of another artifact.
    """

    def __init__(self, folder: Path, manifest: Manifest, engines: Path | None = None, *, verify: bool = True) -> None:
        self._engines = folder / FOLDER if engines is None else engines
        self._verify = verify
        self._build, self._trt = read_build(self._engines)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        pool = map_pool(inside(folder, manifest.weights.file))
        self._weights = {name: _on_device(weight, pool) for name, weight in self._build.weights.items()}

    def function(self, name: str, graph: Graph) -> GraphFunction:
        built = self._build.engines.get(name)
        if built is None or built.graph != graph.file.sha256:
            raise ArtifactError(
                f"the engines in {self._engines} are not of this artifact's graph {name!r}; build them again: "
                "duca-compile build"
            )
        plan = (self._engines / built.file).read_bytes()
        if self._verify and hashlib.sha256(plan).hexdigest() != built.sha256:
            raise ArtifactError(f"{self._engines / built.file} was changed; build it again: duca-compile build")
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(
                f"{self._build.options.library} cannot load {built.file} here: it was built for "
                f"{', '.join(self._build.options.targets) or 'another GPU'}"
            )
        return _Function(engine, graph, {weight.name: self._weights[weight.name] for weight in built.weights})

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=DEVICE)


def _on_device(weight: Weight, pool: np.ndarray) -> torch.Tensor:
    """A weight as the engines take it. Raises ArtifactError where the pool ends before the weight does."""
    weight.check_inside(pool)
    count = math.prod(weight.shape)
    stored = torch.frombuffer(pool, dtype=getattr(torch, weight.stored), count=count, offset=weight.start)
    return stored.view(weight.shape).to(DEVICE, getattr(torch, weight.dtype))


class _Function:
    """Runs one graph on the current stream; each result has its own memory."""

    def __init__(self, engine: Any, graph: Graph, weights: dict[str, torch.Tensor]) -> None:
        self._engine, self._graph, self._weights = engine, graph, weights
        self._idle: dict[int, list[Any]] = {}  # unused contexts by stream; each holds its own activations
        self._no_memory = torch.empty(1, device=DEVICE)  # for empty tensors: TensorRT takes no null address

    def __call__(self, *values: Array) -> list[Array]:
        inputs = [_tensor(value) for value in values]
        batch = self._graph.batch([tensor.shape for tensor in inputs])
        results = [
            torch.empty(spec.at(batch), dtype=getattr(torch, spec.dtype), device=DEVICE) for spec in self._graph.outputs
        ]
        stream = _stream()
        idle = self._idle.setdefault(stream, [])
        context = idle.pop() if idle else self._context()
        for spec, tensor in zip(self._graph.inputs, inputs, strict=True):
            self._bind_input(context, spec.name, tensor)
        for spec, result in zip(self._graph.outputs, results, strict=True):
            context.set_tensor_address(spec.name, result.data_ptr())
        if not context.execute_async_v3(stream):
            raise BackendError(f"TensorRT could not run the engine of {self._graph.file.path}")
        idle.append(context)
        named = zip(self._graph.outputs, results, strict=True)
        return [result.cpu().numpy() if is_score(spec.name) else result for spec, result in named]

    def _context(self) -> Any:
        context = self._engine.create_execution_context()
        for name, weight in self._weights.items():
            self._bind_input(context, name, weight)
        return context

    def _bind_input(self, context: Any, name: str, tensor: torch.Tensor) -> None:
        shape = tuple(tensor.shape)
        if not context.set_input_shape(name, shape):
            raise UsageError(
                f"{name} of shape {shape} is outside of what the engine of {self._graph.file.path} was built for; "
                "build it with another batch"
            )
        context.set_tensor_address(name, tensor.data_ptr() or self._no_memory.data_ptr())


def _tensor(value: Array) -> torch.Tensor:
    tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value, order="C"))
    return tensor.to(DEVICE).contiguous()


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
