"""Builds TensorRT engines of an artifact, with TensorRT-RTX (``tensorrt_rtx``) or TensorRT 10 and later (``tensorrt``).

TensorRT-RTX builds for any GPU and needs none; TensorRT builds for the GPU that it runs on. The weights of matrix
products are inputs of every engine, named after their place in the pool, so that all variants read one copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir
from rich.progress import Progress, TaskID

from duca_compile.artifact.loader import check_files
from duca_compile.artifact.lowered import PRECISIONS, Lowered, lower
from duca_compile.artifact.manifest import BATCH, FILE, Graph, Manifest, Size, TensorSpec, inside, read_manifest, sha256
from duca_compile.artifact.tensorrt_build import FOLDER, RECORD, Build, BuildOptions, BuiltEngine, find_library
from duca_compile.core.files import atomic_write
from duca_compile.core.ports import Port, PortKind
from duca_compile.errors import ArtifactError, BackendError, ExportError, UsageError
from duca_compile.export.onnx import MODULE

TIMINGS = "timing.cache"
_CHANGES = "1"  # a part of every key, to be raised when engines are built in another way


def build(
    artifact: str | os.PathLike[str],
    targets: Sequence[str] = (),
    *,
    precision: str = "bfloat16",
    batch: tuple[int, int, int] = (1, 2, 8),
    library: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Build:
    """Builds an engine of each graph of an artifact, unless an earlier build left it there.

    Args:
        artifact: the folder that ``duca_compile.save`` wrote.
        targets, precision, batch, library: see ``BuildOptions``; for ``library``, None means the installed one.
        folder: where the engines go; None means ``tensorrt`` in the artifact.
        progress: shows the phases of each build.

    Returns:
        What was built, which ``engines.json`` in the folder records.

    Raises:
        BackendError: the library is missing, or fails.
        ExportError: TensorRT does not support an operator of a graph; names the module that it comes from.
        UsageError: an option is impossible, or the artifact has no ONNX graphs.
        ArtifactError: ``artifact`` is no artifact, or is damaged.
    """
    trt, name = find_library(library)
    options = BuildOptions(tuple(dict.fromkeys(map(str.lower, targets))), precision, batch, name)
    _check(trt, options)
    source = Path(artifact)
    manifest = read_manifest(source)
    if manifest.format != "onnx":
        raise UsageError(f"{source} is an artifact of format {manifest.format!r}; engines are built of ONNX graphs")
    check_files(source, manifest)
    target = source / FOLDER if folder is None else Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    builder = _Builder(trt, options, manifest, target, progress)
    engines = {graph: builder.engine(graph, inside(source, onnx.file)) for graph, onnx in manifest.graphs.items()}
    record = Build(trt.__version__, options, engines)
    _replace(target / RECORD, record.dumps().encode())
    return record


def _check(trt: Any, options: BuildOptions) -> None:
    if options.precision not in PRECISIONS:
        raise UsageError(f"precision={options.precision!r} is unknown; choose one of {tuple(PRECISIONS)}")
    least, usual, most = options.batch
    if not 1 <= least <= usual <= most:
        raise UsageError(
            f"batch={options.batch} must be the smallest, the usual and the largest number of batch rows, in this order"
        )
    if not options.targets:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise UsageError(f"{options.library} builds for the GPU of this machine only; leave the targets out")
    known = {name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    for target in options.targets:
        if target not in known:
            raise UsageError(f"target {target!r} is unknown to {options.library}; choose from {sorted(known)}")


class _Builder:
    """Builds the engines of one artifact."""

    def __init__(
        self, trt: Any, options: BuildOptions, manifest: Manifest, folder: Path, progress: Progress | None
    ) -> None:
        self._trt, self._options, self._manifest, self._folder = trt, options, manifest, folder
        self._progress = progress
        self._log = _log(trt)
        self._timings = folder / TIMINGS
        self._times_kernels = options.library == "tensorrt"  # TensorRT-RTX chooses kernels when it loads an engine

    def engine(self, name: str, path: Path) -> BuiltEngine:
        """The engine of one graph; builds it unless there is a file of the same key."""
        graph = self._manifest.graphs[name]
        key = self._key(graph)
        file = self._folder / f"{name}-{key[:16]}.engine"
        lowered = lower(path, self._options.precision)
        if not file.exists():
            _replace(file, self._built(name, graph, lowered))
        return BuiltEngine(file.name, graph.file.sha256, key, file.stat().st_size, sha256(file), lowered.weights)

    def _key(self, graph: Graph) -> str:
        """The hash of everything that the engine is built from; builds from the same inputs differ in their bytes."""
        inputs = {
            "graph": graph.file.sha256,
            "weights": self._manifest.weights.file.sha256,
            "profile": {spec.name: self._profile(spec) for spec in graph.inputs},
            "options": asdict(self._options),
            "version": [self._trt.__version__, _CHANGES],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _profile(self, spec: TensorSpec) -> list[list[int]] | None:
        """The smallest, the usual and the largest shape of an input; None for an input of fixed shape."""
        if not any(isinstance(size, Size) for size in spec.shape):
            return None
        rows = self._options.batch
        counts = self._token_counts()

        def at(size: int | Size, which: int) -> int:
            if not isinstance(size, Size):
                return size
            if size.name != BATCH and size.name not in counts:
                raise ArtifactError(f"{FILE}: no step of the schedule recomputes the tokens that {spec.name!r} names")
            return size.at(rows[which] if size.name == BATCH else counts[size.name][which])

        return [[at(size, which) for size in spec.shape] for which in range(3)]

    def _token_counts(self) -> dict[str, tuple[int, int, int]]:
        """The least, median and largest number of tokens that a step recomputes, by the input that names them."""
        by_input: dict[str, list[int]] = {}
        for plan in self._manifest.schedule.plans:
            for branch, count in plan.counts.items():
                by_input.setdefault(Port(PortKind.TOKENS, int(branch)).input_name, []).append(count)
        return {name: (min(n), sorted(n)[len(n) // 2], max(n)) for name, n in by_input.items()}

    def _built(self, name: str, graph: Graph, lowered: Lowered) -> bytes:
        trt = self._trt
        data = lowered.serialized()
        builder = trt.Builder(self._log)
        check(trt, builder, name, data, lowered.model)
        network = _network(trt, builder)
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse(data):
            raise ExportError(f"graph {name!r}: {_parser_errors(parser)}")
        _let_decompose(trt, network)
        config = builder.create_builder_config()
        self._set_targets(config)
        self._add_profile(builder, config, graph)
        if self._times_kernels:
            known = self._timings.read_bytes() if self._timings.exists() else b""
            config.set_timing_cache(config.create_timing_cache(known), False)
        with self._log.collected() as errors, _watched(trt, config, self._progress, name):
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BackendError(f"{self._options.library} could not build graph {name!r}: {'; '.join(errors[-3:])}")
        if self._times_kernels:
            _replace(self._timings, bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _set_targets(self, config: Any) -> None:
        targets = self._options.targets
        if not targets:
            return
        config.num_compute_capabilities = len(targets)
        for place, target in enumerate(targets):
            config.set_compute_capability(getattr(self._trt.ComputeCapability, target.upper()), place)

    def _add_profile(self, builder: Any, config: Any, graph: Graph) -> None:
        shapes = {spec.name: self._profile(spec) for spec in graph.inputs}
        if not any(shapes.values()):
            return
        profile = builder.create_optimization_profile()
        for name, limits in shapes.items():
            if limits is not None:
                profile.set_shape(name, *limits)
        config.add_optimization_profile(profile)


def check(trt: Any, builder: Any, name: str, data: bytes, model: onnx_ir.Model) -> None:
    """Asks TensorRT's parser about every node of a serialized model.

    Raises:
        ExportError: a node is not supported; says which, why, and which module of the source model it comes from.
    """
    network = _network(trt, builder)  # kept alive: the parser does not hold it
    parser = trt.OnnxParser(network, _log(trt))
    if parser.supports_model_v2(data):
        return
    nodes = list(model.graph)
    supported = {place for i in range(parser.num_subgraphs) for place in parser.get_subgraph_nodes(i)}
    refused = [node for place, node in enumerate(nodes) if place not in supported]
    names = [f"{node.op_type} of {node.metadata_props.get(MODULE) or 'no module'}" for node in refused]
    raise ExportError(
        f"TensorRT does not support {', '.join(dict.fromkeys(names)) or 'a node'} in graph {name!r}: "
        f"{_parser_errors(parser)}"
    )


def _network(trt: Any, builder: Any) -> Any:
    """An empty network that keeps the types of the graph, the only kind that newer versions have."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if typed is None else 1 << int(typed))


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{e.node_name()}: {e.code().name}, {e.desc()}" for e in errors) or "it does not say why"


def _let_decompose(trt: Any, network: Any) -> None:
    """Lets TensorRT compute an attention without a fused kernel in parts, instead of failing the build."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers if kind is not None else 0)):
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


_LOGS: dict[str, Any] = {}


def _log(trt: Any) -> Any:
    """The library's one log, which collects errors and drops everything else."""
    if trt.__name__ not in _LOGS:

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self._errors: list[str] = []

            def log(self, severity: Any, text: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    self._errors.append(text)

            @contextmanager
            def collected(self) -> Iterator[list[str]]:
                self._errors = []
                yield self._errors

        _LOGS[trt.__name__] = Log()
    return _LOGS[trt.__name__]


@contextmanager
def _watched(trt: Any, config: Any, progress: Progress | None, name: str) -> Iterator[None]:
    """Shows the phases of a build, nested ones indented."""
    if progress is None:
        yield
        return
    phases = _Phases(progress, name)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            phases.start(phase, parent, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            phases.advance(phase, step)
            return True

        def phase_finish(self, phase: str) -> None:
            phases.finish(phase)

    config.progress_monitor = Monitor()
    try:
        yield
    finally:
        phases.close()


class _Phases:
    """The tasks of a progress display, for phases that any thread may report."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name, self._lock = progress, name, threading.Lock()
        self._tasks: dict[str, tuple[TaskID, int]] = {}  # by phase, with the depth of nesting

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            depth = self._tasks[parent][1] + 1 if parent in self._tasks else 0
            task = self._progress.add_task(f"{'  ' * depth}{self._name}: {phase}", total=steps)
            self._tasks[phase] = task, depth

    def advance(self, phase: str, step: int) -> None:
        with self._lock:
            self._progress.update(self._tasks[phase][0], completed=step + 1)

    def finish(self, phase: str) -> None:
        with self._lock:
            self._progress.remove_task(self._tasks.pop(phase)[0])

    def close(self) -> None:
        for phase in list(self._tasks):  # left over from a build that failed
            self.finish(phase)


def _replace(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
