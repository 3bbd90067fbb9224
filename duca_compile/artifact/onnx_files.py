"""Checks the ONNX files of an artifact against its manifest, before an engine reads them.

Only the fields that are checked are declared here; protobuf skips the rest. A file may hold tensors in nodes of nested
graphs and functions too, so all of them are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from duca_compile.artifact.schema import File, Graph, TensorSpec
from duca_compile.errors import ArtifactError, missing_package

with missing_package("export"):
    from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

_LONGEST = 500  # characters of a message
_NUMBER = re.compile(r"[0-9]{1,18}")
_SCALARS = {
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
}
# Field of a message: its number, and the message or type that it holds. A star means that it is repeated.
_FIELDS = {
    "Model": {"graph": (7, "Graph"), "training": (20, "Training*"), "functions": (25, "Function*")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Graph": {
        "nodes": (1, "Node*"),
        "tensors": (5, "Tensor*"),
        "inputs": (11, "Value*"),
        "outputs": (12, "Value*"),
        "sparse": (15, "Sparse*"),
    },
    "Function": {"nodes": (7, "Node*"), "attributes": (11, "Attribute*")},
    "Node": {"attributes": (5, "Attribute*")},
    "Attribute": {
        "tensor": (5, "Tensor"),
        "graph": (6, "Graph"),
        "tensors": (10, "Tensor*"),
        "graphs": (11, "Graph*"),
        "one_sparse": (22, "Sparse"),
        "sparse": (23, "Sparse*"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"name": (8, "bytes"), "external": (13, "Entry*"), "location": (14, "int32")},
    "Entry": {"key": (1, "bytes"), "value": (2, "bytes")},
    "Value": {"name": (1, "bytes"), "type": (2, "Type")},
    "Type": {"tensor": (1, "TensorType")},
    "TensorType": {"dtype": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"sizes": (1, "Size*")},
    "Size": {"value": (1, "int64"), "name": (2, "bytes")},
}
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16", 17: "float8_e4m3fn",
    19: "float8_e5m2",
}  # fmt: skip


def check_onnx(path: Path, graph: Graph, pool: File) -> None:
    """Compares an ONNX file with what the manifest says of it.

    Args:
        path: the file.
        graph: the types and shapes that its inputs and outputs must have.
        pool: the one file that its external data may lie in, and only within.

    Raises:
        ArtifactError: it differs, or is no ONNX model.
    """
    try:
        model = _messages()["Model"].FromString(path.read_bytes())
    except (message.DecodeError, OSError) as error:
        raise ArtifactError(f"{path} is no ONNX model: {error}; export the model again") from error
    for what, values, specs in (
        ("inputs", model.graph.inputs, graph.inputs),
        ("outputs", model.graph.outputs, graph.outputs),
    ):
        found, wanted = [_seen(value) for value in values], [_expected(spec) for spec in specs]
        if found != wanted:
            raise ArtifactError(f"{path} has other {what} than the manifest says: {found}, not {wanted}"[:_LONGEST])
    for tensor in _tensors(model):
        _check_place(path, tensor, pool)


def _seen(value: Any) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor
    sizes = tuple(size.value if size.HasField("value") else _text(size.name) for size in tensor.shape.sizes)
    return _text(value.name), _DTYPES.get(tensor.dtype, str(tensor.dtype)), sizes


def _expected(spec: TensorSpec) -> tuple[str, str, tuple[int | str, ...]]:
    return spec.name, spec.dtype, tuple(size if isinstance(size, int) else str(size) for size in spec.shape)


def _tensors(part: Any) -> Iterator[Any]:
    """All tensors of a message. protobuf reads at most 100 levels of messages, so this ends."""
    if part.DESCRIPTOR.name == "Tensor":
        yield part
        return
    for field, value in part.ListFields():
        if field.message_type is not None:
            for child in value if field.is_repeated else (value,):
                yield from _tensors(child)


def _check_place(path: Path, tensor: Any, pool: File) -> None:
    """Raises ArtifactError where the data of a tensor is outside of both its file and the pool."""
    if not tensor.external and not tensor.location:
        return
    entries = [(_text(entry.key), _text(entry.value)) for entry in tensor.external]
    place = dict(entries)
    numbers = [place.get("offset", ""), place.get("length", "")]
    inside = len(place) == len(entries) and place.keys() == {"location", "offset", "length"}
    inside = inside and place["location"] == pool.path and all(map(_NUMBER.fullmatch, numbers))
    if not inside or sum(map(int, numbers)) > pool.bytes:
        raise ArtifactError(
            f"{path}: the data of tensor {_text(tensor.name)!r} must be in the {pool.bytes} bytes of {pool.path}, not "
            f"at {dict(entries)}; export the model again"[:_LONGEST]
        )


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


@cache
def _messages() -> dict[str, Any]:
    """The class of each message."""
    file = descriptor_pb2.FileDescriptorProto(name="duca_compile.proto", package="duca_compile", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        declared = file.message_type.add(name=name)
        for field, (number, held) in fields.items():
            label = kinds.LABEL_REPEATED if held.endswith("*") else kinds.LABEL_OPTIONAL
            kind = held.rstrip("*")
            of = {"type_name": f".duca_compile.{kind}"} if kind in _FIELDS else {"type": _SCALARS[kind]}
            declared.field.add(name=field, number=number, label=label, **of)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"duca_compile.{name}")) for name in _FIELDS
    }
