"""Runs one variant for each call of one captured shape, and keeps the caches between calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from duca_compile.core.ports import (
    CACHES,
    MEASURES,
    PROBE_CHANGE,
    PROBE_SEEN,
    STREAM_END,
    VERIFY_ERROR,
    WRITTEN,
    Port,
    PortKind,
    dead_caches,
)
from duca_compile.core.steps import Probe, Step, StepKind
from duca_compile.core.tensors import Array, TensorVersions
from duca_compile.errors import first_line, not_none
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.base import Forecast, Policy
from duca_compile.runtime.adaptive import Decisions, merged
from duca_compile.runtime.arrays import Arrays
from duca_compile.runtime.cache_state import CacheState, StepInputs
from duca_compile.runtime.clock import CallPosition
from duca_compile.runtime.forecasting import ForecastInputs
from duca_compile.runtime.learning import FullStep, Lesson, Reason, Samples
from duca_compile.runtime.request import Executed, Request
from duca_compile.runtime.selection import TokenSelector, TokenSet

log = logging.getLogger("duca_compile")

_PARTIAL, _FORECAST = StepKind.PARTIAL, StepKind.FORECAST  # an enum lookup is slow in some versions of Python


@dataclass(eq=False)
class Program:
    """A variant ready to run, with everything that ties it to a ``CacheState`` looked up once.

    Attributes:
        run: the compiled variant, a function of flat tensors.
        inputs: the ports of its inputs, in order.
        timestep_key: the key, for ``Planner.timestep_rows``, of the timestep-only values that it reads; false if there
            are none.
        caches: the inputs that are caches.
        reads: the caches that must exist before it runs.
        forecast: the inputs that forecasts need from the host.
        output_count: how many outputs are the model's own; they come first.
        writes: the caches that it fills, each with the index of the output.
        replaces: the caches that it fills and does not read.
        cached_branches: the selectable branches that it does not compute in full: a partial step recomputes some of
            their tokens, and the other tokens grow staler.
        selector_positions: their positions in the ``TokenSelector``.
        tokens: the token index inputs, each with the index in ``cached_branches`` of the first branch that uses it.
        computed: selector positions of the branches computed in full, each with the index of the output that holds
            their token scores, or None.
        measures: the outputs that decisions are based on: their ports and indices.
        copied_caches: the caches whose outputs are views of larger tensors, or not contiguous; None before the first
            run.
        aliased_outputs: indices of the model's own outputs that share memory with the state or with each other; None
            before the first run.
    """

    run: Callable[..., Sequence[Array]]
    inputs: tuple[Port, ...]
    timestep_key: Hashable
    caches: frozenset[Port]
    reads: frozenset[Port]
    forecast: ForecastInputs
    output_count: int
    writes: dict[Port, int]
    replaces: frozenset[Port]
    cached_branches: tuple[int, ...]
    selector_positions: tuple[int, ...]
    tokens: Mapping[Port, int]
    computed: Mapping[int, int | None]
    measures: tuple[tuple[Port, int], ...] = ()
    copied_caches: tuple[Port, ...] | None = None
    aliased_outputs: tuple[int, ...] | None = None

    @staticmethod
    def of(
        run: Callable[..., Sequence[Array]],
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        timestep_key: Hashable,
        forecast: ForecastInputs,
        cached_branches: tuple[int, ...],
        selector_positions: tuple[int, ...],
        tokens: tuple[Port, ...],
        computed: Mapping[int, int | None],
    ) -> Program:
        """The program of a function of flat tensors with these ports."""
        writes = {port: i for i, port in enumerate(outputs) if port.kind in WRITTEN}
        caches = frozenset(port for port in inputs if port.kind in CACHES)
        return Program(
            run,
            inputs,
            timestep_key,
            caches,
            reads=caches - forecast.zero_caches.keys(),
            forecast=forecast,
            output_count=sum(port.kind is PortKind.OUTPUT for port in outputs),
            writes=writes,
            replaces=frozenset(writes.keys() - set(inputs)),
            cached_branches=cached_branches,
            selector_positions=selector_positions,
            tokens={port: tokens.index(port) for port in tokens if port in inputs},
            computed=computed,
            measures=tuple((port, i) for i, port in enumerate(outputs) if port.kind in MEASURES),
        )


@dataclass(frozen=True)
class StepPlan:
    """How one step of a policy runs for one captured shape.

    Attributes:
        step: the step.
        program: the program that runs.
        counts: how many tokens to recompute, for each of the program's ``cached_branches``.
        flops: FLOPs of one call.
    """

    step: Step
    program: Program
    counts: tuple[int, ...]
    flops: float

    @cached_property
    def unread(self) -> tuple[Port, ...]:
        """The caches that its program fills and no later step reads."""
        return dead_caches(self.step.live, self.program.writes)


class RowsTooLargeError(Exception):
    """Precomputing the values of all timesteps would take too much memory."""


class TimestepRows(Protocol):
    """Computes the timestep-only values of one graph, packed into one timestep row for each dtype."""

    @property
    def outputs(self) -> tuple[Port, ...]: ...

    def compute(self, call: Mapping[str, Array], hoisted: Mapping[Port, Array]) -> Sequence[Array]:
        """The timestep rows for the call's own timestep."""

    def compute_all(
        self, call: Mapping[str, Array], hoisted: Mapping[Port, Array], times: tuple[float, ...]
    ) -> Mapping[float, Sequence[Array]]:
        """The timestep rows for each of ``times``; empty if they are not to be computed together.

        Raises:
            RowsTooLargeError: they would take too much memory.
        """


class Planner(Protocol):
    """Plans the steps of one kind of call."""

    @property
    def batch(self) -> int:
        """The number of batch rows of the latent."""

    @property
    def tokens(self) -> Sequence[TokenSet]:
        """The tokens of each selectable branch, by selector position."""

    def arrays(self, like: Array) -> Arrays:
        """Array operations for the kind and device of ``like``."""

    def plan(self, step: Step) -> StepPlan:
        """The plan of ``step``: the same object for the same step."""

    def probe_plan(self) -> StepPlan | None:
        """The plan of the probe that runs before a step is decided; None if the policy has none."""

    def timestep_rows(self, needed: Any) -> TimestepRows:
        """What computes the timestep-only values of ``needed``, a program's ``timestep_key``; all of them for None."""


class Hoister(Protocol):
    """Computes the loop-invariant values from the call's invariant inputs."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of these arguments."""

    def compute(self, call: Mapping[str, Array]) -> dict[Port, Array]: ...


class _Outcome(NamedTuple):
    """What one step gave, and what the history says of it."""

    outputs: Sequence[Array]
    kind: StepKind
    flops: float
    measured: tuple[float, ...] = ()
    rows: tuple[StepKind, ...] = ()


class Dispatcher:
    """Chooses, runs and records one variant for each call of one captured shape.

    It holds no state of any request, so any number of threads may call it, each with a request of its own.

    Args:
        planner: plans each step.
        policy: decides the steps.
        prologue: computes the loop-invariant values.
        precomputes_timesteps: whether the timestep-only values of all known timesteps are computed together. Products
            of another size may round differently.
        samples: what requests learn with, if the policy learns.
        budget: the most bytes that caches and samples of one pass may hold; None for no limit.
    """

    def __init__(
        self,
        planner: Planner,
        policy: Policy,
        prologue: Hoister,
        precomputes_timesteps: bool,
        samples: Samples | None = None,
        budget: int | None = None,
    ) -> None:
        self.planner, self._samples, self._budget = planner, samples, budget
        self._policy, self._prologue, self._precomputes_timesteps = policy, prologue, precomputes_timesteps
        self._adaptive = policy if isinstance(policy, AdaptivePolicy) else None
        self._forecast = policy.forecast
        self._least_full = 1 if self._forecast is None else self._forecast.least
        self._warned = False

    def __call__(
        self, request: Request, position: CallPosition, call: Mapping[str, Array], name: str | None = None
    ) -> Sequence[Array]:
        """Runs one call.

        Args:
            request: the request that the call belongs to.
            position: the step and the guidance pass of the call.
            call: its tensors by name.
            name: the name that the caller gave the guidance pass.

        Returns:
            The model's flat outputs.
        """
        started = perf_counter()
        state, lesson = request.state(self, (name, position.pass_index)), None
        self._hoist(state, call, position.condition)
        if self._adaptive is not None:
            step = _AdaptiveStep(self, self._adaptive, state, call, request, position)
            outputs, kind, flops, measured, rows = step.run()
        else:
            step_planned, lesson = request.step_at(position.step), request.lesson
            plan = self._plan(step_planned, position.step, state, None if lesson is None else lesson.forecast)
            outputs = self._run(plan, state, self._step_inputs(plan, state, call, request, position))
            kind, flops, measured, rows = plan.step.kind, plan.flops, (), ()
        reason: Reason = "" if lesson is None or kind is not StepKind.FULL else lesson.reason
        if lesson is not None:
            measured = self._learn(lesson, request, position, name, state, plan, outputs)
        state.last_step = position.step
        seconds = perf_counter() - started
        request.history.append(
            Executed(position.step, position.pass_index, kind, flops, seconds, name, measured, rows, reason)
        )
        return outputs

    def _learn(
        self,
        lesson: Lesson,
        request: Request,
        position: CallPosition,
        name: str | None,
        state: CacheState,
        plan: StepPlan,
        outputs: Sequence[Array],
    ) -> tuple[float, ...]:
        """Shows a full step to the lesson; what it measured. The last step of a request ends the state."""
        error = None
        ends = [port for port in plan.program.writes if port.kind is PortKind.STREAM_END and not port.order]
        if ends:
            room = None if self._budget is None else self._budget - state.most_bytes
            key = self, request.guidance_pass((name, position.pass_index))
            end = state.caches[STREAM_END if STREAM_END in ends else ends[0]]
            full = FullStep(key, position.step, end, outputs[0], room)
            error = lesson.observe(not_none(self._samples, "what takes samples"), full)
        if position.step + 1 == request.total:
            state.end()
        return () if error is None else (error,)

    def warm_up(
        self,
        request: Request,
        call: Mapping[str, Array],
        steps: Iterable[Step],
        watch: Callable[[Sequence[StepPlan]], Iterable[StepPlan]],
    ) -> None:
        """Runs each program that ``steps`` need once, on a state of its own.

        Args:
            request: a request of its own.
            call: the tensors of an example call by name.
            steps: the steps of a loop.
            watch: passes the plans through, and may show progress.
        """
        first: dict[Program, tuple[int, StepPlan]] = {}
        for index, step in enumerate(steps):
            plan = self.planner.plan(step)
            first.setdefault(plan.program, (index, plan))
        state = CacheState()
        self._hoist(state, call)
        indices = {id(plan): index for index, plan in first.values()}
        if (probe := self.planner.probe_plan()) is not None:
            position = CallPosition(0, 0, False)
            self._run(probe, state, self._step_inputs(probe, state, call, request, position))
        for plan in watch([plan for _, plan in first.values()]):
            position = CallPosition(indices[id(plan)], 0, False)
            self._run(plan, state, self._step_inputs(plan, state, call, request, position))
            state.last_step = position.step

    def _hoist(self, state: CacheState, call: Mapping[str, Array], condition: TensorVersions | None = None) -> None:
        """Computes the loop-invariant values, at the start of a request and again when their inputs have changed.

        They have not changed if ``condition``, what the guidance pass is conditioned on, is the same object as before.
        """
        if condition is not None and condition is state.condition:
            return
        state.condition = condition
        sources = [call[name] for name in self._prologue.inputs]
        if state.hoisted_from is None or not state.hoisted_from.matches(sources):
            seen = TensorVersions.of(sources)
            state.hoist(self._prologue.compute(call), seen)

    def _step_inputs(
        self,
        plan: StepPlan,
        state: CacheState,
        call: Mapping[str, Array],
        request: Request,
        position: CallPosition,
        rows: Sequence[bool] | None = None,
    ) -> StepInputs:
        """The inputs other than caches and loop-invariant values.

        Where batch rows decide for themselves, ``rows`` says which of them a full step is for.
        """
        program = plan.program
        given: StepInputs = {**call, **state.measured} if state.measured else {**call}
        if program.timestep_key:
            given.update(self._timestep_values(program.timestep_key, state, call, request, position))
        if program.forecast.needed:
            learnt = None if request.lesson is None else request.lesson.forecast
            forecast = learnt or self._forecast
            given.update(program.forecast.values(forecast, state, position.step, request.total, rows))
        return given

    def _timestep_values(
        self, needed: Hashable, state: CacheState, call: Mapping[str, Array], request: Request, position: CallPosition
    ) -> Iterable[tuple[Port, Array]]:
        """The timestep-only values that a program reads: precomputed ones if there are any, else computed now."""
        if self._precomputes_timesteps and not state.timesteps_precomputed:
            state.timesteps_precomputed = True
            state.timestep_rows = self._precomputed(state, call, request.expected_times)
        row = None if position.timestep is None else state.timestep_rows.get(position.timestep)
        rows = self.planner.timestep_rows(needed)
        if row is None:
            row = rows.compute(call, state.hoisted)
        return zip(rows.outputs, row, strict=True)

    def _precomputed(
        self, state: CacheState, call: Mapping[str, Array], times: tuple[float, ...]
    ) -> Mapping[float, Sequence[Array]]:
        """The timestep rows for each of ``times``; empty, with one warning, if they cannot be computed together."""
        import torch

        rows = self.planner.timestep_rows(None)
        try:
            return rows.compute_all(call, state.hoisted, times)
        except torch.OutOfMemoryError:
            raise
        except RowsTooLargeError as error:
            reason = str(error)
        except Exception as error:  # vmap has no rule for some operator
            reason = (
                f"torch.func.vmap does not support them ({first_line(error).rstrip('.')}); writing that operator in "
                "another way may help"
            )
            self._precomputes_timesteps = False
        if not self._warned:
            self._warned = True
            log.warning(
                "timestep-only values are computed step by step, not all at once: %s. The result is the "
                "same; each step takes slightly longer",
                reason,
            )
        return {}

    def _plan(self, step: Step, index: int, state: CacheState, learnt: Forecast | None = None) -> StepPlan:
        """The plan of ``step``; that of a full step if the guidance pass is new, missed a step or lacks a cache.

        So is a forecast before which the pass has not had enough full steps, or other ones than the ``learnt`` factors
        are for.
        """
        plan = self.planner.plan(step)
        program = plan.program
        ready = not program.reads or (index - state.last_step <= 1 and state.gather(program).complete)
        if learnt is not None and step.kind is _FORECAST:
            ready = ready and bool(state.forecasts) and state.forecasts[0].fitted(index, learnt) is not None
        if ready and (self._least_full == 1 or step.kind is not _FORECAST or self._has_enough(state)):
            return plan
        return self.planner.plan(Step(StepKind.FULL, kept=step.kept, live=step.live))

    def _has_enough(self, state: CacheState) -> bool:
        return bool(state.forecasts) and len(state.forecasts[0].full) >= self._least_full

    def _run(self, plan: StepPlan, state: CacheState, given: StepInputs) -> Sequence[Array]:
        program = plan.program
        if program.replaces:  # freed first, so that old and new caches are never in memory together
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
        outputs = self._unaliased(program, results[: program.output_count], state)
        if plan.step.live is not state.live:
            state.keep(plan.step.live)
        elif plan.unread:
            state.drop(plan.unread)
        return outputs

    def _written(self, program: Program, results: Sequence[Array]) -> dict[Port, Array]:
        """The caches that a program fills, contiguous as compiled code needs them, and not views of larger tensors."""
        written = {port: results[i] for port, i in program.writes.items()}
        if program.copied_caches is None:  # the same for all calls of a variant
            program.copied_caches = tuple(port for port, value in written.items() if _needs_copy(value))
        for port in program.copied_caches:
            value = written[port]
            written[port] = value.clone() if value.is_contiguous() else value.contiguous()
        return written

    def _tokens(self, plan: StepPlan, state: CacheState) -> dict[Port, Array | None]:
        """The indices of the tokens that a partial step recomputes, by the input."""
        program = plan.program
        if state.selector is None or not program.cached_branches:
            return {}
        chosen = state.selector.select(program.selector_positions, plan.counts, plan.step.interval)
        return {port: chosen[i] for port, i in program.tokens.items()}

    def _unaliased(self, program: Program, outputs: Sequence[Array], state: CacheState) -> Sequence[Array]:
        """The outputs; those that share memory with the state or with another output are copied.

        So the caller may write to any of them in place.
        """
        if program.aliased_outputs is None:  # the same for all calls of a variant
            held = {_memory(t) for t in (*state.caches.values(), *state.hoisted.values())}
            memory = [_memory(output) for output in outputs]
            program.aliased_outputs = tuple(i for i, at in enumerate(memory) if at in held or at in memory[:i])
        if not program.aliased_outputs:
            return outputs
        return tuple(output.clone() if i in program.aliased_outputs else output for i, output in enumerate(outputs))

    def _refresh(self, computed: Mapping[int, int | None], results: Sequence[Array], state: CacheState) -> None:
        """Gives the selector the scores of the branches computed in full, whose tokens are fresh now."""
        selection = self._policy.selection
        if selection is None:
            return
        if state.selector is None:
            state.selector = TokenSelector(selection, self.planner.tokens, self.planner.arrays(results[0]))
        state.selector.refresh({at: None if i is None else results[i] for at, i in computed.items()})


def _memory(tensor: Array) -> int:
    address: int = tensor.untyped_storage().data_ptr()
    return address


def _needs_copy(value: Array) -> bool:
    """Whether it is a view that would keep a larger tensor alive, or is not contiguous."""
    return value.untyped_storage().nbytes() > value.numel() * value.element_size() or not value.is_contiguous()


class _AdaptiveStep:
    """One step of an adaptive policy: it is measured, decided and run within the same call."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        policy: AdaptivePolicy,
        state: CacheState,
        call: Mapping[str, Array],
        request: Request,
        position: CallPosition,
    ) -> None:
        self._dispatcher, self._policy, self._state = dispatcher, policy, state
        self._call, self._request, self._position = call, request, position
        self._flops = 0.0
        self._cheap: Sequence[Array] | None = None  # the outputs of the step that is not full

    def run(self) -> _Outcome:
        state, index = self._state, self._position.step
        if state.decisions is None or index - state.last_step > 1:
            batch = self._dispatcher.planner.batch
            state.decisions = Decisions(self._policy, self._request.total, batch)
        proposed = state.decisions.propose(index)
        measured = self._measure(proposed)
        steps = state.decisions.decide(index, proposed, measured)
        outputs = self._run_decided(steps)
        state.measured.clear()
        if index + 1 == self._request.total:
            state.end()
        kinds = tuple(step.kind for step in steps)
        kind = StepKind.FULL if StepKind.FULL in kinds else kinds[0]
        return _Outcome(outputs, kind, self._flops, tuple(measured), () if self._policy.per == "batch" else kinds)

    def _measure(self, proposed: Sequence[Step]) -> list[float]:
        """What the decision is based on: one value for each batch row, one for all, or none.

        A forecast is measured by running it, so its outputs are kept for the case that it is accepted.
        """
        state, measure = self._state, self._policy.measure
        if isinstance(measure, Probe):
            has_reference = bool(state.forecasts) if measure.of == "forecast" else PROBE_SEEN in state.caches
            self._run_plan(not_none(self._dispatcher.planner.probe_plan(), "the probe's plan"))
            return state.measured[PROBE_CHANGE].tolist() if has_reference else []
        drafts = sorted((step for step in proposed if step.kind is not StepKind.FULL), key=lambda step: step.verified)
        if not drafts:
            return []
        self._cheap = self._run_plan(self._dispatcher.planner.plan(drafts[-1]))
        return state.measured[VERIFY_ERROR].tolist() if drafts[-1].verified else []

    def _run_decided(self, steps: Sequence[Step]) -> Sequence[Array]:
        """Runs the variants of ``steps``, one step for each batch row; at most a cheap one and a full one."""
        planner, measure = self._dispatcher.planner, self._policy.measure
        full = [step.kind is StepKind.FULL for step in steps]
        if self._cheap is None and not all(full):
            self._cheap = self._run_plan(planner.plan(steps[full.index(False)]))
        if isinstance(measure, Probe) and measure.of != "forecast":
            self._keep_reference(measure, full)
        if not any(full):
            return not_none(self._cheap, "the result of the cheap step")
        computed = self._run_plan(planner.plan(Step(StepKind.FULL)), full)
        if self._cheap is None or all(full):
            return computed
        return merged(planner.arrays(computed[0]), full, computed, self._cheap)

    def _run_plan(self, plan: StepPlan, rows: Sequence[bool] | None = None) -> Sequence[Array]:
        self._flops += plan.flops
        dispatcher, state = self._dispatcher, self._state
        inputs = dispatcher._step_inputs(plan, state, self._call, self._request, self._position, rows)
        return dispatcher._run(plan, state, inputs)

    def _keep_reference(self, probe: Probe, full: Sequence[bool]) -> None:
        """Keeps what the next probe is compared with: what this one saw, or only that of the full rows."""
        state = self._state
        seen = state.measured[PROBE_SEEN]
        if probe.to_last_full and not all(full):
            old = state.caches[PROBE_SEEN]
            seen = self._dispatcher.planner.arrays(seen).select_rows(full, seen, old) if any(full) else old
        state.store({PROBE_SEEN: seen})
