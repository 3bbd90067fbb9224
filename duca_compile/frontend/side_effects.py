"""Side effects of forward: found by running the model, followed or refused, and undone after a capture.

What forward creates at its first use stays. What it changes at each call (a counter, collected features) cannot be part
of a graph: submodules that change or read it become one opaque operator each, and capturing undoes the change.
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
from duca_compile.core.once import Once
from duca_compile.core.tensors import version
from duca_compile.errors import CaptureError
from duca_compile.frontend.activations import Activations, is_library, line_of, source_of, storage_key
from duca_compile.frontend.arguments import Containers, Write, check_kinds, check_results, noting, with_other_tensors
from duca_compile.frontend.binder import Call
from duca_compile.frontend.capture import live_tensors, warm
from duca_compile.frontend.compiled_parts import described, wrapped_forward
from duca_compile.frontend.fast_paths import NESTED
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
from duca_compile.frontend.trace_check import MAX_ULPS, copy_containers, hookable_modules, ulp_distance

log = logging.getLogger("duca_compile")

_LOADS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLOSURE"}
_STORES = {"STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_ATTR"}
_ITEM_STORES = {"STORE_SUBSCR", "DELETE_SUBSCR"}
_WRITERS = {  # methods that change a container
    "append", "appendleft", "add", "clear", "extend", "insert", "pop", "popleft", "remove", "setdefault", "update",
}  # fmt: skip
_warned = WeakKeyDictionary[nn.Module, Once]()  # for each model, so that no capture repeats a warning


class Change(NamedTuple):
    """One thing that a run changed: the number of its holder, its key there, and its values before and after."""

    holder: int
    key: object
    before: Any
    after: Any


class ModelState:
    """Everything that a model holds or can reach at one time, to be compared with later and restored."""

    def __init__(self, model: nn.Module) -> None:
        self.holders = [*take(model).holders, *RANDOM]
        self._contents = [content(holder.thing, holder.names) for holder in self.holders]
        things = enumerate(holder.thing for holder in self.holders)
        self._tensors = {i: thing.clone() for i, thing in things if issubclass(type(thing), Tensor)}

    def changes(self) -> list[Change]:
        """What is different now."""
        found = []
        for number, (holder, before) in enumerate(zip(self.holders, self._contents, strict=True)):
            now = content(holder.thing, holder.names)
            if not same_content(now, before):
                keys = [key for key in {**before, **now} if before.get(key, MISSING) is not now.get(key, MISSING)]
                found += [Change(number, key, before.get(key, MISSING), now.get(key, MISSING)) for key in keys]
        return found

    def put_back(self, names: Collection[Name] | None = None) -> None:
        """Restores everything, or the attributes called ``names`` with all that they hold."""
        for number in {change.holder: None for change in self.changes()}:
            holder, before = self.holders[number], self._contents[number]
            if number in self._tensors:
                before = {VALUE: self._tensors[number]}
            if names is None or holder.name in names:
                _restore(holder, before)
            elif holder.name[1] == "" and (keys := [key for path, key in names if path == holder.name[0]]):
                now = content(holder.thing)
                _restore(holder, now | {key: before.get(key, MISSING) for key in keys})

    def name(self, change: Change) -> Name:
        """The attribute of a module that contains the change."""
        path, attribute = self.holders[change.holder].name
        return path, attribute or str(change.key)

    def is_plain(self, change: Change) -> bool:
        """Whether a module's own attribute changed that is a number or another plain value."""
        return not self.holders[change.holder].name[1] and id(type(change.before)) in PLAIN_IDS

    def label(self, change: Change) -> str:
        """Where the change is, such as ``blocks.0.attn.processor.calls``."""
        parts, number, key = list[str](), change.holder, change.key
        while number >= 0:
            holder = self.holders[number]
            is_element = isinstance(key, int) and not holder.named and number == change.holder
            if key is not None and key is not VALUE and not is_element:
                parts.append(f".{key}" if holder.named else f"[{_shown(key)}]")
            if holder.parent < 0 and holder.name[1]:
                parts.append(f".{holder.name[1]}")
            number, key = holder.parent, holder.key
        return (self.holders[change.holder].name[0] + "".join(reversed(parts))).strip(".")

    def identifier(self, change: Change) -> str:
        """The innermost name by which code refers to what changed."""
        number, key = change.holder, change.key
        while number >= 0:
            holder = self.holders[number]
            if holder.named:
                return str(key)
            number, key = holder.parent, holder.key
        return self.holders[change.holder].name[1]

    def tensors(self) -> Iterator[tuple[Tensor, Name]]:
        """All tensors in what can change, with the attributes that hold them."""
        for number, values in enumerate(self._contents):
            if issubclass(type(thing := self.holders[number].thing), Tensor):
                yield thing, self.name(Change(number, VALUE, None, None))
            for key, value in values.items():
                for each in value if type(value) is tuple else (value,):
                    if issubclass(type(each), Tensor):
                        yield each, self.name(Change(number, key, each, each))


def _shown(key: Any) -> str:
    return repr(key[1] if isinstance(key, tuple) else key) if isinstance(key, str | int | tuple) else "..."


def _restore(holder: Holder, values: Mapping[Any, Any]) -> None:
    """Puts these values back into a holder, in place."""
    thing, cls = holder.thing, type(holder.thing)
    if VALUE in values:
        if issubclass(cls, Tensor):
            thing.detach().copy_(values[VALUE])
        elif cls in _RESTORE_STATE:  # an iterator cannot be put back
            _RESTORE_STATE[cls](thing, values[VALUE])
    elif holder.names is not None and issubclass(cls, dict):
        _restore_names(thing, values)
    else:
        restore = next((restore for base, restore in _RESTORE if issubclass(cls, base)), _restore_attributes)
        restore(thing, values)


def _without_missing(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in values.items() if value is not MISSING}


def _restore_names(space: dict[Any, Any], values: Mapping[Any, Any]) -> None:
    kept = _without_missing(values)
    space.update(kept)
    for key in values.keys() - kept.keys():
        space.pop(key, None)


def _restore_dict(thing: dict[Any, Any], values: Mapping[Any, Any]) -> None:
    base: Any = OrderedDict if issubclass(type(thing), OrderedDict) else dict  # which keeps its own order
    base.clear(thing)
    for key, value in _without_missing(values).items():
        base.__setitem__(thing, key, value)


def _restore_class(cls: type, values: Mapping[Any, Any]) -> None:
    for key, value in values.items():
        type.__delattr__(cls, key) if value is MISSING else type.__setattr__(cls, key, value)


def _restore_cell(cell: CellType, values: Mapping[Any, Any]) -> None:
    (cell.cell_contents,) = values.values()


def _restore_variable(variable: ContextVar[Any], values: Mapping[Any, Any]) -> None:
    if values[0] is not MISSING:
        variable.set(values[0])


def _restore_elements(thing: Any, values: Mapping[Any, Any]) -> None:
    thing.clear()
    (thing.extend if issubclass(type(thing), deque) else thing.update)(values.values())


def _restore_attributes(thing: object, values: Mapping[Any, Any]) -> None:
    for key, value in _without_missing(values).items():
        with suppress(AttributeError, TypeError):  # what Python code cannot set was not set by it
            object.__setattr__(thing, key, value)


_RESTORE: tuple[tuple[type | tuple[type, ...], Callable[[Any, Mapping[Any, Any]], object]], ...] = (
    (type, _restore_class),
    (dict, _restore_dict),
    (CellType, _restore_cell),
    (ContextVar, _restore_variable),
    (list, lambda thing, values: list.__setitem__(thing, slice(None), list(values.values()))),
    ((deque, set), _restore_elements),
)
_RESTORE_STATE: dict[type, Callable[[Any, bytes], object]] = {
    RandomNumbers: RandomNumbers.write,
    np.ndarray: lambda array, state: np.copyto(array, np.frombuffer(state, array.dtype).reshape(array.shape)),
    torch.Generator: lambda each, state: each.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    random.Random: lambda each, state: each.setstate(pickle.loads(state)),
    np.random.RandomState: lambda each, state: each.set_state(pickle.loads(state)),
    np.random.Generator: lambda each, state: setattr(each.bit_generator, "state", pickle.loads(state)),
}


@dataclass
class SideEffects:
    """What forward changes at each call of the model, and what follows from it for a capture.

    Attributes:
        results: the leaves of the call's results.
        operators: the paths of submodules that must run as one operator each, with the reasons.
        activations: what was computed from the call's tensors, as far as that could be observed.
        keepers: storages of activations, and the attributes that keep them.
        recurring: attributes that change at each call.
        write_only: those that are plain values and that nothing outside of the operators reads.
        state_before: what the model held before the call.
    """

    results: list[Any]
    operators: dict[str, str] = field(default_factory=dict)
    activations: Activations | None = None
    keepers: dict[int, Name] = field(default_factory=dict)
    recurring: frozenset[Name] = frozenset()
    write_only: frozenset[Name] = frozenset()
    state_before: ModelState | None = None

    def rewind(self) -> None:
        """Undoes what changes at each call, so that the next call repeats the first."""
        if self.state_before is not None and self.recurring:
            self.state_before.put_back(self.recurring)

    def repeated(self, model: nn.Module, call: Call) -> Repeated:
        """The call again, under the settings of torch that hold now."""
        self.rewind()
        return Repeated(warm(model, call.with_arguments(copy_containers(call.arguments))), self)

    def is_in_operator(self, name: Name) -> bool:
        """Whether an attribute belongs to a submodule that runs as one operator."""
        return _is_inside(name[0], self.operators)

    def depends_on_call(self, storage: int) -> bool:
        """Whether what is stored there may have been computed from the call's tensors."""
        return self.activations is None or self.activations.has(storage)

    def check(self, model: nn.Module, captured: CapturedGraph) -> None:
        """Raises CaptureError where an activation of this very call is a constant of the graph."""
        if self.activations is None:
            return
        weights = set(map(id, live_tensors(model).values()))
        for tensor in captured.attributes.values():
            source = None if id(tensor) in weights else self.activations.source(tensor)
            if source is not None and storage_key(tensor) not in self.keepers:
                raise CaptureError(
                    f"{type(model).__name__} keeps an activation of one call, computed at {source}, and reads it in "
                    "the next, so a graph would hold it for ever. What keeps it was not found. Switch that off, or "
                    "pass the value as an argument."
                )


@dataclass
class Repeated:
    """Another run of the same call, which changed the same things."""

    results: list[Any]
    first: SideEffects

    def rewind(self) -> None:
        """Undoes what changes at each call, so that the next call repeats it."""
        self.first.rewind()


@contextmanager
def track_side_effects(
    model: nn.Module, call: Call, known: Mapping[str, str], careful: bool = False
) -> Iterator[SideEffects]:
    """While open, ``model`` may be captured. Afterwards it holds what it held before, and what it made at first use.

    Args:
        known: the submodules that run as one operator in other captures of the model, with the reasons.
        careful: whether to run the model once more, to check that it gives the same results again.

    Raises:
        CaptureError: the model itself reads what it changes at each call, or writes to its arguments.
    """
    before = after = ModelState(model)
    try:
        effects, after = _observe(model, call, before, known, careful)
        yield effects
    except BaseException:
        before.put_back()
        raise
    after.put_back()
    before.put_back(effects.recurring)


def _observe(
    model: nn.Module, call: Call, before: ModelState, known: Mapping[str, str], careful: bool
) -> tuple[SideEffects, ModelState]:
    """The side effects of one call, and what the model holds after it."""
    check_kinds(model, call.arguments)
    effects = _first_run(model, call, before)
    kept = effects.activations.kept(effects.results) if effects.activations else {}
    if not before.changes():
        _warn_of_kept(model, kept, {})
        if careful:
            _check_repeats(model, call, effects, [])
        return effects, before
    after = ModelState(model)
    depends = effects.depends_on_call
    effects.keepers = {key: name for tensor, name in after.tensors() if depends(key := storage_key(tensor))}
    _warn_of_kept(model, kept, effects.keepers)
    attribution = _Attribution(model, after, {before.name(change) for change in before.changes()})
    with attribution:
        later = warm(model, call.with_arguments(with_other_tensors(copy_containers(call.arguments))))
    changes = [change for change in after.changes() if not _equal(change.before, change.after, depends)]
    distance = ulp_distance(effects.results, later)
    _note_recurring(effects, after, changes, attribution.operators(changes, distance > MAX_ULPS))
    _warn_of_operators(model, {path: why for path, why in effects.operators.items() if why is not NESTED})
    made = [change for change in before.changes() if before.name(change) not in effects.recurring]
    names = [(before.name(change), before.identifier(change), before.label(change)) for change in made]
    attribution.check_set(names, {**known, **effects.operators})
    after.put_back()
    if effects.recurring or careful or distance > 0.0:  # else the second run repeated the first
        effects.rewind()
        _check_repeats(model, call, effects, [label for _, _, label in names])
        after.put_back()
    return effects, after


def _first_run(model: nn.Module, call: Call, before: ModelState) -> SideEffects:
    """Runs the model, and observes what depends on the call's tensors where that is possible."""
    activations = Activations(call.tensors)
    try:
        results = _run(model, call, activations)
        compiled = activations.compiled or wrapped_forward(model)
        if compiled is not None:
            _warn(
                model,
                f"{described(compiled)} is compiled by torch.compile. Steps run what it is compiled from: "
                'they equal the model\'s under torch.compiler.set_stance("force_eager"), and can differ from those of '
                "its compiled code in rounding",
            )
        nesting = {path: NESTED for path, module in model.named_modules() if module in activations.nesting}
        return SideEffects(results, nesting, activations=activations, state_before=before)
    except CaptureError:  # perhaps since an operator cannot be observed
        before.put_back()
        return SideEffects(_run(model, call, None), state_before=before)


def _note_recurring(
    effects: SideEffects, after: ModelState, changes: Sequence[Change], operators: dict[str, str]
) -> None:
    """Notes ``changes``, made by a second call to what a first one left, and the operators that follow from them."""
    effects.operators |= operators
    effects.recurring = frozenset(map(after.name, changes))
    effects.keepers = {key: name for key, name in effects.keepers.items() if name not in effects.recurring}
    plain = [after.name(change) for change in changes if after.is_plain(change)]
    effects.write_only = frozenset(name for name in plain if not effects.is_in_operator(name))


def _run(model: nn.Module, call: Call, activations: Activations | None) -> list[Any]:
    """Runs the model with copies of the containers among its arguments; returns the leaves of its results."""
    arguments = copy_containers(call.arguments)
    containers = Containers(arguments)
    results = warm(model, call.with_arguments(arguments), activations)
    if writes := containers.writes():
        places = tuple(write for write, _ in writes)
        raise WritesToArguments(model, call, places, containers.only_filled())
    check_results(model, results)
    return results


def _check_repeats(model: nn.Module, call: Call, effects: SideEffects, made: Sequence[str]) -> None:
    """Raises CaptureError where the same call gives other results, although everything that was found is restored.

    ``made`` are the attributes that were set at first use.
    """

    def repeated() -> list[Any]:
        effects.rewind()
        return warm(model, call.with_arguments(copy_containers(call.arguments)))

    versions = list(map(version, call.tensors))
    results = repeated()
    if ulp_distance(effects.results, results) == 0.0 or versions != list(map(version, call.tensors)):
        return  # a model that writes to its arguments is refused for that reason
    name = type(model).__name__
    if made and ulp_distance(results, repeated()) == 0.0:
        effects.results = results
        _warn(
            model,
            f"forward gives other results at its first call, which sets {made[0]}. Steps give those of its later calls",
        )
        return
    path = _first_that_differs(model, call, effects)
    what = f"{path or f'{name}.forward'} gives"
    if ulp_distance(effects.results, results) <= MAX_ULPS:
        _warn(model, f"{what} results that differ in rounding from call to call, so steps can differ from the model's")
        return
    raise CaptureError(
        f"{what} other results when {name} is called again with the same arguments. They depend on something that is "
        "not an argument, and that was not found where the model can reach it: the time, for example, the environment, "
        "or the state of an object that cannot be inspected. A graph cannot follow that: keep it in an attribute of "
        "the module, as a number or a small tensor, or pass it as an argument."
    )


def _first_that_differs(model: nn.Module, call: Call, effects: SideEffects) -> str:
    """The path of the innermost submodule that returns other results for the same arguments in a second call."""

    def recorded() -> list[tuple[str, Any, Any]]:
        calls: list[tuple[str, Any, Any]] = []

        def recorder(path: str) -> Callable[..., None]:
            def leave(_: nn.Module, args: Any, kwargs: Any, results: Any) -> None:
                calls.append((path, _digest((args, kwargs)), _digest(results)))

            return leave

        with ExitStack() as stack:
            for path, module in hookable_modules(model):
                stack.callback(module.register_forward_hook(recorder(path), with_kwargs=True).remove)
            effects.rewind()
            warm(model, call.with_arguments(copy_containers(call.arguments)))
        return calls

    pairs = zip(recorded(), recorded(), strict=False)
    return next((first[0] for first, second in pairs if first[:2] == second[:2] and first[2] != second[2]), "")


def _digest(values: Any) -> list[Any]:
    """Identifies the values of tensors without keeping them."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return [hash(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()) for tensor in tensors]


class WritesToArguments(Exception):  # noqa: N818 - what it writes can be results
    """Forward writes to a container among its arguments; ``only_fills`` says whether another call's can be filled."""

    def __init__(self, model: nn.Module, call: Call, writes: tuple[Write, ...], only_fills: bool) -> None:
        super().__init__(writes[0].label)
        self.writes, self.only_fills = writes, only_fills
        self._at = model, call, writes[0].label

    def refusal(self) -> CaptureError:
        """What to say where nothing can follow it; runs the model once more."""
        return _refusal(*self._at)


def _refusal(model: nn.Module, call: Call, place: str) -> CaptureError:
    """Runs the model once more, to find the line that writes to an argument."""
    lines: list[str] = []

    def note() -> None:
        lines.append(source_of(sys._getframe(2)))

    with suppress(CaptureError):  # the model may insist on containers of the type that it was given
        warm(model, call.with_arguments({name: noting(value, note) for name, value in call.arguments.items()}))
    where = f" at {lines[0]}" if lines else ""
    return CaptureError(
        f"{type(model).__name__}.forward writes to its argument, {place}{where}. Steps would not do so: return the "
        "value, or collect it with a forward hook on a submodule."
    )


def _warn_of_kept(model: nn.Module, kept: Mapping[int, str], keepers: Collection[int]) -> None:
    others = [source for key, source in kept.items() if key not in keepers]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        _warn(
            model,
            f"something keeps values that are computed from its arguments, at {others[0]}{more}. What keeps them was "
            "not found: steps do not do so, and what was kept remains that of the captured call",
        )


def _warn_of_operators(model: nn.Module, operators: Mapping[str, str]) -> None:
    for path, reason in islice(operators.items(), 1):
        more = f", and {len(operators) - 1} more submodules do the like" if len(operators) > 1 else ""
        _warn(
            model,
            f"{path} {reason}{more}. Each runs as one opaque operator; steps that take its results from caches do not "
            "run it, and change nothing",
        )


def _warn(model: nn.Module, message: str) -> None:
    if _warned.setdefault(model, Once()).first(message):
        log.warning("%s: %s", type(model).__name__, message)


def _equal(one: Any, other: Any, depends: Callable[[int], bool], depth: int = 4) -> bool:
    """Whether replacing one value by the other makes no difference: an equal number, or an equal table."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if id(type(one)) in PLAIN_IDS:
        return bool(one == other) or (one != one and other != other)  # both not a number
    if issubclass(type(one), Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same and not depends(storage_key(one)) and not one.is_meta and torch.equal(one, other)
    if depth and type(one) in (list, tuple) and len(one) == len(other):
        return all(_equal(a, b, depends, depth - 1) for a, b in zip(one, other, strict=True))
    if depth and type(one) is dict and one.keys() == other.keys():
        return all(_equal(one[key], other[key], depends, depth - 1) for key in one)
    return False


class _Attribution:
    """Observes a call, and finds which modules change which attributes, and which code runs in each."""

    def __init__(self, model: nn.Module, state: ModelState, names: Collection[Name]) -> None:
        self._model, self._state = model, state
        self._watched = [i for i, holder in enumerate(state.holders) if self._is_watched(holder, names)]
        self._writers: dict[int, dict[str, None]] = {}
        self._running = [""]
        self._codes: dict[str, dict[int, CodeType]] = {}
        self._last: list[dict[Any, Any]] = []
        self._stack = ExitStack()

    @staticmethod
    def _is_watched(holder: Holder, names: Collection[Name]) -> bool:
        path, attribute = holder.name
        return holder.name in names or (not attribute and any(path == other for other, _ in names))

    def __enter__(self) -> None:
        for path, module in hookable_modules(self._model):
            enter = module.register_forward_pre_hook(self._enter(path), prepend=True)
            leave = module.register_forward_hook(self._leave)
            self._stack.callback(enter.remove)
            self._stack.callback(leave.remove)
        self._running, self._last = [""], self._contents()
        self._stack.callback(sys.setprofile, sys.getprofile())
        sys.setprofile(self._profile)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._note_writers()

    def _contents(self) -> list[dict[Any, Any]]:
        holders = [self._state.holders[number] for number in self._watched]
        return [content(holder.thing, holder.names) for holder in holders]

    def _note_writers(self) -> None:
        """What has changed since the last look was changed by the module that is running."""
        now = self._contents()
        for number, old, new in zip(self._watched, self._last, now, strict=True):
            if not same_content(old, new):
                self._writers.setdefault(number, {})[self._running[-1]] = None
        self._last = now

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._note_writers()
            self._running.append(path)

        return enter

    def _leave(self, *_: object) -> None:
        self._note_writers()
        self._running.pop()

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            self._codes.setdefault(self._running[-1], {})[id(code)] = code

    def operators(self, changes: Collection[Change], results_differ: bool) -> dict[str, str]:
        """The modules that change or read what changes, and why each must be opaque.

        ``results_differ`` says whether the next call gave other results.

        Raises:
            CaptureError: the model itself reads it.
        """
        found: dict[str, str] = {}
        for change in changes:
            identifier = self._state.identifier(change)
            writers = self._writers.get(change.holder) or {self._state.holders[change.holder].name[0]: None}
            line = next(filter(None, (self._line(path, identifier) for path in writers)), None)
            what = f"{self._state.label(change)} at each call{f', at {line}' if line else ''}"
            readers = [path for path in self._codes if self._reads(path, identifier)]
            self._check_model(change, what, writers, readers, results_differ)
            for path in filter(None, dict.fromkeys([*writers, *readers])):
                found.setdefault(path, f"{'changes' if path in writers else 'reads'} {what}")
        return found

    def _check_model(
        self, change: Change, what: str, writers: Collection[str], readers: Sequence[str], results_differ: bool
    ) -> None:
        """Raises CaptureError where the model itself reads the change or nothing can undo it; warns if it writes it."""
        name = type(self._model).__name__
        thing = self._state.holders[change.holder].thing
        if change.key is VALUE and not issubclass(type(thing), (Tensor, *_RESTORE_STATE)):
            raise CaptureError(f"{name} advances an iterator, {what}, which cannot be restored. Count with a number.")
        only_cause = results_differ and not any([*writers, *readers])
        if "" in readers or ("" in writers and (only_cause or issubclass(type(thing), RandomNumbers))):
            raise CaptureError(
                f"{name}.forward changes {what}, and reads it, so no graph can be specialized to it. Keep it outside "
                "of the model and pass it as an argument, or move what reads and changes it to a submodule, which then "
                "runs as one opaque operator."
            )
        if "" in writers:
            _warn(self._model, f"forward changes {what}, and does not read it. Steps do not change it")

    def check_set(self, made: Collection[tuple[Name, str, str]], operators: Collection[str]) -> None:
        """Raises CaptureError where code outside of the operators sets something inside of one: no step would do so.

        ``made`` has the name, identifier and label of each attribute that the first call set.
        """
        outside = [path for path in self._codes if not _is_inside(path, operators)]
        for (path, _), identifier, label in made if operators else ():
            line = next(filter(None, (self._line(each, identifier) for each in outside)), None)
            if line is not None and _is_inside(path, operators):
                raise CaptureError(
                    f"{type(self._model).__name__}.forward sets {label}, at {line}, for a submodule that runs as "
                    "one opaque operator, since its state changes at each call. Pass it there as an argument."
                )

    def _line(self, path: str, identifier: str) -> str | None:
        """Where the code that runs in a module writes to this name."""
        lines = [use for code in self._user_codes(path) for use in _uses(code, identifier) if use.writes]
        return lines[0].where if lines else None

    def _reads(self, path: str, identifier: str) -> bool:
        """Whether the code that runs in a module reads this name on a line that does not write to it."""
        uses = [use for code in self._user_codes(path) for use in _uses(code, identifier)]
        written = {use.where for use in uses if use.writes}
        return any(use.where not in written for use in uses)

    def _user_codes(self, path: str) -> list[CodeType]:
        return [code for code in self._codes.get(path, {}).values() if not is_library(code.co_filename)]


def _is_inside(path: str, operators: Collection[str]) -> bool:
    return any(path == each or path.startswith(f"{each}.") for each in operators)


class _Use(NamedTuple):
    where: str
    writes: bool


def _uses(code: CodeType, identifier: str) -> list[_Use]:
    """The lines of code that name an attribute or a variable, and whether each writes to it or to what it holds."""
    if identifier not in code.co_names and identifier not in code.co_freevars and identifier not in code.co_cellvars:
        return []
    lines: dict[int, list[dis.Instruction]] = {}
    line = code.co_firstlineno
    for each in dis.get_instructions(code):
        line = each.starts_line if each.starts_line is not None else line
        lines.setdefault(line, []).append(each)
    found = []
    for number, instructions in lines.items():
        named = [each for each in instructions if each.argval == identifier and each.opname in _LOADS | _STORES]
        if named:
            stores = any(each.opname in _STORES for each in named)
            fills = any(each.opname in _ITEM_STORES or each.argval in _WRITERS for each in instructions)
            found.append(_Use(line_of(code.co_filename, number), stores or fills))
    return found
