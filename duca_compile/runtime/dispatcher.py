"""Runs one variant per call and keeps the caches between calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import is_

import torch
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
from duca_compile.runtime.clock import StepClock, Tick
from duca_compile.runtime.planning import check_selection, plan_step
from duca_compile.runtime.selection import TokenSelector

log = logging.getLogger("duca_compile")


@dataclass
class CacheState:
    """What one pass of one request carries from step to step; dropped when the next request starts."""

    caches: dict[str, Tensor] = field(default_factory=dict)  # placeholder name -> value
    hoisted: dict[str, Tensor] = field(default_factory=dict)
    hoisted_from: tuple[Tensor, ...] = ()
    hoisted_versions: tuple[int, ...] = ()
    selector: TokenSelector | None = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.caches.values())


@dataclass(frozen=True)
class Executed:
    """One call as it ran: for reports and tests."""

    step: int
    pass_index: int
    kind: StepKind
    flops: float
    seconds: float  # of host time; on an accelerator work may still be queued


@dataclass(frozen=True)
class Program:
    """A variant and what runs it, with the names that tie it to the state."""

    variant: Variant
    run: VariantFunction
    reads: tuple[str, ...]  # the caches among the variant's inputs
    stores: tuple[str | None, ...]  # per output beyond the model's own: the cache it goes to, None for scores
    waiting: tuple[Branch, ...]  # branches whose tokens a partial step chooses from, or leaves to grow stale


@dataclass(frozen=True)
class Prologue:
    """Computes the loop-invariant values from the call's invariant inputs, once per request."""

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
        total: int | None,
        build: Callable[[VariantSpec], tuple[Variant, VariantFunction]],
        prologue: Prologue,
    ) -> None:
        self.facts = facts
        self.policy = policy
        self.history: list[Executed] = []
        self._inputs = inputs
        self._total = total
        self._build = build
        self._prologue = prologue
        self._programs: dict[VariantSpec, Program] = {}
        self._plans: dict[Step, tuple[Program, dict[int, int]]] = {}
        self._selectable = [b for b in facts.branches if b.token_axes is not None]
        self._position = {b.index: i for i, b in enumerate(self._selectable)}
        check_selection(facts, policy)
        self._clock = StepClock(total)
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Forgets every cache; the next call starts a request."""
        self._clock.reset()
        self._states: dict[int, CacheState] = {}
        self._opening: dict[str, tuple[Tensor, int]] = {}
        self._steps: list[Step] = []
        self._coming: Iterator[Step] = iter(())

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running request hold."""
        return sum(state.bytes for state in self._states.values())

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        started = time.perf_counter()
        call = dict(zip(self._inputs, tensors, strict=True))
        tick = self._tick(call)
        if tick.new_request:
            self._states.clear()
            self.history.clear()
            self._steps.clear()
            self._coming = self.policy.steps(self._total)
        state = self._states.setdefault(tick.pass_index, CacheState())
        step = self._step_at(tick.step)
        self._hoist(state, call)
        step, program, counts = self._plan(self._step_at(tick.step), state)
        outputs = self._run(program, counts, step, state, call)
        flops = program.variant.flops(counts)
        self.history.append(Executed(tick.step, tick.pass_index, step.kind, flops, time.perf_counter() - started))
        return outputs

    def _tick(self, call: Mapping[str, Tensor]) -> Tick:
        """The clock's verdict, but a first timestep that repeats is a further pass only if the latent does too.

        Anything else at the first timestep is a new request from the same start: another latent, or the very same
        call again.
        """
        tick = self._clock.tick(call[self.facts.timestep])
        if tick.step == 0:
            if tick.pass_index > 0 and not self._is_further_pass(call):
                self._clock.reset()
                tick = self._clock.tick(call[self.facts.timestep])
            self._opening = {name: (tensor, _version(tensor)) for name, tensor in call.items()}
        return tick

    def _is_further_pass(self, call: Mapping[str, Tensor]) -> bool:
        time, latent = self.facts.timestep, self.facts.latent
        same = {name: _unchanged(call[name], *known) for name, known in self._opening.items() if name != time}
        return same.pop(latent) and not all(same.values())

    def _step_at(self, index: int) -> Step:
        while len(self._steps) <= index:
            step = next(self._coming, None)
            if step is None:
                if not self._warned:
                    self._warned = True
                    log.warning(
                        "step %d is more than the %s planned steps; it and later ones are computed in full. Pass "
                        "optimize(..., num_inference_steps=N) with the number your scheduler runs.",
                        index + 1,
                        self._total,
                    )
                step = Step(StepKind.FULL)
            self._steps.append(step)
        return self._steps[index]

    def _hoist(self, state: CacheState, call: Mapping[str, Tensor]) -> None:
        """Computes loop-invariant values at the start of a request and when their inputs changed."""
        sources = tuple(call[name] for name in self._prologue.inputs)
        versions = tuple(map(_version, sources))
        same = len(sources) == len(state.hoisted_from) and all(map(is_, sources, state.hoisted_from))
        if state.hoisted and same and versions == state.hoisted_versions and -1 not in versions:
            return
        state.hoisted = self._prologue.compute(call)
        state.hoisted_from, state.hoisted_versions = sources, versions

    def _plan(self, step: Step, state: CacheState) -> tuple[Step, Program, dict[int, int]]:
        program, counts = self._planned(step)
        if any(name not in state.caches for name in program.reads):  # this pass has joined in mid-request
            step = Step(StepKind.FULL)
            program, counts = self._planned(step)
        return step, program, counts

    def _planned(self, step: Step) -> tuple[Program, dict[int, int]]:
        if step not in self._plans:
            spec, counts = plan_step(self.facts, self.policy, step)
            self._plans[step] = self._program(spec), counts
        return self._plans[step]

    def _program(self, spec: VariantSpec) -> Program:
        if spec not in self._programs:
            variant, run = self._build(spec)
            extra = [name for name in variant.outputs if not name.startswith("output_")]
            stores = tuple(None if name.startswith("score_") else cache_input(name) for name in extra)
            waiting = tuple(b for b in self._selectable if spec.actions[b.index] is not Action.COMPUTE)
            reads = tuple(name for name in variant.inputs if name.startswith(cache_input("")))
            self._programs[spec] = Program(variant, run, reads, stores, waiting)
        return self._programs[spec]

    def _run(
        self, program: Program, counts: dict[int, int], step: Step, state: CacheState, call: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        variant = program.variant
        values = call | state.hoisted | state.caches
        if step.kind is StepKind.PARTIAL and state.selector is not None:
            positions = [self._position[b.index] for b in program.waiting]
            chosen = state.selector.select(positions, [counts.get(b.index, 0) for b in program.waiting], step.interval)
            values |= {tokens_input(b.index): index for b, index in zip(program.waiting, chosen, strict=True)}
        results = program.run(*[values[name] for name in variant.inputs])
        own = len(results) - len(program.stores)
        for place, value in zip(program.stores, results[own:], strict=True):
            if place is not None:
                state.caches[place] = value
        if Action.COMPUTE in variant.spec.actions:
            self._refresh(variant, dict(zip(variant.outputs, results, strict=True)), state)
        return results[:own]

    def _refresh(self, variant: Variant, results: Mapping[str, Tensor], state: CacheState) -> None:
        """Hands the scores of computed branches to the selector, and marks their tokens fresh."""
        selection = self.policy.selection
        if selection is None or not self._selectable:
            return
        first = self._selectable[0]
        if state.selector is None:
            device = next(iter(results.values())).device
            batch, tokens = first.shape[:2]
            state.selector = TokenSelector(selection, len(self._selectable), batch, tokens, device)
        computed = [b for b in self._selectable if variant.spec.actions[b.index] is Action.COMPUTE]
        sources = {b.index: self.facts.score_source(b) for b in computed}
        state.selector.refresh(
            {self._position[i]: results.get(source.score_slot) if source else None for i, source in sources.items()}
        )


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; -1 where the tensor does not count them."""
    return -1 if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, known: Tensor, version: int) -> bool:
    """Whether ``tensor`` holds what ``known`` held at ``version``; reads both where it cannot tell otherwise."""
    if _version(known) != version:
        return False
    return (tensor is known and version >= 0) or torch.equal(tensor, known)
