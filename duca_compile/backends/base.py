"""Turns a variant into a callable: as it is, through torch.compile with Inductor, or through OpenVINO.

Everything of torch that is not public API and that compiling needs is in this module.
"""

from __future__ import annotations

import logging
import os
import subprocess
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from time import perf_counter
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, fx
from torch._higher_order_ops.utils import registered_hop_fake_fns
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, SymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._sympy.numbers import int_oo

from duca_compile.cuda_graphs import Replayed
from duca_compile.errors import BackendError, UsageError, first_line
from duca_compile.graph import PROBE_SEEN, Variant, VariantFunction, cache_input
from duca_compile.lock import COMPILING
from duca_compile.passes.hoist import hoisted_input
from duca_compile.passes.outline import form_of, kind_of, outline

log = logging.getLogger("duca_compile")

BACKENDS = ("inductor", "openvino", "eager")
MODES = ("default", "reduce-overhead")
_REGION: Any = torch.ops.higher_order.invoke_subgraph


class Backend(Protocol):
    name: str
    exact: bool  # whether results are to be the model's own, bit for bit

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        """A callable of the variant's flat tensors; ``cuts`` are the nodes that end a residual branch."""


class EagerBackend:
    """Runs the graph operator by operator: the reference that other backends are held to."""

    name = "eager"
    exact = True

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        del cuts
        return variant.module.forward


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
        self._told = set[str]()
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
        if reason in self._told:
            log.info("%s could not compile that of %s either, for the same reason", self.label, kind)
            return
        self._told.add(reason)
        log.info("%s could not compile that of %s: %s", self.label, kind, reason)
        which = "all are" if self.hopeless else f"that of {kind} is"
        advice = self.advice if self.hopeless else "Others are tried on their own; strict=True makes it an error."
        warnings.warn(
            f"{self.label} could not compile a variant ({reason}); {which} running under eager instead, at that speed. "
            f"{advice}",
            RuntimeWarning,
            stacklevel=2,
        )


class InductorBackend(CompilingBackend):
    """torch.compile, one graph per variant, no recompilation for other token counts."""

    name = "inductor"
    label = "Inductor"
    advice = "Install a C++ compiler (Debian: apt-get install g++) or set CXX, or ask for backend='eager'."

    def is_hopeless(self, error: Exception) -> bool:
        """Whether it is for want of a C++ compiler that works."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InvalidCxxCompiler | CppCompileError):
            cause = cause.__cause__ or cause.__context__
        return cause is not None and not _compiles_anything()

    def lower(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Inductor's code for the graph.

        Dynamo is left out: the graph is one already, and the dispatcher calls it with nothing but tensors of the
        captured kinds, so there is nothing to guard. Token counts are unbacked: no code may depend on their values.
        """
        shapes = ShapeEnv()
        mode = FakeTensorMode(shape_env=shapes)
        with shapes.ignore_fresh_unbacked_symbols():  # inputs have them: no operator is to account for them
            fakes = [_fake(mode, tensor, position in lifted.dynamic) for position, tensor in enumerate(tensors)]
        inputs = [*(_fake(mode, weight, False) for weight in weights), *fakes]
        module = fx.GraphModule({}, lifted.graph)
        _FakeValues(module, mode).propagate_dont_convert_inputs(*inputs)
        outline(module, lifted.cuts)
        context = torch._guards.tracing(torch._guards.TracingContext(mode))
        # The dispatcher gives only what it was compiled for, so each call need not check the sizes of every tensor.
        unchecked = inductor_config.patch(size_asserts=False, alignment_asserts=False)
        with context, unchecked, _without_hints(), _regions_evaluated_once(mode):
            return cast(Callable[..., Any], compile_fx(module, inputs))


def _compiles_anything() -> bool:
    try:
        command = [get_cpp_compiler(), "-x", "c++", "-c", "-o", os.devnull, "-"]
        done = subprocess.run(command, input=b"int one() { return 1; }", capture_output=True, check=False)
    except (InvalidCxxCompiler, OSError):
        return False
    return done.returncode == 0


@contextmanager
def _regions_evaluated_once(mode: FakeTensorMode) -> Iterator[None]:
    """torch evaluates a region whose sizes are symbols again at each call of it, for each time that it looks at all."""
    evaluate = registered_hop_fake_fns[_REGION]
    known: dict[Hashable, list[tuple[Any, ...]]] = {}
    held: list[Any] = []  # so that no other region has the identity of one of these

    def evaluated(region: Any, name: str, *operands: Any) -> Any:
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        if not all(isinstance(tensor, FakeTensor) and tensor.fake_mode is mode for tensor in tensors):
            return evaluate(region, name, *operands)  # of another thread
        body = getattr(region, "subgraph", region)
        key = id(body), *(kind_of(each) if isinstance(each, Tensor) else str(each) for each in operands)
        if key in known:
            return tuple(torch.empty_strided(size, stride, dtype=t, device=d) for size, stride, t, d in known[key])
        results = evaluate(region, name, *operands)
        memory = {tensor.untyped_storage()._cdata for tensor in tensors}
        if all(isinstance(each, FakeTensor) and each.untyped_storage()._cdata not in memory for each in results):
            known[key] = [(each.shape, each.stride(), each.dtype, each.device) for each in results]
            held.append(body)
        return results

    registered_hop_fake_fns[_REGION] = evaluated
    try:
        yield
    finally:
        registered_hop_fake_fns[_REGION] = evaluate


class _FakeValues(FakeTensorProp):
    """Notes each node's fake value; what was computed of operands of the same kinds is not computed again."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, mode)
        self._known: dict[Hashable, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        text = form_of([n]).text
        if text not in self._known:
            self._known[text] = super().run_node(n), n.meta["val"]
        result, n.meta["val"] = self._known[text]
        return result


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
        self._foreign = [place for place, name in enumerate(variant.inputs) if _is_foreign(name)]
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


def _is_foreign(name: str) -> bool:
    """Whether an input may lie in memory in any order; what the dispatcher keeps is contiguous, but for one value."""
    return name == cache_input(PROBE_SEEN) or not name.startswith((cache_input(""), hoisted_input("")))


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
    for node in module.graph.nodes:
        if node not in own:
            own[node] = graph.node_copy(node, lambda n: own[n])
            if own[node].name != node.name:
                own[node].name = node.name
    return Lifted(graph, tuple(str(node.target) for node in weights), dynamic_positions(variant), cuts)


@contextmanager
def _without_hints() -> Iterator[None]:
    """torch logs where a lowering asks for the value of a token count, and then does without it."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic: bool) -> Tensor:
    if not dynamic:
        return mode.from_tensor(tensor, static_shapes=True)
    sizes = [DimDynamic.STATIC] * tensor.dim()
    sizes[1] = DimDynamic.UNBACKED
    context: SymbolicContext = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * tensor.dim())
    fake = mode.from_tensor(tensor, static_shapes=False, symbolic_context=context)
    count: Any = fake.shape[1]
    # Else strides are those of max(1, count), and regions copy their operands from one form of that to the other.
    count.node.shape_env.constrain_symbol_range(count.node.expr, compiler_min=1, compiler_max=int_oo)
    return fake


def make_backend(name: str, strict: bool, mode: str = "default") -> Backend:
    """Raises UsageError for an unknown name or mode, and BackendError for a backend whose package is not installed."""
    if mode not in MODES or (mode != "default" and name != "inductor"):
        raise UsageError(f"mode={mode!r} is unknown to backend={name!r}; inductor has {MODES}")
    if name == "eager":
        return EagerBackend()
    if name == "inductor":
        return InductorBackend(strict, mode)
    if name == "openvino":
        from duca_compile.openvino_backend import OpenVINOBackend

        return OpenVINOBackend(strict)
    raise UsageError(f"backend={name!r} is unknown; choose one of {BACKENDS}")


def dynamic_positions(variant: Variant) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(variant.inputs) if name in variant.dynamic_inputs)
