"""What a forward reads besides its arguments: the module tree, its weights, and Python values that it can reach.

A capture holds for as long as these are what they were. Looking at all of them takes milliseconds, so it is done once
per request, and where a quick look at the places (``Watch``) says that something was done to one; whether the first
weight is still the same object, of the same type and device, is asked at every call.

Foreign objects are looked at without running any code of theirs, and within a budget: Python modules, classes and what
holds too much are known by their identity.
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
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from duca_compile.core.tensors import version
from duca_compile.frontend.away import settings
from duca_compile.frontend.capture import inner_tensors

Name = tuple[str, str]  # a module's path, and an attribute of it
Entry = Any  # hashable; to mypy a class is not
ATTRIBUTE_BUDGET = 2000  # values that one attribute may hold to be looked into; beyond that its identity counts
TOTAL_BUDGET = 100_000  # the same for all of a model
VARIABLE_BUDGET = 500  # the same for one variable of a Python module that functions name
SMALL = 2**16  # elements of tensors that forward may count in
ARRAY_BYTES = 4096  # numpy arrays up to this size are known by their values
PATIENCE = 50  # the quick look waits this many times as long as it takes, so that it takes 2 % of the time at most
_PLAIN = {str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device}
_HOOKS = {name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))}
_TABLES = {"_parameters", "_buffers", "_modules"}
_BOOKKEEPING = vars(nn.Module()).keys() - _HOOKS - _TABLES - {"training"}  # state dict hooks and the like
_ROLES = dict.fromkeys(_BOOKKEEPING, "") | dict.fromkeys(_HOOKS, "hooks")
_ROLES["_diffusers_hook"] = ""  # the list of hooks that diffusers keeps; forward has those that it runs
_ROLES |= {"_parameters": "weights", "_buffers": "weights", "_modules": "modules"}
_GLOBAL_HOOKS = [name for name in ("_global_forward_pre_hooks", "_global_forward_hooks") if hasattr(torch_module, name)]
_MACHINERY = {"logging", "threading", "concurrent", "asyncio", "multiprocessing", "queue", "weakref"}  # not state
_LIBRARY = {  # whose classes and functions keep nothing that forward reads
    "abc", "accelerate", "builtins", "collections", "diffusers", "enum", "functools", "huggingface_hub", "numpy",
    "peft", "torch", "transformers", "types", "typing",
}  # fmt: skip
PLAIN_IDS = frozenset(map(id, _PLAIN))  # a class may have a metaclass with a hash of its own
_GLOBAL_IDS = PLAIN_IDS | frozenset(map(id, (dict, list, set, deque)))
_VERSION: Callable[[Any], Any] | None = getattr(torch._C._dynamo.guards, "dict_version", None)
MISSING: Any = type("Missing", (), {})()
VALUE: Any = type("Value", (), {})()  # the key of a state that is told by bytes


class Structure:
    """All that a capture has built in, by name. Of weights that is their kind: others of the same kind do as well."""

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
        """What is in one of them only, or not the same in both."""
        names = self._entries.keys() | other._entries.keys()
        return sorted(n for n in names if self._entries.get(n, MISSING) != other._entries.get(n, MISSING))

    def is_plain(self, name: Name) -> bool:
        """Whether what is called ``name`` is a number, a string or the like."""
        entry = self._entries.get(name)
        return isinstance(entry, tuple) and entry[0] in _PLAIN

    def without(self, names: Iterable[Name]) -> Structure:
        left_out = frozenset(names)
        return Structure({name: entry for name, entry in self._entries.items() if name not in left_out})


@dataclass(frozen=True)
class _Place:
    """Where a module keeps a parameter or a buffer, and what it is."""

    table: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    dtype: torch.dtype
    device: torch.device

    def kept(self) -> bool:
        now = self.table.get(self.name)
        same = now is self.tensor and now.dtype is self.dtype and now.device == self.device
        return same or _traced((now,))


@dataclass(frozen=True)
class Weights:
    """Every parameter and buffer of a model, and where it keeps the first of each."""

    tensors: tuple[Tensor, ...]
    firsts: tuple[_Place, ...]

    def seem_kept(self) -> bool:
        """Whether the first of each is still the same object of the same type and device in the same place.

        What is done to a whole model, such as ``to()``, is done to these too (it makes new buffers), and asking all
        takes longer than a skipped step. So it counts while another thread traces the model: then they are away, and
        will be back.
        """
        for place in self.firsts:  # noqa: SIM110 - a generator takes longer, and this is asked at every call
            if not place.kept():
                return False
        return True

    def traced(self) -> bool:
        """Whether these are the fakes that torch.export puts in the place of a model's weights while it traces."""
        return _traced(self.tensors)

    def same(self, other: Weights) -> bool:
        """Whether both hold the same objects."""
        return len(self.tensors) == len(other.tensors) and all(map(is_, self.tensors, other.tensors))


class Holder(NamedTuple):
    """Something that can change: a dictionary, a list, a tensor, a cell of a closure, chosen names of a namespace.

    ``key`` says where it is in the holder before it, whose number is ``within``; -1 where ``name`` says it all.
    """

    thing: Any
    name: Name
    within: int
    key: object
    named: bool = False  # whether its keys are names in code: of attributes, or of variables
    names: tuple[str, ...] | None = None  # of a namespace or a class: those that count


@dataclass(frozen=True)
class Snapshot:
    """A model at one time. ``beyond`` names the attributes that hold too much to be looked at."""

    structure: Structure
    weights: Weights
    holders: Sequence[Holder]
    hooks: Sequence[Mapping[Any, Any]]  # tables of hooks that hold none
    beyond: Sequence[Name]


def take(model: nn.Module, without: frozenset[Name] = frozenset(), live: frozenset[str] = frozenset()) -> Snapshot:
    """``model`` as it is now, but for the attributes named by ``without``.

    Of the modules at ``live``, which run as they are, it counts what hooks and what kinds of objects they hold.
    """
    walk = _Walk(live)
    walk.tree(model)
    entries = walk.entries
    for name in without & entries.keys():
        del entries[name]
    weights = Weights(tuple(walk.tensors), tuple(walk.firsts.values()))
    return Snapshot(Structure(entries), weights, walk.holders, walk.hooks, walk.beyond)


class Watch:
    """A quick look at all that a snapshot looked into: whether anything was set, added or removed since.

    What is found may make no difference; what is not found was not touched, but for values that the walk knows by
    identity. It takes some 80 microseconds for 1300 modules, so it has its turn once in ``PATIENCE`` times as long; but
    at once where a hook was registered, or one of those that were there was removed.
    """

    def __init__(self, seen: Snapshot) -> None:
        spaces = [each for each in seen.holders if each.names is not None and type(each.thing) is not CellType]
        self._spaces = [(each.thing, each.names, content(each.thing, each.names)) for each in spaces]
        things = [each.thing for each in seen.holders if each.names is None or type(each.thing) is CellType]
        things = [thing for thing in things if not issubclass(type(thing), Tensor)]  # those are followed anyway
        self._tables = [thing for thing in things if issubclass(type(thing), dict)]
        self._lists = [(thing, tuple(thing)) for thing in things if type(thing) is list]
        rest = [thing for thing in things if not issubclass(type(thing), dict) and type(thing) is not list]
        self._rest = [(thing, content(thing)) for thing in rest]
        self._hooks, self._handles = seen.hooks, RemovableHandle.next_id
        own = [each.thing for each in seen.holders if each.name[1] in _HOOKS and each.within < 0]
        self._set = [(table, len(table)) for table in own if issubclass(type(table), dict)]
        self._versions = self._now()
        started = perf_counter()
        self._stirred()
        self._cost, self._due = perf_counter() - started, 0.0

    def due(self) -> bool:
        if perf_counter() >= self._due or RemovableHandle.next_id != self._handles:
            return True
        return bool(self._set) and any(len(table) != count for table, count in self._set)

    def stirred(self) -> bool:
        started = perf_counter()
        found = self._stirred()
        now = perf_counter()
        self._cost = min(self._cost, now - started)  # at other times something else was in its way
        self._due = now + PATIENCE * self._cost
        return found

    def wait(self, seconds: float) -> None:
        """What took so long has its turn again when that has become a small part of the time."""
        self._due = perf_counter() + PATIENCE * seconds

    def _now(self) -> list[Any]:
        if _VERSION is not None:
            return [*map(_VERSION, self._tables)]
        return [tuple(map(id, table.values())) for table in self._tables]

    def _stirred(self) -> bool:
        if self._now() != self._versions:
            return True
        if RemovableHandle.next_id != self._handles:  # a hook was registered, if perhaps on another model
            self._handles = RemovableHandle.next_id
            if any(self._hooks):
                return True
        if any(len(thing) != len(known) or not all(map(is_, thing, known)) for thing, known in self._lists):
            return True
        if any(not same_content(content(thing), known) for thing, known in self._rest):
            return True
        return any(not same_content(content(thing, names), known) for thing, names, known in self._spaces)


def content(thing: Any, names: tuple[str, ...] | None = None) -> dict[Any, Any]:
    """What a holder holds now, by key, place or name; nothing of it is compared."""
    cls = type(thing)  # what a foreign object says of its class is not asked
    if issubclass(cls, type):
        return {name: type.__getattribute__(thing, "__dict__").get(name, MISSING) for name in names or ()}
    if issubclass(cls, dict):
        if names is not None:
            return {name: dict.get(thing, name, MISSING) for name in names}
        try:
            return dict.copy(thing) if cls is dict else dict(dict.items(thing))
        except Exception:  # a key that cannot be asked
            return {}
    if issubclass(cls, CellType):
        return {names[0] if names else 0: cell_value(thing)}
    if issubclass(cls, list):
        return dict(enumerate(list.__iter__(thing)))
    if issubclass(cls, deque):
        return dict(enumerate(deque.__iter__(thing)))
    if issubclass(cls, Tensor):
        return {VALUE: str(version(thing)).encode()}
    if cls in _STATE:
        return {VALUE: _STATE[cls](thing)}
    if cls is ContextVar:
        return {0: thing.get(MISSING)}
    if issubclass(cls, set):
        return {id(each): each for each in set.__iter__(thing)}
    return {name: _slot(thing, name) for name in _slots(type(thing))}


class RandomNumbers:
    """What Python or numpy draws random numbers from."""

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
for _kind in (list, tuple, range, dict, str):
    _STATE[type(iter(_kind() if _kind is not range else range(0)))] = lambda each: str(each.__length_hint__()).encode()


def _progress(generator: GeneratorType[Any, Any, Any]) -> bytes:
    """How far it is, as far as its place in the code and plain local values tell."""
    frame = generator.gi_frame
    if frame is None:
        return b"done"
    ours = [(name, each) for name, each in frame.f_locals.items() if type(type(each)) is type]
    known = [(name, _STATE[type(each)](each)) for name, each in ours if type(each) in _STATE]
    plain = [(name, each) for name, each in frame.f_locals.items() if id(type(each)) in PLAIN_IDS]
    return repr((frame.f_lasti, known, plain)).encode()


def cell_value(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return MISSING


def _same_key(one: Any, other: Any) -> bool:
    """Without asking a foreign key."""
    return one is other or (type(one) is type(other) is int and bool(one == other))


def same_content(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    if len(one) == len(other) and all(map(is_, one.values(), other.values())):
        return all(map(_same_key, one, other))
    return VALUE in one and one == other


def _traced(tensors: Iterable[object]) -> bool:
    return any(isinstance(tensor, FakeTensor | FunctionalTensor) for tensor in tensors)


@dataclass(frozen=True)
class _Same:
    """Stands for an object that is known by its identity, and keeps it, so that no other one gets its address."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _TooMuch(Exception):  # noqa: N818 - no error: its identity counts then
    """An attribute holds more than is looked at."""


class _Walk:
    """Turns what it meets into values that can be compared. Shared objects are numbered as they are met."""

    def __init__(self, live: frozenset[str]) -> None:
        self.entries: dict[Name, Entry] = {}
        self.tensors: list[Tensor] = []
        self.firsts: dict[str, _Place] = {}
        self.holders: list[Holder] = []
        self.hooks: list[Mapping[Any, Any]] = []
        self.beyond: list[Name] = []
        self._live = live
        self._met: dict[int, tuple[Name, int]] = {}  # where objects were met first, so that others do not move them
        self._weight_numbers: dict[int, int] = {}
        self._module_numbers: dict[int, int] = {}
        self._open: set[int] = set()  # containers that are being looked into: one may hold itself
        self._classes: set[type] = set()
        self._forwards: set[type] = set()  # classes of modules whose forward is known
        self._looks: dict[int, Callable[[Any], Entry] | None] = {}
        self._name: Name = ("", "")
        self._within, self._key = -1, object()
        self._left = self._total = self._count = 0

    def tree(self, model: nn.Module) -> None:
        self._total = TOTAL_BUDGET
        modules = [*_named_modules(model)]
        self._module_numbers = {id(module): number for number, (_, module) in enumerate(modules)}
        for name in _GLOBAL_HOOKS:
            table = getattr(torch_module, name)
            if all(map(_is_of_torch, table.values())):
                self.hooks.append(table)
            else:
                self._hook_table(("", name), table)
        for path, module in modules:
            live = any(path == each or path.startswith(f"{each}.") for each in self._live) if self._live else False
            self._module(path, module, live)

    def _module(self, path: str, module: nn.Module, live: bool) -> None:
        entries, attributes, within = self.entries, vars(module), len(self.holders)
        if not live:
            self.holders.append(Holder(attributes, (path, ""), -1, None, True))
        entries[path, ""] = _Same(module) if path in self._live else type(module)
        for name, value in tuple(attributes.items()):
            role = _ROLES.get(name)
            if role is None:
                if live:
                    if self._look_at(type(value)) == self._object:
                        entries[path, name] = type(value)
                elif id(type(value)) in PLAIN_IDS:
                    entries[path, name] = type(value), value
                elif name != "forward" or not _is_own_forward(module, value):
                    self._attribute((path, name), value, within, name)
            elif role == "weights":
                if value:
                    self._weights(path, name, value, live)
            elif role == "modules":
                if value and not live:
                    self.holders.append(Holder(value, (path, name), within, None))
                    for key, child in tuple(value.items()):
                        entries[path, key] = None if child is None else self._module_numbers.get(id(child))
            elif role == "hooks":
                if not live:
                    self._hook_table((path, name), value)
                elif value:
                    entries[path, name] = tuple(map(_Same, value.values()))
        if type(module) not in self._forwards:
            self._forward_of(path, type(module))
        if not live and type(module) not in self._classes:
            self._attribute((path, type(module).__name__), type(module), within, None, self._class)

    def _forward_of(self, path: str, cls: type) -> None:
        """A patch may replace the forward of a class."""
        self._forwards.add(cls)
        owner = next((each for each in cls.__mro__ if "forward" in vars(each)), None)
        if owner is not None:
            self.holders.append(Holder(owner, (path, cls.__name__), -1, None, True, ("forward",)))
            self.entries[path, f"{cls.__name__}.forward"] = _Same(vars(owner)["forward"])

    def _hook_table(self, name: Name, table: Any) -> None:
        if table:
            self._attribute(name, table, -1, None)
        elif isinstance(table, dict):
            self.hooks.append(table)

    def _weights(self, path: str, table: str, tensors: dict[str, Tensor | None], live: bool) -> None:
        for key, tensor in tuple(tensors.items()):
            entry = self._weight(tensor)
            if not live:
                self.entries[path, key] = entry
            if tensor is not None:
                if table == "_buffers" and not live and type(tensor) is Tensor:
                    self._name, self._within, self._key = (path, key), -1, None
                    self._small_tensor(tensor)
                self.tensors.append(tensor)
                if table not in self.firsts:
                    self.firsts[table] = _Place(tensors, key, tensor, tensor.dtype, tensor.device)

    def _number(self, thing: object) -> tuple[tuple[Name, int], bool]:
        """Its number, and whether it is met for the first time."""
        known = self._met.get(id(thing))
        if known is not None:
            return known, False
        self._count += 1
        number = self._met[id(thing)] = self._name, self._count
        return number, True

    def _weight(self, tensor: Tensor | None) -> Entry:
        if tensor is None:
            return None
        number = self._weight_numbers.setdefault(id(tensor), len(self._weight_numbers))
        if is_lazy(tensor):  # of a lazy module that has not run
            return number, type(tensor)
        if type(tensor) in (nn.Parameter, Tensor):
            return number, type(tensor), kind(tensor)
        inner = inner_tensors(tensor)
        if len(inner) == 1 and inner[0] is tensor:
            return number, type(tensor), kind(tensor)
        meta = repr(tensor.__tensor_flatten__()[1])  # type: ignore[attr-defined]
        return number, type(tensor), kind(tensor), meta, *map(kind, inner)

    def _attribute(
        self, name: Name, value: Any, within: int, key: object, look: Callable[[Any], Entry] | None = None
    ) -> None:
        """Looks into one attribute of a module; where that takes too long, its identity counts."""
        self._name, self._within, self._key = name, within, key
        self._count = 0
        self._left = budget = min(ATTRIBUTE_BUDGET, self._total)
        had, numbers = len(self.holders), len(self._met)
        try:
            self.entries[name] = (look or self._entry)(value)
        except Exception as error:  # too deep, a dictionary that another thread changes, a hostile object
            self._forget(had, numbers)
            self._open.clear()
            self.entries[name] = _Same(value)
            if isinstance(error, _TooMuch):
                self.beyond.append(name)
        self._total -= budget - max(self._left, 0)

    def _entry(self, value: Any) -> Entry:
        cls = type(value)
        if id(cls) in PLAIN_IDS:
            return cls, value  # 1, 1.0 and True are not the same to a forward
        self._left -= 1
        if self._left < 0:
            raise _TooMuch
        if id(cls) not in self._looks:
            self._looks[id(cls)] = self._look_at(cls)
        look = self._looks[id(cls)]
        return _Same(value) if look is None else look(value)

    def _look_at(self, cls: type) -> Callable[[Any], Entry] | None:
        """How objects of this class are looked at; None where their identity counts."""
        if type(cls).__hash__ is not type.__hash__ or type(cls).__eq__ is not type.__eq__ or id(cls) in PLAIN_IDS:
            return None
        if issubclass(cls, Tensor):
            return self._tensor
        if issubclass(cls, dict | list | tuple | set | frozenset | deque):
            return self._container
        if issubclass(cls, FunctionType):
            return self._function
        if issubclass(cls, MethodType):
            return self._method
        if issubclass(cls, functools.partial):
            return self._partial
        if cls is np.ndarray:
            return self._array
        if cls in _STATE:
            return self._iterator
        if cls is ContextVar:
            return self._context_variable
        if issubclass(cls, type):
            return None if cls.__hash__ is not type.__hash__ or cls.__eq__ is not type.__eq__ else self._held_class
        if issubclass(cls, ModuleType | Enum | CodeType):
            return None
        if issubclass(cls, nn.Module):
            return self._inner_module
        if cls is local:
            return self._object
        home = type.__getattribute__(cls, "__module__")
        root = home.partition(".")[0] if isinstance(home, str) else ""
        return None if root in _MACHINERY else self._object

    def _inside(
        self,
        holder: Any,
        items: Iterable[tuple[object, Any]],
        named: bool = False,
        names: tuple[str, ...] | None = None,
    ) -> Entry:
        """The entries of what is inside of something that can change."""
        self.holders.append(Holder(holder, self._name, self._within, self._key, named, names))
        before = self._within, self._key
        self._within = len(self.holders) - 1
        found: list[Entry] = []
        for key, value in items:
            if id(type(value)) in PLAIN_IDS:
                self._left -= 1
                found.append((key, type(value), value))
            else:
                self._key = key
                found.append((key, self._entry(value)))
        self._within, self._key = before
        if self._left < 0:
            raise _TooMuch
        return tuple(found)

    def _tensor(self, value: Tensor) -> Entry:
        self._small_tensor(value)
        return _Same(value), kind(value)

    def _small_tensor(self, value: Tensor) -> None:
        """Forward may count in it; larger ones are weights that nothing writes to."""
        if value.numel() <= SMALL and version(value) >= 0 and not value.is_meta:
            self.holders.append(Holder(value, self._name, self._within, self._key))

    def _iterator(self, value: Any) -> Entry:
        self.holders.append(Holder(value, self._name, self._within, self._key))
        return _Same(value)

    def _context_variable(self, value: ContextVar[Any]) -> Entry:
        self.holders.append(Holder(value, self._name, self._within, self._key))
        return ContextVar, self._entry(value.get(MISSING))

    def _array(self, value: Any) -> Entry:
        if value.dtype.hasobject or value.nbytes > ARRAY_BYTES:
            return _Same(value)
        self.holders.append(Holder(value, self._name, self._within, self._key))
        return np.ndarray, value.dtype.str, value.shape, value.tobytes()

    def _container(self, value: Any) -> Entry:
        cls = type(value)
        number, first = self._number(value)
        if not first and not issubclass(cls, tuple | frozenset):
            return cls, number
        if id(value) in self._open:
            return cls
        if (len(value) if cls in (dict, list, tuple, set) else 0) > self._left:
            raise _TooMuch
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
            self.holders.append(Holder(value, self._name, self._within, self._key))
            found = frozenset(map(self._entry, tuple(set.__iter__(value))))
        else:
            found = frozenset(map(self._entry, tuple(frozenset.__iter__(value))))
        self._open.discard(id(value))
        return cls, found

    def _dict_key(self, key: Any) -> Entry:
        return key if type(key) is str else (type(key), key) if id(type(key)) in PLAIN_IDS else _Same(key)

    def _method(self, value: MethodType) -> Entry:
        return MethodType, self._entry(value.__func__), self._entry(value.__self__)

    def _partial(self, value: functools.partial[Any]) -> Entry:
        return type(value), *map(self._entry, (value.func, value.args, value.keywords))

    def _function(self, value: FunctionType) -> Entry:
        """What a function that a module holds can read: its closure, its defaults, and plain globals that it names.

        It is known by these and by its code, for hooks are made anew each time that they are set.
        """
        number, first = self._number(value)
        if not first:
            return FunctionType, number
        names = value.__code__.co_freevars
        cells = tuple(
            (name, self._cell(name, cell)) for name, cell in zip(names, value.__closure__ or (), strict=False)
        )
        given = [each for each in (value.__defaults__, value.__kwdefaults__, value.__dict__) if each]
        return _Same(value.__code__), cells, tuple(map(self._entry, given)), self._globals(value)

    def _cell(self, name: str, cell: CellType) -> Entry:
        number, first = self._number(cell)
        return self._inside(cell, [(name, cell_value(cell))], True, (name,)) if first else number

    def _globals(self, function: FunctionType) -> Entry:
        named = _plain_globals(function)
        if not named and not _module_globals(function):
            return ()
        space = function.__globals__
        self._key = None
        found = self._some_inside(space, named)
        return found, tuple([self._variables(space[name], own) for name, own in _module_globals(function)])

    def _variables(self, module: Any, names: tuple[str, ...]) -> Entry:
        """What a function reads of a Python module that it names."""
        space = object.__getattribute__(module, "__dict__")
        self._key = None
        return self._some_inside(space, names)

    def _some_inside(self, space: dict[str, Any], names: tuple[str, ...]) -> Entry:
        """Of variables of a Python module each that holds too much is known by its identity, and no other one."""
        self.holders.append(Holder(space, self._name, self._within, self._key, True, names))
        before = self._within, self._key
        self._within = len(self.holders) - 1
        found: list[Entry] = []
        for name in names:
            value = space.get(name, MISSING)
            left, had, met = self._left, len(self.holders), len(self._met)
            self._key, self._left = name, min(left, VARIABLE_BUDGET)
            given = self._left
            try:
                found.append((name, self._entry(value)))
            except _TooMuch:
                if left < VARIABLE_BUDGET:
                    raise
                self._forget(had, met)
                found.append((name, _Same(value)))
            self._left = left - (given - max(self._left, 0))
        self._within, self._key = before
        return tuple(found)

    def _forget(self, holders: int, met: int) -> None:
        """What was found behind so many."""
        del self.holders[holders:]
        for each in [*self._met][met:]:
            del self._met[each]

    def _held_class(self, value: type) -> Entry:
        return _Same(value) if value in self._classes else self._class(value)

    def _inner_module(self, value: nn.Module) -> Entry:
        """A module that is held by something else than the tree of modules, unless it is in that too."""
        if id(value) in self._module_numbers:
            return nn.Module, self._module_numbers[id(value)]
        number, first = self._number(value)
        if not first:
            return nn.Module, number
        items = [(name, each) for name, each in tuple(vars(value).items()) if name not in _BOOKKEEPING]
        return type(value), self._inside(vars(value), items, True)

    def _object(self, value: Any) -> Entry:
        if (mover := settings(value)) is not None:
            return mover
        cls = type(value)
        number, first = self._number(value)
        if not first:
            return cls, number
        attributes, slots = _attributes(value), _slots(cls)
        if attributes is None and not slots:
            return _Same(value)
        found: tuple[Entry, ...] = (cls,)
        if slots:
            found += (self._inside(value, [(name, _slot(value, name)) for name in slots], True),)
        if attributes is not None:
            found += (self._inside(attributes, tuple(attributes.items()), True),)
        if cls not in self._classes:
            found += (self._class(cls),)
        return found

    def _class(self, cls: type) -> Entry:
        """Plain values and containers that the instances of a class share, and those that its methods name."""
        found: list[Entry] = [_Same(cls)]
        for each in type.__getattribute__(cls, "__mro__"):
            if each in self._classes:
                continue
            self._classes.add(each)
            own, functions = _own_state(each)
            if own:
                values = content(each, own)
                found.append(self._inside(each, values.items(), True, own))
            found += [self._function(function) for function in functions]
        return tuple(found)


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether it is what the class has anyway: so whoever has set another one leaves it behind."""
    if type(forward) is not MethodType:
        return False
    return forward.__self__ is module and forward.__func__ is type(module).forward


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, by the tables alone."""
    seen = {id(model)}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        prefix = f"{path}." if path else ""
        children = []
        for name, child in tuple(module._modules.items()):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                children.append((prefix + name, child))
        waiting += reversed(children)


def _attributes(value: Any) -> dict[str, Any] | None:
    """The dictionary of an object's attributes, without asking the object."""
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


_OWN_STATE = WeakKeyDictionary[type, tuple[tuple[str, ...], tuple[FunctionType, ...]]]()


def _own_state(cls: type) -> tuple[tuple[str, ...], tuple[FunctionType, ...]]:
    """Names of plain values and containers in a class, and its methods that name such globals; none of a library's."""
    known = _OWN_STATE.get(cls)
    if known is None:
        home = type.__getattribute__(cls, "__module__")
        space = type.__getattribute__(cls, "__dict__")
        if not isinstance(home, str) or home.partition(".")[0] in _LIBRARY:
            known = (), ()
        else:
            names = [name for name, value in space.items() if id(type(value)) in _GLOBAL_IDS and name[:2] != "__"]
            functions = [each for each in space.values() if type(each) is FunctionType and _reads_more(each)]
            known = tuple(names), tuple(functions)
        _OWN_STATE[cls] = known
    return known


_NAMED = WeakKeyDictionary[FunctionType, tuple[str, ...]]()
_MODULES = WeakKeyDictionary[FunctionType, tuple[tuple[str, tuple[str, ...]], ...]]()


def _plain_globals(function: FunctionType) -> tuple[str, ...]:
    """The names of what may change among the globals that a function names: of plain values and containers, and, in
    code of the user's own, of functions, objects and classes of such code, too."""
    known = _NAMED.get(function)
    if known is None:
        space = function.__globals__
        own = _is_own(function.__code__.co_filename)
        names = [] if _is_library(space) else sorted((_globals_of if own else _names)(function.__code__))
        known = tuple([n for n in names if n[:2] != "__" and _may_change(space.get(n, MISSING), own)])
        _NAMED[function] = known
    return known


def _module_globals(function: FunctionType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The Python modules of the user's own that a function names, and what it may read of each."""
    known = _MODULES.get(function)
    if known is None:
        space = function.__globals__
        own = _is_own(function.__code__.co_filename) and not _is_library(space)
        names = sorted(_names(function.__code__)) if own else []
        found = []
        for name in sorted(_globals_of(function.__code__)) if names else []:
            module = space.get(name)
            if type(module) is not ModuleType or not _is_own(vars(module).get("__file__")) or _is_library(vars(module)):
                continue
            read = [n for n in names if n[:2] != "__" and _may_change(vars(module).get(n, MISSING), True)]
            if read:
                found.append((name, tuple(read)))
        known = _MODULES[function] = tuple(found)
    return known


_STDLIB = sysconfig.get_path("stdlib")


def _is_own(filename: object) -> bool:
    """Whether code is neither of an installed package nor of Python."""
    return not isinstance(filename, str) or not ("site-packages" in filename or filename.startswith(_STDLIB))


def _is_of_torch(hook: Any) -> bool:
    """Whether torch itself has set it, as its FLOP counter does: such hooks observe, and each use has new ones."""
    home = getattr(hook, "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] == "torch"


def _is_library(space: Mapping[str, Any]) -> bool:
    return str(space.get("__name__")).partition(".")[0] in _LIBRARY


def _may_change(value: Any, own: bool) -> bool:
    """Whether a global can hold something else later; ``own`` is whether the code is the user's."""
    cls = type(value)
    if id(cls) in _GLOBAL_IDS:
        return True
    if not own or value is MISSING or issubclass(cls, ModuleType | BuiltinFunctionType | nn.Module):
        return False
    if issubclass(cls, FunctionType | Tensor | dict | list | set | deque | local | ContextVar):
        return True
    if cls is np.ndarray or cls in _STATE:
        return True
    home = type.__getattribute__(value if issubclass(cls, type) else cls, "__module__")
    root = home.partition(".")[0] if isinstance(home, str) else ""
    return root == "types" or root not in _LIBRARY | _MACHINERY | sys.stdlib_module_names


def _reads_more(function: FunctionType) -> bool:
    """Whether it can read more than its arguments, and what its class has."""
    return bool(
        _plain_globals(function) or _module_globals(function) or set(function.__code__.co_freevars) - {"__class__"}
    )


def _names(code: CodeType) -> set[str]:
    """The names in a function's code, and in the functions within it: of globals, and of attributes."""
    return set(code.co_names).union(*(_names(each) for each in code.co_consts if isinstance(each, CodeType)))


def _globals_of(code: CodeType) -> set[str]:
    """The names of globals alone."""
    inner = [_globals_of(each) for each in code.co_consts if isinstance(each, CodeType)]
    own = {str(each.argval) for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "STORE_GLOBAL")}
    return own.union(*inner)


def kind(tensor: Tensor) -> Entry:
    """What compiled code relies on; another tensor of the same kind can take its place."""
    layout = tensor.layout
    return tensor.shape, tensor.stride() if layout is torch.strided else None, tensor.dtype, tensor.device, layout
