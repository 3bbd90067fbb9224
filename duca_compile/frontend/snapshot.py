"""What forward reads besides its arguments: the module tree, its weights, and every Python value it can reach.

A capture is valid for as long as all of this stays unchanged. Walking all of it takes milliseconds, so that happens
once per request, and whenever a quick check (``Watch``) finds that something was set. Whether the first weight is still
the same object, with the same dtype and device, is checked at every call.

Foreign objects are inspected without running any of their code, and within a budget: Python modules, classes and
containers that hold too much are compared by identity.
"""

from __future__ import annotations

import dis
import functools
import itertools
import pickle
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from operator import is_
from threading import local
from time import perf_counter
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.backends import mha
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from duca_compile.core.tensors import version
from duca_compile.frontend.capture import inner_tensors
from duca_compile.frontend.fast_paths import FAST_MODULES
from duca_compile.frontend.offloading import hook_settings

Name = tuple[str, str]  # a module's path, and an attribute of it
Entry = Any  # hashable; to mypy a class is not
ATTRIBUTE_BUDGET = 2000  # values inspected within one attribute; one that holds more is compared by identity
TOTAL_BUDGET = 100_000  # the same for a whole model
VARIABLE_BUDGET = 500  # the same for one variable of a Python module that functions name
SMALL = 2**16  # elements of tensors that forward may use as counters
ARRAY_BYTES = 4096  # numpy arrays of up to this size are compared by value
WATCH_BACKOFF = 50  # the quick check waits this many times its own duration, so it takes at most 2 % of the time
_PLAIN = {str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device}
_HOOKS = {name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))}
_BOOKKEEPING = vars(nn.Module()).keys() - _HOOKS - {"_parameters", "_buffers", "_modules", "training"}
_DIFFUSERS_HOOKS = "_diffusers_hook"  # diffusers' list of hooks; forward holds those that run
_GLOBAL_HOOKS = [name for name in ("_global_forward_pre_hooks", "_global_forward_hooks") if hasattr(torch_module, name)]
_MACHINERY = {"logging", "threading", "concurrent", "asyncio", "multiprocessing", "queue", "weakref"}  # not state
_LIBRARY = {  # packages whose classes and functions keep no state that forward reads
    "abc", "accelerate", "builtins", "collections", "diffusers", "enum", "functools", "huggingface_hub", "numpy",
    "peft", "torch", "transformers", "types", "typing",
}  # fmt: skip
PLAIN_IDS = frozenset(map(id, _PLAIN))  # by id, since a class may have a metaclass with its own hash
_GLOBAL_IDS = PLAIN_IDS | frozenset(map(id, (dict, list, set, deque)))
_VERSION: Callable[[Any], Any] | None = getattr(torch._C._dynamo.guards, "dict_version", None)
MISSING: Any = type("Missing", (), {})()
VALUE: Any = type("Value", (), {})()  # the only key of a holder whose state is compared as bytes


class Structure:
    """Everything that is built into a capture, by name. Weights count by kind: others of the same kind fit as well."""

    def __init__(self, entries: Mapping[Name, Entry]) -> None:
        self._entries = entries

    @functools.cached_property
    def _hash(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._entries == other._entries)

    def differences(self, other: Structure) -> list[Name]:
        """The names that only one of them has, or whose entries differ."""
        names = self._entries.keys() | other._entries.keys()
        return sorted(n for n in names if self._entries.get(n, MISSING) != other._entries.get(n, MISSING))

    def is_plain(self, name: Name) -> bool:
        """Whether ``name`` is a number, a string or another plain value."""
        entry = self._entries.get(name)
        return isinstance(entry, tuple) and entry[0] in _PLAIN

    def without(self, names: Iterable[Name]) -> Structure:
        """A copy that leaves out ``names``."""
        left_out = frozenset(names)
        return Structure({name: entry for name, entry in self._entries.items() if name not in left_out})


@dataclass(frozen=True)
class _WeightEntry:
    """A parameter or buffer as it was seen, and the module's table that holds it."""

    table: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    dtype: torch.dtype
    device: torch.device

    def is_unchanged(self) -> bool:
        now = self.table.get(self.name)
        same = now is self.tensor and now.dtype is self.dtype and now.device == self.device
        return same or _are_fakes((now,))


@dataclass(frozen=True)
class Weights:
    """All parameters and buffers of a model, and where the first of each is held."""

    tensors: tuple[Tensor, ...]
    firsts: tuple[_WeightEntry, ...]

    def seem_unchanged(self) -> bool:
        """Whether the first parameter and the first buffer are the same objects, with the same dtype and device.

        What is done to a whole model, such as ``to()``, reaches these too (buffers are replaced by it), and checking
        all weights would take longer than a skip step. They count as unchanged while another thread traces the model,
        which replaces them for a while.
        """
        for first in self.firsts:  # noqa: SIM110 - a generator is slower, and this runs at every call
            if not first.is_unchanged():
                return False
        return True

    def traced(self) -> bool:
        """Whether these are the fake tensors that torch.export puts in place of the weights while it traces."""
        return _are_fakes(self.tensors)

    def same(self, other: Weights) -> bool:
        """Whether both hold the same objects."""
        return len(self.tensors) == len(other.tensors) and all(map(is_, self.tensors, other.tensors))


class Holder(NamedTuple):
    """Something that can change: a dictionary, list, tensor or closure cell, or some names of a namespace.

    ``parent`` is the number of the holder that contains it, and ``key`` its key there; -1 where ``name`` says it all.
    """

    thing: Any
    name: Name
    parent: int
    key: object
    named: bool = False  # whether its keys are names in code: of attributes, or of variables
    names: tuple[str, ...] | None = None  # of a namespace or a class: the names that count


@dataclass(frozen=True)
class Snapshot:
    """A model at one time. ``over_budget`` names the attributes that hold too much to be inspected."""

    structure: Structure
    weights: Weights
    holders: Sequence[Holder]
    hooks: Sequence[Mapping[Any, Any]]  # the empty tables of hooks
    over_budget: Sequence[Name]


def take(model: nn.Module, without: frozenset[Name] = frozenset(), opaque: frozenset[str] = frozenset()) -> Snapshot:
    """A snapshot of ``model``, without the attributes named by ``without``.

    Of the opaque modules, at the paths ``opaque``, only the hooks and the types of attributes count.
    """
    walk = _Walk(opaque)
    walk.tree(model)
    entries = walk.entries
    for name in without & entries.keys():
        del entries[name]
    weights = Weights(tuple(walk.tensors), tuple(walk.firsts.values()))
    return Snapshot(Structure(entries), weights, walk.holders, walk.hooks, walk.over_budget)


class Watch:
    """A quick check of everything that a snapshot inspected: whether anything was set, added or removed since.

    A change that it finds may make no difference. One that it does not find did not happen, except to values that
    snapshots compare by identity. It takes some 80 microseconds for 1300 modules, so it runs again after
    ``WATCH_BACKOFF`` times its duration; at once where a hook was registered, or one that was there was removed.
    """

    def __init__(self, seen: Snapshot) -> None:
        spaces = [each for each in seen.holders if each.names is not None and type(each.thing) is not CellType]
        self._spaces = [(each.thing, each.names, content(each.thing, each.names)) for each in spaces]
        things = [each.thing for each in seen.holders if each.names is None or type(each.thing) is CellType]
        things = [thing for thing in things if not issubclass(type(thing), Tensor)]  # graphs read these anyway
        self._tables = [thing for thing in things if issubclass(type(thing), dict)]
        self._lists = [(thing, tuple(thing)) for thing in things if type(thing) is list]
        rest = [thing for thing in things if not issubclass(type(thing), dict) and type(thing) is not list]
        self._rest = [(thing, content(thing)) for thing in rest]
        self._hooks, self._handles = seen.hooks, RemovableHandle.next_id
        hooked = [each.thing for each in seen.holders if each.name[1] in _HOOKS and each.parent < 0]
        self._hooked = [(table, len(table)) for table in hooked if issubclass(type(table), dict)]
        self._versions = self._current_versions()
        started = perf_counter()
        self._changed()
        self._cost, self._next = perf_counter() - started, 0.0

    def is_due(self) -> bool:
        """Whether it is time for the next check."""
        if perf_counter() >= self._next or RemovableHandle.next_id != self._handles:
            return True
        return bool(self._hooked) and any(len(table) != count for table, count in self._hooked)

    def changed(self) -> bool:
        """Whether anything has changed; schedules the next check."""
        started = perf_counter()
        found = self._changed()
        now = perf_counter()
        self._cost = min(self._cost, now - started)  # a longer run was interrupted by something else
        self._next = now + WATCH_BACKOFF * self._cost
        return found

    def back_off(self, seconds: float) -> None:
        """Postpones the next check until ``seconds``, the cost of a false alarm, are a small part of the time."""
        self._next = perf_counter() + WATCH_BACKOFF * seconds

    def _current_versions(self) -> list[Any]:
        if _VERSION is not None:
            return [*map(_VERSION, self._tables)]
        return [tuple(map(id, table.values())) for table in self._tables]

    def _changed(self) -> bool:
        if self._current_versions() != self._versions:
            return True
        if RemovableHandle.next_id != self._handles:  # a hook was registered, though perhaps on another model
            self._handles = RemovableHandle.next_id
            if any(self._hooks):
                return True
        if any(len(thing) != len(known) or not all(map(is_, thing, known)) for thing, known in self._lists):
            return True
        if any(not same_content(content(thing), known) for thing, known in self._rest):
            return True
        return any(not same_content(content(thing, names), known) for thing, names, known in self._spaces)


def content(thing: Any, names: tuple[str, ...] | None = None) -> dict[Any, Any]:
    """What a holder holds now, by key, position or name. Nothing of it is compared."""
    cls = type(thing)  # ``__class__`` would be the foreign object's answer
    if issubclass(cls, type):
        return {name: type.__getattribute__(thing, "__dict__").get(name, MISSING) for name in names or ()}
    if issubclass(cls, dict):
        return _items(thing) if names is None else {name: dict.get(thing, name, MISSING) for name in names}
    if issubclass(cls, CellType):
        return {names[0] if names else 0: cell_value(thing)}
    for base, read in _CONTENTS:
        if issubclass(cls, base):
            return read(thing)
    if cls in _STATE:
        return {VALUE: _STATE[cls](thing)}
    return {name: _slot(thing, name) for name in _slots(cls)}


def _items(thing: dict[Any, Any]) -> dict[Any, Any]:
    try:
        return dict.copy(thing) if type(thing) is dict else dict(dict.items(thing))
    except Exception:  # a foreign key that cannot be hashed again
        return {}


_CONTENTS: tuple[tuple[type, Callable[[Any], dict[Any, Any]]], ...] = (
    (list, lambda thing: dict(enumerate(list.__iter__(thing)))),
    (deque, lambda thing: dict(enumerate(deque.__iter__(thing)))),
    (Tensor, lambda thing: {VALUE: str(version(thing)).encode()}),
    (set, lambda thing: {id(each): each for each in set.__iter__(thing)}),
    (ContextVar, lambda thing: {0: thing.get(MISSING)}),
)


class RandomNumbers:
    """The global random state of Python or numpy."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self._get, self._put = get, put

    def read(self) -> bytes:
        return pickle.dumps(self._get())

    def write(self, state: bytes) -> None:
        self._put(pickle.loads(state))


RANDOM = (
    Holder(RandomNumbers(random.getstate, random.setstate), ("", "random numbers of Python"), -1, None),
    Holder(RandomNumbers(np.random.get_state, np.random.set_state), ("", "random numbers of numpy"), -1, None),
)
_STATE: dict[type, Callable[[Any], bytes]] = {
    np.ndarray: lambda array: array.tobytes(),
    torch.Generator: lambda generator: generator.get_state().numpy().tobytes(),
    random.Random: lambda source: pickle.dumps(source.getstate()),
    np.random.RandomState: lambda source: pickle.dumps(source.get_state()),
    np.random.Generator: lambda source: pickle.dumps(source.bit_generator.state),
    itertools.count: lambda counter: repr(counter).encode(),
    GeneratorType: lambda generator: _progress(generator),
    RandomNumbers: RandomNumbers.read,
}
_ITERATORS: tuple[Iterator[Any], ...] = (iter([]), iter(()), iter(range(0)), iter({}), iter(""))
_STATE |= {type(each): lambda iterator: str(iterator.__length_hint__()).encode() for each in _ITERATORS}


def _progress(generator: GeneratorType[Any, Any, Any]) -> bytes:
    """How far a generator has run, as far as its position in the code and its plain local values tell."""
    frame = generator.gi_frame
    if frame is None:
        return b"done"
    plain_classes = [(name, each) for name, each in frame.f_locals.items() if type(type(each)) is type]
    known = [(name, _STATE[type(each)](each)) for name, each in plain_classes if type(each) in _STATE]
    plain = [(name, each) for name, each in frame.f_locals.items() if id(type(each)) in PLAIN_IDS]
    return repr((frame.f_lasti, known, plain)).encode()


def cell_value(cell: CellType) -> Any:
    """The value of a closure's variable, or ``MISSING`` before it is assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _same_key(one: Any, other: Any) -> bool:
    """Compares without running code of a foreign key."""
    return one is other or (type(one) is type(other) is int and bool(one == other))


def same_content(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether two results of ``content`` hold the same objects under the same keys, or the same bytes."""
    if len(one) == len(other) and all(map(is_, one.values(), other.values())):
        return all(map(_same_key, one, other))
    return VALUE in one and one == other


def _are_fakes(tensors: Iterable[object]) -> bool:
    return any(isinstance(tensor, FakeTensor | FunctionalTensor) for tensor in tensors)


@dataclass(frozen=True)
class _Identity:
    """Stands for an object that is compared by identity, and keeps it alive, so that its address is not reused."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _OverBudget(Exception):  # noqa: N818 - not an error: the attribute is compared by identity
    """An attribute holds more than is inspected."""


class _Walk:
    """Turns what it visits into values that can be compared. Shared objects are numbered in order of visit."""

    def __init__(self, opaque: frozenset[str]) -> None:
        self.entries: dict[Name, Entry] = {}
        self.tensors: list[Tensor] = []
        self.firsts: dict[str, _WeightEntry] = {}
        self.holders: list[Holder] = []
        self.hooks: list[Mapping[Any, Any]] = []
        self.over_budget: list[Name] = []
        self._opaque = opaque
        self._numbers: dict[
            int, tuple[Name, int]
        ] = {}  # by id; numbers start anew in each attribute, so that one does not affect another
        self._weight_numbers: dict[int, int] = {}
        self._module_numbers: dict[int, int] = {}
        self._open: set[int] = set()  # containers being inspected: one may contain itself
        self._classes: set[type] = set()
        self._forwards: set[type] = set()  # classes of modules whose forward is noted
        self._looks: dict[int, Callable[[Any], Entry] | None] = {}
        self._name: Name = ("", "")
        self._parent, self._key = -1, object()
        self._left = self._total = self._count = 0
        self._tables: dict[str, Callable[[str, str, Any, int], None]] = {
            "_parameters": self._weights,
            "_buffers": self._weights,
            "_modules": self._children,
            **dict.fromkeys(_HOOKS, self._hook_table),
            **dict.fromkeys((*_BOOKKEEPING, _DIFFUSERS_HOOKS), lambda *_: None),
        }

    def tree(self, model: nn.Module) -> None:
        self._total = TOTAL_BUDGET
        modules = [*_named_modules(model)]
        self._module_numbers = {id(module): number for number, (_, module) in enumerate(modules)}
        for name in _GLOBAL_HOOKS:
            table = getattr(torch_module, name)
            if all(map(_is_of_torch, table.values())):
                self.hooks.append(table)
            else:
                self._hook_table("", name, table, -1)
        self._functional()
        for path, module in modules:
            if self._opaque and any(path == each or path.startswith(f"{each}.") for each in self._opaque):
                self._opaque_module(path, module)
            else:
                self._module(path, module)

    def _functional(self) -> None:
        """The functions of torch.nn.functional: attention libraries have users put their own in the place of one."""
        space, path = vars(functional), functional.__name__
        self.holders.append(Holder(space, (path, ""), -1, None, True))
        for name, value in space.items():
            if callable(value):
                self.entries[path, name] = _Identity(value)

    def _fast_path(self, cls: type) -> None:
        """The setting that decides which path PyTorch's own attention modules take."""
        name, path = "_is_fastpath_enabled", mha.__name__
        if issubclass(cls, FAST_MODULES) and (path, name) not in self.entries:
            self.holders.append(Holder(vars(mha), (path, ""), -1, None, True, (name,)))
            self.entries[path, name] = bool, mha.get_fastpath_enabled()

    def _module(self, path: str, module: nn.Module) -> None:
        entries, attributes, parent, cls = self.entries, vars(module), len(self.holders), type(module)
        self.holders.append(Holder(attributes, (path, ""), -1, None, True))
        entries[path, ""] = cls
        for name, value in tuple(attributes.items()):
            table = self._tables.get(name)
            if table is not None:
                if value:
                    table(path, name, value, parent)
                elif name in _HOOKS and isinstance(value, dict):
                    self.hooks.append(value)
            elif id(type(value)) in PLAIN_IDS:
                entries[path, name] = type(value), value
            elif name != "forward" or not _is_own_forward(module, value):
                self._attribute((path, name), value, parent, name)
        if cls not in self._forwards:
            self._fast_path(cls)
            self._forward_of(path, cls)
        if cls not in self._classes:
            self._attribute((path, cls.__name__), cls, parent, None, self._class)

    def _opaque_module(self, path: str, module: nn.Module) -> None:
        """An opaque module, or one inside of it."""
        entries, cls = self.entries, type(module)
        entries[path, ""] = _Identity(module) if path in self._opaque else cls
        for name, value in tuple(vars(module).items()):
            if name not in self._tables:
                if self._look_at(type(value)) == self._object:
                    entries[path, name] = type(value)
            elif name in ("_parameters", "_buffers"):
                for key, tensor in tuple((value or {}).items()):
                    self._weight(tensor)
                    self._weight_found(name, value, key, tensor)
            elif name in _HOOKS and value:
                entries[path, name] = tuple(map(_Identity, value.values()))
        if cls not in self._forwards:
            self._forward_of(path, cls)

    def _forward_of(self, path: str, cls: type) -> None:
        """A patch may replace the forward of a class."""
        self._forwards.add(cls)
        owner = next((each for each in cls.__mro__ if "forward" in vars(each)), None)
        if owner is not None:
            self.holders.append(Holder(owner, (path, cls.__name__), -1, None, True, ("forward",)))
            self.entries[path, f"{cls.__name__}.forward"] = _Identity(vars(owner)["forward"])

    def _hook_table(self, path: str, name: str, table: Any, parent: int) -> None:
        self._attribute((path, name), table, -1, None)

    def _children(self, path: str, name: str, modules: dict[str, nn.Module | None], parent: int) -> None:
        self.holders.append(Holder(modules, (path, name), parent, None))
        for key, child in tuple(modules.items()):
            self.entries[path, key] = None if child is None else self._module_numbers.get(id(child))

    def _weights(self, path: str, table: str, tensors: dict[str, Tensor | None], parent: int) -> None:
        for key, tensor in tuple(tensors.items()):
            self.entries[path, key] = self._weight(tensor)
            if table == "_buffers" and type(tensor) is Tensor:
                self._name, self._parent, self._key = (path, key), -1, None
                self._small_tensor(tensor)
            self._weight_found(table, tensors, key, tensor)

    def _weight_found(self, table: str, tensors: dict[str, Tensor | None], key: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            self.tensors.append(tensor)
            if table not in self.firsts:
                self.firsts[table] = _WeightEntry(tensors, key, tensor, tensor.dtype, tensor.device)

    def _number(self, thing: object) -> tuple[tuple[Name, int], bool]:
        """The number of an object, and whether this is its first visit."""
        known = self._numbers.get(id(thing))
        if known is not None:
            return known, False
        self._count += 1
        number = self._numbers[id(thing)] = self._name, self._count
        return number, True

    def _weight(self, tensor: Tensor | None) -> Entry:
        if tensor is None:
            return None
        number = self._weight_numbers.setdefault(id(tensor), len(self._weight_numbers))
        if is_lazy(tensor):  # the module has not run yet
            return number, type(tensor)
        if type(tensor) in (nn.Parameter, Tensor):
            return number, type(tensor), kind(tensor)
        inner = inner_tensors(tensor)
        if len(inner) == 1 and inner[0] is tensor:
            return number, type(tensor), kind(tensor)
        meta = repr(tensor.__tensor_flatten__()[1])  # type: ignore[attr-defined]
        return number, type(tensor), kind(tensor), meta, *map(kind, inner)

    def _attribute(
        self, name: Name, value: Any, parent: int, key: object, look: Callable[[Any], Entry] | None = None
    ) -> None:
        """Inspects one attribute of a module; where that fails or takes too long, it is compared by identity."""
        self._name, self._parent, self._key = name, parent, key
        self._count = 0
        self._left = budget = min(ATTRIBUTE_BUDGET, self._total)
        holders, numbers = len(self.holders), len(self._numbers)
        try:
            self.entries[name] = (look or self._entry)(value)
        except Exception as error:  # nested too deeply, a dictionary that another thread changes, a hostile object
            self._discard(holders, numbers)
            self._open.clear()
            self.entries[name] = _Identity(value)
            if isinstance(error, _OverBudget):
                self.over_budget.append(name)
        self._total -= budget - max(self._left, 0)

    def _entry(self, value: Any) -> Entry:
        cls = type(value)
        if id(cls) in PLAIN_IDS:
            return cls, value  # forward tells 1, 1.0 and True apart
        self._left -= 1
        if self._left < 0:
            raise _OverBudget
        if id(cls) not in self._looks:
            self._looks[id(cls)] = self._look_at(cls)
        look = self._looks[id(cls)]
        return _Identity(value) if look is None else look(value)

    def _look_at(self, cls: type) -> Callable[[Any], Entry] | None:
        """The method that inspects objects of this class; None where they are compared by identity."""
        if not _is_plain_metaclass(type(cls)) or id(cls) in PLAIN_IDS:
            return None
        if cls in _STATE:
            return self._array if cls is np.ndarray else self._stateful
        for bases, name in _LOOKS:
            if issubclass(cls, bases):
                look: Callable[[Any], Entry] | None = None if name is None else getattr(self, name)
                return look if not issubclass(cls, type) or _is_plain_metaclass(cls) else None
        return None if _root_package(cls) in _MACHINERY else self._object

    def _inside(
        self,
        holder: Any,
        items: Iterable[tuple[object, Any]],
        named: bool = False,
        names: tuple[str, ...] | None = None,
    ) -> Entry:
        """The entries of what a mutable object holds."""
        self.holders.append(Holder(holder, self._name, self._parent, self._key, named, names))
        before = self._parent, self._key
        self._parent = len(self.holders) - 1
        found: list[Entry] = []
        for key, value in items:
            if id(type(value)) in PLAIN_IDS:
                self._left -= 1
                found.append((key, type(value), value))
            else:
                self._key = key
                found.append((key, self._entry(value)))
        self._parent, self._key = before
        if self._left < 0:
            raise _OverBudget
        return tuple(found)

    def _hold(self, value: Any) -> None:
        self.holders.append(Holder(value, self._name, self._parent, self._key))

    def _tensor(self, value: Tensor) -> Entry:
        self._small_tensor(value)
        return _Identity(value), kind(value)

    def _small_tensor(self, value: Tensor) -> None:
        """Forward may use it as a counter; larger tensors are weights that nothing writes to."""
        if value.numel() <= SMALL and version(value) >= 0 and not value.is_meta:
            self._hold(value)

    def _stateful(self, value: Any) -> Entry:
        self._hold(value)
        return _Identity(value)

    def _context_variable(self, value: ContextVar[Any]) -> Entry:
        self._hold(value)
        return ContextVar, self._entry(value.get(MISSING))

    def _array(self, value: Any) -> Entry:
        if value.dtype.hasobject or value.nbytes > ARRAY_BYTES:
            return _Identity(value)
        self._hold(value)
        return np.ndarray, value.dtype.str, value.shape, value.tobytes()

    def _container(self, value: Any) -> Entry:
        cls = type(value)
        number, first = self._number(value)
        if not first and not issubclass(cls, tuple | frozenset):
            return cls, number
        if id(value) in self._open:
            return cls
        if (len(value) if cls in (dict, list, tuple, set) else 0) > self._left:
            raise _OverBudget
        self._open.add(id(value))
        if issubclass(cls, dict):
            items = tuple(dict.items(value))
            found = self._inside(value, ((self._dict_key(key), each) for key, each in items))
        elif issubclass(cls, tuple):
            found = tuple(map(self._entry, tuple.__iter__(value)))
        elif issubclass(cls, list):
            found = self._inside(value, enumerate(tuple(list.__iter__(value))))
        elif issubclass(cls, deque):
            found = self._inside(value, enumerate(tuple(deque.__iter__(value))))
        elif issubclass(cls, set):
            self._hold(value)
            found = frozenset(map(self._entry, tuple(set.__iter__(value))))
        else:
            found = frozenset(map(self._entry, tuple(frozenset.__iter__(value))))
        self._open.discard(id(value))
        return cls, found

    def _dict_key(self, key: Any) -> Entry:
        if type(key) is str:
            return key
        return (type(key), key) if id(type(key)) in PLAIN_IDS else _Identity(key)

    def _method(self, value: MethodType) -> Entry:
        return MethodType, self._entry(value.__func__), self._entry(value.__self__)

    def _partial(self, value: functools.partial[Any]) -> Entry:
        return type(value), *map(self._entry, (value.func, value.args, value.keywords))

    def _function(self, value: FunctionType) -> Entry:
        """What a function can read: its closure, its defaults, and the plain globals that it names.

        These and its code are compared, not its identity: a hook that is registered again is often a new function.
        """
        number, first = self._number(value)
        if not first:
            return FunctionType, number
        names = value.__code__.co_freevars
        cells = tuple(
            (name, self._cell(name, cell)) for name, cell in zip(names, value.__closure__ or (), strict=False)
        )
        set_on_it = [each for each in (value.__defaults__, value.__kwdefaults__, value.__dict__) if each]
        return _Identity(value.__code__), cells, tuple(map(self._entry, set_on_it)), self._globals(value)

    def _cell(self, name: str, cell: CellType) -> Entry:
        number, first = self._number(cell)
        return self._inside(cell, [(name, cell_value(cell))], True, (name,)) if first else number

    def _globals(self, function: FunctionType) -> Entry:
        named = _plain_globals(function)
        if not named and not _module_globals(function):
            return ()
        space = function.__globals__
        self._key = None
        found = self._variables(space, named)
        return found, tuple([self._module_variables(space[name], names) for name, names in _module_globals(function)])

    def _module_variables(self, module: Any, names: tuple[str, ...]) -> Entry:
        """The variables of a Python module that a function names."""
        space = object.__getattribute__(module, "__dict__")
        self._key = None
        return self._variables(space, names)

    def _variables(self, space: dict[str, Any], names: tuple[str, ...]) -> Entry:
        """Some variables of a Python module. Only those that hold too much are compared by identity."""
        self.holders.append(Holder(space, self._name, self._parent, self._key, True, names))
        before = self._parent, self._key
        self._parent = len(self.holders) - 1
        found: list[Entry] = []
        for name in names:
            value = space.get(name, MISSING)
            left, holders, numbers = self._left, len(self.holders), len(self._numbers)
            self._key, self._left = name, min(left, VARIABLE_BUDGET)
            budget = self._left
            try:
                found.append((name, self._entry(value)))
            except _OverBudget:
                if left < VARIABLE_BUDGET:
                    raise
                self._discard(holders, numbers)
                found.append((name, _Identity(value)))
            self._left = left - (budget - max(self._left, 0))
        self._parent, self._key = before
        return tuple(found)

    def _discard(self, holders: int, numbers: int) -> None:
        """Drops the holders and numbers found since there were only this many."""
        del self.holders[holders:]
        for each in [*self._numbers][numbers:]:
            del self._numbers[each]

    def _referenced_class(self, value: type) -> Entry:
        return _Identity(value) if value in self._classes else self._class(value)

    def _referenced_module(self, value: nn.Module) -> Entry:
        """A module that is held by something other than the module tree; it may be in the tree as well."""
        if id(value) in self._module_numbers:
            return nn.Module, self._module_numbers[id(value)]
        number, first = self._number(value)
        if not first:
            return nn.Module, number
        items = [(name, each) for name, each in tuple(vars(value).items()) if name not in _BOOKKEEPING]
        return type(value), self._inside(vars(value), items, True)

    def _object(self, value: Any) -> Entry:
        if (settings := hook_settings(value)) is not None:
            return settings
        cls = type(value)
        number, first = self._number(value)
        if not first:
            return cls, number
        attributes, slots = _attributes(value), _slots(cls)
        if attributes is None and not slots:
            return _Identity(value)
        found: tuple[Entry, ...] = (cls,)
        if slots:
            found += (self._inside(value, [(name, _slot(value, name)) for name in slots], True),)
        if attributes is not None:
            found += (self._inside(attributes, tuple(attributes.items()), True),)
        if cls not in self._classes:
            found += (self._class(cls),)
        return found

    def _class(self, cls: type) -> Entry:
        """Plain values and containers in a class and its bases, and the globals that its methods name."""
        found: list[Entry] = [_Identity(cls)]
        for each in type.__getattribute__(cls, "__mro__"):
            if each in self._classes:
                continue
            self._classes.add(each)
            names, functions = _class_state(each)
            if names:
                values = content(each, names)
                found.append(self._inside(each, values.items(), True, names))
            found += [self._function(function) for function in functions]
        return tuple(found)


# The first base that fits says which method inspects an object; None: it is compared by identity.
_LOOKS: tuple[tuple[type | tuple[type, ...], str | None], ...] = (
    (Tensor, "_tensor"),
    ((dict, list, tuple, set, frozenset, deque), "_container"),
    (FunctionType, "_function"),
    (MethodType, "_method"),
    (functools.partial, "_partial"),
    (ContextVar, "_context_variable"),
    (type, "_referenced_class"),
    ((ModuleType, Enum, CodeType), None),
    (nn.Module, "_referenced_module"),
)


def _is_plain_metaclass(cls: Any) -> bool:
    """Whether comparing classes of this metaclass runs no foreign code."""
    return cls.__hash__ is type.__hash__ and cls.__eq__ is type.__eq__


def _root_package(cls: type) -> str:
    home = type.__getattribute__(cls, "__module__")
    return home.partition(".")[0] if isinstance(home, str) else ""


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether it is the method of the class anyway: code that patched forward may put that back as an attribute."""
    if type(forward) is not MethodType:
        return False
    return forward.__self__ is module and forward.__func__ is type(module).forward


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``named_modules``, but reads the tables only, and runs no code of a module."""
    seen = {id(model)}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        prefix = f"{path}." if path else ""
        children = []
        for name, child in tuple(module._modules.items()):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                children.append((prefix + name, child))
        stack += reversed(children)


def _attributes(value: Any) -> dict[str, Any] | None:
    """The dictionary of an object's attributes, without running its code."""
    try:
        found = (local if type(value) is local else object).__getattribute__(value, "__dict__")
    except Exception:
        return None
    return found if type(found) is dict else None


_SLOTS = WeakKeyDictionary[type, tuple[str, ...]]()


def _slots(cls: type) -> tuple[str, ...]:
    if cls not in _SLOTS:
        spaces = [type.__getattribute__(each, "__dict__") for each in type.__getattribute__(cls, "__mro__")[:-1]]
        found = {name for space in spaces for name, value in space.items() if type(value) is MemberDescriptorType}
        home = type.__getattribute__(cls, "__module__")
        _SLOTS[cls] = () if home in _LIBRARY else tuple(sorted(found))
    return _SLOTS[cls]


def _slot(value: Any, name: str) -> Any:
    for each in type.__getattribute__(type(value), "__mro__"):
        descriptor = type.__getattribute__(each, "__dict__").get(name)
        if type(descriptor) is MemberDescriptorType:
            try:
                return descriptor.__get__(value)
            except AttributeError:
                return MISSING
    return MISSING


_CLASS_STATE = WeakKeyDictionary[type, tuple[tuple[str, ...], tuple[FunctionType, ...]]]()


def _class_state(cls: type) -> tuple[tuple[str, ...], tuple[FunctionType, ...]]:
    """Names of plain values and containers in a class, and its methods that read such globals; none in a library."""
    known = _CLASS_STATE.get(cls)
    if known is None:
        home = type.__getattribute__(cls, "__module__")
        space = type.__getattribute__(cls, "__dict__")
        if not isinstance(home, str) or home.partition(".")[0] in _LIBRARY:
            known = (), ()
        else:
            names = [name for name, value in space.items() if id(type(value)) in _GLOBAL_IDS and name[:2] != "__"]
            functions = [each for each in space.values() if type(each) is FunctionType and _reads_more(each)]
            known = tuple(names), tuple(functions)
        _CLASS_STATE[cls] = known
    return known


_PLAIN_GLOBALS = WeakKeyDictionary[FunctionType, tuple[str, ...]]()
_MODULE_GLOBALS = WeakKeyDictionary[FunctionType, tuple[tuple[str, tuple[str, ...]], ...]]()


def _plain_globals(function: FunctionType) -> tuple[str, ...]:
    """The names of globals that a function reads and that may change.

    These are plain values and containers, and in the user's own code also functions, objects and classes of such code.
    """
    known = _PLAIN_GLOBALS.get(function)
    if known is None:
        space = function.__globals__
        user = _is_user_code(function.__code__.co_filename)
        names = [] if _is_library(space) else sorted((_globals_of if user else _names)(function.__code__))
        known = tuple([n for n in names if n[:2] != "__" and _may_change(space.get(n, MISSING), user)])
        _PLAIN_GLOBALS[function] = known
    return known


def _module_globals(function: FunctionType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The user's own Python modules that a function names, and the variables that it may read from each."""
    known = _MODULE_GLOBALS.get(function)
    if known is None:
        space = function.__globals__
        user = _is_user_code(function.__code__.co_filename) and not _is_library(space)
        names = sorted(_names(function.__code__)) if user else []
        found = []
        for name in sorted(_globals_of(function.__code__)) if names else []:
            module = space.get(name)
            if type(module) is not ModuleType or not _is_user_module(vars(module)):
                continue
            read = [n for n in names if n[:2] != "__" and _may_change(vars(module).get(n, MISSING), True)]
            if read:
                found.append((name, tuple(read)))
        known = _MODULE_GLOBALS[function] = tuple(found)
    return known


_STDLIB = sysconfig.get_path("stdlib")


def _is_user_module(space: Mapping[str, Any]) -> bool:
    return _is_user_code(space.get("__file__")) and not _is_library(space)


def _is_user_code(filename: object) -> bool:
    """Whether code is neither in an installed package nor in Python's library."""
    return not isinstance(filename, str) or not ("site-packages" in filename or filename.startswith(_STDLIB))


def _is_of_torch(hook: Any) -> bool:
    """Whether torch itself registered it, as its FLOP counter does: such hooks only observe, and are new each time."""
    home = getattr(hook, "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] == "torch"


def _is_library(space: Mapping[str, Any]) -> bool:
    return str(space.get("__name__")).partition(".")[0] in _LIBRARY


def _may_change(value: Any, user: bool) -> bool:
    """Whether a global may hold something else later; ``user`` says whether the code that reads it is the user's."""
    cls = type(value)
    if id(cls) in _GLOBAL_IDS:
        return True
    if not user or value is MISSING or issubclass(cls, ModuleType | BuiltinFunctionType | nn.Module):
        return False
    if issubclass(cls, FunctionType | Tensor | dict | list | set | deque | local | ContextVar):
        return True
    if cls is np.ndarray or cls in _STATE:
        return True
    root = _root_package(value if issubclass(cls, type) else cls)
    return root == "types" or root not in _LIBRARY | _MACHINERY | sys.stdlib_module_names


def _reads_more(function: FunctionType) -> bool:
    """Whether a method can read more than its arguments and its class."""
    return bool(
        _plain_globals(function) or _module_globals(function) or set(function.__code__.co_freevars) - {"__class__"}
    )


def _names(code: CodeType) -> set[str]:
    """The names of globals and attributes in a function's code and in the functions inside of it."""
    return set(code.co_names).union(*(_names(each) for each in code.co_consts if isinstance(each, CodeType)))


def _globals_of(code: CodeType) -> set[str]:
    """The names of globals only."""
    inner = [_globals_of(each) for each in code.co_consts if isinstance(each, CodeType)]
    names = {str(each.argval) for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "STORE_GLOBAL")}
    return names.union(*inner)


def kind(tensor: Tensor) -> Entry:
    """What compiled code relies on; tensors of equal kind can take each other's place."""
    layout = tensor.layout
    return tensor.shape, tensor.stride() if layout is torch.strided else None, tensor.dtype, tensor.device, layout
