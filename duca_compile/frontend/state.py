"""What forward changes by itself: found by running it, followed or refused, and put back behind a capture.

What it makes at first use stays. What it changes at each call (a counter, collected features) no graph can hold: the
submodules that change or read it run as they are, as one operator each, and capturing leaves it as it was.
"""

from __future__ import annotations

import dis
import logging
import pickle
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from types import CellType, CodeType, FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from duca_compile.core.ir import CapturedGraph
from duca_compile.core.tensors import version
from duca_compile.errors import CaptureError
from duca_compile.frontend.activations import Activations, is_library, line_of, source_of, storage_key
from duca_compile.frontend.arguments import Containers, check_kinds, check_results, noting, with_other_tensors
from duca_compile.frontend.binder import Call
from duca_compile.frontend.capture import live_tensors, warm
from duca_compile.frontend.reproduce import ROUNDING, apart, copied, hookable
from duca_compile.frontend.snapshot import (
    MISSING,
    PLAIN_IDS,
    RANDOM,
    VALUE,
    Holder,
    Name,
    RandomNumbers,
    content,
    same_content,
    take,
)

log = logging.getLogger("duca_compile")

_LOADS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLOSURE"}
_STORES = {"STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_ATTR"}
_WRITERS = {  # methods that change a container
    "append", "appendleft", "add", "clear", "extend", "insert", "pop", "popleft", "remove", "setdefault", "update",
}  # fmt: skip


class Change(NamedTuple):
    """One thing that a run changed: where it is, what it was and what it is."""

    holder: int
    key: object
    before: Any
    after: Any


class Held:
    """What a model and all that it can reach hold at one time, to be compared with later and put back."""

    def __init__(self, model: nn.Module) -> None:
        self.holders = [*take(model).holders, *RANDOM]
        self._contents = [content(holder.thing, holder.names) for holder in self.holders]
        things = enumerate(holder.thing for holder in self.holders)
        self._tensors = {i: thing.clone() for i, thing in things if issubclass(type(thing), Tensor)}

    def changes(self) -> list[Change]:
        found = []
        for number, (holder, before) in enumerate(zip(self.holders, self._contents, strict=True)):
            now = content(holder.thing, holder.names)
            if not same_content(now, before):
                keys = [key for key in {**before, **now} if before.get(key, MISSING) is not now.get(key, MISSING)]
                found += [Change(number, key, before.get(key, MISSING), now.get(key, MISSING)) for key in keys]
        return found

    def put_back(self, names: Collection[Name] | None = None) -> None:
        """Everything, or the attributes called ``names`` with all that is in them."""
        for number in {change.holder: None for change in self.changes()}:
            holder, before = self.holders[number], self._contents[number]
            if number in self._tensors:
                before = {VALUE: self._tensors[number]}
            if names is None or holder.name in names:
                _put(holder, before)
            elif holder.name[1] == "" and (own := [key for path, key in names if path == holder.name[0]]):
                now = content(holder.thing)
                _put(holder, now | {key: before.get(key, MISSING) for key in own})

    def name(self, change: Change) -> Name:
        """The attribute of a module that the change is in."""
        path, attribute = self.holders[change.holder].name
        return path, attribute or str(change.key)

    def is_plain(self, change: Change) -> bool:
        """Whether it is of a number or the like that is a module's own attribute."""
        return not self.holders[change.holder].name[1] and id(type(change.before)) in PLAIN_IDS

    def label(self, change: Change) -> str:
        """Such as ``blocks.0.attn.processor.calls``."""
        parts, number, key = list[str](), change.holder, change.key
        while number >= 0:
            holder = self.holders[number]
            if (
                key is not None
                and key is not VALUE
                and not (isinstance(key, int) and not holder.named and number == change.holder)
            ):
                parts.append(f".{key}" if holder.named else f"[{_shown(key)}]")
            if holder.within < 0 and holder.name[1]:
                parts.append(f".{holder.name[1]}")
            number, key = holder.within, holder.key
        return (self.holders[change.holder].name[0] + "".join(reversed(parts))).strip(".")

    def word(self, change: Change) -> str:
        """The innermost name by which code gets at it."""
        number, key = change.holder, change.key
        while number >= 0:
            holder = self.holders[number]
            if holder.named:
                return str(key)
            number, key = holder.within, holder.key
        return self.holders[change.holder].name[1]

    def tensors(self) -> Iterator[tuple[Tensor, Name]]:
        """All tensors in what can change, and the attributes that they are in."""
        for number, values in enumerate(self._contents):
            if issubclass(type(thing := self.holders[number].thing), Tensor):
                yield thing, self.name(Change(number, VALUE, None, None))
            for key, value in values.items():
                for each in value if type(value) is tuple else (value,):
                    if issubclass(type(each), Tensor):
                        yield each, self.name(Change(number, key, each, each))


def _shown(key: Any) -> str:
    return repr(key[1] if isinstance(key, tuple) else key) if isinstance(key, str | int | tuple) else "..."


def _put(holder: Holder, values: Mapping[Any, Any]) -> None:
    """Makes a holder hold these again, in place."""
    thing: Any = holder.thing
    cls = type(thing)
    kept = {key: value for key, value in values.items() if value is not MISSING}
    if issubclass(cls, Tensor):
        thing.detach().copy_(values[VALUE])
    elif issubclass(cls, RandomNumbers):
        thing.write(values[VALUE])
    elif issubclass(cls, np.ndarray):
        thing[...] = np.frombuffer(values[VALUE], thing.dtype).reshape(thing.shape)
    elif cls is ContextVar:
        if values[0] is not MISSING:
            thing.set(values[0])
    elif cls in _DRAWN:
        _DRAWN[cls](thing, values[VALUE])
    elif VALUE in values:
        pass  # an iterator, which cannot be put back
    elif issubclass(cls, type):
        for key, value in values.items():
            type.__delattr__(thing, key) if value is MISSING else type.__setattr__(thing, key, value)
    elif issubclass(cls, dict) and holder.names is not None:
        thing.update(kept)
        for key in values.keys() - kept.keys():
            thing.pop(key, None)
    elif issubclass(cls, dict):
        own: Any = OrderedDict if issubclass(cls, OrderedDict) else dict  # which keeps an order of its own
        own.clear(thing)
        for key, value in kept.items():
            own.__setitem__(thing, key, value)
    elif issubclass(cls, CellType):
        (thing.cell_contents,) = values.values()
    elif issubclass(cls, list):
        list.__setitem__(thing, slice(None), list(values.values()))
    elif issubclass(cls, deque | set):
        thing.clear()
        (thing.extend if issubclass(cls, deque) else thing.update)(values.values())
    else:
        for key, value in kept.items():
            with suppress(AttributeError, TypeError):  # what cannot be set was not set by Python code
                object.__setattr__(thing, key, value)


_DRAWN: dict[type, Callable[[Any, bytes], object]] = {
    torch.Generator: lambda each, state: each.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    random.Random: lambda each, state: each.setstate(pickle.loads(state)),
    np.random.RandomState: lambda each, state: each.set_state(pickle.loads(state)),
    np.random.Generator: lambda each, state: setattr(each.bit_generator, "state", pickle.loads(state)),
}


@dataclass
class Own:
    """What forward changes at each call of the model, and what is to be done about it.

    ``results`` are those of the call. ``operators`` gives the paths of the submodules that must run as one operator
    each, and why.
    """

    results: list[Any]
    operators: dict[str, str] = field(default_factory=dict)
    activations: Activations | None = None
    attributed: dict[int, Name] = field(default_factory=dict)  # storages of activations, and what keeps them
    running: frozenset[Name] = frozenset()  # attributes that change with each call
    unread: frozenset[Name] = frozenset()  # those that are plain values of modules that do not run as they are
    held: Held | None = None  # what the model held before the call

    def again(self) -> None:
        """Puts back what changes with each call, so that the next one is like the first."""
        if self.held is not None and self.running:
            self.held.put_back(self.running)

    def holds(self, held: Held, change: Change) -> bool:
        """Whether a change is in what runs as one operator."""
        return _is_in(held.name(change)[0], self.operators)

    def depends(self, key: int) -> bool:
        """Whether what is stored there was computed of the call's tensors, as far as that is known."""
        return self.activations is None or self.activations.has(key)

    def check(self, model: nn.Module, captured: CapturedGraph) -> None:
        """Raises CaptureError where an activation of this very call is built into the graph."""
        if self.activations is None:
            return
        weights = set(map(id, live_tensors(model).values()))
        for tensor in captured.attributes.values():
            source = None if id(tensor) in weights else self.activations.source(tensor)
            if source is not None and storage_key(tensor) not in self.attributed:
                raise CaptureError(
                    f"{type(model).__name__} keeps an activation of one call, made at {source}, and reads it in the "
                    "next, so that a graph would hold it for ever. What keeps it was not found. Switch it off, or pass "
                    "the value as an argument."
                )


@contextmanager
def followed(model: nn.Module, call: Call, known: Mapping[str, str], careful: bool = False) -> Iterator[Own]:
    """While open, ``model`` may be captured. Behind it, the model holds what it held, and what it made at first use.

    ``known`` are submodules that run as one operator in other calls. To be ``careful`` takes one more run, which has to
    give the same results.

    Raises:
        CaptureError: the model itself changes at each call what it reads, or writes into its arguments.
    """
    before = after = Held(model)
    try:
        own, after = _observed(model, call, before, known, careful)
        yield own
    except BaseException:
        before.put_back()
        raise
    after.put_back()
    before.put_back(own.running)


def _observed(model: nn.Module, call: Call, before: Held, known: Mapping[str, str], careful: bool) -> tuple[Own, Held]:
    check_kinds(model, call.arguments)
    activations: Activations | None = Activations(call.tensors)
    try:
        results = _run(model, call, activations)
    except CaptureError:  # for want of an operator that can be looked at, perhaps
        before.put_back()
        activations = None
        results = _run(model, call, None)
    own = Own(results, activations=activations, held=before)
    kept = activations.kept(results) if activations else {}
    if not before.changes():
        _warn_of_kept(model, kept, {})
        if careful:
            _check_repeats(model, call, own, [])
        return own, before
    after = Held(model)
    own.attributed = {key: label for tensor, label in after.tensors() if own.depends(key := storage_key(tensor))}
    _warn_of_kept(model, kept, own.attributed)
    blame = _Blame(model, after, {before.name(change) for change in before.changes()})
    other = call.with_arguments(with_other_tensors(copied(call.arguments)))
    with blame:
        later = warm(model, other)
    changes = [change for change in after.changes() if not _alike(change.before, change.after, own.depends)]
    own.running = frozenset(map(after.name, changes))
    own.attributed = {key: name for key, name in own.attributed.items() if name not in own.running}
    own.operators = blame.operators(changes, apart(results, later) > ROUNDING)
    own.unread = frozenset(after.name(each) for each in changes if after.is_plain(each) and not own.holds(after, each))
    made = [(before.name(change), before.word(change), before.label(change)) for change in before.changes()]
    blame.check_set([each for each in made if each[0] not in own.running], {**known, **own.operators})
    _warn_of_operators(model, own.operators)
    after.put_back()
    if own.running or careful or apart(results, later) > 0.0:  # else the second run was a repetition
        own.again()
        _check_repeats(model, call, own, [label for name, _, label in made if name not in own.running])
        after.put_back()
    return own, after


def _run(model: nn.Module, call: Call, activations: Activations | None) -> list[Any]:
    """Runs the model with containers of its own; returns the leaves of its results."""
    given = copied(call.arguments)
    containers = Containers(given)
    results = warm(model, call.with_arguments(given), activations)
    if (place := containers.written()) is not None:
        raise _refusal(model, call, place)
    check_results(model, results)
    return results


def _check_repeats(model: nn.Module, call: Call, own: Own, made: Sequence[str]) -> None:
    """Raises CaptureError where the same call gives other results, though all that was found is as it was.

    ``made`` are the attributes that were set at first use.
    """

    def again() -> list[Any]:
        own.again()
        return warm(model, call.with_arguments(copied(call.arguments)))

    versions = list(map(version, call.tensors))
    found = again()
    if apart(own.results, found) == 0.0 or versions != list(map(version, call.tensors)):
        return  # what writes to its arguments is refused for that
    name = type(model).__name__
    if made and apart(found, again()) == 0.0:
        own.results = found
        _warn(
            model,
            f"forward gives other results at its first call, which sets {made[0]}. Steps give those of its later calls",
        )
        return
    where = _first_that_differs(model, call, own)
    what = f"{where or f'{name}.forward'} gives"
    if apart(own.results, found) <= ROUNDING:
        _warn(model, f"{what} results that differ in rounding from call to call, so steps can differ from the model's")
        return
    raise CaptureError(
        f"{what} other results when {name} is called again with the same arguments. It goes by something that is no "
        "argument, and that was not found where the model can reach it: the time, say, the environment, or state in "
        "an object that cannot be looked into. A graph cannot follow that: keep it in an attribute of the module, as a "
        "number or a small tensor, or pass it as an argument."
    )


def _first_that_differs(model: nn.Module, call: Call, own: Own) -> str:
    """The path of the innermost submodule that returns other results of the same arguments in a second call."""

    def recorded() -> list[tuple[str, Any, Any]]:
        found: list[tuple[str, Any, Any]] = []

        def note(path: str) -> Callable[..., None]:
            def leave(_: nn.Module, args: Any, kwargs: Any, results: Any) -> None:
                found.append((path, _digest((args, kwargs)), _digest(results)))

            return leave

        with ExitStack() as stack:
            for path, module in hookable(model):
                stack.callback(module.register_forward_hook(note(path), with_kwargs=True).remove)
            own.again()
            warm(model, call.with_arguments(copied(call.arguments)))
        return found

    pairs = zip(recorded(), recorded(), strict=False)
    return next((one[0] for one, other in pairs if one[:2] == other[:2] and one[2] != other[2]), "")


def _digest(values: Any) -> list[Any]:
    """What tells tensors from others, without keeping them."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return [hash(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()) for tensor in tensors]


def _refusal(model: nn.Module, call: Call, place: str) -> CaptureError:
    """Runs once more to find who puts something into an argument."""
    lines: list[str] = []

    def note() -> None:
        lines.append(source_of(sys._getframe(2)))

    with suppress(CaptureError):  # it may want containers of the very kind that it was given
        warm(model, call.with_arguments({name: noting(value, note) for name, value in call.arguments.items()}))
    where = f" at {lines[0]}" if lines else ""
    return CaptureError(
        f"{type(model).__name__}.forward writes into its argument, {place}{where}. Steps would not do so: return the "
        "value, or collect it by a forward hook on a submodule."
    )


def _warn_of_kept(model: nn.Module, kept: Mapping[int, str], attributed: Collection[int]) -> None:
    others = [source for key, source in kept.items() if key not in attributed]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        _warn(
            model,
            f"something keeps values that it computes of its arguments, made at {others[0]}{more}. What keeps them was "
            "not found: steps do not do so, and what was kept stays that of the call that was captured",
        )


def _warn_of_operators(model: nn.Module, operators: Mapping[str, str]) -> None:
    for path, reason in islice(operators.items(), 1):
        more = f", and {len(operators) - 1} more submodules do so" if len(operators) > 1 else ""
        _warn(
            model,
            f"{path} {reason}{more}. What does so runs as it is, as one operator; steps that take its results from "
            "caches do not run it, and change nothing",
        )


_SAID = WeakKeyDictionary[nn.Module, set[str]]()  # what was said of a model, so that each capture does not say it again


def _warn(model: nn.Module, message: str) -> None:
    said = _SAID.setdefault(model, set())
    if message not in said:
        said.add(message)
        log.warning("%s: %s", type(model).__name__, message)


def _alike(one: Any, other: Any, depends: Callable[[int], bool], depth: int = 4) -> bool:
    """Whether a value that was replaced makes no difference: an equal number, or an equal table."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if id(type(one)) in PLAIN_IDS:
        return bool(one == other) or (one != one and other != other)  # not a number, both
    if issubclass(type(one), Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same and not depends(storage_key(one)) and not one.is_meta and torch.equal(one, other)
    if depth and type(one) in (list, tuple) and len(one) == len(other):
        return all(_alike(a, b, depends, depth - 1) for a, b in zip(one, other, strict=True))
    if depth and type(one) is dict and one.keys() == other.keys():
        return all(_alike(one[key], other[key], depends, depth - 1) for key in one)
    return False


class _Blame:
    """Runs beside a call, and finds which modules change what, and which code runs in each."""

    def __init__(self, model: nn.Module, held: Held, names: Collection[Name]) -> None:
        self._model, self._held = model, held
        self._watched = [i for i, holder in enumerate(held.holders) if self._counts(holder, names)]
        self._writers: dict[int, dict[str, None]] = {}
        self._running = [""]
        self._codes: dict[str, dict[int, CodeType]] = {}
        self._last: list[dict[Any, Any]] = []
        self._stack = ExitStack()

    @staticmethod
    def _counts(holder: Holder, names: Collection[Name]) -> bool:
        path, attribute = holder.name
        return holder.name in names or (not attribute and any(path == other for other, _ in names))

    def __enter__(self) -> None:
        for path, module in hookable(self._model):
            enter = module.register_forward_pre_hook(self._enter(path), prepend=True)
            leave = module.register_forward_hook(self._leave)
            self._stack.callback(enter.remove)
            self._stack.callback(leave.remove)
        self._running, self._last = [""], self._now()
        self._stack.callback(sys.setprofile, sys.getprofile())
        sys.setprofile(self._profile)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._look()

    def _now(self) -> list[dict[Any, Any]]:
        holders = [self._held.holders[number] for number in self._watched]
        return [content(holder.thing, holder.names) for holder in holders]

    def _look(self) -> None:
        now = self._now()
        for number, old, new in zip(self._watched, self._last, now, strict=True):
            if not same_content(old, new):
                self._writers.setdefault(number, {})[self._running[-1]] = None
        self._last = now

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._look()
            self._running.append(path)

        return enter

    def _leave(self, *_: object) -> None:
        self._look()
        self._running.pop()

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            self._codes.setdefault(self._running[-1], {})[id(code)] = code

    def operators(self, changes: Collection[Change], moved: bool) -> dict[str, str]:
        """The modules that change or read what changes, and why each must run as it is.

        ``moved`` is whether the results of the next call were others.

        Raises:
            CaptureError: the model itself reads it.
        """
        found: dict[str, str] = {}
        for change in changes:
            label, word = self._held.label(change), self._held.word(change)
            writers = self._writers.get(change.holder) or {self._held.holders[change.holder].name[0]: None}
            line = next(filter(None, (self._line(path, word) for path in writers)), None)
            what = f"{label} at each call{f', at {line}' if line else ''}"
            readers = [path for path in self._codes if self._reads(path, word)]
            thing = self._held.holders[change.holder].thing
            if change.key is VALUE and not issubclass(type(thing), (Tensor, np.ndarray, RandomNumbers, *_DRAWN)):
                raise CaptureError(
                    f"{type(self._model).__name__} advances an iterator, {what}, which cannot be put back. Count by a "
                    "number."
                )
            alone = moved and not any([*writers, *readers])  # then nothing else can be the reason
            if "" in readers or ("" in writers and (alone or issubclass(type(thing), RandomNumbers))):
                raise CaptureError(
                    f"{type(self._model).__name__}.forward changes {what}, and reads it, so no graph can hold what "
                    "follows. Keep it outside of the model and pass it as an argument, or move what reads and "
                    "changes it to a submodule, which then runs as it is, as one operator."
                )
            if "" in writers:
                _warn(
                    self._model, f"forward changes {what}, and does not read it. Steps do not do so: it stays as it was"
                )
            for path in filter(None, dict.fromkeys([*writers, *readers])):
                found.setdefault(path, f"{'changes' if path in writers else 'reads'} {what}")
        return found

    def check_set(self, made: Collection[tuple[Name, str, str]], operators: Collection[str]) -> None:
        """Raises CaptureError where code outside of what runs as it is sets something in there: no step would."""
        outside = [path for path in self._codes if not _is_in(path, operators)]
        for (path, _), word, label in made if operators else ():
            line = next(filter(None, (self._line(each, word) for each in outside)), None)
            if line is not None and _is_in(path, operators):
                raise CaptureError(
                    f"{type(self._model).__name__}.forward sets {label}, at {line}, for a submodule that runs as it "
                    "is, as one operator, since it keeps what changes with each call. Pass it to that as an argument."
                )

    def _line(self, path: str, word: str) -> str | None:
        """Where the code that runs in a module writes to what is called so."""
        lines = [each for code in self._own_codes(path) for each in _uses(code, word) if each.writes]
        return lines[0].where if lines else None

    def _reads(self, path: str, word: str) -> bool:
        """Whether the code that runs in a module reads what is called so on a line that does not write to it."""
        uses = [each for code in self._own_codes(path) for each in _uses(code, word)]
        written = {each.where for each in uses if each.writes}
        return any(each.where not in written for each in uses)

    def _own_codes(self, path: str) -> list[CodeType]:
        return [code for code in self._codes.get(path, {}).values() if not is_library(code.co_filename)]


def _is_in(path: str, operators: Collection[str]) -> bool:
    return any(path == each or path.startswith(f"{each}.") for each in operators)


class _Use(NamedTuple):
    where: str
    writes: bool


def _uses(code: CodeType, word: str) -> list[_Use]:
    """The lines of code that name an attribute or a variable, and whether each writes to it or to what it holds."""
    if word not in code.co_names and word not in code.co_freevars and word not in code.co_cellvars:
        return []
    lines: dict[int, list[dis.Instruction]] = {}
    line = code.co_firstlineno
    for each in dis.get_instructions(code):
        line = each.starts_line if each.starts_line is not None else line
        lines.setdefault(line, []).append(each)
    found = []
    for number, own in lines.items():
        named = [each for each in own if each.argval == word and each.opname in _LOADS | _STORES]
        if named:
            stores = any(each.opname in _STORES for each in named)
            fills = any(each.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") or each.argval in _WRITERS for each in own)
            found.append(_Use(line_of(code.co_filename, number), stores or fills))
    return found
