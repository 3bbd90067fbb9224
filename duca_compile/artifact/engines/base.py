"""The interface of the engines that run the graphs of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from duca_compile.artifact import manifest
from duca_compile.core.ports import PortKind, named_result
from duca_compile.core.tensors import Array
from duca_compile.errors import ArtifactError, UsageError

# The kinds of outputs that leave the engine; all others are only read by later steps.
HOST = (PortKind.OUTPUT, PortKind.SCORE, PortKind.PROBE_CHANGE, PortKind.VERIFY_ERROR)

# Maps values in the order of a graph's inputs to values in the order of its outputs. Inputs are numpy arrays, torch
# tensors, or values that a function of the same engine returned. Outputs that HOST names are numpy arrays; those of the
# model may be torch tensors instead.
GraphFunction = Callable[..., Sequence[Array]]


def map_pool(path: Path) -> np.ndarray:
    """The bytes of the weights, mapped from their file. Raises ArtifactError where it cannot be read."""
    try:
        # Writable copies: read-only memory is not exported to engines. An empty file cannot be mapped.
        return np.memmap(path, mode="c") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; copy the artifact again") from error


def is_for_host(result: str) -> bool:
    """Whether the result of this name leaves the engine."""
    port = named_result(result)
    return port is not None and port.kind in HOST


def is_score(result: str) -> bool:
    """Whether the result of this name holds scores, which are chosen from with numpy."""
    port = named_result(result)
    return port is not None and port.kind is PortKind.SCORE


class Engine(Protocol):
    """Runs the graphs of an artifact."""

    def function(self, name: str, graph: manifest.Graph) -> GraphFunction:
        """A thread-safe function that runs the graph. Raises BackendError where the engine cannot run it."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Zeros, as a value of the engine."""


@dataclass(frozen=True)
class Options:
    """The options of ``duca_compile.load`` that engines read."""

    providers: Sequence[str] | None = None
    threads: int | None = None
    share_weights: bool = True
    verify: bool = True

    def check_no_providers(self, backend: str) -> None:
        """Raises UsageError where providers are given."""
        if self.providers is not None:
            raise UsageError(f"providers are ONNX Runtime's; leave them out with backend={backend!r}")

    def check_no_threads(self, backend: str) -> None:
        """Raises UsageError where a number of threads is given."""
        if self.threads is not None:
            raise UsageError(
                f"threads are ONNX Runtime's and OpenVINO's; with {backend!r} set torch.set_num_threads instead"
            )
