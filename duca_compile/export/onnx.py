"""Writes graphs with open sizes as ONNX models that share one pool of weights."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir
import onnxscript
import torch

from duca_compile.artifact.manifest import Chunk, File, Graph, Pool, TensorSpec, sha256
from duca_compile.core.lock import COMPILING
from duca_compile.errors import ExportError, InternalError, first_line
from duca_compile.export.batch import OpenGraph

POOL = "weights.bin"
ALIGNMENT = 2**16  # where large tensors start: what can be mapped into memory on every system
ALIGNED_FROM = 2**21  # bytes; aligning smaller tensors would make the pool more than 3 % larger
LINE = 64  # where smaller tensors start
MODULE = "module"  # key of a node's metadata: the path of the module of the source model that the node comes from
_SCOPES = "pkg.torch.onnx.name_scopes"
INLINE = 256  # bytes; tensors up to this size, such as axes and numbers, stay in the ONNX file


class PoolWriter:
    """Writes weights to a file in ``folder``; equal weights are written once."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / POOL).open("wb")
        self._hash = hashlib.sha256()
        self._chunks: dict[str, Chunk] = {}
        self._end = 0

    def add(self, data: bytes | memoryview) -> Chunk:
        """The place of these bytes in the pool; writes them unless they are there already."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._chunks:
            unit = ALIGNMENT if len(data) >= ALIGNED_FROM else LINE
            self._write(bytes(-self._end % unit))
            self._chunks[digest] = Chunk(digest, self._end, len(data))
            self._write(data)
        return self._chunks[digest]

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._end += len(data)

    def close(self) -> Pool:
        """Closes the file, and describes it."""
        self._file.close()
        file = File(POOL, self._end, self._hash.hexdigest())
        return Pool(file, ALIGNMENT, ALIGNED_FROM, tuple(self._chunks.values()))


class OnnxWriter:
    """Writes one ONNX file for each graph, and one pool of weights for all."""

    format: Literal["onnx", "aoti"] = "onnx"

    def __init__(self, folder: Path, opset: int) -> None:
        self._folder, self.opset = folder, opset
        self.versions = {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
        self._pool, self._graphs = PoolWriter(folder), dict[str, Graph]()

    def add(self, graph: OpenGraph) -> None:
        """Raises ExportError where the graph has no ONNX form."""
        self._graphs[graph.name] = write_graph(graph, self._folder, self._pool, self.opset)

    def close(self) -> tuple[dict[str, Graph], Pool]:
        """The graphs by name, and their weights. Raises ExportError where a file is no valid ONNX model."""
        weights = self._pool.close()
        for graph in self._graphs.values():
            check_graph(self._folder / graph.file.path)
        return self._graphs, weights


def to_onnx(graph: OpenGraph, opset: int) -> onnx_ir.Model:
    """The graph in ONNX, with the names of ``graph`` for inputs, outputs and open sizes; weights are not copied.

    Raises:
        ExportError: an operator has no form in this opset.
    """
    program = graph.program()
    with COMPILING, _quiet():
        try:
            exported = torch.onnx.export(
                program, args=(), f=None, dynamo=True, opset_version=opset, optimize=True, verbose=False
            )
        except Exception as error:
            raise ExportError(f"graph {graph.name!r} has no ONNX form: {first_line(error)}") from error
    if exported is None:
        raise InternalError(f"torch.onnx.export returned nothing for graph {graph.name!r}")
    model = exported.model
    _strip(model)
    model.graph.name = graph.name
    _free_names(model, {spec.name for spec in (*graph.inputs, *graph.outputs)})
    for values, specs in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        if len(values) != len(specs):
            raise ExportError(f"graph {graph.name!r} has {len(values)} inputs or outputs in ONNX, not {len(specs)}")
        for value, spec in zip(values, specs, strict=True):
            _describe(value, spec)
    return model


def _free_names(model: onnx_ir.Model, names: Collection[str]) -> None:
    """Renames the weights and inner values that are called like one of ``names``, as an argument may be."""
    nodes = model.graph.all_nodes()
    inner = [*model.graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    taken = {*names, *(value.name for value in (*model.graph.inputs, *inner))}
    for value in inner:
        if value.name in names:
            value.name = next(new for i in count(1) if (new := f"{value.name}_{i}") not in taken)
            taken.add(value.name)


def _describe(value: Any, spec: TensorSpec) -> None:
    value.name = spec.name
    value.shape = onnx_ir.Shape([size if isinstance(size, int) else str(size) for size in spec.shape])


def _strip(model: onnx_ir.Model) -> None:
    """Drops the exporter's notes, which hold local paths and are most of the file; keeps the paths of modules."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]  # the last one is the operator
        node.metadata_props.clear()
        if scopes and scopes[-1] and not scopes[-1].startswith("_empty"):  # torch's own nodes are in no module
            node.metadata_props[MODULE] = scopes[-1]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's exporter, which prints, logs and warns about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_graph(graph: OpenGraph, folder: Path, pool: PoolWriter, opset: int) -> Graph:
    """Writes ``<name>.onnx``, with its weights in the pool.

    Raises:
        ExportError: the graph has no ONNX form.
    """
    model = to_onnx(graph, opset)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE:
            continue
        chunk = pool.add(tensor.tobytes())
        value.const_value = onnx_ir.ExternalTensor(
            POOL,
            chunk.start,
            chunk.bytes,
            tensor.dtype,
            name=value.name or "",
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            base_dir=folder,
        )
    path = folder / f"{graph.name}.onnx"
    onnx_ir.save(model, path)
    return Graph(
        file=describe_file(folder, path.name),
        inputs=graph.inputs,
        outputs=graph.outputs,
        in_place=dict(graph.in_place),
        operators=dict(Counter(node.op_type for node in model.graph).most_common()),
    )


def check_graph(path: Path) -> None:
    """Raises ExportError where the file is no valid ONNX model. Reads the pool, which must be complete."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is no valid ONNX model: {first_line(error)}") from error


def describe_file(folder: Path, name: str) -> File:
    path = folder / name
    return File(name, path.stat().st_size, sha256(path))
