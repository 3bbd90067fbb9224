"""Reads an artifact from its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from duca_compile.artifact import manifest
from duca_compile.artifact.engines import open_engine
from duca_compile.artifact.engines.base import Options
from duca_compile.artifact.manifest import Manifest, inside, read_manifest
from duca_compile.artifact.model import Artifact
from duca_compile.errors import ArtifactError


def load(
    path: str | os.PathLike[str],
    backend: str = "onnxruntime",
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    share_weights: bool = True,
    verify: bool = True,
) -> Artifact:
    """An artifact that was written by ``duca_compile.save``, ready to be called like the model.

    Args:
        path: the folder.
        backend: "onnxruntime", "openvino" for a CPU, "tensorrt" for the engines that ``duca-compile build`` made,
            or "aoti" for an artifact of that format.
        providers: of ONNX Runtime, the first choice first; the CPU where it is None. One that cannot be used is an
            error, never a silent fall-back.
        threads: that one operator may use in ONNX Runtime and OpenVINO; as many as they take where it is None.
        share_weights: hold the weights once, mapped from the file, for all graphs. Else each graph rearranges copies of
            its own, which can be faster for wide models. Engines of TensorRT and code of AOTInductor always share them.
        verify: compare each file with its hash. This reads all of them.

    Raises:
        ArtifactError: it is no artifact, is damaged, or is of a later version; says what is wrong.
        BackendError: a package or a provider is missing.
        UsageError: an unknown backend or provider.
    """
    folder = Path(path)
    found = read_manifest(folder)
    check_files(folder, found, verify)
    return Artifact(found, open_engine(backend, folder, found, Options(providers, threads, share_weights)))


def check_files(folder: Path, found: Manifest, verify: bool = True) -> None:
    """Raises ArtifactError where a file is missing, leaves the folder, or, with ``verify``, is not what was written."""
    for file in dict.fromkeys((found.weights.file, *(graph.file for graph in found.graphs.values()))):
        path = inside(folder, file)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ArtifactError(f"{path} is missing: {error.strerror}; export the model again") from error
        if size != file.bytes:
            state = "truncated" if size < file.bytes else "too long"
            raise ArtifactError(f"{path} is {state}: it has {size} bytes, not {file.bytes}; copy the artifact again")
        if verify and manifest.sha256(path) != file.sha256:
            raise ArtifactError(f"{path} was changed: its SHA-256 is not that of the manifest; copy the artifact again")
