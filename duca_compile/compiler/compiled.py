"""One captured call, ready to run: its graph, its variants and their weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, fx

from duca_compile.backends.base import Backend, HoldsWeights
from duca_compile.compiler.precompute import make_rows
from duca_compile.core.guards import ValueGuards
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.once import Once
from duca_compile.core.tensors import TensorVersions
from duca_compile.core.variants import Variant, VariantFunction, VariantSpec
from duca_compile.errors import InternalError
from duca_compile.frontend.offloading import fetch
from duca_compile.frontend.opaque import opaque
from duca_compile.frontend.snapshot import kind
from duca_compile.passes.caching.predict import with_predictor
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies.base import Policy
from duca_compile.runtime.clock import CallPosition
from duca_compile.runtime.dispatcher import Dispatcher
from duca_compile.runtime.request import Request
from duca_compile.runtime.torch.programs import Programs
from duca_compile.runtime.torch.prologue import Prologue
from duca_compile.runtime.torch.rows import Rows
from duca_compile.runtime.torch.samples import TorchSamples

log = logging.getLogger("duca_compile")

REMEMBERED = 16  # kinds of call whose last capture is remembered, so that the log can say what has changed


class _Variants:
    """Builds the variants of one captured graph, and keeps all of them on the model's current weights."""

    def __init__(
        self,
        captured: CapturedGraph,
        facts: Facts,
        prologue: Prologue,
        backend: Backend,
        cache_dtype: torch.dtype | None,
    ) -> None:
        self.captured, self._facts, self._backend, self._cache_dtype = captured, facts, backend, cache_dtype
        self._modules = [prologue.module]
        self._built: dict[VariantSpec, tuple[Variant, VariantFunction]] = {}
        self._compiled: list[HoldsWeights] = []
        self._cuts = frozenset({facts.branches[0].stream, *(branch.add for branch in facts.branches)})
        if captured.guards is not None:
            self._modules.append(captured.guards.module)

    def build(self, spec: VariantSpec) -> tuple[Variant, VariantFunction]:
        """The variant and what runs it; made once, however many policies need it."""
        if spec not in self._built:
            self._built[spec] = self._made(spec)
        return self._built[spec]

    def _made(self, spec: VariantSpec) -> tuple[Variant, VariantFunction]:
        started = perf_counter()
        variant = build_variant(self.captured, self._facts, spec, cache_dtype=self._cache_dtype)
        nodes, seconds = len(variant.module.graph.nodes), perf_counter() - started
        log.debug("made the graph of %s: %d nodes, in %.2f s", spec.kind, nodes, seconds)
        self._modules.append(variant.module)
        function = self._backend.compile(variant, self._cuts)
        if isinstance(function, HoldsWeights):
            self._compiled.append(function)
        return variant, function

    def build_rows(self, needed: frozenset[str] | None) -> Rows:
        rows = make_rows(self.captured, self._facts, needed)
        self._modules.append(rows.module)
        return rows

    def follow(self, module: fx.GraphModule) -> None:
        """Keeps this module on the model's current weights as well."""
        self._modules.append(module)

    def rebind(self, weights: Mapping[str, Tensor]) -> None:
        current = self.captured.attributes
        changed = {name: tensor for name, tensor in weights.items() if current[name] is not tensor}
        if not changed:
            return
        self.captured = replace(self.captured, attributes={**current, **changed})
        for module in self._modules:
            for name in {str(n.target) for n in module.graph.nodes if n.op == "get_attr"} & changed.keys():
                prefix, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(prefix), leaf, changed[name])
        for function in self._compiled:
            function.refresh()


class Compiled:
    """One captured call: its graph, its facts, and the dispatcher that runs its variants.

    ``said`` remembers what was logged; ``budget`` is the most bytes that the caches of one pass may hold.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        facts: Facts,
        prologue: Prologue,
        policy: Policy,
        backend: Backend,
        live: Mapping[str, Tensor],
        cache_dtype: torch.dtype | None = None,
        said: Once | None = None,
        budget: int | None = None,
    ) -> None:
        self.facts, self._budget = facts, budget
        self._guards = [] if captured.guards is None else [captured.guards]
        self._places = _places(self._guards)
        self._held_for: TensorVersions | None = None  # the tensors for which the guards held last
        self._read_weights = () if captured.guards is None else tuple(captured.guards.attributes)
        captured = with_predictor(captured, facts, policy.predictor)
        self._inputs = captured.inputs
        self._variants = _Variants(captured, facts, prologue, backend, cache_dtype)
        names = {id(tensor): name for name, tensor in live.items()}
        # A trace may name the model's weights differently. Every other attribute is a constant of the graph.
        self._weights = {name: names[id(t)] for name, t in captured.attributes.items() if id(t) in names}
        self._prologue, self._exact, self._said = prologue, backend.exact, said
        self._plan_for(policy)

    def _plan_for(self, policy: Policy) -> None:
        self.programs = Programs(self.facts, policy, self._variants, self._said)
        all_at_once = not self._exact
        self.dispatcher = Dispatcher(self.programs, policy, self._prologue, all_at_once, TorchSamples(), self._budget)
        self.used = 0  # the number of the model's call that used it last

    def with_policy(self, policy: Policy) -> Compiled:
        """The same capture for another policy; what both need is compiled once.

        Raises:
            PolicyError: this graph cannot serve the policy.
        """
        if policy.predictor is not None:
            raise InternalError("a predictor changes the graph, so its policy needs a capture of its own")
        other = copy.copy(self)
        other._plan_for(policy)
        return other

    @property
    def captured(self) -> CapturedGraph:
        return self._variants.captured

    def guards_hold(self, tensors: tuple[Tensor, ...], anew: bool = False) -> bool:
        """Whether it is valid for a call with these tensors, given the values that forward reads in Python, if any.

        Unless ``anew``, tensors that are the same objects as last time and were not written to are taken as unchanged.
        """
        if not self._guards:
            return True
        read = tuple([tensors[place] for place in self._places])
        read += tuple([self.captured.attributes[name] for name in self._read_weights])
        if not anew and self._held_for is not None and self._held_for.matches(read):
            return True
        if not any(guards.hold(tensors) for guards in self._guards):
            return False
        self._held_for = TensorVersions.of(read)
        return True

    def summary(self) -> str:
        """What was captured, in one line."""
        facts, captured = self.facts, self.captured
        parts = [f"{len(captured.graph.nodes)} nodes", f"{len(facts.branches)} branches in {facts.blocks} blocks"]
        if captured.opaque:
            parts.append(f"{len(captured.opaque)} submodules as one operator each")
        if captured.guarded_inputs:
            parts.append(f"for what forward reads of {', '.join(captured.guarded_inputs)}")
        return ", ".join(parts)

    def add_guards(self, guards: ValueGuards | None) -> None:
        """Notes further values for which its graph is valid."""
        if guards is not None:
            known = [*self._guards[1 - REMEMBERED :], guards]
            self._places = _places(known)  # first, since another thread may be checking the guards
            self._guards = known
            self._variants.follow(guards.module)

    def named(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The tensors of a call by their names in the graph."""
        return dict(zip(self._inputs, tensors, strict=True))

    def run(self, request: Request, position: CallPosition, call: Mapping[str, Tensor], name: str | None) -> Any:
        """What the model returns for a call of the guidance pass ``name`` at the step that ``position`` says.

        ``call`` has the call's tensors by name.
        """
        return self.captured.output.rebuild(self.dispatcher(request, position, call, name))

    def rebind(self, live: Mapping[str, Tensor]) -> None:
        """Replaces the weights by the model's current ones, ``live``, which are of the same kinds."""
        self._variants.rebind({name: live[own_name] for name, own_name in self._weights.items()})

    def holds_other_weights(self, known: Collection[int]) -> bool:
        """Whether it holds weights other than those whose identities are ``known``."""
        return any(id(self.captured.attributes[name]) not in known for name in self._weights)

    def same_graph(self, other: Compiled) -> bool:
        """Whether both compute the same, given the same weights."""
        first, second = self.captured, other.captured
        if _text(first) != _text(second) or first.attributes.keys() != second.attributes.keys():
            return False
        pairs = [(name, first.attributes[name], second.attributes[name]) for name in first.attributes]
        return all(kind(a) == kind(b) and (name in self._weights or _equal(a, b)) for name, a, b in pairs)


def _places(known: Iterable[ValueGuards]) -> tuple[int, ...]:
    """The positions of the call's tensors that any of these guards reads."""
    return tuple(sorted({place for guards in known for place in guards.places}))


def _text(captured: CapturedGraph) -> Hashable:
    """A graph without its weights, in a form that can be compared."""
    paths = {opaque: {site.number: site.path for site in captured.opaque}}
    paths[fetch] = {weight.number: str(weight) for weight in captured.fetched}
    nodes = tuple((n.op, n.name, str(n.target), _arguments(n, paths), str(n.kwargs)) for n in captured.graph.nodes)
    return nodes, captured.inputs, repr(captured.output)


def _arguments(node: fx.Node, paths: Mapping[Any, Mapping[int, str]]) -> str:
    """Opaque submodules and fetched weights have another number in each trace, so their paths are compared instead."""
    if node.target in paths:
        *operands, number = node.args
        return f"{operands} {paths[node.target][cast(int, number)]}"
    return str(node.args)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (not one.is_meta and torch.equal(one, other))
