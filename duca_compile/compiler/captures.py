"""The captures of one model: reused while the model is unchanged, made again where it is not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple

from torch import nn

from duca_compile.compiler.compiled import REMEMBERED, Compiled
from duca_compile.compiler.differences import differences
from duca_compile.core.lock import COMPILING
from duca_compile.core.once import Once
from duca_compile.frontend.binder import Call, Key
from duca_compile.frontend.capture import live_tensors
from duca_compile.frontend.snapshot import Name, Snapshot, Structure, Watch, take

log = logging.getLogger("duca_compile")

MAX_CAPTURES = 4  # captures kept for one state of the model; the least recently used is evicted
MAX_IN_ALL = 8  # captures kept for all its states: each guidance pass of a step may have a state, as guiders' do
MAX_CHANGES = 3  # requests in a row that find the model changed, after which a warning says so
Kind = tuple[Hashable, int]  # a call's key, and a number that tells apart calls for which forward reads other values


class _Recent(NamedTuple):
    """What the last call found."""

    key: Hashable = None
    structure: Structure | None = None
    compiled: Compiled | None = None


class CaptureCache:
    """Keeps captures, each for one kind of call and one state of the model, at most ``MAX_CAPTURES`` for each state.

    ``capture`` makes one, given the submodules that are opaque in the others, with the reasons. What capturing
    itself changes on the model, such as tables made at first use, invalidates nothing. Where a change of the model
    turns out to leave the graph as it was, nothing is compiled; and if a plain value that forward itself changes was
    the only difference, it is ignored from then on.
    """

    def __init__(self, model: nn.Module, capture: Callable[[Call, Mapping[str, str]], Compiled]) -> None:
        self._model, self._capture = model, capture
        self._kept: dict[tuple[Kind, Structure], Compiled] = {}
        self._now: Snapshot | None = None  # the model as it was last seen
        self._watch: Watch | None = None  # notices what changes after that
        self.touched = False  # whether a caller was given a part of the model, and may have changed it
        self._unwatched = 0  # calls since the last quick check
        self._logged = Once()
        self._last: dict[Key, Structure] = {}  # by kind of call: the model as it was last captured
        self._changed_by_forward: set[Name] = set()
        self._ignored: frozenset[Name] = frozenset()  # attributes that make no difference
        self._changes = 0  # captures in a row that were caused by a change of the model
        self._evicted = dict[tuple[Hashable, Structure], None]()  # kinds of call whose captures were evicted
        self._just_captured = False  # whether the last lookup ended in a capture
        self._calls = count(1)
        self._recent = _Recent()
        self._lock = threading.RLock()  # taken before COMPILING, never after
        self._capturing = False  # whether a thread is capturing

    def values(self) -> Collection[Compiled]:
        return self._kept.values()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, call: Call) -> Compiled:
        """The capture for ``call``, going by the last snapshot of the model and by its current weights.

        Raises what capturing raises.
        """
        now = self._now
        if now is None or not now.weights.seem_unchanged():
            return self.find_revalidated(call)
        watch = self._watch
        if self.touched or watch is None or watch.is_due():
            if self._changed():
                return self._find_after_change(call, now.structure)
        else:
            self._unwatched += 1
        key, structure, compiled = self._recent
        known = compiled is not None and key is call.key and structure is now.structure
        if compiled is None or not known or not compiled.guards_hold(call.tensors):
            compiled = self._get(call, now.structure) or self.find_revalidated(call)
            self._recent = _Recent(call.key, now.structure, compiled)
        compiled.used = next(self._calls)
        return compiled

    def _changed(self) -> bool:
        """Whether the model has changed since the last snapshot.

        Never while another thread captures it, which sets some attributes and restores them.
        """
        watch = self._watch
        if watch is None or self._capturing:
            return False
        self.touched = False
        if watch.changed():
            return True
        self._unwatched = 0
        return False

    def _find_after_change(self, call: Call, before: Structure) -> Compiled:
        """The capture, where something was changed since the last call, which may or may not make a difference."""
        started, unwatched, self._unwatched = perf_counter(), self._unwatched, 0
        compiled = self.find_revalidated(call)
        now, watch = self._now, self._watch
        if now is None or watch is None:
            return compiled
        if now.structure is before:
            watch.back_off(perf_counter() - started)  # a false alarm; some recur at each call
        elif unwatched:
            log.warning(
                "%s has changed (%s), perhaps up to %d calls ago: those ran without the change. Change it through the "
                "optimized model, or call reset() after the change, to have it noticed at once",
                type(self._model).__name__,
                _listed(now.structure.differences(before)[:3]),
                unwatched,
            )
        return compiled

    def find_revalidated(self, call: Call) -> Compiled:
        """Like ``find``, after a new snapshot of the model; for the start of a request."""
        with self._lock:
            self._recent = _Recent()  # its capture may be dropped
            now = self._look()
            compiled = self._get(call, now.structure, anew=True)
            if compiled is not None and not self._just_captured:
                self._changes = 0
            self._just_captured = False
            compiled = compiled or self._make(call, now)
            compiled.used = next(self._calls)
            return compiled

    def _get(self, call: Call, structure: Structure, anew: bool = False) -> Compiled | None:
        for number in range(MAX_CAPTURES):
            compiled = self._kept.get(((call.key, number), structure))
            if compiled is not None and compiled.guards_hold(call.tensors, anew):
                return compiled
        return None

    def _look(self) -> Snapshot:
        """A new snapshot of the model. Captures that are still valid get its new tensors in place of the old ones."""
        seen = take(self._model, self._ignored, self._opaque())
        if seen.weights.traced():
            with COMPILING:
                seen = take(self._model, self._ignored, self._opaque())
        known = (structure for _, structure in self._kept if structure == seen.structure)
        now = replace(seen, structure=next(known, seen.structure))
        before, self._now = self._now, now
        self._watch, self.touched = Watch(now), False
        self._log_over_budget(now)
        if before is not None and (before.structure != now.structure or not before.weights.same(now.weights)):
            self._update_weights(now)
        return now

    def _log_over_budget(self, now: Snapshot) -> None:
        if now.over_budget and self._logged.first("over budget"):
            log.info(
                "%s holds too much in %s to inspect: it is compared by identity, and changes inside are not noticed",
                type(self._model).__name__,
                _listed(now.over_budget[:5]),
            )

    def _opaque(self) -> frozenset[str]:
        """Paths of the opaque submodules, whose state is part of no capture."""
        return frozenset(site.path for compiled in self._kept.values() for site in compiled.captured.opaque)

    def forget(self, compiled: Compiled) -> None:
        """Drops a capture."""
        with self._lock:
            self._kept = {key: each for key, each in self._kept.items() if each is not compiled}
            self._recent = _Recent()

    def _update_weights(self, now: Snapshot) -> None:
        """Captures of other states are kept, in case these return, unless they alone keep weights alive."""
        live = live_tensors(self._model)
        known = set(map(id, live.values()))
        for key, compiled in list(self._kept.items()):
            if key[1] == now.structure:
                compiled.rebind(live)
            elif compiled.holds_other_weights(known):
                del self._kept[key]
                log.info("dropping a capture: %s no longer holds its weights", type(self._model).__name__)

    def _make(self, call: Call, before: Snapshot) -> Compiled:
        self._log_reason(call, before.structure)
        self._warn_of_evictions(call, before.structure)
        compiled = self._captured(call, before.structure)
        self._drop_without_opaque(compiled, before.structure)
        if write_only := compiled.captured.write_only:
            self._ignore(write_only)
            before = replace(before, structure=before.structure.without(write_only))
        now = self._look()
        changed = now.structure.differences(before.structure)
        if changed:
            self._changed_by_forward.update(changed)
            self._replace(before.structure, now.structure)
        self._last.pop(call.key, None)
        self._last[call.key] = now.structure
        _trim(self._last)
        same = [key for key, other in self._kept.items() if key[0][0] == call.key and other.same_graph(compiled)]
        if same:
            self._kept[same[0]].add_guards(compiled.captured.guards)
            return self._reuse(same[0], before, now)
        self._evict(now.structure)
        numbers = {kind[1] for kind, structure in self._kept if kind[0] == call.key and structure == now.structure}
        self._kept[(call.key, min({*range(MAX_CAPTURES)} - numbers)), now.structure] = compiled
        if compiled.captured.opaque:  # from now on the state of these submodules is ignored, which is no change
            self._replace(now.structure, self._look().structure)
        return compiled

    def _captured(self, call: Call, structure: Structure) -> Compiled:
        self._capturing = True
        started = perf_counter()
        try:
            compiled = self._capture(call, self._operators(structure))
        finally:
            self._capturing = False
        log.info("captured %s in %.1f s: %s", type(self._model).__name__, perf_counter() - started, compiled.summary())
        self._just_captured = True
        return compiled

    def _evict(self, structure: Structure) -> None:
        """Drops the least recently used captures, of this state of the model or of all, where there are too many."""
        for most, keys in (
            (MAX_CAPTURES, [key for key in self._kept if key[1] == structure]),
            (MAX_IN_ALL, [*self._kept]),
        ):
            by_use = sorted((key for key in keys if key in self._kept), key=lambda each: self._kept[each].used)
            for key in by_use[: max(0, len(by_use) + 1 - most)]:
                del self._kept[key]
                self._evicted[key[0][0], key[1]] = None
                log.info("dropping the least recently used of %d captured shapes", most)
        _trim(self._evicted)

    def _operators(self, structure: Structure) -> dict[str, str]:
        """The opaque submodules in the captures of this state of the model, with the reasons."""
        kept = [compiled.captured.opaque for (_, known), compiled in self._kept.items() if known == structure]
        return {site.path: site.reason for sites in kept for site in sites}

    def _drop_without_opaque(self, compiled: Compiled, structure: Structure) -> None:
        """Drops the captures that contain what turned out to change at each call."""
        paths = {site.path for site in compiled.captured.opaque}
        for key, other in list(self._kept.items()):
            more = paths - {site.path for site in other.captured.opaque}
            if key[1] == structure and more:
                del self._kept[key]
                log.info("dropping a capture that is specialized to what changes in %s", ", ".join(sorted(more)))

    def _reuse(self, key: tuple[Kind, Structure], before: Snapshot, now: Snapshot) -> Compiled:
        """An earlier capture whose graph turned out to fit the current model as well."""
        log.info("the graph is the same as before, so nothing is compiled")
        compiled = self._kept.pop(key)
        compiled.rebind(live_tensors(self._model))
        self._kept[key[0], now.structure] = compiled
        changed = set(key[1].differences(before.structure))
        plain = {name for name in changed if before.structure.is_plain(name)}
        if changed <= self._changed_by_forward and plain:
            self._ignore(plain)
            self._look()
        return compiled

    def _ignore(self, names: Collection[Name]) -> None:
        """From now on these attributes make no difference."""
        self._ignored = self._ignored.union(names)
        self._map_structures(lambda structure: structure.without(names))

    def _replace(self, old: Structure, new: Structure) -> None:
        self._map_structures(lambda structure: new if structure == old else structure)

    def _map_structures(self, new: Callable[[Structure], Structure]) -> None:
        """Replaces the structures in all keys; equal ones become one object, which compares at once."""
        unique = dict[Structure, Structure]()

        def renewed(structure: Structure) -> Structure:
            changed = new(structure)
            return unique.setdefault(changed, changed)

        self._kept = {(call, renewed(structure)): compiled for (call, structure), compiled in self._kept.items()}
        self._last = {call: renewed(structure) for call, structure in self._last.items()}
        self._evicted = {(call, renewed(structure)): None for call, structure in self._evicted}

    def _warn_of_evictions(self, call: Call, now: Structure) -> None:
        """Warns once where a kind of call comes again whose capture was evicted."""
        if (call.key, now) in self._evicted and self._logged.first("evictions"):
            log.warning(
                "%s is called with more combinations of shapes, types, options and values that it reads than the %d "
                "captures that are kept, so evicted ones are captured and compiled again and again, which takes long. "
                "Pad to fewer shapes, run calls of the same kind one after another, or call a copy for some of the "
                "kinds (copy.copy(optimized), which shares the weights)",
                type(self._model).__name__,
                MAX_CAPTURES,
            )

    def _log_reason(self, call: Call, now: Structure) -> None:
        """Logs why a capture is made, and warns where the model keeps changing."""
        name, last = type(self._model).__name__, self._last.get(call.key)
        if last is None or last == now:
            if self._last and log.isEnabledFor(logging.INFO):
                log.info(
                    "new shapes, types, options or values that it reads in the call (%s): capturing %s anew",
                    self._difference(call, now),
                    name,
                )
            return
        first, *more = sorted(last.differences(now), key=self._changed_by_forward.__contains__)
        changed = _listed([first]) + (f" and {len(more)} more" if more else "")
        log.info("changed weights, modules or attributes (%s): capturing %s anew", changed, name)
        self._changes += 1
        if self._changes == MAX_CHANGES:
            log.warning(
                "%s has changed before each of the last %d captures (now %s), each of which takes long; set it once "
                "before the loop, or make it an argument of forward",
                name,
                MAX_CHANGES,
                changed,
            )

    def _difference(self, call: Call, now: Structure) -> str:
        """What is new in a call that finds no capture although the model is unchanged."""
        if call.key not in self._last:
            found = min((differences(call.key, known) for known in self._last), key=len)
            return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        if (call.key, now) in self._evicted:
            return "its capture was evicted"
        known = [compiled for (kind, _), compiled in self._kept.items() if kind[0] == call.key]
        read = sorted({name for compiled in known for name in compiled.captured.guarded_inputs})
        return f"other values of {', '.join(read)}" if read else "its capture was dropped"


def _listed(names: Iterable[Name]) -> str:
    return ", ".join(f"{path}.{name}".strip(".") for path, name in names)


def _trim(remembered: dict[Any, Any]) -> None:
    """Forgets the oldest entries beyond ``REMEMBERED``."""
    while len(remembered) > REMEMBERED:
        del remembered[next(iter(remembered))]
