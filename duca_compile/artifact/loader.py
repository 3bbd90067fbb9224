"""Reads an artifact from its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG

from duca_compile.artifact.engines import open_engine
from duca_compile.artifact.engines.base import Options
from duca_compile.artifact.manifest import File, Manifest, inside, read_manifest, sha256
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
    """Loads an artifact that ``duca_compile.save`` wrote; the result is called like the model.

    Args:
        path: the folder.
        backend: "onnxruntime", "openvino" for a CPU, "tensorrt" for engines that ``duca-compile build`` made, or "aoti"
            for an artifact of that format.
        providers: of ONNX Runtime, the first choice first; None means the CPU. A provider that cannot be used is an
            error; there is no silent fallback.
        threads: how many threads one operator may use in ONNX Runtime and OpenVINO; None leaves it to them.
        share_weights: hold the weights once for all graphs, mapped from the file. Otherwise each graph holds a copy in
            the layout that it prefers, which can be faster for wide models. TensorRT engines and AOTInductor's code
            always share them.
        verify: compare the hash of each file with the manifest, which reads all of them.

    Raises:
        ArtifactError: the folder is no artifact, is damaged, or was written by a later version; says what is wrong.
        BackendError: a package or a provider is missing.
        UsageError: the backend or a provider is unknown.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, verify)
    return Artifact(
        manifest, open_engine(backend, folder, manifest, Options(providers, threads, share_weights, verify))
    )


def check_files(folder: Path, manifest: Manifest, verify: bool = True) -> None:
    """Checks the files without an engine.

    Raises:
        ArtifactError: a file is missing, leaves the folder, is not what the manifest says, or, with ``verify``, has
            another hash.
    """
    for file in dict.fromkeys((manifest.weights.file, *(graph.file for graph in manifest.graphs.values()))):
        _check_file(inside(folder, file), file, verify)
    if manifest.format == "onnx":
        from duca_compile.artifact.onnx_files import check_onnx

        for graph in manifest.graphs.values():
            check_onnx(inside(folder, graph.file), graph, manifest.weights.file)


def _check_file(path: Path, file: File, verify: bool) -> None:
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is not a regular file; copy the artifact again")
        digest = sha256(path) if verify and status.st_size == file.bytes else file.sha256
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing: {error.strerror}; export the model again") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; copy the artifact again") from error
    size = status.st_size
    if size != file.bytes:
        state = "truncated" if size < file.bytes else "too long"
        raise ArtifactError(f"{path} is {state}: it has {size} bytes, not {file.bytes}; copy the artifact again")
    if digest != file.sha256:
        raise ArtifactError(f"{path} was changed: its SHA-256 is not that of the manifest; copy the artifact again")
