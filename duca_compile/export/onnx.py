"""Writes graphs with open sizes as ONNX models that share one pool of weights."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir
import onnxscript
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from duca_compile.artifact.manifest import Chunk, File, Graph, Pool, TensorSpec, sha256
from duca_compile.core.lock import COMPILING
from duca_compile.errors import ExportError, InternalError, first_line
from duca_compile.export.batch import OpenGraph
from duca_compile.export.reasons import reason

POOL = "weights.bin"
ALIGNMENT = 2**16  # where large tensors start: what can be mapped into memory on every system
ALIGNED_FROM = 2**21  # bytes; aligning smaller tensors would make the pool more than 3 % larger
LINE = 64  # where smaller tensors start
MODULE = "module"  # key of a node's metadata: the path of the module of the source model that the node comes from
_SCOPES = "pkg.torch.onnx.name_scopes"
_SOURCE = "pkg.torch.onnx.fx_node"
_NODE = re.compile(r"%(\w+) :")  # the name at the start of what that holds
_MOVES = (  # rewrites after which every value is the same, bit for bit
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.flatten_to_reshape_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_cast_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_expand_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.no_op_transpose_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.reshape_reshape_rule,
    rules.slice_split_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
)
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


@dataclass(frozen=True)
class Translation:
    """The program that an ONNX file was translated from.

    Attributes:
        program: its nodes are PyTorch's operators, and some of their values are values in the file.
        path: the file.
        sources: the node that a node or a value in the file comes from, by its name.
        values: the node whose value a value in the file is, by the name of the latter.
    """

    program: torch.export.ExportedProgram
    path: Path
    sources: Mapping[str, fx.Node]
    same: Mapping[str, fx.Node]

    def values(self, inputs: Sequence[Tensor], interpreter: type[fx.Interpreter]) -> dict[fx.Node, Tensor]:
        """The value of each node that yields a tensor, as an interpreter computes it."""
        given = iter(inputs)
        stored = {**self.program.state_dict, **self.program.constants}
        specs = self.program.graph_signature.input_specs
        arguments = [next(given) if spec.kind is InputKind.USER_INPUT else stored[spec.target] for spec in specs]
        running = interpreter(self.program.graph_module, garbage_collect_values=False)
        running.run(*arguments)
        return {node: value for node, value in running.env.items() if isinstance(value, Tensor)}

    @contextlib.contextmanager
    def with_outputs(self, wanted: Collection[fx.Node]) -> Iterator[tuple[File, dict[str, fx.Node]]]:
        """A file beside that of the graph, which also returns the values of these nodes where it has them.

        Yields the file, and the nodes by the names of their values, in order.
        """
        model = onnx_ir.load(self.path)
        outputs = {*model.graph.outputs}
        inner = {value.name: value for node in model.graph for value in node.outputs if value not in outputs}
        names = {name: node for name, node in self.same.items() if node in wanted and name in inner}
        model.graph.outputs.extend(inner[name] for name in names)
        path = self.path.with_name(f"values-of-{self.path.name}")
        onnx_ir.save(model, path)
        try:
            yield describe_file(path.parent, path.name), names
        finally:
            path.unlink()


class OnnxWriter:
    """Writes one ONNX file for each graph, and one pool of weights for all.

    Attributes:
        translations: what the files were translated from, by graph.
    """

    format: Literal["onnx", "aoti"] = "onnx"

    def __init__(self, folder: Path, opset: int) -> None:
        self._folder, self.opset = folder, opset
        self.versions = {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
        self._pool, self._graphs = PoolWriter(folder), dict[str, Graph]()
        self.translations: dict[str, Translation] = {}

    def add(self, graph: OpenGraph) -> None:
        """Raises ExportError where the graph has no ONNX form."""
        path = self._folder / f"{graph.name}.onnx"
        model, self.translations[graph.name] = to_onnx(graph, self.opset, path)
        self._graphs[graph.name] = write_graph(graph, model, path, self._pool)

    def close(self) -> tuple[dict[str, Graph], Pool]:
        """The graphs by name, and their weights. Raises ExportError where a file is no valid ONNX model."""
        weights = self._pool.close()
        for graph in self._graphs.values():
            check_graph(self._folder / graph.file.path)
        return self._graphs, weights


def to_onnx(graph: OpenGraph, opset: int, path: Path) -> tuple[onnx_ir.Model, Translation]:
    """The graph in ONNX, with the names of ``graph`` for inputs, outputs and open sizes; weights are not copied.

    ``path`` is the file that it is for.

    Raises:
        ExportError: an operator has no form in this opset.
    """
    program = graph.program()
    with COMPILING, _quiet():
        try:
            exported = torch.onnx.export(
                program, args=(), f=None, dynamo=True, opset_version=opset, optimize=False, verbose=False
            )
        except Exception as error:
            raise ExportError(f"graph {graph.name!r} has no ONNX form: {reason(error)}") from error
        if exported is None:
            raise InternalError(f"torch.onnx.export returned nothing for graph {graph.name!r}")
        model = exported.model
        _simplify(model)
    if exported.exported_program is None:
        raise InternalError(f"torch.onnx.export has lost the program of graph {graph.name!r}")
    origins = _origins(model, exported.exported_program)
    _strip(model)
    model.graph.name = graph.name
    _free_names(model, {spec.name for spec in (*graph.inputs, *graph.outputs)})
    for values, specs in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        if len(values) != len(specs):
            raise ExportError(f"graph {graph.name!r} has {len(values)} inputs or outputs in ONNX, not {len(specs)}")
        for value, spec in zip(values, specs, strict=True):
            _describe(value, spec)
    return model, origins.translation(exported.exported_program, path)


@dataclass(frozen=True)
class _Origins:
    """The nodes of a program that nodes and values of an ONNX model come from, and are the same as."""

    nodes: Sequence[tuple[onnx_ir.Node, fx.Node]]
    same: Sequence[tuple[onnx_ir.Value, fx.Node]]

    def translation(self, program: torch.export.ExportedProgram, path: Path) -> Translation:
        """By the names that they have by now."""
        named = [(node.name, source) for node, source in self.nodes]
        named += [(value.name, source) for node, source in self.nodes for value in node.outputs]
        sources = {str(name): source for name, source in named}
        return Translation(program, path, sources, {str(value.name): node for value, node in self.same})


def _origins(model: onnx_ir.Model, program: torch.export.ExportedProgram) -> _Origins:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    found, same = [], []
    for node in model.graph:
        named = _NODE.match(node.metadata_props.get(_SOURCE, ""))
        if named is not None and named[1] in nodes:
            found.append((node, nodes[named[1]]))
        same += [(value, nodes[value.name]) for value in node.outputs if value.name in nodes]
    return _Origins(found, same)


def _simplify(model: onnx_ir.Model) -> None:
    """Folds constants, and removes what moves data for nothing.

    Not by the exporter's own rules, some of which compare numbers within a tolerance: a sum with 1e-8 or less, as in a
    division that must not be by zero, would be taken for a sum with 0.
    """
    passes = [
        common.InlinePass(),
        onnx_ir.passes.PassManager([_FoldConstants(), RewritePass(_MOVES), common.RemoveUnusedNodesPass()], steps=2),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ]
    onnx_ir.passes.Sequential(*passes)(model)


class _FoldConstants(onnx_ir.passes.InPlacePass):
    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        return fold_constants(model, onnx_shape_inference=True)


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


def write_graph(graph: OpenGraph, model: onnx_ir.Model, path: Path, pool: PoolWriter) -> Graph:
    """Writes a model of the graph to ``path``, with its weights in the pool beside it."""
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
            base_dir=path.parent,
        )
    onnx_ir.save(model, path)
    return Graph(
        file=describe_file(path.parent, path.name),
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
