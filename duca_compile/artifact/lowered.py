"""An artifact's graphs as a GPU engine takes them: products in half precision, and weights as inputs.

All of it happens in ONNX, so the result can be run and compared without a GPU. Only products (matrix products,
convolutions, attention) change their type; norms, softmax, embeddings, the residual streams and the caches stay in
float32, with casts between. Weights of matrix products become inputs named after their place in the pool, so that the
engines of all variants read one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx_ir import DataType, Node, Value

from duca_compile.artifact.decoding import ImpossibleError
from duca_compile.artifact.schema import ITEM_BYTES, Count, Positive
from duca_compile.errors import ArtifactError, ExportError, InternalError

PRECISIONS = {"float32": DataType.FLOAT, "float16": DataType.FLOAT16, "bfloat16": DataType.BFLOAT16}
_CAST_OPERATORS = ("MatMul", "Gemm", "Conv", "Attention")  # whose operands and results change their type
_SHARED_BY = ("MatMul", "Gemm")  # whose weights an engine takes as inputs; a convolution's kernel must be a constant
_SHARED_FROM = 2**12  # bytes; smaller weights stay in the graph


@dataclass(frozen=True)
class Weight:
    """A weight that is an input of an engine: ``bytes`` from ``start`` in the pool, as ``shape`` of ``stored``.

    Raises:
        ImpossibleError: the bytes are not those of the shape, or a type is not one of ``PRECISIONS``.
    """

    name: str
    start: Count
    bytes: Count
    shape: tuple[Positive, ...]
    stored: str  # its type in the pool, by numpy's name
    dtype: str  # what the engine takes

    def __post_init__(self) -> None:
        if not {self.stored, self.dtype} <= PRECISIONS.keys():
            raise ImpossibleError(
                f"stored: it and dtype must be of {tuple(PRECISIONS)}, not {self.stored}, {self.dtype}"
            )
        if len(self.shape) > 8 or prod(self.shape) * ITEM_BYTES[self.stored] != self.bytes:
            raise ImpossibleError(f"bytes: {self.bytes} are not those of {self.stored} of shape {self.shape}")

    def check_inside(self, pool: np.ndarray) -> None:
        """Raises ArtifactError where the bytes of a pool end before the weight does."""
        if self.start + self.bytes > pool.size:
            raise ArtifactError(f"the weight {self.name!r} is outside of the weights' {pool.size} bytes")

    def array(self, pool: np.ndarray) -> np.ndarray:
        """The weight in the bytes of a pool, in the type in which it is stored; no copy.

        Raises:
            ArtifactError: the pool ends before the weight does.
        """
        self.check_inside(pool)
        stored = PRECISIONS[self.stored].numpy()
        return pool[self.start : self.start + self.bytes].view(stored).reshape(self.shape)


@dataclass(frozen=True)
class Lowered:
    """A model that is complete but for its shared weights."""

    model: onnx_ir.Model
    weights: tuple[Weight, ...]

    def serialized(self) -> bytes:
        return bytes(onnx_ir.to_proto(self.model).SerializeToString())


def lower(path: Path, precision: str) -> Lowered:
    """The graph of an artifact's ONNX file; what is in half precision there stays so.

    Args:
        path: the file.
        precision: of products, one of ``PRECISIONS``.

    Raises:
        ExportError: a weight is too large for float16.
    """
    model = onnx_ir.load(path)
    shared = _share(model.graph)
    if PRECISIONS[precision] is not DataType.FLOAT:
        _cast_products(model, PRECISIONS[precision], frozenset(shared))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            value.const_value = onnx_ir.Tensor(value.const_value.numpy().copy(), name=value.name)
    return Lowered(model, tuple(_weight(value, tensor) for value, tensor in shared.items()))


def _share(graph: onnx_ir.Graph) -> dict[Value, onnx_ir.ExternalTensor]:
    """Turns the weights of matrix products into inputs, one for each place in the pool; returns them with their values.

    Two weights may share a place under different shapes; these are different inputs.
    """
    inputs: dict[str, Value] = {}
    tensors: dict[Value, onnx_ir.ExternalTensor] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if not isinstance(tensor, onnx_ir.ExternalTensor) or not _is_shared(value, tensor):
            continue
        graph.initializers.pop(_value_name(value))
        name = "_".join(map(str, ("weight", tensor.offset, *tensor.shape)))
        if name in inputs:
            onnx_ir.convenience.replace_all_uses_with(value, inputs[name])
            continue
        value.name, value.const_value = name, None
        inputs[name], tensors[value] = value, tensor
        graph.inputs.append(value)
    return tensors


def _is_shared(value: Value, tensor: onnx_ir.ExternalTensor) -> bool:
    readers = {node.op_type for node in value.consumers()}
    products = bool(readers) and readers <= {*_SHARED_BY} and len(tensor.shape) > 1
    return products and tensor.dtype in PRECISIONS.values() and tensor.nbytes >= _SHARED_FROM


def _value_name(value: Value) -> str:
    if value.name is None:
        raise InternalError("a value of an ONNX graph has no name")
    return value.name


def _weight(value: Value, tensor: onnx_ir.ExternalTensor) -> Weight:
    name, dtype = _value_name(value), value.dtype
    if dtype is None:
        raise InternalError(f"the weight {name!r} has no type")
    if dtype is DataType.FLOAT16 and np.abs(tensor.numpy()).max() > np.finfo(np.float16).max:
        raise ExportError(f"the weight {tensor.name!r} is too large for float16; build with bfloat16 or float32")
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return Weight(name, tensor.offset or 0, tensor.nbytes, shape, _precision(tensor.dtype), _precision(dtype))


def _precision(dtype: DataType) -> str:
    return next(name for name, known in PRECISIONS.items() if known is dtype)


def _cast_products(model: onnx_ir.Model, dtype: DataType, weights: frozenset[Value]) -> None:
    """Casts what products read to ``dtype``, each value once, and their results back to float32."""
    graph, casts = model.graph, dict[Value, Value]()
    opset = model.opset_imports[""]
    for node in list(graph):
        if node.domain or node.op_type not in _CAST_OPERATORS or not _takes(node.op_type, opset, dtype):
            continue
        _narrow_inputs(graph, node, dtype, weights, casts)
        for output in node.outputs:
            if output.dtype is DataType.FLOAT:
                _widen(graph, node, output, dtype)


def _narrow_inputs(
    graph: onnx_ir.Graph, node: Node, dtype: DataType, weights: frozenset[Value], casts: dict[Value, Value]
) -> None:
    """Has the node read ``dtype``: weights are given in it, and other values are cast; ``casts`` are the known ones."""
    for place, value in enumerate(node.inputs):
        if value is None or value.dtype is not DataType.FLOAT:
            continue
        if value in weights:
            value.dtype = dtype
            continue
        if value not in casts:
            cast = _cast(value, dtype)
            graph.insert_before(node, cast)
            casts[value] = cast.outputs[0]
        node.replace_input_with(place, casts[value])


def _takes(operator: str, opset: int, dtype: DataType) -> bool:
    """Whether this version of the operator has the type."""
    schema = onnx.defs.get_schema(operator, opset, "")
    first = schema.inputs[0].type_str
    allowed = next(
        constraint.allowed_type_strs for constraint in schema.type_constraints if constraint.type_param_str == first
    )
    return f"tensor({dtype.name.lower()})" in allowed


def _cast(value: Value, dtype: DataType) -> Node:
    node = onnx_ir.node("Cast", [value], {"to": dtype.value})
    (result,) = node.outputs
    result.name, result.shape, result.dtype = f"{value.name}_as_{dtype.name.lower()}", value.shape, dtype
    return node


def _widen(graph: onnx_ir.Graph, node: Node, output: Value, dtype: DataType) -> None:
    """Has the node return ``dtype``, and everything else read its result in float32 under its old name."""
    cast = _cast(output, DataType.FLOAT)
    (wide,) = cast.outputs
    onnx_ir.convenience.replace_all_uses_with(output, wide, replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    wide.name, output.name = output.name, f"{output.name}_{dtype.name.lower()}"
    output.dtype = dtype
    graph.insert_after(node, cast)
