"""Arguments and results of classes of their own, such as caches of keys and values: torch takes them for containers.

An object is a container if its attributes hold nothing but tensors, plain values, containers and other such objects.
Its class is then registered with torch's pytrees, as ``register_dataclass`` does it. No ``__init__`` runs for copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LEAVES = {Tensor, nn.Parameter, bool, int, float, str, type(None), torch.dtype, torch.device}
_OTHERS = (Tensor, nn.Module, Enum, list, dict, tuple, set, frozenset, str, bytes, int, float)
_HEAP_TYPE = 1 << 9  # the flag of classes that are defined in Python
_registered: set[type] = set()


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Like torch's ``tree_flatten``, after classes that it does not know were registered as far as possible."""
    leaves, spec = pytree.tree_flatten(value)
    while register(leaf for leaf in leaves if type(leaf) not in LEAVES):
        leaves, spec = pytree.tree_flatten(value)
    return leaves, spec


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that counts as a container; None for anything else."""
    return vars(value) if type(value) in _registered else None


def register(values: Iterable[Any]) -> bool:
    """Registers the classes of those values that may be containers; whether there was one."""
    classes = {type(value) for value in values if _is_container(value, set())} - _registered
    for cls in classes:
        _registered.add(cls)
        pytree.register_pytree_node(
            cls,
            _flatten,
            partial(_rebuilt, cls),
            flatten_with_keys_fn=_flatten_with_keys,
            serialized_type_name=f"duca_compile.{cls.__module__}.{cls.__qualname__}.{id(cls)}",
        )
    return bool(classes)


def _is_container(value: Any, seen: set[int]) -> bool:
    """Whether it is an object that holds nothing but data, each other object once."""
    cls = type(value)
    if isinstance(value, _OTHERS) or callable(value) or id(value) in seen:
        return False
    if _base(cls) is None:
        return False
    seen.add(id(value))
    return all(type(each) in LEAVES or _is_container(each, seen) for each in _held(vars(value).values()))


def _base(cls: type) -> type | None:
    """The class whose ``__new__`` makes objects of ``cls``; None if they may hold more than their ``__dict__`` does."""
    base = cls
    while base.__flags__ & _HEAP_TYPE and base.__base__ is not None:
        base = base.__base__
    slots = any(vars(each).get("__slots__") for each in cls.__mro__)
    return base if base in (object, SimpleNamespace) and cls.__dictoffset__ != 0 and not slots else None


def _held(values: Iterable[Any]) -> Iterator[Any]:
    """What these values are, or hold in containers that torch knows."""
    for value in values:
        yield from pytree.tree_leaves(value)


def _flatten(value: Any) -> tuple[list[Any], tuple[str, ...]]:
    return [*vars(value).values()], (*vars(value),)


def _flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(pytree.GetAttrKey(name), each) for name, each in vars(value).items()], (*vars(value),)


def _rebuilt(cls: type, values: Iterable[Any], names: tuple[str, ...]) -> Any:
    base: Any = _base(cls)
    value: Any = base.__new__(cls)
    vars(value).update(zip(names, values, strict=True))
    return value
