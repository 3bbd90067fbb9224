"""Runs the graphs of an artifact from the machine code of an AOTInductor package; compiles nothing."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from duca_compile.artifact.engines.base import GraphFunction, Options, is_score
from duca_compile.artifact.manifest import Graph, Manifest, inside
from duca_compile.core.tensors import Array
from duca_compile.core.torch_api import check_torch
from duca_compile.errors import ArtifactError, BackendError, first_line, missing_package

with missing_package("export"):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

check_torch("artifacts of format 'aoti'")


def open_engine(folder: Path, manifest: Manifest, options: Options) -> AOTIEngine:
    """The engine for an artifact. Raises UsageError for providers or threads, which it does not have."""
    options.check_no_providers("aoti")
    options.check_no_threads("aoti")
    return AOTIEngine(folder, manifest)


class AOTIEngine:
    """One model of the package for each graph; all models read the same weights.

    Attributes:
        weights: by name. Writing into them takes effect at the next call.

    Raises:
        ArtifactError: the package cannot be loaded on this machine, or the weights are damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._package = inside(folder, manifest.graphs[manifest.prologue].file)
        _check_package(self._package)
        try:
            self._device = torch.device(self._load(manifest.prologue).get_metadata()["AOTI_DEVICE_KEY"])
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(f"{self._package} does not say for which device it was compiled") from error
        path = inside(folder, manifest.weights.file)
        try:
            self.weights = load_file(path, device=str(self._device))
        except SafetensorError as error:
            raise ArtifactError(f"{path} holds no weights: {first_line(error)}; export the model again") from error

    def _load(self, name: str) -> Any:
        # Not torch's load_package, which compiles a program to compare this processor with that of the package.
        try:
            return torch._C._aoti.AOTIModelPackageLoader(str(self._package), name, False, 1, -1)
        except RuntimeError as error:
            raise ArtifactError(f"model {name!r} of {self._package} cannot be loaded: {first_line(error)}") from error

    def function(self, name: str, graph: Graph) -> GraphFunction:
        model = self._load(name)
        names = model.get_constant_fqns()
        if missing := sorted({*names} - self.weights.keys()):
            raise ArtifactError(f"the weights that model {name!r} needs lack {missing}")
        weights = {name: self.weights[name] for name in names}
        model.load_constants(weights, use_inactive=False, check_full_update=True, user_managed=True)
        return _Function(model, graph, self._device, weights)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)


def _check_package(path: Path) -> None:
    """Raises ArtifactError where a package would unpack to more bytes than it has, or to files outside of its folder.

    torch unpacks it into a temporary folder. Packages are not compressed.
    """
    try:
        with ZipFile(path) as package:
            entries = package.infolist()
    except (BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no package of AOTInductor: {first_line(error)}; export the model again"
        ) from error
    names = [PurePosixPath(entry.filename.replace("\\", "/")) for entry in entries]
    if any(name.is_absolute() or ".." in name.parts for name in names) or len({*names}) < len(names):
        raise ArtifactError(f"{path} has entries that lead out of it, or the same one twice; export the model again")
    compressed = any(entry.compress_type != ZIP_STORED for entry in entries)
    if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ArtifactError(f"{path} would unpack to more than its own bytes; export the model again")


class _Function:
    """Runs one graph; each result has its own memory."""

    def __init__(self, loader: Any, graph: Graph, device: torch.device, weights: dict[str, torch.Tensor]) -> None:
        self._loader, self._graph, self._device = loader, graph, device
        self._scores = [is_score(spec.name) for spec in graph.outputs]
        self._weights = weights  # keeps them alive: the loader has only their addresses

    def __call__(self, *values: Array) -> list[Array]:
        inputs = [_tensor(value).to(self._device).contiguous() for value in values]
        try:
            results = self._loader.run(inputs)
        except RuntimeError as error:
            raise BackendError(f"AOTInductor's code of {self._graph.file.path} failed: {first_line(error)}") from error
        used = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        outputs: list[Array] = []
        for scores, result in zip(self._scores, results, strict=True):
            output = result.clone() if result.untyped_storage().data_ptr() in used else result
            used.add(output.untyped_storage().data_ptr())
            outputs.append(output.cpu().numpy() if scores else output)
        return outputs


def _tensor(value: Array) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value, order="C"))
