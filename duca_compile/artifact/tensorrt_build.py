"""The record of an artifact's TensorRT engines, and the library that builds and runs them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from duca_compile.artifact.decoding import decode, parse, read_text
from duca_compile.artifact.lowered import PRECISIONS, Weight
from duca_compile.artifact.manifest import inside
from duca_compile.artifact.schema import Count, Positive
from duca_compile.errors import ArtifactError, BackendError, UsageError

LIBRARIES = ("tensorrt_rtx", "tensorrt")
FOLDER = "tensorrt"  # in the artifact, unless another is named
RECORD = "engines.json"
_HASH = "sha256"  # the field of the record that holds the hash of all others


@dataclass(frozen=True)
class BuildOptions:
    """What engines are built for.

    Attributes:
        targets: GPU architectures such as "sm89", all served by one engine; none means the GPU of this machine.
        precision: of products: "bfloat16", "float16" or "float32". Everything else keeps the artifact's types.
        batch: the smallest, the usual and the largest number of batch rows of a call, where the artifact leaves it
            open.
        library: "tensorrt_rtx" or "tensorrt".
    """

    targets: tuple[str, ...]
    precision: str
    batch: tuple[Positive, Positive, Positive]
    library: str


@dataclass(frozen=True)
class BuiltEngine:
    """A built graph.

    Attributes:
        file: its name in the folder; ``bytes`` is its size, and ``sha256`` the hash of its content.
        graph: the hash of the ONNX file.
        key: the hash of everything that it was built from.
        weights: the inputs that it has beside those of the graph.
    """

    file: str
    graph: str
    key: str
    bytes: Count
    sha256: str
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class Build:
    """The engines of an artifact by the names of its graphs: what ``engines.json`` in their folder holds."""

    version: str  # of the library
    options: BuildOptions
    engines: dict[str, BuiltEngine]

    @property
    def weights(self) -> dict[str, Weight]:
        """Each weight that any engine takes, by name."""
        return {weight.name: weight for engine in self.engines.values() for weight in engine.weights}

    def dumps(self) -> str:
        """The text of ``engines.json``: the record, and its hash."""
        content = asdict(self)
        return json.dumps({_HASH: _hash(content), **content}, indent=1) + "\n"


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_build(folder: Path) -> tuple[Build, Any]:
    """The record of the engines in a folder, and the library that built them.

    Raises:
        ArtifactError: there is no record, or it or its files are damaged.
        BackendError: the library is not installed, or is of another version.
    """
    path = folder / RECORD
    try:
        inside(folder, RECORD)
        content = parse(read_text(path), RECORD)
        digest = content.pop(_HASH, None) if isinstance(content, dict) else None
        build = decode(content, Build, RECORD)
        _check(build, folder)
        if digest != _hash(content):
            raise ValueError(f"it was changed: its {_HASH} is not that of its content")
    except (OSError, ValueError, ArtifactError) as error:
        raise ArtifactError(f"{path} is no record of engines ({error}); build them: duca-compile build") from error
    trt, library = find_library(build.options.library)
    if trt.__version__ != build.version:
        raise BackendError(
            f"the engines in {folder} were built by {library} {build.version}, and {trt.__version__} is installed; "
            "build them again: duca-compile build"
        )
    return build, trt


def _check(build: Build, folder: Path) -> None:
    """Raises ValueError or ArtifactError for what the types cannot say."""
    options = build.options
    for name, value, choices in (
        ("library", options.library, LIBRARIES),
        ("precision", options.precision, tuple(PRECISIONS)),
    ):
        if value not in choices:
            raise ValueError(f"options.{name} must be one of {choices}, not {value!r}")
    if sorted(options.batch) != list(options.batch):
        raise ValueError(f"options.batch: {options.batch} are not the smallest, the usual and the largest number")
    for graph, engine in build.engines.items():
        differ = [weight.name for weight in engine.weights if build.weights[weight.name] != weight]
        if differ:
            raise ValueError(f"engines.{graph}.weights: {differ[0]!r} differs from that of another engine")
        path = inside(folder, engine.file, RECORD)
        if not path.is_file() or path.stat().st_size != engine.bytes:
            raise ValueError(f"engines.{graph}.file: {engine.file!r} is not a file of {engine.bytes} bytes there")


def find_library(name: str | None) -> tuple[Any, str]:
    """The library of this name, or the first one that is installed, with its name.

    Raises:
        UsageError: there is no such library.
        BackendError: it, or every one, is missing.
    """
    if name is not None and name not in LIBRARIES:
        raise UsageError(f"library={name!r} is unknown; choose one of {LIBRARIES}")
    for candidate in LIBRARIES if name is None else (name,):
        try:
            return import_module(candidate), candidate
        except ImportError:
            continue
    raise BackendError(
        f"{name or ' or '.join(LIBRARIES)} is not installed; duca-compile[tensorrt] installs the first, and NVIDIA's "
        "tensorrt package is the second"
    )
