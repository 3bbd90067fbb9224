"""Runs one variant per call of one captured shape and keeps the caches between calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor, fx

from duca_compile.errors import first_line
from duca_compile.graph import (
    MEASURED,
    PROBE_CHANGE,
    PROBE_SEEN,
    VERIFY_ERROR,
    Action,
    Facts,
    Variant,
    VariantFunction,
    VariantSpec,
    cache_input,
    tokens_input,
)
from duca_compile.lock import COMPILING
from duca_compile.policies.adaptive import AdaptivePolicy, Probe
from duca_compile.policies.base import Policy, Step, StepKind
from duca_compile.runtime.adaptive import Decisions, merged
from duca_compile.runtime.clock import Sight, Tick
from duca_compile.runtime.forecasting import ForecastInputs
from duca_compile.runtime.planning import check_rows, check_selection, plan_step, probe_spec, tokens_of
from duca_compile.runtime.request import CacheState, Executed, Request
from duca_compile.runtime.rows import Rows
from duca_compile.runtime.selection import TokenSelector

log = logging.getLogger("duca_compile")


@dataclass(eq=False)
class Program:
    """A variant and what runs it, with all that ties it to the state looked up once."""

    variant: Variant
    run: VariantFunction
    fetch: Callable[[Mapping[str, Tensor]], Iterable[Tensor]]  # the inputs, from the values by name
    reads: frozenset[str]  # the caches among the inputs that must be there
    forecast: ForecastInputs
    own: int  # how many outputs are the model's own; they come first
    writes: dict[str, int]  # the caches to fill, and from which outputs
    replaces: frozenset[str]  # those of them that it does not read
    waiting: tuple[int, ...]  # branches whose tokens a partial step chooses from, or leaves to grow stale
    rows: tuple[int, ...]  # their positions in the selector
    tokens: tuple[str, ...]  # the names of the inputs that say which tokens
    computed: Mapping[int, int | None]  # positions that are computed in full -> the output with their scores
    loose: tuple[str, ...] | None = None  # the caches whose outputs are views of larger tensors
    measures: tuple[tuple[str, int], ...] = ()  # what decisions are made from, and from which outputs
    aliases: tuple[int, ...] | None = None  # the model's own outputs that share memory with the state or each other


@dataclass(frozen=True)
class Plan:
    """What a policy's step comes to for one captured shape."""

    step: Step
    program: Program
    counts: tuple[int, ...]  # tokens to recompute, for each of the program's waiting branches
    flops: float


@dataclass(frozen=True)
class Prologue:
    """Computes the loop-invariant values from the call's invariant inputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: fx.GraphModule

    def compute(self, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """They are contiguous, as compiled code wants them."""
        values = self.module.forward(*[call[name] for name in self.inputs])
        return {name: value.contiguous() for name, value in zip(self.outputs, values, strict=True)}


class Builder(Protocol):
    """Makes what a dispatcher runs, of one captured graph."""

    def build(self, spec: VariantSpec) -> tuple[Variant, VariantFunction]:
        """The variant of a spec, and what runs it."""

    def build_rows(self, needed: frozenset[str] | None) -> Rows:
        """What computes the timestep-only values called ``needed``, or all."""


class Dispatcher:
    """Chooses, runs and accounts for one variant per call of one captured shape.

    It holds nothing of any request: any number of threads may call it, each with a request of its own. The builder is
    asked once for each spec. ``foresees`` says whether the values of timesteps that are known are computed together:
    another size of products may round differently.
    """

    def __init__(
        self,
        facts: Facts,
        inputs: tuple[str, ...],
        policy: Policy,
        builder: Builder,
        prologue: Prologue,
        foresees: bool,
    ) -> None:
        check_selection(facts, policy)
        check_rows(facts, policy)
        self._facts, self._inputs, self._policy = facts, inputs, policy
        self._builder, self._prologue, self._foresees = builder, prologue, foresees
        self._rows: dict[frozenset[str] | None, Rows] = {}
        self._programs: dict[VariantSpec, Program] = {}
        self._plans: dict[Step, Plan] = {}
        self._probe: Plan | None = None
        self._selectable = [b for b in facts.branches if b.pointwise]
        self._position = {b.index: i for i, b in enumerate(self._selectable)}

    @property
    def programs(self) -> Collection[Program]:
        """All that was built so far."""
        return self._programs.values()

    def __call__(
        self, request: Request, tick: Tick, call: Mapping[str, Tensor], name: str | None = None
    ) -> tuple[Tensor, ...]:
        """Runs one call, with its tensors by name, where ``tick`` says, in the pass called ``name``."""
        started = time.perf_counter()
        state = request.state(self, (name, tick.pass_index))
        self._hoist(state, call)
        if isinstance(self._policy, AdaptivePolicy):
            outputs, done = self._decided(self._policy, state, call, request, tick)
        else:
            plan = self._plan(request.step_at(tick.step), tick.step, state)
            outputs = self._run(plan, state, self._given(plan, state, call, request, tick))
            done = Executed(tick.step, tick.pass_index, plan.step.kind, plan.flops, 0.0)
        state.last_step = tick.step
        request.history.append(replace(done, seconds=time.perf_counter() - started, pass_name=name))
        return outputs

    def _decided(
        self, policy: AdaptivePolicy, state: CacheState, call: Mapping[str, Tensor], request: Request, tick: Tick
    ) -> tuple[tuple[Tensor, ...], Executed]:
        """Measures, decides, and runs what was decided: all within this step."""
        if state.decisions is None or tick.step - state.last_step > 1:
            state.decisions = Decisions(policy, request.total, self._facts.batch)
        flops = 0.0

        def run(step: Step, rows: Sequence[bool] | None = None) -> tuple[Tensor, ...]:
            nonlocal flops
            plan = self._planned(step)
            flops += plan.flops
            return self._run(plan, state, self._given(plan, state, call, request, tick, rows))

        proposed = state.decisions.propose(tick.step)
        drafts = sorted((s for s in proposed if s.kind is not StepKind.FULL), key=lambda s: s.verified)
        measured: list[float] = []
        cheap: tuple[Tensor, ...] | None = None
        if isinstance(policy.measure, Probe):
            known = bool(state.past) if policy.measure.of == "forecast" else cache_input(PROBE_SEEN) in state.caches
            flops += self._look(state, call, request, tick)
            measured = state.measured[PROBE_CHANGE].tolist() if known else []
        elif drafts:
            cheap = run(drafts[-1])
            measured = state.measured[VERIFY_ERROR].tolist() if drafts[-1].verified else []
        steps = state.decisions.decide(tick.step, proposed, measured)
        full = [step.kind is StepKind.FULL for step in steps]
        if cheap is None and not all(full):
            cheap = run(steps[full.index(False)])
        if isinstance(policy.measure, Probe) and policy.measure.of != "forecast":
            self._remember_look(policy.measure, state, full)
        if any(full):
            computed = run(Step(StepKind.FULL), full)
            outputs = computed if cheap is None or all(full) else merged(full, computed, cheap)
        else:
            assert cheap is not None
            outputs = cheap
        state.measured.clear()
        kind = StepKind.FULL if any(full) else steps[0].kind
        rows = () if policy.per == "batch" else tuple(step.kind for step in steps)
        return outputs, Executed(tick.step, tick.pass_index, kind, flops, 0.0, None, tuple(measured), rows)

    def _look(self, state: CacheState, call: Mapping[str, Tensor], request: Request, tick: Tick) -> float:
        """Runs the probe; what it found is in ``state.measured``. Returns its FLOPs."""
        if self._probe is None:
            spec = probe_spec(self._facts, self._policy)
            assert spec is not None
            with COMPILING:
                program = self._program(spec)
            self._probe = Plan(Step(StepKind.FULL), program, (), program.variant.flops({}))
        self._run(self._probe, state, self._given(self._probe, state, call, request, tick))
        return self._probe.flops

    def _remember_look(self, probe: Probe, state: CacheState, full: Sequence[bool]) -> None:
        """What the next look compares with: this one, or where it is to be of a full step, that of the full rows."""
        name, seen = cache_input(PROBE_SEEN), state.measured[PROBE_SEEN]
        if probe.to_last_full and not all(full):
            (seen,) = merged(full, (seen,), (state.caches[name],)) if any(full) else (state.caches[name],)
        state.caches[name] = seen

    def warm_up(
        self,
        request: Request,
        call: Mapping[str, Tensor],
        steps: Iterable[Step],
        watch: Callable[[Sequence[Plan]], Iterable[Plan]],
    ) -> None:
        """Runs each program that ``steps`` need once, on a state of its own; ``watch`` hands the plans out."""
        first: dict[Program, tuple[int, Plan]] = {}
        for index, step in enumerate(steps):
            plan = self._planned(step)
            first.setdefault(plan.program, (index, plan))
        state = CacheState()
        self._hoist(state, call)
        indices = {id(plan): index for index, plan in first.values()}
        if probe_spec(self._facts, self._policy) is not None:
            self._look(state, call, request, Tick(0, 0, False))
        for plan in watch([plan for _, plan in first.values()]):
            tick = Tick(indices[id(plan)], 0, False)
            self._run(plan, state, self._given(plan, state, call, request, tick))
            state.last_step = tick.step

    def _hoist(self, state: CacheState, call: Mapping[str, Tensor]) -> None:
        """Computes loop-invariant values at the start of a request and when their inputs changed."""
        sources = Sight.of(tuple(call[name] for name in self._prologue.inputs))
        if sources.unchanged_since(state.hoisted_from):
            return
        state.hoisted, state.hoisted_from = self._prologue.compute(call), sources
        state.rows, state.foreseen = {}, False

    def _given(
        self,
        plan: Plan,
        state: CacheState,
        call: Mapping[str, Tensor],
        request: Request,
        tick: Tick,
        rows: Sequence[bool] | None = None,
    ) -> dict[str, Tensor]:
        """The inputs that this step alone determines; a full step may be for some ``rows`` of the batch."""
        return {
            **call,
            **state.measured,
            **self._timestep_values(plan.program, state, call, request, tick),
            **plan.program.forecast.values(self._policy.forecast, state, tick.step, rows),
        }

    def _timestep_values(
        self, program: Program, state: CacheState, call: Mapping[str, Tensor], request: Request, tick: Tick
    ) -> dict[str, Tensor]:
        """The rows that the program reads: those computed before the loop, else computed now."""
        needed = program.variant.pieces
        if not needed:
            return {}
        if self._foresees and not state.foreseen:
            state.foreseen = True
            state.rows = self._foreseen(state, call, request.coming_times)
        rows = None if tick.timestep is None else state.rows.get(tick.timestep)
        if rows is None:
            rows = self._row_program(needed).compute(call, state.hoisted)
        return dict(zip(self._row_program(needed).outputs, rows, strict=True))

    def _foreseen(
        self, state: CacheState, call: Mapping[str, Tensor], times: tuple[float, ...]
    ) -> dict[float, tuple[Tensor, ...]]:
        try:
            return self._row_program(None).compute_all(call, state.hoisted, times)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an operator that vmap has no rule for
            log.info("timestep-only values are computed step by step: %s", first_line(error))
            self._foresees = False
            return {}

    def _row_program(self, needed: frozenset[str] | None) -> Rows:
        if needed not in self._rows:
            with COMPILING:
                self._rows[needed] = self._builder.build_rows(needed)
        return self._rows[needed]

    def _plan(self, step: Step, index: int, state: CacheState) -> Plan:
        """The plan of ``step``, or of a full one for a pass that has just joined or has missed steps."""
        plan = self._planned(step)
        program = plan.program
        if not program.reads or (program in state.ready and index - state.last_step <= 1):
            return plan
        if index - state.last_step > 1 or not program.reads <= state.caches.keys():
            return self._planned(Step(StepKind.FULL))
        state.ready.add(program)
        return plan

    def _planned(self, step: Step) -> Plan:
        plan = self._plans.get(step)
        if plan is not None:
            return plan
        with COMPILING:
            spec, counts = plan_step(self._facts, self._policy, step)
            program = self._program(spec)
            waiting = tuple(counts.get(index, 0) for index in program.waiting)
            plan = self._plans[step] = Plan(step, program, waiting, program.variant.flops(counts))
        return plan

    def _program(self, spec: VariantSpec) -> Program:
        if spec not in self._programs:
            variant, run = self._builder.build(spec)
            own = sum(name.startswith("output_") for name in variant.outputs)
            extra = [*enumerate(variant.outputs)][own:]
            measures = tuple((name, i) for i, name in extra if name in MEASURED)
            kept = [(i, name) for i, name in extra if not name.startswith("score_") and name not in MEASURED]
            writes = {cache_input(name): i for i, name in kept}
            waiting = tuple(b.index for b in self._selectable if spec.actions[b.index] is not Action.COMPUTE)
            forecast = ForecastInputs.of(variant)
            caches = frozenset(name for name in variant.inputs if name.startswith(cache_input("")))
            self._programs[spec] = Program(
                variant,
                run,
                _getter(variant.inputs),
                reads=caches - forecast.old.keys(),
                forecast=forecast,
                own=own,
                writes=writes,
                replaces=frozenset(writes.keys() - set(variant.inputs)),
                waiting=waiting,
                rows=tuple(self._position[index] for index in waiting),
                tokens=tuple(map(tokens_input, waiting)),
                computed=self._computed(variant),
                measures=measures,
            )
        return self._programs[spec]

    def _computed(self, variant: Variant) -> dict[int, int | None]:
        found: dict[int, int | None] = {}
        for branch in self._selectable:
            if variant.spec.actions[branch.index] is Action.COMPUTE:
                scores = variant.spec.scores
                source = None if scores is None else self._facts.score_source(branch, scores)
                emitted = source is not None and source.score_slot in variant.outputs
                slot = variant.outputs.index(source.score_slot) if source is not None and emitted else None
                found[self._position[branch.index]] = slot
        return found

    def _run(self, plan: Plan, state: CacheState, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        program = plan.program
        for name in program.replaces:  # free before they are computed anew, so that there are never two of them
            state.caches.pop(name, None)
        values = {**given, **state.hoisted, **state.caches, **self._tokens(plan, state)}
        results = program.run(*program.fetch(values))
        state.caches.update({name: results[i] for name, i in program.writes.items()})
        state.measured.update({name: results[i] for name, i in program.measures})
        if program.loose is None:  # a property of the variant, so looked up once
            program.loose = tuple(name for name, i in program.writes.items() if _is_loose(results[i]))
        for name in program.loose:
            state.caches[name] = state.caches[name].clone()
        if program.computed:
            self._refresh(program.computed, results, state)
        return self._unaliased(program, results[: program.own], state)

    def _tokens(self, plan: Plan, state: CacheState) -> dict[str, Tensor]:
        """The tokens that each waiting branch recomputes, by the name of its input."""
        program = plan.program
        if plan.step.kind is not StepKind.PARTIAL or state.selector is None or not program.waiting:
            return {}
        chosen = state.selector.select(program.rows, plan.counts, plan.step.interval)
        return {name: tokens for name, tokens in zip(program.tokens, chosen, strict=True) if tokens is not None}

    def _unaliased(self, program: Program, outputs: tuple[Tensor, ...], state: CacheState) -> tuple[Tensor, ...]:
        """The outputs, copied where the caller's changing one in place would change the state or another output."""
        if program.aliases is None:  # a property of the variant, so looked up once
            held = {_memory(t) for t in (*state.caches.values(), *state.hoisted.values())}
            memory = [_memory(output) for output in outputs]
            program.aliases = tuple(i for i, each in enumerate(memory) if each in held or each in memory[:i])
        if not program.aliases:
            return outputs
        return tuple(output.clone() if i in program.aliases else output for i, output in enumerate(outputs))

    def _refresh(self, computed: Mapping[int, int | None], results: tuple[Tensor, ...], state: CacheState) -> None:
        """Hands the scores of computed branches to the selector, and marks their tokens fresh."""
        selection = self._policy.selection
        if selection is None:
            return
        if state.selector is None:
            tokens = [tokens_of(self._facts, selection, branch) for branch in self._selectable]
            state.selector = TokenSelector(selection, tokens, results[0].device)
        state.selector.refresh({row: None if slot is None else results[slot] for row, slot in computed.items()})


def _getter(names: tuple[str, ...]) -> Callable[[Mapping[str, Tensor]], Iterable[Tensor]]:
    if len(names) < 2:  # itemgetter of one name gives no tuple
        return lambda values: [values[name] for name in names]
    return itemgetter(*names)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_loose(value: Tensor) -> bool:
    """Whether a larger tensor would be kept with it: caches are as large as they seem."""
    return value.untyped_storage().nbytes() > value.numel() * value.element_size()
