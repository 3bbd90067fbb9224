"""The state of one denoising loop: its steps, what has run, and the caches of all captured shapes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from duca_compile.graph import dead_caches
from duca_compile.policies.base import Kept, Policy, Step, StepKind
from duca_compile.runtime.adaptive import Decisions
from duca_compile.runtime.arrays import Array, same_values, size
from duca_compile.runtime.clock import Sight, StepClock, Tick, held, version
from duca_compile.runtime.forecasting import Past
from duca_compile.runtime.selection import TokenSelector

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("duca_compile")

REMEMBERED_LOOPS = 8

PassKey = tuple[str | None, int]  # the pass's name, and which call of that name at the step


class Executed(NamedTuple):
    """One call as it ran: for reports and tests."""

    step: int
    pass_index: int
    kind: StepKind
    flops: float
    seconds: float  # of host time; on an accelerator work may still be queued
    pass_name: str | None = None
    measured: tuple[float, ...] = ()  # of adaptive policies: what was measured, one value for each row
    rows: tuple[StepKind, ...] = ()  # of those whose rows decide for themselves: what each row did


class Reader(Protocol):
    """A program, as far as its inputs go; known by its identity."""

    inputs: tuple[str, ...]
    caches: frozenset[str]  # those of them that are caches
    reads: frozenset[str]  # those of the caches that must be there


class Gathered(NamedTuple):
    """The inputs of one program, as far as they stay from step to step, and the places and names of the rest."""

    values: list[Array | None]
    rest: tuple[tuple[int, str], ...]
    whole: bool  # whether all caches that must be there are


@dataclass
class CacheState:
    """What one pass of one request carries from step to step; dropped when the next request starts."""

    caches: dict[str, Array] = field(default_factory=dict)  # placeholder name -> value
    last_step: int = -1
    gathered: dict[Reader, Gathered] = field(default_factory=dict)
    hoisted: dict[str, Array] = field(default_factory=dict)
    hoisted_from: Sight | None = None
    rows: Mapping[float, Sequence[Array]] = field(default_factory=dict)  # timestep -> the values it alone determines
    foreseen: bool = False  # whether the rows of the coming timesteps were computed
    selector: TokenSelector | None = None
    past: tuple[Past, ...] = ()  # of the batch, or of each row where rows decide for themselves
    decisions: Decisions | None = None
    measured: dict[str, Array] = field(default_factory=dict)  # what this step's variants measured, by name

    kept: Kept = Kept.ALL  # the kinds of caches that were kept behind the last step
    _most: tuple[int, int] = (0, 0)  # how many caches there were at most, and their bytes

    def store(self, values: Mapping[str, Array]) -> None:
        """Puts these caches in the places of those of the same names; what was written in place is there already."""
        caches = self.caches
        new = [name for name, value in values.items() if caches.get(name) is not value]
        if new:
            caches.update(values)
            self._changed(new)

    def drop(self, names: Collection[str]) -> None:
        """Forgets these caches, as far as they are there."""
        for name in names:
            self.caches.pop(name, None)
        self._changed(names)

    def _changed(self, names: Collection[str]) -> None:
        for reader in [reader for reader in self.gathered if not reader.caches.isdisjoint(names)]:
            del self.gathered[reader]

    def hoist(self, values: dict[str, Array], sources: Sight) -> None:
        """Notes the loop-invariant values of a call; those of timesteps may depend on them."""
        self.hoisted, self.hoisted_from = values, sources
        self.rows, self.foreseen = {}, False
        self.gathered.clear()

    def gather(self, reader: Reader) -> Gathered:
        """What a program reads of caches and hoisted values, looked up once for as long as they stay."""
        gathered = self.gathered.get(reader)
        if gathered is None:
            values = [*map({**self.hoisted, **self.caches}.get, reader.inputs)]
            rest = tuple([(place, reader.inputs[place]) for place, value in enumerate(values) if value is None])
            whole = reader.reads.isdisjoint(name for _, name in rest)
            gathered = self.gathered[reader] = Gathered(values, rest, whole)
        return gathered

    def inputs(self, reader: Reader, given: Mapping[str, Array]) -> list[Array]:
        """What a program reads."""
        gathered = self.gather(reader)
        values = gathered.values.copy()
        for place, name in gathered.rest:
            values[place] = given[name]
        return values

    @property
    def most_bytes(self) -> int:
        """The most bytes that the caches have held, with the scores of tokens."""
        if len(self.caches) >= self._most[0]:
            self._most = len(self.caches), sum(map(size, self.caches.values()))
        return self._most[1] + (0 if self.selector is None else self.selector.bytes)

    def end(self) -> None:
        """Drops all that decisions have kept behind the last step; should there be another, it starts anew."""
        self.keep(Kept.NOTHING)
        self.decisions, self.past = None, ()

    def keep(self, live: Kept) -> None:
        """Drops the caches that no later step reads."""
        self.kept = live
        if live is Kept.ALL:
            return
        if len(self.caches) > self._most[0]:
            self.most_bytes  # noqa: B018 - remembers it
        if live is Kept.NOTHING:
            self.caches.clear()
            self.gathered = {reader: gathered for reader, gathered in self.gathered.items() if not reader.caches}
        else:
            self.drop(dead_caches(live, self.caches))


class Names(Protocol):
    """The names of the inputs that tell steps and requests apart."""

    @property
    def latent(self) -> str: ...

    @property
    def timestep(self) -> str: ...


class Schedule(Protocol):
    """Knows the timesteps of each run of the loop before it starts: a pipeline's scheduler."""

    def run(self) -> object | None:
        """The run that is on: another object for each run, None where it is not known."""

    def timesteps(self, first: Tensor) -> Sequence[float]:
        """The timesteps of this run, from the one whose first model call is given ``first``."""


class Request:
    """Which step a call is, what the policy wants done at it, and what its passes carry from step to step.

    One request may run through several captured shapes (another prompt length for the unconditional pass, guidance
    switched off half way) and through several models (the experts of one pipeline), so this is not theirs. States are
    held by whoever runs them, weakly: those of a captured shape that is dropped go with it.
    """

    def __init__(
        self,
        policy: Policy,
        total: int | None,
        schedule: Schedule | None = None,
        loops: Loops | None = None,
    ) -> None:
        self._policy, self._given, self._schedule = policy, total, schedule
        self._loops = Loops() if loops is None else loops
        self._times: list[float | None] = []  # of this request, as they came
        self.coming_times: tuple[float, ...] = ()  # of this request, as far as they are known when it starts
        self._clock = StepClock(total)
        self._run: object | None = None  # held, so that its identity is not handed to the next run
        self._warned = False
        self._states = WeakKeyDictionary[object, dict[PassKey, CacheState]]()
        self.history: list[Executed] = []
        self._total = total
        self._steps: PlannedSteps | None = None
        self._opening: dict[str, tuple[Tensor, int]] = {}
        self._passes: dict[str | None, int] = {}

    def reset(self) -> None:
        """Drops every cache; the next call starts a new request."""
        self._clock.reset()
        self._states.clear()

    @property
    def total(self) -> int | None:
        """The steps of the running request, where they are known."""
        return self._total

    @property
    def cache_bytes(self) -> int:
        """The most bytes that the caches of the running, or last, request have held."""
        return sum(state.most_bytes for states in [*self._states.values()] for state in [*states.values()])

    def state(self, owner: object, key: PassKey) -> CacheState:
        """What ``owner`` carries for one pass."""
        states = self._states.get(owner)
        if states is None:
            states = self._states[owner] = {}
        state = states.get(key)
        if state is None:
            state = states[key] = CacheState()
        return state

    def tick(self, names: Names, call: Mapping[str, Tensor], name: str | None = None) -> Tick:
        """Where the call falls; ``pass_index`` counts the calls of the pass called ``name`` at the step.

        A new run of the schedule is a new request. Where there is no schedule, the clock's verdict counts, but a first
        timestep that repeats is a further pass only if the latent does too, or if the pass has a new name. Anything
        else at the first timestep is a new request from the same start: another latent, or the very same call again.
        """
        timestep = call[names.timestep]
        run = None if self._schedule is None else self._schedule.run()
        if run is not self._run:
            self._run = run
            self._clock.reset()
        tick = self._clock.tick(timestep)
        repeats = tick.step == 0 and tick.pass_index > 0 and run is None
        if repeats and not self._is_further_pass(names, call, name):
            self._clock.reset()
            tick = self._clock.tick(timestep)
        if tick.new_request:
            self._start(timestep, tick.timestep)
        if tick.step == len(self._times):
            self._times.append(tick.timestep)
        if tick.pass_index == 0:
            self._passes.clear()
        if tick.step == 0 and run is None:
            self._opening = {name: (held(tensor), version(tensor)) for name, tensor in call.items()}
        index = self._passes.get(name, 0)
        self._passes[name] = index + 1
        return tick if index == tick.pass_index else tick._replace(pass_index=index)

    def _start(self, timestep: Tensor, first: float | None) -> None:
        self._loops.remember(self._times)
        self._times.clear()
        self._states.clear()
        self.history.clear()
        self._opening.clear()
        self._total, monotone = self._given, True
        if self._schedule is not None and self._run is not None:
            times = [time for time, _ in groupby(self._schedule.timesteps(timestep))]
            self._total, monotone = len(times), times in (sorted(times), sorted(times, reverse=True))
            self.coming_times = () if first is None else _as_called(times, timestep, first)
        else:
            self.coming_times = () if first is None else _viewed(timestep) or self._loops.starting_at(first)
        self._clock.expect(self._total, monotone)
        self._steps = self._loops.steps(self._policy, self._total)

    def _is_further_pass(self, names: Names, call: Mapping[str, Tensor], name: str | None) -> bool:
        if name is not None and name not in self._passes:
            return True
        if names.latent not in self._opening:
            return False
        same = {
            name: name in self._opening and _unchanged(tensor, *self._opening[name])
            for name, tensor in call.items()
            if name != names.timestep
        }
        return same.pop(names.latent) and not all(same.values())

    def step_at(self, index: int) -> Step:
        """The policy's step; beyond the planned ones a full step, with one warning."""
        step = None if self._steps is None else self._steps.at(index)
        if step is None:
            self._warn(index)
            return Step(StepKind.FULL)
        return step

    def _warn(self, index: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "step %d is more than the %s planned steps; it and later ones are computed in full. Pass "
                "optimize(..., num_inference_steps=N) with the number your scheduler runs, or optimize the pipeline "
                "that runs; calibrate, or export an artifact, for that number.",
                index + 1,
                self._steps if self._steps is None else len(self._steps),
            )


class PlannedSteps:
    """The steps of one policy, planned as far as they were asked for; threads may share it.

    Equal steps are one object: then whoever looks something up by a step need not compare their fields.
    """

    def __init__(self, plan: Callable[[], Iterator[Step]]) -> None:
        self._plan, self._coming, self._lock = plan, plan(), threading.Lock()
        self._same, self._known = dict[Step, Step](), list[Step]()
        self.at(0)  # a policy that cannot be planned says so here

    def __len__(self) -> int:
        """How many are planned by now."""
        return len(self._known)

    def at(self, index: int) -> Step | None:
        """None beyond the last one."""
        if index >= len(self._known):
            with self._lock:
                self._extend(index + 1)
        return self._known[index] if index < len(self._known) else None

    def _extend(self, count: int) -> None:
        try:
            for step in islice(self._coming, max(0, count - len(self._known))):
                self._known.append(self._same.setdefault(step, step))
        except BaseException:  # a generator that has raised is at its end: whoever asks again is told again
            self._coming = islice(self._plan(), len(self._known), None)
            raise


class Loops:
    """The timesteps of earlier requests: a loop that starts as one before will go on as that did, most often.

    And the steps of one policy, which are planned once for each number of them.
    """

    def __init__(self) -> None:
        self._known: dict[float, tuple[float, ...]] = {}  # by the first timestep
        self._planned: dict[int | None, PlannedSteps] = {}

    def steps(self, policy: Policy, total: int | None) -> PlannedSteps:
        if total not in self._planned:
            steps = PlannedSteps(lambda: policy.planned(total))
            if total is not None:
                steps.at(total)  # all of them: what is wrong with one is said before the loop
            self._planned[total] = steps
        return self._planned[total]

    def remember(self, times: Sequence[float | None]) -> None:
        values = tuple(time for time in times if time is not None)
        if len(values) < 2 or len(values) < len(times):
            return
        self._known.pop(values[0], None)
        self._known[values[0]] = values
        while len(self._known) > REMEMBERED_LOOPS:
            self._known.pop(next(iter(self._known)), None)

    def starting_at(self, first: float) -> tuple[float, ...]:
        return self._known.get(first, ())


def _as_called(times: Sequence[float], timestep: Tensor, first: float) -> tuple[float, ...]:
    """The schedule's timesteps as the model is given them: as they are, or as a part of the training's thousand."""
    import torch

    values = torch.tensor(times, dtype=torch.float64).to(timestep.dtype)
    for each in (values, values / 1000, torch.tensor(times) / 1000):
        listed = tuple(map(float, each.tolist()))
        if listed[0] == first:
            return listed
    return ()


def _viewed(timestep: Tensor) -> tuple[float, ...]:
    """The timesteps from this one on, where it is a view of all, as ``for t in scheduler.timesteps`` gives."""
    base = getattr(timestep, "_base", None)
    if base is None or base.dim() != 1 or base.numel() < 2 or base.is_inference() or not base.is_contiguous():
        return ()
    return tuple(map(float, base[timestep.storage_offset() - base.storage_offset() :].tolist()))


def _unchanged(tensor: Tensor, known: Tensor, at_version: int) -> bool:
    """Whether ``tensor`` holds what ``known`` held at ``at_version``; reads both where it cannot tell otherwise."""
    if version(known) != at_version:
        return False
    return (tensor is known and at_version >= 0) or same_values(tensor, known)
