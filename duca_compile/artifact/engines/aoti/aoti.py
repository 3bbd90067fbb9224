"""Runs the graphs of an artifact as code that AOTInductor compiled; nothing is compiled here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from duca_compile.artifact.engines.base import GraphFunction, Options, is_score
from duca_compile.artifact.manifest import Graph, Manifest, inside
from duca_compile.core.tensors import Array
from duca_compile.errors import ArtifactError, BackendError, first_line, missing_package

with missing_package("export"):
    import torch
    from safetensors.torch import load_file


def open_engine(folder: Path, found: Manifest, options: Options) -> AOTIEngine:
    """AOTInductor's code for an artifact; it has neither providers nor threads of its own."""
    options.check_no_providers("aoti")
    options.check_no_threads("aoti")
    return AOTIEngine(folder, found)


class AOTIEngine:
    """One model of a package for each graph, all of which read the same weights.

    Attributes:
        weights: by name; what is written into them takes effect from the next call on.

    Raises:
        ArtifactError: the package cannot be loaded on this machine.
    """

    def __init__(self, folder: Path, found: Manifest) -> None:
        self._package = inside(folder, found.graphs[found.prologue].file)
        self._device = torch.device(self._load(found.prologue).get_metadata()["AOTI_DEVICE_KEY"])
        self.weights = load_file(inside(folder, found.weights.file), device=str(self._device))

    def _load(self, name: str) -> Any:
        # Not torch's load_package: that compares the processor with the one it was compiled for, by compiling for it.
        try:
            return torch._C._aoti.AOTIModelPackageLoader(str(self._package), name, False, 1, -1)
        except RuntimeError as error:
            raise ArtifactError(f"model {name!r} of {self._package} cannot be loaded: {first_line(error)}") from error

    def function(self, name: str, graph: Graph) -> GraphFunction:
        model = self._load(name)
        names = model.get_constant_fqns()
        if missing := sorted({*names} - self.weights.keys()):
            raise ArtifactError(f"the weights that model {name!r} needs lack {missing}")
        own = {each: self.weights[each] for each in names}
        model.load_constants(own, use_inactive=False, check_full_update=True, user_managed=True)
        return _Function(model, graph, self._device, own)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)


class _Function:
    """Runs one graph; what it returns is memory of its own."""

    def __init__(self, loader: Any, graph: Graph, device: torch.device, weights: dict[str, torch.Tensor]) -> None:
        self._loader, self._graph, self._device = loader, graph, device
        self._scores = [is_score(spec.name) for spec in graph.outputs]
        self._weights = weights  # held: the loader has their addresses alone

    def __call__(self, *values: Array) -> list[Array]:
        given = [_tensor(value).to(self._device).contiguous() for value in values]
        try:
            results = self._loader.run(given)
        except RuntimeError as error:
            raise BackendError(f"AOTInductor's code of {self._graph.file.path} failed: {first_line(error)}") from error
        taken = {tensor.untyped_storage().data_ptr() for tensor in given}
        found: list[Array] = []
        for scores, result in zip(self._scores, results, strict=True):
            own = result.clone() if result.untyped_storage().data_ptr() in taken else result
            taken.add(own.untyped_storage().data_ptr())
            found.append(own.cpu().numpy() if scores else own)
        return found


def _tensor(value: Array) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value, order="C"))
