"""What a backend is: it turns a variant into a callable. What those that compile have in common."""

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

from duca_compile.backends.cuda_graphs import Replayed
from duca_compile.core.lock import COMPILING
from duca_compile.core.once import Once
from duca_compile.core.ports import WRITTEN, Port, PortKind
from duca_compile.core.variants import Variant, VariantFunction
from duca_compile.errors import BackendError, first_line

log = logging.getLogger("duca_compile")


class Backend(Protocol):
    name: str
    exact: bool  # whether results are to be the model's own, bit for bit

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        """A callable of the variant's flat tensors; ``cuts`` are the nodes that end a residual branch."""


class CompilingBackend(ABC):
    """Compiles each variant at its first call, for all token counts.

    Where that fails, the variant runs under eager, alone, with one warning for each reason; ``strict`` raises
    BackendError instead. Where nothing can be compiled, no other variant is tried.
    """

    name: str
    label: str
    advice: str  # what to do where nothing can be compiled
    exact = False

    def __init__(self, strict: bool = False, mode: str = "default") -> None:
        self._strict = strict
        self._reasons = Once()
        self.hopeless = False  # whether no variant can be compiled
        self.replays = mode == "reduce-overhead"

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        if self.hopeless:
            log.info("the variant of %s runs under eager: %s can compile nothing", variant.spec.kind, self.label)
            return variant.module.forward
        return _FirstCall(self, variant, cuts)

    @abstractmethod
    def lower(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """A function of the weights and then the tensors."""

    def reason(self, error: Exception) -> str:
        return first_line(error)

    def is_hopeless(self, error: Exception) -> bool:
        """Whether what failed is no matter of the variant."""
        del error
        return False

    def failed(self, error: Exception, kind: str) -> None:
        """Notes that a variant, of steps of this kind, could not be compiled.

        Raises:
            BackendError: where the backend is strict.
        """
        reason = self.reason(error)
        if self._strict:
            raise BackendError(f"{self.label} could not compile a variant: {reason}. It is that of {kind}") from error
        self.hopeless = self.is_hopeless(error)
        if not self._reasons.first(reason):
            log.info("%s could not compile that of %s either, for the same reason", self.label, kind)
            return
        log.info("%s could not compile that of %s: %s", self.label, kind, reason)
        which = "all are" if self.hopeless else f"that of {kind} is"
        advice = self.advice if self.hopeless else "Others are tried on their own; strict=True makes it an error."
        warnings.warn(
            f"{self.label} could not compile a variant ({reason}); {which} running under eager instead, at that speed. "
            f"{advice}",
            RuntimeWarning,
            stacklevel=2,
        )


@runtime_checkable
class HoldsWeights(Protocol):
    """A compiled variant that holds the weights apart from its module."""

    def refresh(self) -> None:
        """The module has other weights of the same kinds from now on."""


class _FirstCall:
    """Compiles at the first call; afterwards it calls the compiled code with the weights of now."""

    def __init__(self, backend: CompilingBackend, variant: Variant, cuts: frozenset[str]) -> None:
        self._backend, self._module, self._kind = backend, variant.module, variant.spec.kind
        self._compiled: Callable[..., Any] | None = None
        self._replayed: Replayed | None = None
        self._lifted = _lift(variant, cuts)
        self._foreign = [place for place, port in enumerate(variant.inputs) if _is_foreign(port)]
        self._weights: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Strides are built into compiled code, and a caller's latent or expanded timestep may come with any.
        for place in self._foreign:
            if not tensors[place].is_contiguous():
                tensors = tuple(map(Tensor.contiguous, tensors))
                break
        if self._compiled is None:
            with COMPILING:
                if self._compiled is None:
                    self._compiled = self._compile(tensors)
        if self._backend.replays and tensors[0].device.type == "cuda":
            self._replayed = self._replayed or Replayed(self._run)
            return self._replayed(*tensors)
        return self._run(*tensors)

    def _run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert self._compiled is not None
        return tuple(self._compiled(*self._weights, *tensors))

    def refresh(self) -> None:
        """The module has other weights of the same kinds from now on."""
        self._replayed = None  # it was recorded with the old ones
        self._weights = [attrgetter(name)(self._module) for name in self._lifted.weights]

    def _compile(self, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        self.refresh()
        if not self._backend.hopeless:
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


def _is_foreign(port: Port) -> bool:
    """Whether an input may lie in any order in memory: what the dispatcher keeps is contiguous, but for PROBE_SEEN."""
    return port.kind is not PortKind.HOISTED and port.kind not in WRITTEN


@dataclass(frozen=True)
class Lifted:
    """A variant's graph whose weights are its first inputs.

    Attributes:
        graph: it.
        weights: their names in the module, in the order of the inputs.
        dynamic: the places of token indices (batch, k) among the tensors, which are the other inputs.
        cuts: the nodes that end a residual branch.
    """

    graph: fx.Graph
    weights: tuple[str, ...]
    dynamic: tuple[int, ...]
    cuts: frozenset[str]


def _lift(variant: Variant, cuts: frozenset[str]) -> Lifted:
    module, graph, own = variant.module, fx.Graph(), dict[fx.Node, fx.Node]()
    weights = module.graph.find_nodes(op="get_attr")
    for node in weights:
        own[node] = graph.placeholder(f"weight_{node.name}")
    for node in module.graph.find_nodes(op="placeholder"):
        own[node] = graph.node_copy(node)
    for node in graph.find_nodes(op="placeholder"):
        node.target = node.name  # a weight may be called like an argument
    for node in module.graph.nodes:
        if node not in own:
            own[node] = graph.node_copy(node, lambda n: own[n])
            if own[node].name != node.name:
                own[node].name = node.name
    return Lifted(graph, tuple(str(node.target) for node in weights), dynamic_positions(variant), cuts)


def dynamic_positions(variant: Variant) -> tuple[int, ...]:
    return tuple(i for i, port in enumerate(variant.inputs) if port in variant.dynamic_inputs)
