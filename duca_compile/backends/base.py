"""The interface of backends, and the common base of those that compile."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from duca_compile.backends.cuda_graphs import GraphReplay
from duca_compile.core.lock import COMPILING
from duca_compile.core.once import Once
from duca_compile.core.ports import WRITTEN, Port, PortKind
from duca_compile.core.variants import Variant, VariantFunction
from duca_compile.errors import BackendError, InternalError, first_line

log = logging.getLogger("duca_compile")


class Backend(Protocol):
    """Turns variants into callables.

    Attributes:
        name: what ``optimize(backend=...)`` calls it.
        exact: whether full steps must equal the model's own results, bit for bit.
    """

    name: str
    exact: bool

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        """A callable of the variant's flat tensors.

        Args:
            variant: the rewritten graph.
            cuts: names of the nodes that end a residual branch.

        Raises:
            BackendError: it cannot be compiled, where the backend is strict.
        """


class CompilingBackend(ABC):
    """Compiles each variant at its first call, for all token counts.

    A variant that fails to compile runs under the eager backend, with one warning for each reason. If nothing can be
    compiled at all, no further variant is tried.

    Args:
        strict: whether to raise BackendError instead.
        mode: "default", or "reduce-overhead" to replay each step as a CUDA graph.

    Attributes:
        label: the compiler's name in messages.
        advice: what to do if nothing can be compiled.
        unusable: whether nothing can be compiled.
        replays: whether steps are replayed as CUDA graphs.
    """

    name: str
    label: str
    advice: str
    exact = False

    def __init__(self, strict: bool = False, mode: str = "default") -> None:
        self._strict = strict
        self._reasons = Once()
        self.unusable = False
        self.replays = mode == "reduce-overhead"

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        if self.unusable:
            log.info("the variant of %s runs under eager: %s can compile nothing", variant.spec.kind, self.label)
            return variant.module.forward
        return _CompiledOnFirstCall(self, variant, cuts)

    @abstractmethod
    def lower(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Compiles a graph. Returns a function of the weights, then the tensors."""

    def reason(self, error: Exception) -> str:
        """Why compiling failed, in one line."""
        return first_line(error)

    def makes_unusable(self, error: Exception) -> bool:
        """Whether the error shows that no variant can be compiled."""
        del error
        return False

    def failed(self, error: Exception, kind: str) -> None:
        """Records that a variant could not be compiled, and warns once for each reason.

        Args:
            error: what the compiler raised.
            kind: what the variant runs, such as "full steps".

        Raises:
            BackendError: the backend is strict.
        """
        reason = self.reason(error)
        if self._strict:
            raise BackendError(f"{self.label} could not compile the variant of {kind}: {reason}") from error
        self.unusable = self.makes_unusable(error)
        if not self._reasons.first(reason):
            log.info("%s could not compile the variant of %s either, for the same reason", self.label, kind)
            return
        log.info("%s could not compile the variant of %s: %s", self.label, kind, reason)
        which = "all variants run" if self.unusable else f"that of {kind} runs"
        advice = self.advice if self.unusable else "Other variants are still compiled; strict=True makes this an error."
        warnings.warn(
            f"{self.label} could not compile a variant ({reason}); {which} under eager instead, which is slower. "
            f"{advice}",
            RuntimeWarning,
            stacklevel=2,
        )


@runtime_checkable
class HoldsWeights(Protocol):
    """A compiled variant that holds references to the weights of its module."""

    def refresh(self) -> None:
        """The module has other weights of the same kinds from now on."""


class _CompiledOnFirstCall:
    """Compiles a variant at the first call. Every call passes the current weights to the compiled code."""

    def __init__(self, backend: CompilingBackend, variant: Variant, cuts: frozenset[str]) -> None:
        self._backend, self._module, self._kind = backend, variant.module, variant.spec.kind
        self._compiled: Callable[..., Any] | None = None
        self._replayed: GraphReplay | None = None
        self._lifted = _lift(variant, cuts)
        self._any_strides = [i for i, port in enumerate(variant.inputs) if _may_have_any_strides(port)]
        self._weights: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Compiled code is specialized to strides, and a caller's latent or expanded timestep may have any strides.
        for i in self._any_strides:
            if not tensors[i].is_contiguous():
                tensors = tuple(map(Tensor.contiguous, tensors))
                break
        if self._compiled is None:
            with COMPILING:
                if self._compiled is None:
                    self._compiled = self._compile(tensors)
        if self._backend.replays and tensors[0].device.type == "cuda":
            self._replayed = self._replayed or GraphReplay(self._run)
            return self._replayed(*tensors)
        return self._run(*tensors)

    def _run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._compiled is None:
            raise InternalError("a variant runs before it is compiled")
        return tuple(self._compiled(*self._weights, *tensors))

    def refresh(self) -> None:
        """The module has other weights of the same kinds from now on."""
        self._replayed = None  # it was recorded with the old weights
        self._weights = [attrgetter(name)(self._module) for name in self._lifted.weights]

    def _compile(self, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        self.refresh()
        if not self._backend.unusable:
            started = perf_counter()
            try:
                compiled = self._backend.lower(self._lifted, self._weights, tensors)
                log.info(
                    "%s compiled the variant of %s in %.1f s", self._backend.label, self._kind, perf_counter() - started
                )
                return compiled
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._backend.failed(error, self._kind)
        log.info("the variant of %s runs under eager", self._kind)
        count = len(self._weights)
        return lambda *arguments: self._module.forward(*arguments[count:])


def _may_have_any_strides(port: Port) -> bool:
    """Whether an input may have any strides. The dispatcher keeps caches contiguous, except what a probe saw."""
    return port.kind is not PortKind.HOISTED and port.kind not in WRITTEN


@dataclass(frozen=True)
class Lifted:
    """A variant's graph with the weights as its first inputs.

    Attributes:
        graph: the graph.
        weights: names of the weights in the module, in the order of the inputs.
        dynamic: indices, among the inputs after the weights, of token indices (batch, count), whose count varies.
        cuts: names of the nodes that end a residual branch.
    """

    graph: fx.Graph
    weights: tuple[str, ...]
    dynamic: tuple[int, ...]
    cuts: frozenset[str]


def _lift(variant: Variant, cuts: frozenset[str]) -> Lifted:
    module, graph, copies = variant.module, fx.Graph(), dict[fx.Node, fx.Node]()
    weights = module.graph.find_nodes(op="get_attr")
    for node in weights:
        copies[node] = graph.placeholder(f"weight_{node.name}")
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    for node in graph.find_nodes(op="placeholder"):
        node.target = node.name  # a weight may be called like an argument
    for node in module.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if copies[node].name != node.name:
                copies[node].name = node.name
    return Lifted(graph, tuple(str(node.target) for node in weights), dynamic_positions(variant), cuts)


def dynamic_positions(variant: Variant) -> tuple[int, ...]:
    """Indices of the inputs whose second dimension varies from step to step."""
    return tuple(i for i, port in enumerate(variant.inputs) if port in variant.dynamic_inputs)
