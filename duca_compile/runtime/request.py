"""One request: its steps, what has run, and the state of each of its guidance passes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from duca_compile.core.once import Once
from duca_compile.core.steps import Step, StepKind
from duca_compile.core.tensors import Array
from duca_compile.errors import not_none
from duca_compile.policies.auto import PassKind, RequestKind
from duca_compile.policies.base import Policy
from duca_compile.runtime.cache_state import CacheState
from duca_compile.runtime.calls import (
    UNRELATED,
    CallInputs,
    GuidancePass,
    GuidancePasses,
    LatentSample,
    PassKey,
    tensor_getter,
)
from duca_compile.runtime.clock import (
    NEW_REQUEST,
    NEXT_STEP,
    SAME_STEP,
    CallPosition,
    ReportedStep,
    StepClock,
    Transition,
)
from duca_compile.runtime.learning import Learner, Lesson, Reason
from duca_compile.runtime.loops import LoopMemory, LoopSchedule, PlannedSteps, schedule_of_view

log = logging.getLogger("duca_compile")

MAX_PASSES = 8  # guidance passes of one name, which only their order tells apart; a limit keeps the state bounded
MAX_TILES = 256  # the same for passes that their latents tell apart, and for all passes together
MAX_RESTARTS = 2  # restarts in mid-loop, in a row, before a warning


class Executed(NamedTuple):
    """One call that ran, for reports and tests.

    Attributes:
        step: the step, counted from 0.
        pass_index: which of the calls named ``pass_name`` at this step.
        kind: what ran; full if it was full for any batch row.
        flops: FLOPs of the call.
        seconds: host time; on an accelerator, work may still be queued.
        pass_name: the name that the caller gave the guidance pass.
        measured: what an adaptive policy measured, one value for each batch row; under ``Auto``, the relative error
            that a forecast would have had in place of this full step.
        rows: what ran for each batch row, where rows decide for themselves.
        reason: under ``Auto``, why the step is full other than by what was learnt: "learning", "drift" or "not worth
            it"; else empty.
    """

    step: int
    pass_index: int
    kind: StepKind
    flops: float
    seconds: float
    pass_name: str | None = None
    measured: tuple[float, ...] = ()
    rows: tuple[StepKind, ...] = ()
    reason: Reason = ""


class InputNames(Protocol):
    """The names of the inputs that tell steps and requests apart."""

    @property
    def latent(self) -> str: ...

    @property
    def timestep(self) -> str: ...

    @property
    def changing(self) -> Collection[str]:
        """The latent and the timestep, and the rest of the latent where it is a list of tensors."""


class _SetAside(NamedTuple):
    """Passes that seem to belong to the previous request, kept while that may still prove wrong."""

    passes: list[GuidancePass]
    history: list[Executed]
    states: list[tuple[object, GuidancePass, CacheState]]


class Request:
    """Finds the step and the guidance pass of each call, and holds the state of each pass.

    A request may run through several captured shapes (another prompt length in the unconditional pass, guidance that
    is switched off in mid-loop) and several models (the experts of one pipeline), so it belongs to none of them. It
    holds their states by weak reference: a captured shape that is evicted takes its states with it.

    Args:
        policy: decides the steps.
        total: the number of steps of a request, if it is known.
        schedule: knows the timesteps, if the model belongs to a pipeline.
        memory: earlier loops of the same model.
        learner: what earlier requests have learnt, if the policy learns.
    """

    def __init__(
        self,
        policy: Policy,
        total: int | None,
        schedule: LoopSchedule | None = None,
        memory: LoopMemory | None = None,
        learner: Learner | None = None,
    ) -> None:
        self._policy, self._given_total, self._schedule = policy, total, schedule
        self._memory = LoopMemory() if memory is None else memory
        self._learner = learner
        self.lesson: Lesson | None = None  # what this request does, if the policy learns
        self._scheduled: tuple[float, ...] = ()  # the timesteps by the schedule
        self._times: list[float | None] = []  # the timesteps of this request so far
        self.expected_times: tuple[float, ...] = ()  # those that are known when it starts
        self._clock = StepClock(total)
        self._run: object | None = None  # referenced, so that the next run cannot have the same identity
        self._warned = Once()
        self._states = WeakKeyDictionary[object, dict[GuidancePass | None, CacheState]]()
        self.history: list[Executed] = []
        self._total = total
        self._steps: PlannedSteps | None = None
        self._names: InputNames | None = None  # of the last call
        self._conditions: tuple[str, ...] = ()  # the inputs that its pass is conditioned on
        self._get_conditions = tensor_getter(())
        self._passes = GuidancePasses()
        self._set_aside: _SetAside | None = None
        self._openings: list[LatentSample] = []  # first latents of earlier requests of one step, at this timestep
        self._varying = set[str]()  # the inputs that are known to change from step to step
        self._candidates: list[GuidancePass] = []  # passes that a call seemed to belong to, and did not
        self._restarts = 0  # requests in a row that started because timesteps turned back in mid-loop

    def reset(self) -> None:
        """Drops all caches; the next call starts a new request."""
        self._end_lesson()
        self._clock.reset()
        self._states.clear()
        self._passes.clear()
        self._openings.clear()
        self._set_aside = None

    def _end_lesson(self) -> None:
        if self.lesson is not None:
            self.lesson.close()
        self.lesson = None

    @property
    def total(self) -> int | None:
        """The number of steps of the running request, if it is known."""
        return self._total

    @property
    def cache_bytes(self) -> int:
        """The most bytes that the caches of the running (or last) request have held, with samples to learn from."""
        recorded = 0 if self.lesson is None else self.lesson.bytes
        return recorded + sum(state.most_bytes for states in [*self._states.values()] for state in [*states.values()])

    def state(self, owner: object, key: PassKey) -> CacheState:
        """The state of ``owner``, a captured shape, for one guidance pass."""
        states = self._states.get(owner)
        if states is None:
            states = self._states[owner] = {}
        state = states.get(pass_ := self._passes.get(key))
        if state is None:
            state = states[pass_] = CacheState()
        return state

    def guidance_pass(self, key: PassKey) -> GuidancePass | None:
        """The pass of this name and number."""
        return self._passes.get(key)

    def locate(
        self, names: InputNames, call: Mapping[str, Array], name: str | None = None, step_index: int | None = None
    ) -> CallPosition:
        """The step and the guidance pass of a call.

        What the caller says comes first, then the schedule, then timesteps. A new run of the schedule is a new
        request. Without a schedule, conditions and latents decide what timesteps leave open.

        Args:
            names: the names of its latent and timestep.
            call: its tensors by name.
            name: the name that the caller gave the guidance pass.
            step_index: the step, if the caller gave it.

        Returns:
            The position; ``pass_index`` counts the passes called ``name``.
        """
        timestep, schedule, clock = call[names.timestep], self._schedule, self._clock
        if schedule is not None and (run := schedule.run()) is not self._run:
            self._run = run
            clock.reset()
        reported = schedule is not None or step_index is not None
        transition, pass_ = clock.classify(timestep, self._reported_step(step_index) if reported else None), None
        if transition is NEXT_STEP and (only := self._only_pass(names, call, name)) is not None:
            return self._advance_only_pass(only, call[names.latent])
        if names is not self._names:
            self._names, self._conditions = names, tuple(n for n in call if n not in names.changing)
            self._get_conditions = tensor_getter(self._conditions)
        given = CallInputs(name, names, call[names.latent], self._conditions, self._get_conditions(call))
        if transition is NEXT_STEP:
            transition, pass_ = self._match_next_step(given)
        elif transition is SAME_STEP:
            transition, pass_ = self._match_same_step(given)
        else:
            self._note_restart(given)
        time = clock.advance(transition)
        step = clock.step
        if transition is NEW_REQUEST:
            self._start(timestep, time)
        if step == len(self._times):
            self._times.append(time)
        if pass_ is None:
            pass_ = self._passes.add(given)
            pass_.candidates, self._candidates = self._candidates, []
        pass_.record(step, given, samples=step == 0 or self._passes.tiled)
        return CallPosition(step, pass_.index, transition is NEW_REQUEST, time, pass_.conditions)

    def _only_pass(self, names: InputNames, call: Mapping[str, Array], name: str | None) -> GuidancePass | None:
        """The pass of a call at another timestep, if the loop has no other pass and the conditions are unchanged.

        This is the usual case, and needs no further checks.
        """
        passes = self._passes
        if len(passes.all) != 1 or passes.tiled or self._openings or self._set_aside is not None:
            return None
        pass_ = passes.all[0]
        known = names is self._names and pass_.kind is names and pass_.name == name
        return pass_ if known and pass_.conditions.matches(self._get_conditions(call)) else None

    def _advance_only_pass(self, pass_: GuidancePass, latent: Array) -> CallPosition:
        time = self._clock.advance(NEXT_STEP)
        step = self._clock.step
        if step == len(self._times):
            self._times.append(time)
        pass_.move_to(step, latent)
        return CallPosition(step, 0, False, time, pass_.conditions)

    def captured(self, names: InputNames) -> None:
        """Records that the call that started the request is of another kind, as a check of the whole model showed."""
        for pass_ in self._passes.all:
            pass_.kind = names

    def _reported_step(self, step_index: int | None) -> ReportedStep | None:
        if step_index is not None:
            return ReportedStep(step_index, by_caller=True)
        step = None if self._schedule is None or self._run is None else self._schedule.step()
        return None if step is None else ReportedStep(step, by_caller=False)

    def _start(self, timestep: Array, first: float | None) -> None:
        self._end_lesson()
        self._memory.remember(self._times)
        self._times.clear()
        self._states.clear()
        self._passes.clear()
        self.history.clear()
        self._total, monotone, self._scheduled = self._given_total, True, ()
        if self._schedule is not None and self._run is not None:
            times = list(self._schedule.timesteps(timestep))
            self._total, self._scheduled = len(times), tuple(times)
            monotone = times in (sorted(times), sorted(times, reverse=True))
            self.expected_times = () if first is None else self._schedule.as_called(times, timestep, first)
        else:
            self.expected_times = () if first is None else schedule_of_view(timestep) or self._memory.starting_at(first)
        self._clock.expect(self._total, monotone)
        self._steps = self._memory.steps(self._policy, self._total)
        if self._learner is not None:
            self.lesson = Lesson(self._learner, not_none(self._total, "the number of steps"))

    def _kind(self) -> RequestKind:
        """What decides whether this request is like others, once its first step is over."""
        times = self._scheduled or tuple(time for time in self._times[:2] if time is not None)
        scheduler = "" if self._schedule is None else self._schedule.name()
        passes = tuple(PassKind(each.name, each.latent_shape) for each in self._passes.all)
        return RequestKind(not_none(self._total, "the number of steps"), scheduler, times, passes)

    def _note_restart(self, call: CallInputs) -> None:
        """Warns if the timesteps start a request in mid-loop again and again."""
        self._openings.clear()
        self._set_aside = None
        midway = self._clock.is_midway(start=self._restarts > 0)
        midway = midway and any(pass_.has_same_objects(call) for pass_ in self._passes.of(call.name))
        self._restarts = self._restarts + 1 if midway else 0
        if self._restarts == MAX_RESTARTS:
            self._warn(
                "timesteps turned back in mid-loop %d times in a row, and each time a new request started, whose first "
                "step is a full one. If this is a single loop, give the step of each call: "
                "with model.cache_context(name, step_index=i)",
                MAX_RESTARTS,
            )

    def _match_next_step(self, call: CallInputs) -> tuple[Transition, GuidancePass | None]:
        """The transition and the pass of the first call at another timestep."""
        self._set_aside = None
        step = self._clock.step + 1
        if self._openings:
            if self._continues_earlier_opening(call):
                self._switch_to_tiles()
            self._openings.clear()
        pass_ = self._passes.find(call, step, reads=step == 1)
        if pass_ is None or self._run is not None or self._passes.tiled:
            return NEXT_STEP, pass_
        if step == 1 and pass_.place > 0:  # the passes before it seem to belong to the previous request
            self._set_aside = self._set_aside_before(pass_.place)
        if not pass_.has_same_objects(call) and self._is_conditioned_otherwise(pass_, call, step):
            return (NEW_REQUEST if step == 1 and self._total in (None, 1) else NEXT_STEP), None
        return NEXT_STEP, pass_

    def _is_conditioned_otherwise(self, pass_: GuidancePass, call: CallInputs, step: int) -> bool:
        """Whether a call that seems to belong to ``pass_`` belongs to another pass or request: its conditions differ.

        Inputs that change from step to step do not count. An input is known to be one of these once it has changed
        twice, to a value that no pass had, while other inputs stayed the same; in a named pass, once it has changed
        twice.
        """
        if self._clock.step_given or not pass_.has_same_kind(call):  # calls of other kinds share no caches anyway
            return False
        changed = pass_.changed_inputs(call, reads=step == 1) - self._varying
        if pass_.candidates and (call.name is not None or len(changed) < len(call.names)):
            others = [other.changed_inputs(call, reads=step == 1) for other in pass_.candidates]
            self._varying |= changed.intersection(*others)
        if changed <= self._varying:
            pass_.candidates = []
            return False
        if len(pass_.candidates) > 1:
            self._warn(
                "everything that the model is conditioned on changes at each step, so each step is computed in full. "
                "If these are steps of one guidance pass, name it: with model.cache_context(name, step_index=i)"
            )
        self._candidates = [*self._passes.all, *pass_.candidates][:MAX_PASSES]
        for candidate in self._candidates:
            candidate.candidates = []  # bounds the chain of candidates
        return True

    def _match_same_step(self, call: CallInputs) -> tuple[Transition, GuidancePass | None]:
        """The transition and the pass of a call at the same timestep: another pass, the next step or a new request."""
        step = self._clock.step
        first = step == 0 and self._run is None
        pass_ = self._passes.find(call, step, reads=step <= 1)
        if self._set_aside is not None and not (pass_ is not None and pass_.has_same_values(call)):
            pass_ = self._restored(call) or pass_
        if pass_ is None:
            belongs = call.name is not None or not first or self._passes.all[-1].has_latent(call.latent)
            return (self._another_pass(call) if belongs else self._start_again()), None
        if pass_.step != step:
            other = not (self._run is not None or self._passes.tiled or pass_.has_same_objects(call))
            other = other and self._is_conditioned_otherwise(pass_, call, step)
            return (self._another_pass(call), None) if other else (SAME_STEP, pass_)
        if first:
            return self._match_first_step(pass_, call)
        if not pass_.has_latent(call.latent):
            if self._clock.rounded and (self._clock.advances or pass_.may_continue_with(call.latent)):
                return NEXT_STEP, pass_
            self._passes.tiled |= pass_.is_unrelated_to(call.latent) and pass_.has_same_values(call)
        return self._another_pass(call), None

    def _match_first_step(self, pass_: GuidancePass, call: CallInputs) -> tuple[Transition, GuidancePass | None]:
        """The same at the first timestep without a schedule, when the loop's passes are not known yet."""
        if pass_.has_latent(call.latent):
            if not pass_.has_same_values(call):
                return self._another_pass(call), None
            names = [known.name for known in self._passes.all]
            start = len(names) - pass_.place  # where a request that has come to this pass must have started
            if not 0 < pass_.place < start or names[start:] != names[: pass_.place]:
                return NEW_REQUEST, None
            self._set_aside_before(start)
            return SAME_STEP, None
        if self._clock.rounded is None:
            if self._clock.advances:
                return NEXT_STEP, pass_
            if pass_.has_same_values(call) and pass_.may_continue_with(call.latent):
                if self._total is not None and self._total > 1:
                    return NEXT_STEP, pass_
                self._warn(
                    "the first timestep, which is rounded, came again with a latent close to the last one: taken for "
                    "the start of another request. If it is the next step of a loop, say optimize(..., "
                    "num_inference_steps=N), or give the step of each call: with model.cache_context(name, "
                    "step_index=i)"
                )
        return self._start_again(), None

    def _start_again(self) -> Transition:
        """Another request with the same first timestep, or a tile, as the second step will show."""
        opening = self._passes.all[0].sample
        if opening is not None:
            self._openings = [*self._openings[1 - MAX_TILES :], opening]
        return NEW_REQUEST

    def _another_pass(self, call: CallInputs) -> Transition:
        """Another pass of this step, unless there are too many that nothing tells apart."""
        most = MAX_TILES if self._passes.tiled else MAX_PASSES
        if len(self._passes.of(call.name)) < most and len(self._passes.all) < MAX_TILES:
            return SAME_STEP
        if self._clock.step > 0 or self._run is not None or len(self._passes.all) >= MAX_TILES:
            self._warn(
                "there are more calls at one timestep than can be told apart (%d with one name, %d in all): a new "
                "request starts, and all caches are dropped. Give each guidance pass and tile a name of its own: "
                "with model.cache_context(name)",
                most,
                MAX_TILES,
            )
            return NEW_REQUEST
        self._set_aside_before(1)
        return SAME_STEP

    def _continues_earlier_opening(self, call: CallInputs) -> bool:
        """Whether the latent is closer to that of an earlier request than to that of this one."""
        now = LatentSample(call.latent)
        distance = min(pass_.sample.distance(now) for pass_ in self._passes.all if pass_.sample is not None)
        return min(opening.distance(now) for opening in self._openings) < UNRELATED * distance

    def _switch_to_tiles(self) -> None:
        """Takes what seemed to be requests for tiles: this call can use no caches."""
        self._states.clear()
        self._passes.clear()
        self._passes.tiled = True
        self._warn(
            "calls at one timestep have different latents, as tiles and context windows do. The first step of all but "
            "the last was dropped, so the second step is computed in full. Name them, and give their step: "
            'with model.cache_context(f"tile {n}", step_index=i)'
        )

    def _set_aside_before(self, place: int) -> _SetAside:
        """Removes the passes of the first step before ``place``, which belong to the previous request."""
        removed, kept = self._passes.all[:place], self._passes.all[place:]
        states = [
            (owner, pass_, states.pop(pass_))
            for owner, states in [*self._states.items()]
            for pass_ in removed
            if pass_ in states
        ]
        history = self.history[:place]
        self._passes.put(kept)
        self.history[:] = _renumbered(self.history[place:], removed, -1)
        return _SetAside(removed, history, states)

    def _restored(self, call: CallInputs) -> GuidancePass | None:
        """The pass of a call, if it was set aside by mistake; then all passes that were set aside are restored."""
        aside = not_none(self._set_aside, "what was set aside")
        new_name = call.name is not None and not self._passes.of(call.name)  # then the name alone decides
        known = [pass_ for pass_ in aside.passes if pass_.name == call.name]
        match = next((pass_ for pass_ in reversed(known) if pass_.has_same_values(call)), None)
        if match is None and new_name and known:
            match = known[-1]
        if match is not None:
            self._set_aside = None
            self.history[:] = [*aside.history, *_renumbered(self.history, aside.passes, 1)]
            self._passes.put([*aside.passes, *self._passes.all])
            for owner, pass_, state in aside.states:
                self._states.setdefault(owner, {})[pass_] = state
        return match

    def step_at(self, index: int) -> Step:
        """The policy's step; after the last planned one a full step, with one warning."""
        step = None if self._steps is None else self._steps.at(index)
        if step is None:
            self._warn(
                "step %d is more than the %s planned steps; it and later ones are computed in full. Pass the number "
                "of steps that your scheduler runs, optimize(..., num_inference_steps=N), or optimize the whole "
                "pipeline; calibrate, or export an artifact, for that number.",
                index + 1,
                self._steps if self._steps is None else len(self._steps),
            )
            return Step(StepKind.FULL)
        return step if self.lesson is None else self.lesson.step(index, self._kind)

    def _warn(self, message: str, *values: object) -> None:
        """Logs a warning once."""
        if self._warned.first(message):
            log.warning(message, *values)


def _renumbered(history: Sequence[Executed], passes: Sequence[GuidancePass], sign: int) -> list[Executed]:
    """The same history with pass indices shifted by the number of ``passes`` of their name."""
    shift = Counter(pass_.name for pass_ in passes)
    return [
        executed._replace(pass_index=executed.pass_index + sign * shift[executed.pass_name]) for executed in history
    ]
