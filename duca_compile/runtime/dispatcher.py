"""Runs one variant per call of one captured shape and keeps the caches between calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any, Protocol

from duca_compile.core.ports import (
    CACHES,
    MEASURES,
    PROBE_CHANGE,
    PROBE_SEEN,
    VERIFY_ERROR,
    WRITTEN,
    Port,
    PortKind,
    dead_caches,
)
from duca_compile.core.steps import Probe, Step, StepKind
from duca_compile.core.tensors import Array, TensorVersions
from duca_compile.errors import first_line
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.base import Policy
from duca_compile.runtime.adaptive import Decisions, merged
from duca_compile.runtime.arrays import Arrays
from duca_compile.runtime.clock import Tick
from duca_compile.runtime.forecasting import ForecastInputs
from duca_compile.runtime.request import CacheState, Executed, Given, Request
from duca_compile.runtime.selection import Tokens, TokenSelector

log = logging.getLogger("duca_compile")

_PARTIAL = StepKind.PARTIAL  # looking it up takes a while in some versions of Python


@dataclass(eq=False)
class Program:
    """What runs a variant, with all that ties it to the state looked up once."""

    run: Callable[..., Sequence[Array]]
    inputs: tuple[Port, ...]
    pieces: Hashable  # says which timestep-only values it reads; false where there are none
    caches: frozenset[Port]  # the caches among the inputs
    reads: frozenset[Port]  # those of them that must be there
    forecast: ForecastInputs
    own: int  # how many outputs are the model's own; they come first
    writes: dict[Port, int]  # the caches to fill, and from which outputs
    replaces: frozenset[Port]  # those of them that it does not read
    waiting: tuple[int, ...]  # branches whose tokens a partial step chooses from, or leaves to grow stale
    rows: tuple[int, ...]  # their positions in the selector
    tokens: Mapping[Port, int]  # the inputs that say which tokens, each with the first of those branches that it is for
    computed: Mapping[int, int | None]  # positions that are computed in full -> the output with their scores
    measures: tuple[tuple[Port, int], ...] = ()  # what decisions are made from, and from which outputs
    loose: tuple[Port, ...] | None = None  # the caches whose outputs are views of larger tensors, or not contiguous
    aliases: tuple[int, ...] | None = None  # the model's own outputs that share memory with the state or each other

    @staticmethod
    def of(
        run: Callable[..., Sequence[Array]],
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        pieces: Hashable,
        forecast: ForecastInputs,
        waiting: tuple[int, ...],
        rows: tuple[int, ...],
        tokens: tuple[Port, ...],
        computed: Mapping[int, int | None],
    ) -> Program:
        """Of a function of flat values with these ports."""
        writes = {port: i for i, port in enumerate(outputs) if port.kind in WRITTEN}
        caches = frozenset(port for port in inputs if port.kind in CACHES)
        return Program(
            run,
            inputs,
            pieces,
            caches,
            reads=caches - forecast.old.keys(),
            forecast=forecast,
            own=sum(port.kind is PortKind.OUTPUT for port in outputs),
            writes=writes,
            replaces=frozenset(writes.keys() - set(inputs)),
            waiting=waiting,
            rows=rows,
            tokens={port: tokens.index(port) for port in tokens if port in inputs},
            computed=computed,
            measures=tuple((port, i) for i, port in enumerate(outputs) if port.kind in MEASURES),
        )


@dataclass(frozen=True)
class Plan:
    """What a policy's step comes to for one captured shape."""

    step: Step
    program: Program
    counts: tuple[int, ...]  # tokens to recompute, for each of the program's waiting branches
    flops: float

    @cached_property
    def unread(self) -> tuple[Port, ...]:
        """The caches that its program fills and no later step reads."""
        return dead_caches(self.step.live, self.program.writes)


class RowsTooLargeError(Exception):
    """The values of all timesteps would take more memory than they are worth."""


class TimestepRows(Protocol):
    """Computes the timestep-only values of one graph, packed into one row for each type."""

    @property
    def outputs(self) -> tuple[Port, ...]: ...

    def compute(self, call: Mapping[str, Array], hoisted: Mapping[Port, Array]) -> Sequence[Array]:
        """The rows of the call's own timestep."""

    def compute_all(
        self, call: Mapping[str, Array], hoisted: Mapping[Port, Array], times: tuple[float, ...]
    ) -> Mapping[float, Sequence[Array]]:
        """The rows of each of ``times``; none where that is not to be done at once."""


class Planner(Protocol):
    """Knows what each step comes to for one kind of call."""

    @property
    def batch(self) -> int:
        """The rows of the latent."""

    @property
    def tokens(self) -> Sequence[Tokens]:
        """The tokens of each branch whose tokens can be chosen."""

    def arrays(self, like: Array) -> Arrays:
        """What chooses tokens by scores such as ``like``."""

    def plan(self, step: Step) -> Plan:
        """The same object for the same step."""

    def look(self) -> Plan | None:
        """What measures before a step is decided; None where the policy does not ask for it."""

    def rows(self, needed: Any) -> TimestepRows:
        """What computes the timestep-only values that ``needed``, a program's pieces, stands for; of None, all."""


class Hoister(Protocol):
    """Computes the loop-invariant values from the call's invariant inputs."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of these arguments."""

    def compute(self, call: Mapping[str, Array]) -> dict[Port, Array]: ...


class Dispatcher:
    """Chooses, runs and accounts for one variant per call of one captured shape.

    It holds nothing of any request: any number of threads may call it, each with a request of its own. ``foresees``
    says whether the values of timesteps that are known are computed together: another size of products may round
    differently.
    """

    def __init__(self, planner: Planner, policy: Policy, prologue: Hoister, foresees: bool) -> None:
        self.planner = planner
        self._policy, self._prologue, self._foresees = policy, prologue, foresees
        self._adaptive = policy if isinstance(policy, AdaptivePolicy) else None
        self._warned = False

    def __call__(
        self, request: Request, tick: Tick, call: Mapping[str, Array], name: str | None = None
    ) -> Sequence[Array]:
        """Runs one call, with its tensors by name, where ``tick`` says, in the pass called ``name``."""
        started = perf_counter()
        state = request.state(self, (name, tick.pass_index))
        self._hoist(state, call, tick.condition)
        if self._adaptive is not None:
            outputs, kind, flops, measured, rows = self._decided(self._adaptive, state, call, request, tick)
        else:
            plan = self._plan(request.step_at(tick.step), tick.step, state)
            outputs = self._run(plan, state, self._given(plan, state, call, request, tick))
            kind, flops, measured, rows = plan.step.kind, plan.flops, (), ()
        state.last_step = tick.step
        seconds = perf_counter() - started
        request.history.append(Executed(tick.step, tick.pass_index, kind, flops, seconds, name, measured, rows))
        return outputs

    def _decided(
        self, policy: AdaptivePolicy, state: CacheState, call: Mapping[str, Array], request: Request, tick: Tick
    ) -> tuple[Sequence[Array], StepKind, float, tuple[float, ...], tuple[StepKind, ...]]:
        """Measures, decides, and runs what was decided: all within this step.

        Returns the outputs, and the step's kind, its FLOPs, what was measured and each row's kind for the history.
        """
        if state.decisions is None or tick.step - state.last_step > 1:
            state.decisions = Decisions(policy, request.total, self.planner.batch)
        flops = 0.0

        def run(step: Step, rows: Sequence[bool] | None = None) -> Sequence[Array]:
            nonlocal flops
            plan = self.planner.plan(step)
            flops += plan.flops
            return self._run(plan, state, self._given(plan, state, call, request, tick, rows))

        proposed = state.decisions.propose(tick.step)
        drafts = sorted((s for s in proposed if s.kind is not StepKind.FULL), key=lambda s: s.verified)
        measured: list[float] = []
        cheap: Sequence[Array] | None = None
        if isinstance(policy.measure, Probe):
            known = bool(state.past) if policy.measure.of == "forecast" else PROBE_SEEN in state.caches
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
            outputs = computed
            if cheap is not None and not all(full):
                outputs = merged(self.planner.arrays(computed[0]), full, computed, cheap)
        else:
            assert cheap is not None
            outputs = cheap
        state.measured.clear()
        if tick.step + 1 == request.total:
            state.end()
        kind = StepKind.FULL if any(full) else steps[0].kind
        rows = () if policy.per == "batch" else tuple(step.kind for step in steps)
        return outputs, kind, flops, tuple(measured), rows

    def _look(self, state: CacheState, call: Mapping[str, Array], request: Request, tick: Tick) -> float:
        """Runs the probe; what it found is in ``state.measured``. Returns its FLOPs."""
        plan = self.planner.look()
        assert plan is not None
        self._run(plan, state, self._given(plan, state, call, request, tick))
        return plan.flops

    def _remember_look(self, probe: Probe, state: CacheState, full: Sequence[bool]) -> None:
        """What the next look compares with: this one, or where it is to be of a full step, that of the full rows."""
        seen = state.measured[PROBE_SEEN]
        if probe.to_last_full and not all(full):
            old = state.caches[PROBE_SEEN]
            seen = self.planner.arrays(seen).choose(full, seen, old) if any(full) else old
        state.store({PROBE_SEEN: seen})

    def warm_up(
        self,
        request: Request,
        call: Mapping[str, Array],
        steps: Iterable[Step],
        watch: Callable[[Sequence[Plan]], Iterable[Plan]],
    ) -> None:
        """Runs each program that ``steps`` need once, on a state of its own; ``watch`` hands the plans out."""
        first: dict[Program, tuple[int, Plan]] = {}
        for index, step in enumerate(steps):
            plan = self.planner.plan(step)
            first.setdefault(plan.program, (index, plan))
        state = CacheState()
        self._hoist(state, call)
        indices = {id(plan): index for index, plan in first.values()}
        if self.planner.look() is not None:
            self._look(state, call, request, Tick(0, 0, False))
        for plan in watch([plan for _, plan in first.values()]):
            tick = Tick(indices[id(plan)], 0, False)
            self._run(plan, state, self._given(plan, state, call, request, tick))
            state.last_step = tick.step

    def _hoist(self, state: CacheState, call: Mapping[str, Array], condition: TensorVersions | None = None) -> None:
        """Computes loop-invariant values at the start of a request and when their inputs changed.

        They did not where ``condition``, what the pass is conditioned on, is the object of before.
        """
        if condition is not None and condition is state.condition:
            return
        state.condition = condition
        sources = [call[name] for name in self._prologue.inputs]
        if state.hoisted_from is None or not state.hoisted_from.matches(sources):
            seen = TensorVersions.of(sources)
            state.hoist(self._prologue.compute(call), seen)

    def _given(
        self,
        plan: Plan,
        state: CacheState,
        call: Mapping[str, Array],
        request: Request,
        tick: Tick,
        rows: Sequence[bool] | None = None,
    ) -> Given:
        """The inputs that this step alone determines; a full step may be for some ``rows`` of the batch."""
        program = plan.program
        given: Given = {**call, **state.measured} if state.measured else {**call}
        if program.pieces:
            given.update(self._timestep_values(program.pieces, state, call, request, tick))
        if program.forecast.needed:
            given.update(program.forecast.values(self._policy.forecast, state, tick.step, rows))
        return given

    def _timestep_values(
        self, needed: Hashable, state: CacheState, call: Mapping[str, Array], request: Request, tick: Tick
    ) -> Iterable[tuple[Port, Array]]:
        """The rows that a program with these pieces reads: those computed before the loop, else computed now."""
        if self._foresees and not state.foreseen:
            state.foreseen = True
            state.rows = self._foreseen(state, call, request.coming_times)
        rows = None if tick.timestep is None else state.rows.get(tick.timestep)
        known = self.planner.rows(needed)
        if rows is None:
            rows = known.compute(call, state.hoisted)
        return zip(known.outputs, rows, strict=True)

    def _foreseen(
        self, state: CacheState, call: Mapping[str, Array], times: tuple[float, ...]
    ) -> Mapping[float, Sequence[Array]]:
        import torch

        try:
            return self.planner.rows(None).compute_all(call, state.hoisted, times)
        except torch.OutOfMemoryError:
            raise
        except RowsTooLargeError as error:
            reason = str(error)
        except Exception as error:  # an operator that vmap has no rule for
            reason = f"torch.func.vmap cannot ({first_line(error).rstrip('.')}); another form of that operator may do"
            self._foresees = False
        if not self._warned:
            self._warned = True
            log.warning(
                "what depends on the timestep alone is computed step by step, and not for all steps at once: %s. The "
                "result is the same; each step takes a little longer",
                reason,
            )
        return {}

    def _plan(self, step: Step, index: int, state: CacheState) -> Plan:
        """The plan of ``step``, or of a full one for a pass that has just joined or has missed steps."""
        plan = self.planner.plan(step)
        program = plan.program
        if not program.reads or (index - state.last_step <= 1 and state.gather(program).whole):
            return plan
        return self.planner.plan(Step(StepKind.FULL, kept=step.kept, live=step.live))

    def _run(self, plan: Plan, state: CacheState, given: Given) -> Sequence[Array]:
        program = plan.program
        if program.replaces:  # free before they are computed anew, so that there are never two of them
            state.drop(program.replaces)
        if plan.step.kind is _PARTIAL:
            given.update(self._tokens(plan, state))
        results = program.run(*state.inputs(program, given))
        if program.writes:
            state.store(self._written(program, results))
        if program.measures:
            state.measured.update({port: results[i] for port, i in program.measures})
        if program.computed:
            self._refresh(program.computed, results, state)
        outputs = self._unaliased(program, results[: program.own], state)
        if plan.step.live is not state.kept:
            state.keep(plan.step.live)
        elif plan.unread:
            state.drop(plan.unread)
        return outputs

    def _written(self, program: Program, results: Sequence[Array]) -> dict[Port, Array]:
        """The caches that a program fills: contiguous, as compiled code wants them, and as large as they seem."""
        written = {port: results[i] for port, i in program.writes.items()}
        if program.loose is None:  # a property of the variant, so looked up once
            program.loose = tuple(port for port, value in written.items() if _is_loose(value))
        for port in program.loose:
            value = written[port]
            written[port] = value.clone() if value.is_contiguous() else value.contiguous()
        return written

    def _tokens(self, plan: Plan, state: CacheState) -> dict[Port, Array | None]:
        """The tokens that the waiting branches of a partial step recompute, by the input."""
        program = plan.program
        if state.selector is None or not program.waiting:
            return {}
        chosen = state.selector.select(program.rows, plan.counts, plan.step.interval)
        return {port: chosen[place] for port, place in program.tokens.items()}

    def _unaliased(self, program: Program, outputs: Sequence[Array], state: CacheState) -> Sequence[Array]:
        """The outputs, copied where the caller's changing one in place would change the state or another output."""
        if program.aliases is None:  # a property of the variant, so looked up once
            held = {_memory(t) for t in (*state.caches.values(), *state.hoisted.values())}
            memory = [_memory(output) for output in outputs]
            program.aliases = tuple(i for i, each in enumerate(memory) if each in held or each in memory[:i])
        if not program.aliases:
            return outputs
        return tuple(output.clone() if i in program.aliases else output for i, output in enumerate(outputs))

    def _refresh(self, computed: Mapping[int, int | None], results: Sequence[Array], state: CacheState) -> None:
        """Hands the scores of computed branches to the selector, and marks their tokens fresh."""
        selection = self._policy.selection
        if selection is None:
            return
        if state.selector is None:
            state.selector = TokenSelector(selection, self.planner.tokens, self.planner.arrays(results[0]))
        state.selector.refresh({row: None if slot is None else results[slot] for row, slot in computed.items()})


def _memory(tensor: Array) -> int:
    address: int = tensor.untyped_storage().data_ptr()
    return address


def _is_loose(value: Array) -> bool:
    """Whether a larger tensor would be kept with it, or its memory is in another order."""
    return value.untyped_storage().nbytes() > value.numel() * value.element_size() or not value.is_contiguous()
