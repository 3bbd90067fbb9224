"""Writes graphs as one AOTInductor package of machine code, with the weights in a file beside it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from duca_compile.artifact.manifest import Chunk, File, Graph, Pool, sha256
from duca_compile.backends.inductor.private import compile_ahead, package
from duca_compile.core.fx_utils import op_name
from duca_compile.core.lock import COMPILING
from duca_compile.errors import ExportError
from duca_compile.export.batch import OpenGraph
from duca_compile.export.reasons import reason

if TYPE_CHECKING:
    from duca_compile.export.onnx import Translation

PACKAGE = "model.pt2"
WEIGHTS = "weights.safetensors"
_OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,  # at load time, all graphs get the same tensors
    "aot_inductor.check_lowerbound": False,  # the code also holds for a batch of one, and for one token or none
}


class AOTIWriter:
    """Compiles each graph to code without weights; weights are written once each, by their names in the model."""

    format: Literal["onnx", "aoti"] = "aoti"
    opset: int | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.versions = {"safetensors": safetensors.__version__}
        self.translations: dict[str, Translation] = {}  # code has no values of its own that could be compared
        self._graphs: list[OpenGraph] = []
        self._code: dict[str, Any] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, graph: OpenGraph) -> None:
        """Raises ExportError where Inductor cannot compile the graph, or there is no C++ compiler."""
        program = graph.program()
        with COMPILING, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's internals
            try:
                self._code[graph.name] = compile_ahead(program.module(), graph.example(), dict(_OPTIONS))
            except Exception as error:
                raise ExportError(f"AOTInductor cannot compile graph {graph.name!r}: {reason(error)}") from error
        for name, value in {**program.state_dict, **program.constants}.items():
            if isinstance(value, Tensor) and not self._same(name, value):
                raise ExportError(
                    f"graph {graph.name!r} has a constant {name!r} that differs from that of other graphs"
                )
        self._graphs.append(graph)

    def _same(self, name: str, value: Tensor) -> bool:
        known = self._weights.setdefault(name, value)
        return known is value or (known.shape == value.shape and torch.equal(known, value))

    def close(self) -> tuple[dict[str, Graph], Pool]:
        """The graphs by name, and their weights."""
        code, weights = self._folder / PACKAGE, self._folder / WEIGHTS
        package(str(code), self._code)
        save_file(_apart(self._weights), weights)
        file = _file(code)
        return {graph.name: _described(graph, file) for graph in self._graphs}, _pool(weights)


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the file format requires."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, weight in weights.items():
        dense = weight.detach().contiguous()
        tensors[name] = dense.clone() if dense.untyped_storage().data_ptr() in storages else dense
        storages.add(dense.untyped_storage().data_ptr())
    return tensors


def _described(graph: OpenGraph, file: File) -> Graph:
    operators = Counter(op_name(node) for node in graph.module.graph.nodes if node.op == "call_function")
    return Graph(file, graph.inputs, graph.outputs, dict(graph.in_place), dict(operators.most_common()))


def _file(path: Path) -> File:
    return File(path.name, path.stat().st_size, sha256(path))


def _pool(path: Path) -> Pool:
    """Finds the tensors in a safetensors file, which begins with the length of its header and the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = sorted(entry["data_offsets"] for entry in header.values())
        chunks = [
            Chunk(hashlib.sha256(file.read(end - start)).hexdigest(), 8 + length + start, end - start)
            for start, end in places
        ]
    return Pool(_file(path), 1, 0, tuple(chunks))
