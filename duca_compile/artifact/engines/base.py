"""What runs the graphs of an artifact: the engines' interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from duca_compile.artifact import manifest
from duca_compile.core.ports import PortKind, named_result
from duca_compile.core.tensors import Array
from duca_compile.errors import UsageError

# The results that leave the engine; all others only go into later steps.
HOST = (PortKind.OUTPUT, PortKind.SCORE, PortKind.PROBE_CHANGE, PortKind.VERIFY_ERROR)

# Flat values in the order of a graph's inputs to those of its outputs. Values are numpy arrays, torch tensors or what
# an earlier function of the same engine returned; those of HOST are returned as numpy arrays, or outputs as tensors.
GraphFunction = Callable[..., Sequence[Array]]


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
        """What runs the graph of this name, in any number of threads. Raises BackendError where the engine cannot."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A value of the engine's own."""


@dataclass(frozen=True)
class Options:
    """How an engine is to run; see ``duca_compile.load``."""

    providers: Sequence[str] | None = None
    threads: int | None = None
    share_weights: bool = True

    def check_no_providers(self, backend: str) -> None:
        """Raises UsageError where there are any."""
        if self.providers is not None:
            raise UsageError(f"providers are ONNX Runtime's; leave them out with backend={backend!r}")

    def check_no_threads(self, backend: str) -> None:
        """Raises UsageError where their number is given."""
        if self.threads is not None:
            raise UsageError(
                f"threads are ONNX Runtime's and OpenVINO's; with {backend!r} set torch.set_num_threads instead"
            )
