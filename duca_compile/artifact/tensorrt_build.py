"""The record of an artifact's TensorRT engines, and the library that builds and runs them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from duca_compile.artifact.lowered import Weight
from duca_compile.errors import ArtifactError, BackendError, UsageError

LIBRARIES = ("tensorrt_rtx", "tensorrt")
FOLDER = "tensorrt"  # in the artifact, unless another is named
RECORD = "engines.json"


@dataclass(frozen=True)
class Options:
    """What engines are built for.

    Attributes:
        targets: GPU architectures such as "sm89", one engine for all of them; none for the GPU of this machine.
        precision: of products: "bfloat16", "float16" or "float32". All else stays as the artifact has it.
        batch: the least, the usual and the largest number of rows of a call, where the artifact leaves it open.
        library: "tensorrt_rtx" or "tensorrt".
    """

    targets: tuple[str, ...]
    precision: str
    batch: tuple[int, int, int]
    library: str


@dataclass(frozen=True)
class Engine:
    """A built graph.

    Attributes:
        file: in the folder; ``bytes`` is its size.
        graph: the hash of the ONNX file.
        key: the hash of all that it was built from.
        weights: its inputs that are not the graph's.
    """

    file: str
    graph: str
    key: str
    bytes: int
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class Build:
    """The engines of an artifact, by the names of its graphs; ``engines.json`` in their folder."""

    version: str  # of the library
    options: Options
    engines: dict[str, Engine]

    @property
    def weights(self) -> dict[str, Weight]:
        """Each weight that an engine takes, once."""
        return {weight.name: weight for engine in self.engines.values() for weight in engine.weights}


def read_build(folder: Path) -> tuple[Build, Any]:
    """What was built in a folder, and the library that built it.

    Raises:
        ArtifactError: nothing was.
        BackendError: the library is not installed, or is of another version.
    """
    path = folder / RECORD
    try:
        found = json.loads(path.read_text("utf-8"))
        options = Options(**{**found["options"], **{k: tuple(found["options"][k]) for k in ("targets", "batch")}})
        engines = {
            name: Engine(
                **{**each, "weights": tuple(Weight(**{**w, "shape": tuple(w["shape"])}) for w in each["weights"])}
            )
            for name, each in found["engines"].items()
        }
        build = Build(found["version"], options, engines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is no record of engines ({error}); build them: duca-compile build") from error
    trt, _ = find_library(options.library)
    if trt.__version__ != build.version:
        raise BackendError(
            f"the engines in {folder} were built by {options.library} {build.version}, and {trt.__version__} is "
            "installed; build them again: duca-compile build"
        )
    return build, trt


def find_library(name: str | None) -> tuple[Any, str]:
    """The library of this name, or the first that is installed."""
    if name is not None and name not in LIBRARIES:
        raise UsageError(f"library={name!r} is unknown; choose one of {LIBRARIES}")
    for each in LIBRARIES if name is None else (name,):
        try:
            return import_module(each), each
        except ImportError:
            continue
    raise BackendError(
        f"{name or ' or '.join(LIBRARIES)} is not installed; duca-compile[tensorrt] installs the first, and NVIDIA's "
        "tensorrt package is the second"
    )
