"""Runs one variant per call of one captured shape and keeps the caches between calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import is_

from torch import Tensor

from duca_compile.graph import (
    Action,
    Branch,
    Facts,
    Variant,
    VariantFunction,
    VariantSpec,
    cache_input,
    tokens_input,
)
from duca_compile.policies.base import Policy, Step, StepKind
from duca_compile.runtime.clock import version
from duca_compile.runtime.planning import check_selection, plan_step
from duca_compile.runtime.request import Executed, Request
from duca_compile.runtime.selection import TokenSelector


@dataclass
class CacheState:
    """What one pass of one request carries from step to step; dropped when the next request starts."""

    caches: dict[str, Tensor] = field(default_factory=dict)  # placeholder name -> value
    last_step: int = -1
    hoisted: dict[str, Tensor] = field(default_factory=dict)
    hoisted_from: tuple[Tensor, ...] = ()
    hoisted_versions: tuple[int, ...] = ()
    selector: TokenSelector | None = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.caches.values())


@dataclass
class Program:
    """A variant and what runs it, with the names that tie it to the state."""

    variant: Variant
    run: VariantFunction
    reads: tuple[str, ...]  # the caches among the variant's inputs
    writes: tuple[str | None, ...]  # per output beyond the model's own: the cache it goes to, None for scores
    waiting: tuple[Branch, ...]  # branches whose tokens a partial step chooses from, or leaves to grow stale
    aliases: tuple[int, ...] | None = None  # the model's own outputs that share memory with the state or each other


@dataclass(frozen=True)
class Prologue:
    """Computes the loop-invariant values from the call's invariant inputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: VariantFunction

    def compute(self, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.outputs, self.run(*[call[name] for name in self.inputs]), strict=True))


class Dispatcher:
    """Chooses, runs and accounts for one variant per call of one captured shape.

    ``build`` makes the program of a spec and is called once per spec.
    """

    def __init__(
        self,
        facts: Facts,
        inputs: tuple[str, ...],
        policy: Policy,
        build: Callable[[VariantSpec], tuple[Variant, VariantFunction]],
        prologue: Prologue,
    ) -> None:
        check_selection(facts, policy)
        self._facts, self._inputs, self._policy = facts, inputs, policy
        self._build, self._prologue = build, prologue
        self._programs: dict[VariantSpec, Program] = {}
        self._plans: dict[Step, tuple[Program, dict[int, int]]] = {}
        self._selectable = [b for b in facts.branches if b.pointwise]
        self._position = {b.index: i for i, b in enumerate(self._selectable)}
        self._request_number = 0
        self._states: dict[int, CacheState] = {}

    def forget(self) -> None:
        """Drops every cache."""
        self._states.clear()

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(state.bytes for state in self._states.values())

    def __call__(self, request: Request, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs one call as the next of ``request``; an error in it makes the next call start a new request."""
        started = time.perf_counter()
        call = dict(zip(self._inputs, tensors, strict=True))
        tick = request.tick(self._facts, call)
        if request.number != self._request_number:
            self._request_number = request.number
            self.forget()
        state = self._states.setdefault(tick.pass_index, CacheState())
        try:
            self._hoist(state, call)
            step, program, counts = self._plan(request.step_at(tick.step), tick.step, state)
            outputs = self._run(program, counts, step, state, call)
        except BaseException:
            request.reset()
            raise
        state.last_step = tick.step
        flops = program.variant.flops(counts)
        request.history.append(Executed(tick.step, tick.pass_index, step.kind, flops, time.perf_counter() - started))
        return outputs

    def _hoist(self, state: CacheState, call: Mapping[str, Tensor]) -> None:
        """Computes loop-invariant values at the start of a request and when their inputs changed."""
        sources = tuple(call[name] for name in self._prologue.inputs)
        versions = tuple(map(version, sources))
        same = len(sources) == len(state.hoisted_from) and all(map(is_, sources, state.hoisted_from))
        if state.hoisted and same and versions == state.hoisted_versions and -1 not in versions:
            return
        state.hoisted = self._prologue.compute(call)
        state.hoisted_from, state.hoisted_versions = sources, versions

    def _plan(self, step: Step, index: int, state: CacheState) -> tuple[Step, Program, dict[int, int]]:
        """The program of ``step``, or of a full one for a pass that has just joined or has missed steps."""
        program, counts = self._planned(step)
        missed = index - state.last_step > 1
        if program.reads and (missed or any(name not in state.caches for name in program.reads)):
            step = Step(StepKind.FULL)
            program, counts = self._planned(step)
        return step, program, counts

    def _planned(self, step: Step) -> tuple[Program, dict[int, int]]:
        if step not in self._plans:
            spec, counts = plan_step(self._facts, self._policy, step)
            self._plans[step] = self._program(spec), counts
        return self._plans[step]

    def _program(self, spec: VariantSpec) -> Program:
        if spec not in self._programs:
            variant, run = self._build(spec)
            extra = [name for name in variant.outputs if not name.startswith("output_")]
            writes = tuple(None if name.startswith("score_") else cache_input(name) for name in extra)
            waiting = tuple(b for b in self._selectable if spec.actions[b.index] is not Action.COMPUTE)
            reads = tuple(name for name in variant.inputs if name.startswith(cache_input("")))
            self._programs[spec] = Program(variant, run, reads, writes, waiting)
        return self._programs[spec]

    def _run(
        self, program: Program, counts: dict[int, int], step: Step, state: CacheState, call: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        variant = program.variant
        values = call | state.hoisted | state.caches
        if step.kind is StepKind.PARTIAL and state.selector is not None and program.waiting:
            positions = [self._position[b.index] for b in program.waiting]
            chosen = state.selector.select(positions, [counts.get(b.index, 0) for b in program.waiting], step.interval)
            values |= {tokens_input(b.index): index for b, index in zip(program.waiting, chosen, strict=True)}
        results = program.run(*[values[name] for name in variant.inputs])
        own = len(results) - len(program.writes)
        for name, value in zip(program.writes, results[own:], strict=True):
            if name is not None:
                state.caches[name] = _compact(value)
        if Action.COMPUTE in variant.spec.actions:
            self._refresh(variant, dict(zip(variant.outputs, results, strict=True)), state)
        return self._unaliased(program, results[:own], state)

    def _unaliased(self, program: Program, outputs: tuple[Tensor, ...], state: CacheState) -> tuple[Tensor, ...]:
        """The outputs, copied where the caller's changing one in place would change the state or another output."""
        if program.aliases is None:  # a property of the variant, so looked up once
            held = {_memory(t) for t in (*state.caches.values(), *state.hoisted.values())}
            memory = [_memory(output) for output in outputs]
            program.aliases = tuple(i for i, each in enumerate(memory) if each in held or each in memory[:i])
        if not program.aliases:
            return outputs
        return tuple(output.clone() if i in program.aliases else output for i, output in enumerate(outputs))

    def _refresh(self, variant: Variant, results: Mapping[str, Tensor], state: CacheState) -> None:
        """Hands the scores of computed branches to the selector, and marks their tokens fresh."""
        selection = self._policy.selection
        if selection is None or not self._selectable:
            return
        if state.selector is None:
            device = next(iter(results.values())).device
            shapes = [(b.shape[0], b.tokens) for b in self._selectable]
            state.selector = TokenSelector(selection, shapes, device)
        computed = [b for b in self._selectable if variant.spec.actions[b.index] is Action.COMPUTE]
        sources = {b.index: self._facts.score_source(b) for b in computed}
        state.selector.refresh(
            {self._position[i]: results.get(source.score_slot) if source else None for i, source in sources.items()}
        )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _compact(value: Tensor) -> Tensor:
    """``value`` without the rest of a larger tensor that it may be a view of, so that caches are what they seem."""
    return value if value.untyped_storage().nbytes() <= value.numel() * value.element_size() else value.clone()
