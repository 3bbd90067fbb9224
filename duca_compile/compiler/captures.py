"""The captures of one model: found again while the model is what it was, made anew where it is not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import NamedTuple

from torch import nn

from duca_compile.compiler.compiled import REMEMBERED, Compiled
from duca_compile.compiler.differences import differences
from duca_compile.core.lock import COMPILING
from duca_compile.frontend.binder import Call, Key
from duca_compile.frontend.capture import live_tensors
from duca_compile.frontend.snapshot import Name, Snapshot, Structure, Watch, take

log = logging.getLogger("duca_compile")

MAX_CAPTURES = 4  # shapes kept compiled at a time for one state of the model; the least recently used one goes first
MAX_IN_ALL = 8  # for all its states: passes of one step may each have one, as guiders' do
RESTLESS = 3  # requests in a row that find the model changed, after which a warning says so
Kind = tuple[Hashable, int]  # a call's key, and a number where forward reads other values


class _Recent(NamedTuple):
    """What the last call found."""

    key: Hashable = None
    structure: Structure | None = None
    compiled: Compiled | None = None


class Captures:
    """Keeps captures, each for one kind of call and one state of the model, ``MAX_CAPTURES`` for each state at most.

    ``capture`` makes one, given the submodules that run as they are in others, and why. What capturing itself changes
    on the model, such as tables made at first use, is no change: the captures of before still hold. Where a change
    turns out to leave the graph as it was, nothing is compiled; a number or the like that forward itself changes and
    that left the graph as it was is no longer looked at.
    """

    def __init__(self, model: nn.Module, capture: Callable[[Call, Mapping[str, str]], Compiled]) -> None:
        self._model, self._capture = model, capture
        self._kept: dict[tuple[Kind, Structure], Compiled] = {}
        self._now: Snapshot | None = None  # the model as it was last seen
        self._watch: Watch | None = None  # for what is done to it since
        self.touched = False  # whether somebody was given a part of the model, and may have changed it
        self._unwatched = 0  # calls since the last quick look
        self._said = False  # whether the log has what is too large to be looked at
        self._last: dict[Key, Structure] = {}  # by kind of call: the model as it was last captured
        self._own: set[Name] = set()  # attributes that forward changes
        self._unread: frozenset[Name] = frozenset()  # those of them that make no difference
        self._changes = 0  # captures in a row that a change of the model asked for
        self._dropped = dict[tuple[Hashable, Structure], None]()  # kinds of call whose captures made way for others
        self._crowded = False  # whether it was said that there are too many kinds
        self._captured_now = False  # whether the last look ended in one
        self._calls = count(1)
        self._recent = _Recent()
        self._lock = threading.RLock()  # taken before COMPILING, never after
        self._making = False  # whether a thread is capturing

    def values(self) -> Collection[Compiled]:
        return self._kept.values()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, call: Call) -> Compiled:
        """The capture for ``call``, by what was last seen of the model and by its weights of now.

        Raises what capturing raises.
        """
        now = self._now
        if now is None or not now.weights.seem_kept():
            return self.find_anew(call)
        watch = self._watch
        if self.touched or watch is None or watch.due():
            if self._stirred():
                return self._find_stirred(call, now.structure)
        else:
            self._unwatched += 1
        key, structure, compiled = self._recent
        known = compiled is not None and key is call.key and structure is now.structure
        if compiled is None or not known or not compiled.holds(call.tensors):
            compiled = self._get(call, now.structure) or self.find_anew(call)
            self._recent = _Recent(call.key, now.structure, compiled)
        compiled.used = next(self._calls)
        return compiled

    def _stirred(self) -> bool:
        """Whether anything was done to what the model holds.

        Not while it is captured, by another thread, which sets and puts back some of it.
        """
        watch = self._watch
        if watch is None or self._making:
            return False
        self.touched = False
        if watch.stirred():
            return True
        self._unwatched = 0
        return False

    def _find_stirred(self, call: Call, before: Structure) -> Compiled:
        """Something was done to the model since the last call, which may or may not make a difference."""
        started, unwatched, self._unwatched = perf_counter(), self._unwatched, 0
        compiled = self.find_anew(call)
        now, watch = self._now, self._watch
        if now is None or watch is None:
            return compiled
        if now.structure is before:
            watch.wait(perf_counter() - started)  # a false alarm; some are raised at each call
        elif unwatched:
            names = ", ".join(f"{path}.{name}".strip(".") for path, name in now.structure.differences(before)[:3])
            log.warning(
                "%s has changed (%s), perhaps up to %d calls ago: those ran as before. Change it through the optimized "
                "model, or call reset() behind the change, to have it noticed at once",
                type(self._model).__name__,
                names,
                unwatched,
            )
        return compiled

    def find_anew(self, call: Call) -> Compiled:
        """The same, after a look at the whole model: for the start of a request."""
        with self._lock:
            self._recent = _Recent()  # captures may be dropped
            now = self._look()
            compiled = self._get(call, now.structure, anew=True)
            if compiled is not None and not self._captured_now:
                self._changes = 0
            self._captured_now = False
            return self._used(compiled or self._make(call, now))

    def _get(self, call: Call, structure: Structure, anew: bool = False) -> Compiled | None:
        for number in range(MAX_CAPTURES):
            compiled = self._kept.get(((call.key, number), structure))
            if compiled is not None and compiled.holds(call.tensors, anew):
                return compiled
        return None

    def _used(self, compiled: Compiled) -> Compiled:
        compiled.used = next(self._calls)
        return compiled

    def _look(self) -> Snapshot:
        """The model as it is now; its new tensors take the places of the old ones in the captures that still hold."""
        seen = take(self._model, self._unread, self._live())
        if seen.weights.traced():
            with COMPILING:
                seen = take(self._model, self._unread, self._live())
        known = (structure for _, structure in self._kept if structure == seen.structure)
        now = replace(seen, structure=next(known, seen.structure))
        before, self._now = self._now, now
        self._watch, self.touched = Watch(now), False
        self._say_beyond(now)
        if before is not None and (before.structure != now.structure or not before.weights.same(now.weights)):
            self._settle(now)
        return now

    def _say_beyond(self, now: Snapshot) -> None:
        if now.beyond and not self._said:
            self._said = True
            names = ", ".join(f"{path}.{name}".strip(".") for path, name in now.beyond[:5])
            log.info(
                "%s holds much in %s: it is known by its identity, and what changes inside is not noticed",
                type(self._model).__name__,
                names,
            )

    def _live(self) -> frozenset[str]:
        """Paths of the submodules that run as they are: what they hold is not built into any capture."""
        return frozenset(site.path for compiled in self._kept.values() for site in compiled.captured.opaque)

    def forget(self, compiled: Compiled) -> None:
        """Drops a capture."""
        with self._lock:
            self._kept = {key: each for key, each in self._kept.items() if each is not compiled}
            self._recent = _Recent()

    def _settle(self, now: Snapshot) -> None:
        """Captures of other states are kept for a return to these, but not where they alone keep weights alive."""
        live = live_tensors(self._model)
        known = set(map(id, live.values()))
        for key, compiled in list(self._kept.items()):
            if key[1] == now.structure:
                compiled.rebind(live)
            elif compiled.holds_others(known):
                del self._kept[key]
                log.info("dropping a capture: %s no longer holds its weights", type(self._model).__name__)

    def _make(self, call: Call, before: Snapshot) -> Compiled:
        self._tell(call, before.structure)
        self._tell_crowded(call, before.structure)
        self._making = True
        started = perf_counter()
        try:
            compiled = self._capture(call, self._operators(before.structure))
        finally:
            self._making = False
        log.info("captured %s in %.1f s: %s", type(self._model).__name__, perf_counter() - started, compiled.summary())
        self._captured_now = True
        self._drop_without(compiled, before.structure)
        if unread := compiled.captured.unread:
            self._leave_out(unread)
            before = replace(before, structure=before.structure.without(unread))
        now = self._look()
        own = now.structure.differences(before.structure)
        if own:
            self._own.update(own)
            self._replace(before.structure, now.structure)
        self._last.pop(call.key, None)
        self._last[call.key] = now.structure
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]
        alike = [key for key, other in self._kept.items() if key[0][0] == call.key and other.same_graph(compiled)]
        if alike:
            self._kept[alike[0]].holds_too(compiled.captured.readings)
            return self._keep(alike[0], before, now)
        self._make_room(now.structure)
        numbers = {kind[1] for kind, structure in self._kept if kind[0] == call.key and structure == now.structure}
        self._kept[(call.key, min({*range(MAX_CAPTURES)} - numbers)), now.structure] = compiled
        if compiled.captured.opaque:  # what these submodules hold is looked at no longer: that is no change
            self._replace(now.structure, self._look().structure)
        return compiled

    def _make_room(self, structure: Structure) -> None:
        """Drops what was used least recently, of this state of the model or of all, where there are too many."""
        for most, keys in (
            (MAX_CAPTURES, [key for key in self._kept if key[1] == structure]),
            (MAX_IN_ALL, [*self._kept]),
        ):
            by_use = sorted((key for key in keys if key in self._kept), key=lambda each: self._kept[each].used)
            for key in by_use[: max(0, len(by_use) + 1 - most)]:
                del self._kept[key]
                self._dropped[key[0][0], key[1]] = None
                log.info("dropping the least recently used of %d captured shapes", most)
        while len(self._dropped) > REMEMBERED:
            del self._dropped[next(iter(self._dropped))]

    def _operators(self, structure: Structure) -> dict[str, str]:
        """The submodules that run as they are in the captures of this state of the model, and why."""
        kept = [compiled.captured.opaque for (_, known), compiled in self._kept.items() if known == structure]
        return {site.path: site.reason for sites in kept for site in sites}

    def _drop_without(self, compiled: Compiled, structure: Structure) -> None:
        """Drops the captures that have built in what turned out to change."""
        paths = {site.path for site in compiled.captured.opaque}
        for key, other in list(self._kept.items()):
            more = paths - {site.path for site in other.captured.opaque}
            if key[1] == structure and more:
                del self._kept[key]
                log.info("dropping a capture that has built in what changes in %s", ", ".join(sorted(more)))

    def _keep(self, key: tuple[Kind, Structure], before: Snapshot, now: Snapshot) -> Compiled:
        """An earlier capture whose graph turned out to be that of the model as it is now."""
        log.info("its graph is that of before, so nothing is compiled")
        compiled = self._kept.pop(key)
        compiled.rebind(live_tensors(self._model))
        self._kept[key[0], now.structure] = compiled
        changed = set(key[1].differences(before.structure))
        unread = {name for name in changed if before.structure.is_plain(name)}
        if changed <= self._own and unread:
            self._leave_out(unread)
            self._look()
        return compiled

    def _leave_out(self, names: Collection[Name]) -> None:
        """These attributes make no difference from now on."""
        self._unread = self._unread.union(names)
        self._restate(lambda structure: structure.without(names))

    def _replace(self, old: Structure, new: Structure) -> None:
        self._restate(lambda structure: new if structure == old else structure)

    def _restate(self, new: Callable[[Structure], Structure]) -> None:
        """Replaces the structures that captures are known by; equal ones stay one object, which compares at once."""
        one = dict[Structure, Structure]()

        def renewed(structure: Structure) -> Structure:
            changed = new(structure)
            return one.setdefault(changed, changed)

        self._kept = {(call, renewed(structure)): compiled for (call, structure), compiled in self._kept.items()}
        self._last = {call: renewed(structure) for call, structure in self._last.items()}
        self._dropped = {(call, renewed(structure)): None for call, structure in self._dropped}

    def _tell_crowded(self, call: Call, now: Structure) -> None:
        """Warns once where a kind of call comes again whose capture has made way for others."""
        if self._crowded or (call.key, now) not in self._dropped:
            return
        self._crowded = True
        log.warning(
            "%s is called with more kinds of shapes, types, options or values that it reads than the %d captures that "
            "are kept, so the same are captured and compiled again and again, which takes long. Pad to fewer shapes, "
            "run calls of the same kind one after another, or call a copy for some of the kinds (copy.copy(optimized), "
            "which shares the weights)",
            type(self._model).__name__,
            MAX_CAPTURES,
        )

    def _tell(self, call: Call, now: Structure) -> None:
        """Says why a capture is made, and warns where the model keeps changing."""
        name, last = type(self._model).__name__, self._last.get(call.key)
        if last is None or last == now:
            if self._last and log.isEnabledFor(logging.INFO):
                log.info(
                    "new shapes, types, options or values that it reads in the call (%s): capturing %s anew",
                    self._difference(call, now),
                    name,
                )
            return
        (path, attribute), *more = sorted(last.differences(now), key=self._own.__contains__)
        changed = f"{path}.{attribute}".strip(".") + (f" and {len(more)} more" if more else "")
        log.info("changed weights, modules or attributes (%s): capturing %s anew", changed, name)
        self._changes += 1
        if self._changes == RESTLESS:
            log.warning(
                "%s has changed before each of the last %d captures (now %s), and each takes long; set it once before "
                "the loop, or make it an argument of forward",
                name,
                RESTLESS,
                changed,
            )

    def _difference(self, call: Call, now: Structure) -> str:
        """What is new in a call that finds no capture, though the model is what it was."""
        if call.key not in self._last:
            found = min((differences(call.key, known) for known in self._last), key=len)
            return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        if (call.key, now) in self._dropped:
            return "its capture made way for others"
        known = [compiled for (kind, _), compiled in self._kept.items() if kind[0] == call.key]
        read = sorted({name for compiled in known for name in compiled.captured.given})
        return f"other values of {', '.join(read)}" if read else "its capture was dropped"
