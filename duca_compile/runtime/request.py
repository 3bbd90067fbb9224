"""The state of one denoising loop: its steps, what has run, and the caches of all captured shapes."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from duca_compile.core.ports import Port, dead_caches
from duca_compile.core.steps import Kept, Step, StepKind
from duca_compile.core.tensors import Array, TensorVersions
from duca_compile.policies.base import Policy
from duca_compile.runtime.adaptive import Decisions
from duca_compile.runtime.arrays import size
from duca_compile.runtime.calls import APART, Named, PassKey, Sample, Slot, Slots, chosen
from duca_compile.runtime.clock import AGAIN, NEXT, START, Move, Place, StepClock, Tick
from duca_compile.runtime.past import Past
from duca_compile.runtime.selection import TokenSelector

log = logging.getLogger("duca_compile")

REMEMBERED_LOOPS = 8
MAX_PASSES = 8  # of one name, that only their order tells apart; with more, state would not be bounded
MAX_TILES = 256  # the same for those that their latents tell apart, and for all together
RESTLESS = 2  # a loop that turned back so often is said to


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


Given = dict[Any, Array]  # the values of one step: the tensors of the call by name, all others by port


class Reader(Protocol):
    """A program, as far as its inputs go; known by its identity."""

    inputs: tuple[Port, ...]
    caches: frozenset[Port]  # those of them that are caches
    reads: frozenset[Port]  # those of the caches that must be there


class Gathered(NamedTuple):
    """The inputs of one program, as far as they stay from step to step, and the places and keys of the rest."""

    values: list[Array | None]
    rest: tuple[tuple[int, Port | str], ...]
    whole: bool  # whether all caches that must be there are


@dataclass
class CacheState:
    """What one pass of one request carries from step to step; dropped when the next request starts."""

    caches: dict[Port, Array] = field(default_factory=dict)
    last_step: int = -1
    gathered: dict[Reader, Gathered] = field(default_factory=dict)
    hoisted: dict[Port, Array] = field(default_factory=dict)
    hoisted_from: TensorVersions | None = None
    condition: TensorVersions | None = None  # of the whole call that they were last found right for
    rows: Mapping[float, Sequence[Array]] = field(default_factory=dict)  # timestep -> the values it alone determines
    foreseen: bool = False  # whether the rows of the coming timesteps were computed
    selector: TokenSelector | None = None
    past: tuple[Past, ...] = ()  # of the batch, or of each row where rows decide for themselves
    decisions: Decisions | None = None
    measured: dict[Port, Array] = field(default_factory=dict)  # what this step's variants measured

    kept: Kept = Kept.ALL  # the kinds of caches that were kept behind the last step
    _most: tuple[int, int] = (0, 0)  # how many caches there were at most, and their bytes

    def store(self, values: Mapping[Port, Array]) -> None:
        """Puts these caches in the places of those of the same ports; what was written in place is there already."""
        caches = self.caches
        new = [port for port, value in values.items() if caches.get(port) is not value]
        if new:
            caches.update(values)
            self._changed(new)

    def drop(self, ports: Collection[Port]) -> None:
        """Forgets these caches, as far as they are there."""
        for port in ports:
            self.caches.pop(port, None)
        self._changed(ports)

    def _changed(self, ports: Collection[Port]) -> None:
        for reader in [reader for reader in self.gathered if not reader.caches.isdisjoint(ports)]:
            del self.gathered[reader]

    def hoist(self, values: dict[Port, Array], sources: TensorVersions) -> None:
        """Notes the loop-invariant values of a call; those of timesteps may depend on them."""
        self.hoisted, self.hoisted_from = values, sources
        self.rows, self.foreseen = {}, False
        self.gathered.clear()

    def gather(self, reader: Reader) -> Gathered:
        """What a program reads of caches and hoisted values, looked up once for as long as they stay."""
        gathered = self.gathered.get(reader)
        if gathered is None:
            values = [*map({**self.hoisted, **self.caches}.get, reader.inputs)]
            rest = tuple([(place, reader.inputs[place].key) for place, value in enumerate(values) if value is None])
            whole = reader.reads.isdisjoint(key for _, key in rest)
            gathered = self.gathered[reader] = Gathered(values, rest, whole)
        return gathered

    def inputs(self, reader: Reader, given: Given) -> list[Array]:
        """What a program reads."""
        gathered = self.gathered.get(reader) or self.gather(reader)
        values = gathered.values.copy()
        for place, key in gathered.rest:
            values[place] = given[key]
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

    @property
    def changing(self) -> Collection[str]:
        """Those two, and what else the latent is made of where it is a list of tensors."""


class Schedule(Protocol):
    """Knows the timesteps of each run of the loop before it starts: a pipeline's scheduler."""

    def run(self) -> object | None:
        """The run that is on: another object for each run, None where it is not known."""

    def timesteps(self, first: Array) -> Sequence[float]:
        """That of each step of this run, from the one whose first model call is given ``first``."""

    def as_called(self, times: Sequence[float], timestep: Array, first: float) -> tuple[float, ...]:
        """These, as the model is given them, where the first call's is ``timestep``, whose value is ``first``."""

    def step(self) -> int | None:
        """The step that the run is at, as counted from its first one; None where that is not known."""


class _Aside(NamedTuple):
    """Passes that seem to be of the request before, as long as they may turn out not to be."""

    slots: list[Slot]
    history: list[Executed]
    states: list[tuple[object, Slot, CacheState]]


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
        self._warned = set[str]()
        self._states = WeakKeyDictionary[object, dict[Slot | None, CacheState]]()
        self.history: list[Executed] = []
        self._total = total
        self._steps: PlannedSteps | None = None
        self._names: Names | None = None  # of the last call, and the inputs that passes are conditioned on
        self._inputs: tuple[str, ...] = ()
        self._chosen = chosen(())
        self._slots = Slots()
        self._aside: _Aside | None = None
        self._openings: list[Sample] = []  # latents of the requests before, of one step each, at this timestep
        self._varying = set[str]()  # the inputs that change from step to step, as far as that was seen
        self._former: list[Slot] = []  # passes that a call might have been of, and turned out not to be
        self._turns = 0  # requests in a row that started where timesteps turned back in mid-loop

    def reset(self) -> None:
        """Drops every cache; the next call starts a new request."""
        self._clock.reset()
        self._states.clear()
        self._slots.clear()
        self._openings.clear()
        self._aside = None

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
        state = states.get(slot := self._slots.get(key))
        if state is None:
            state = states[slot] = CacheState()
        return state

    def tick(
        self, names: Names, call: Mapping[str, Array], name: str | None = None, step_index: int | None = None
    ) -> Tick:
        """Where the call falls; ``pass_index`` counts the passes called ``name``.

        What the caller says counts first, then the schedule, then timesteps. A new run of the schedule is a new
        request. Where there is none, what passes are conditioned on and their latents tell what timesteps cannot.
        """
        timestep, schedule, clock = call[names.timestep], self._schedule, self._clock
        if schedule is not None and (run := schedule.run()) is not self._run:
            self._run = run
            clock.reset()
        said = schedule is not None or step_index is not None
        move, slot = clock.look(timestep, self._place(step_index) if said else None), None
        if move is NEXT and (only := self._only_pass(names, call, name)) is not None:
            return self._go_on(only, call[names.latent])
        if names is not self._names:
            self._names, self._inputs = names, tuple(n for n in call if n not in names.changing)
            self._chosen = chosen(self._inputs)
        given = Named(name, names, call[names.latent], self._inputs, self._chosen(call))
        if move is NEXT:
            move, slot = self._first_of_step(given)
        elif move is AGAIN:
            move, slot = self._again(given)
        else:
            self._turn_back(given)
        time = clock.go(move)
        step = clock.step
        if move is START:
            self._start(timestep, time)
        if step == len(self._times):
            self._times.append(time)
        if slot is None:
            slot = self._slots.add(given)
            slot.former, self._former = self._former, []
        slot.called(step, given, samples=step == 0 or self._slots.tiled)
        return Tick(step, slot.index, move is START, time, slot.sight)

    def _only_pass(self, names: Names, call: Mapping[str, Array], name: str | None) -> Slot | None:
        """The pass of a call at another timestep, where the loop has no other and it is conditioned as it was.

        That is so most often, and then no more has to be asked.
        """
        slots = self._slots
        if len(slots.all) != 1 or slots.tiled or self._openings or self._aside is not None:
            return None
        slot = slots.all[0]
        known = names is self._names and slot.kind is names and slot.name == name
        return slot if known and slot.sight.matches(self._chosen(call)) else None

    def _go_on(self, slot: Slot, latent: Array) -> Tick:
        """The next step, of the only pass."""
        time = self._clock.go(NEXT)
        step = self._clock.step
        if step == len(self._times):
            self._times.append(time)
        slot.at(step, latent)
        return Tick(step, 0, False, time, slot.sight)

    def captured(self, names: Names) -> None:
        """Notes that the call that started the request is of this kind, as a closer look at the model showed."""
        for slot in self._slots.all:
            slot.kind = names

    def _place(self, step_index: int | None) -> Place | None:
        if step_index is not None:
            return Place(step_index, by_caller=True)
        step = None if self._schedule is None or self._run is None else self._schedule.step()
        return None if step is None else Place(step, by_caller=False)

    def _start(self, timestep: Array, first: float | None) -> None:
        self._loops.remember(self._times)
        self._times.clear()
        self._states.clear()
        self._slots.clear()
        self.history.clear()
        self._total, monotone = self._given, True
        if self._schedule is not None and self._run is not None:
            times = list(self._schedule.timesteps(timestep))
            self._total, monotone = len(times), times in (sorted(times), sorted(times, reverse=True))
            self.coming_times = () if first is None else self._schedule.as_called(times, timestep, first)
        else:
            self.coming_times = () if first is None else _viewed(timestep) or self._loops.starting_at(first)
        self._clock.expect(self._total, monotone)
        self._steps = self._loops.steps(self._policy, self._total)

    def _turn_back(self, call: Named) -> None:
        """Notes that timesteps say that a request starts."""
        self._openings.clear()
        self._aside = None
        midway = self._clock.is_midway(start=self._turns > 0)
        midway = midway and any(slot.is_as(call) for slot in self._slots.of(call.name))
        self._turns = self._turns + 1 if midway else 0
        if self._turns == RESTLESS:
            self._warn(
                "timesteps turned back in mid-loop %d times in a row, and each time a request started, whose first "
                "step is a full one. If these are one loop, say where it is: "
                "with model.cache_context(name, step_index=i)",
                RESTLESS,
            )

    def _first_of_step(self, call: Named) -> tuple[Move, Slot | None]:
        """What the first call at another timestep is, behind a request's first step."""
        self._aside = None
        step = self._clock.step + 1
        if self._openings:
            if self._is_of_an_earlier_one(call):
                self._go_on_with_tiles()
            self._openings.clear()
        slot = self._slots.find(call, step, reads=step == 1)
        if slot is None or self._run is not None or self._slots.tiled:
            return NEXT, slot
        if step == 1 and slot.place > 0:  # those before it were another request's, it seems
            self._aside = self._drop_before(slot.place)
        if not slot.is_as(call) and self._is_another(slot, call, step):
            return (START if step == 1 and self._total in (None, 1) else NEXT), None
        return NEXT, slot

    def _is_another(self, slot: Slot, call: Named, step: int) -> bool:
        """Whether a call is of another pass, or of another request, than seems: it is conditioned on something else.

        Inputs that change from step to step do not count. They are known once they have changed twice, each time to
        what no pass had, while others stayed; of a pass with a name, its name says that it is the same.
        """
        if self._clock.told or not slot.is_alike(call):  # calls of other kinds share no caches anyway
            return False
        changed = slot.changes(call, reads=step == 1) - self._varying
        if slot.former and (call.name is not None or len(changed) < len(call.inputs)):
            self._varying |= changed.intersection(*[former.changes(call, reads=step == 1) for former in slot.former])
        if changed <= self._varying:
            slot.former = []
            return False
        if len(slot.former) > 1:
            self._warn(
                "all that the model is conditioned on changes at each step, so each is computed in full. If these are "
                "steps of one pass, name it: with model.cache_context(name, step_index=i)"
            )
        self._former = [*self._slots.all, *slot.former][:MAX_PASSES]
        for former in self._former:
            former.former = []  # whose own are dropped, so that they are bounded
        return True

    def _again(self, call: Named) -> tuple[Move, Slot | None]:
        """What a call at the same timestep is: of which pass of this step, or of the next step or request."""
        step = self._clock.step
        first = step == 0 and self._run is None
        slot = self._slots.find(call, step, reads=step <= 1)
        if self._aside is not None and not (slot is not None and slot.is_for(call)):
            slot = self._taken_back(call) or slot
        if slot is None:
            own = call.name is not None or not first or self._slots.all[-1].has(call.latent)
            return (self._further(call) if own else self._begin_again()), None
        if slot.step != step:
            other = not (self._run is not None or self._slots.tiled or slot.is_as(call))
            other = other and self._is_another(slot, call, step)
            return (self._further(call), None) if other else (AGAIN, slot)
        if first:
            return self._first_again(slot, call)
        if not slot.has(call.latent):
            if self._clock.rounded and (self._clock.advances or slot.goes_on_with(call.latent)):
                return NEXT, slot
            self._slots.tiled |= slot.is_apart_from(call.latent) and slot.is_for(call)
        return self._further(call), None

    def _first_again(self, slot: Slot, call: Named) -> tuple[Move, Slot | None]:
        """The same without a schedule at the first timestep, where nothing tells yet what passes the loop has."""
        if slot.has(call.latent):
            if not slot.is_for(call):
                return self._further(call), None
            names = [each.name for each in self._slots.all]
            start = len(names) - slot.place  # where a request must have started that has come to this pass
            if not 0 < slot.place < start or names[start:] != names[: slot.place]:
                return START, None
            self._drop_before(start)
            return AGAIN, None
        if self._clock.rounded is None:
            if self._clock.advances:
                return NEXT, slot
            if slot.is_for(call) and slot.goes_on_with(call.latent):
                if self._total is not None and self._total > 1:
                    return NEXT, slot
                self._warn(
                    "the first timestep, which is rounded, came again with a latent much like the last: taken for the "
                    "start of another request. If it is the next step of a loop, say optimize(..., "
                    "num_inference_steps=N), or where the loop is: with model.cache_context(name, step_index=i)"
                )
        return self._begin_again(), None

    def _begin_again(self) -> Move:
        """Another request of the same first timestep; a tile, should this come out later."""
        opening = self._slots.all[0].sample
        if opening is not None:
            self._openings = [*self._openings[1 - MAX_TILES :], opening]
        return START

    def _further(self, call: Named) -> Move:
        """Another pass of this step, unless there are too many that nothing tells apart."""
        most = MAX_TILES if self._slots.tiled else MAX_PASSES
        if len(self._slots.of(call.name)) < most and len(self._slots.all) < MAX_TILES:
            return AGAIN
        if self._clock.step > 0 or self._run is not None or len(self._slots.all) >= MAX_TILES:
            self._warn(
                "there are more calls at one timestep than are kept apart (%d of one name, %d in all): a request "
                "starts, and all caches are dropped. Name passes and tiles, each by its own name: "
                "with model.cache_context(name)",
                most,
                MAX_TILES,
            )
            return START
        self._drop_before(1)
        return AGAIN

    def _is_of_an_earlier_one(self, call: Named) -> bool:
        """Whether the latent is nearer to that of an earlier request than to that of this one."""
        now = Sample(call.latent)
        own = min(slot.sample.distance(now) for slot in self._slots.all if slot.sample is not None)
        return min(opening.distance(now) for opening in self._openings) < APART * own

    def _go_on_with_tiles(self) -> None:
        """What seemed to be requests were tiles: nobody's caches are this call's."""
        self._states.clear()
        self._slots.clear()
        self._slots.tiled = True
        self._warn(
            "calls at one timestep have different latents, as tiles and context windows have. The first step of each "
            "but the last was forgotten, so the second step is computed in full. Name them, and say where the loop "
            'is: with model.cache_context(f"tile {n}", step_index=i)'
        )

    def _drop_before(self, place: int) -> _Aside:
        """Takes out the passes of the first step before the one of that place, which were another request's."""
        gone, kept = self._slots.all[:place], self._slots.all[place:]
        states = [
            (owner, slot, states.pop(slot))
            for owner, states in [*self._states.items()]
            for slot in gone
            if slot in states
        ]
        history = self.history[:place]
        self._slots.put(kept)
        self.history[:] = _renumbered(self.history[place:], gone, -1)
        return _Aside(gone, history, states)

    def _taken_back(self, call: Named) -> Slot | None:
        """The pass of a call, where it was taken out by mistake: with it, all are there again."""
        aside = self._aside
        assert aside is not None
        named = call.name is not None and not self._slots.of(call.name)  # then that says it
        known = [slot for slot in aside.slots if slot.name == call.name]
        slot = next((slot for slot in reversed(known) if slot.is_for(call)), known[-1] if named and known else None)
        if slot is not None:
            self._aside = None
            self.history[:] = [*aside.history, *_renumbered(self.history, aside.slots, 1)]
            self._slots.put([*aside.slots, *self._slots.all])
            for owner, each, state in aside.states:
                self._states.setdefault(owner, {})[each] = state
        return slot

    def step_at(self, index: int) -> Step:
        """The policy's step; beyond the planned ones a full step, with one warning."""
        step = None if self._steps is None else self._steps.at(index)
        if step is None:
            self._warn(
                "step %d is more than the %s planned steps; it and later ones are computed in full. Pass "
                "optimize(..., num_inference_steps=N) with the number your scheduler runs, or optimize the pipeline "
                "that runs; calibrate, or export an artifact, for that number.",
                index + 1,
                self._steps if self._steps is None else len(self._steps),
            )
            return Step(StepKind.FULL)
        return step

    def _warn(self, message: str, *values: object) -> None:
        """Says it once."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message, *values)


def _renumbered(history: Sequence[Executed], slots: Sequence[Slot], sign: int) -> list[Executed]:
    """The same with pass indices shifted by the number of ``slots`` of their names."""
    shift = Counter(slot.name for slot in slots)
    return [each._replace(pass_index=each.pass_index + sign * shift[each.pass_name]) for each in history]


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
        values = tuple(dict.fromkeys(time for time in times if time is not None))
        if len(values) < 2 or None in times:
            return
        self._known.pop(values[0], None)
        self._known[values[0]] = values
        while len(self._known) > REMEMBERED_LOOPS:
            self._known.pop(next(iter(self._known)), None)

    def starting_at(self, first: float) -> tuple[float, ...]:
        return self._known.get(first, ())


def _viewed(timestep: Array) -> tuple[float, ...]:
    """The timesteps from this one on, where it is a view of all, as ``for t in scheduler.timesteps`` gives."""
    base = getattr(timestep, "_base", None)
    if base is None or base.dim() != 1 or base.numel() < 2 or base.is_inference() or not base.is_contiguous():
        return ()
    return tuple(dict.fromkeys(map(float, base[timestep.storage_offset() - base.storage_offset() :].tolist())))
