"""What a forward reads besides its arguments: the module tree, its weights and its plain Python attributes.

A capture holds for as long as these are what they were. Looking at all of them takes milliseconds, so it is done once
per request; whether the first weight is still the same object, of the same type and device, is asked at every call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from duca_compile.away import settings
from duca_compile.capture import inner_tensors

Name = tuple[str, str]  # a module's path, and an attribute of it
Entry = Any  # hashable; to mypy a class is not

_PLAIN = {str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device}
_HOOKS = {name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))}
_TABLES = {"_parameters", "_buffers", "_modules"}
_BOOKKEEPING = vars(nn.Module()).keys() - _HOOKS - _TABLES - {"training"}  # state dict hooks and the like


class Structure:
    """All that a capture has built in, by name. Of weights that is their kind: others of the same kind do as well."""

    def __init__(self, entries: Mapping[Name, Entry]) -> None:
        self._entries = entries
        self._hash = hash(frozenset(entries.items()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Structure) and self._hash == other._hash and self._entries == other._entries
        )

    def differences(self, other: Structure) -> list[Name]:
        """What is in one of them only, or not the same in both."""
        names = self._entries.keys() | other._entries.keys()
        missing = object()
        return sorted(n for n in names if self._entries.get(n, missing) != other._entries.get(n, missing))

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
        same = now is self.tensor and self.tensor.dtype == self.dtype and self.tensor.device == self.device
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
        return all(place.kept() for place in self.firsts)

    def traced(self) -> bool:
        """Whether these are the fakes that torch.export puts in the place of a model's weights while it traces."""
        return _traced(self.tensors)

    def same(self, other: Weights) -> bool:
        """Whether both hold the same objects."""
        return len(self.tensors) == len(other.tensors) and all(map(is_, self.tensors, other.tensors))


@dataclass(frozen=True)
class Snapshot:
    """A model at one time."""

    structure: Structure
    weights: Weights


def take(model: nn.Module, without: frozenset[Name] = frozenset(), live: frozenset[str] = frozenset()) -> Snapshot:
    """``model`` as it is now, but for the attributes named by ``without`` and what the modules at ``live`` hold."""
    walk = _Walk()
    for path, module in model.named_modules():
        walk.module(path, module)
        if path in live:
            walk.entries[path, ""] = _Same(module)
    walk.forget(live)
    entries = {name: entry for name, entry in walk.entries.items() if name not in without}
    return Snapshot(Structure(entries), Weights(tuple(walk.tensors), tuple(walk.firsts.values())))


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


class _Walk:
    """Turns what it meets into values that can be compared. Shared objects are numbered as they are met."""

    def __init__(self) -> None:
        self.entries: dict[Name, Entry] = {}
        self.tensors: list[Tensor] = []
        self.firsts: dict[str, _Place] = {}
        self._met: dict[int, int] = {}
        self._open: set[int] = set()  # containers that are being looked into: one may hold itself

    def module(self, path: str, module: nn.Module) -> None:
        self.entries[path, ""] = type(module)
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    self.entries[path, key] = self._weight(tensor)
                    if tensor is not None:
                        self.tensors.append(tensor)
                        self.firsts.setdefault(name, _Place(value, key, tensor, tensor.dtype, tensor.device))
            elif name == "_modules":
                for key, child in value.items():
                    self.entries[path, key] = None if child is None else self._number(child)[0]
            elif name not in _BOOKKEEPING and (name not in _HOOKS or value):
                self.entries[path, name] = self._entry(value)

    def forget(self, live: frozenset[str]) -> None:
        """Drops what modules at these paths hold: they run as they are."""
        for path, name in list(self.entries):
            if any((path == each and name) or path.startswith(f"{each}.") for each in live):
                del self.entries[path, name]

    def _number(self, thing: object) -> tuple[int, bool]:
        """Its number, and whether it is met for the first time."""
        first = id(thing) not in self._met
        return self._met.setdefault(id(thing), len(self._met)), first

    def _weight(self, tensor: Tensor | None) -> Entry:
        if tensor is None:
            return None
        inner = inner_tensors(tensor)
        if len(inner) == 1 and inner[0] is tensor:
            return self._number(tensor)[0], type(tensor), kind(tensor)
        meta = self._entry(tensor.__tensor_flatten__()[1])  # type: ignore[attr-defined]
        return self._number(tensor)[0], type(tensor), kind(tensor), meta, *map(kind, inner)

    def _entry(self, value: Any) -> Entry:
        cls = type(value)
        if cls in _PLAIN or isinstance(value, Enum):
            return cls, value  # 1, 1.0 and True are not the same to a forward
        if isinstance(value, Tensor):
            return _Same(value), kind(value)
        if isinstance(value, dict | list | tuple | set | frozenset):
            return self._container(value)
        if isinstance(value, functools.partial):
            return self._container((value.func, value.args, value.keywords))
        if isinstance(value, nn.Module | type | FunctionType) or not hasattr(value, "__dict__"):
            return _Same(value)
        if (mover := settings(value)) is not None:
            return mover
        number, first = self._number(value)
        return (cls, self._container(vars(value))) if first else (cls, number)

    def _container(self, value: Any) -> Entry:
        if id(value) in self._open:
            return type(value)
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                return type(value), *((self._entry(key), self._entry(each)) for key, each in value.items())
            if isinstance(value, set | frozenset):
                return type(value), frozenset(map(self._entry, value))
            return type(value), *map(self._entry, value)
        finally:
            self._open.discard(id(value))


def kind(tensor: Tensor) -> Entry:
    """What compiled code relies on; another tensor of the same kind can take its place."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.layout
