"""The containers among a call's arguments: forward gets copies, and what it writes to them is a result of its graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from duca_compile.errors import CaptureError, first_line
from duca_compile.frontend.objects import attributes
from duca_compile.frontend.snapshot import MISSING, PLAIN_IDS, content
from duca_compile.frontend.trace_check import copy_containers

_LEAVES = (Tensor, bool, int, float, str, type(None), Enum)  # what torch.export accepts, besides containers


def with_other_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with copies of all tensors, which reveals what depends on a tensor's identity."""
    cloned: dict[str, Any] = tree_map_only(Tensor, Tensor.clone, arguments)
    return cloned


class _Step(NamedTuple):
    is_attribute: bool
    key: Any


class Write(NamedTuple):
    """A value that forward put into a container among its arguments."""

    path: tuple[_Step, ...]  # leads from the arguments to the container
    key: _Step
    appends: bool  # whether it follows what a list held

    @property
    def label(self) -> str:
        (_, name), *steps = *self.path, self.key
        return str(name) + "".join(f".{key}" if is_attribute else f"[{key!r}]" for is_attribute, key in steps)

    def put(self, arguments: Mapping[str, Any], value: Any) -> None:
        """Puts a value of another call into the same place among its arguments."""
        container: Any = arguments
        for is_attribute, key in self.path:
            container = vars(container)[key] if is_attribute else container[key]
        if self.appends:
            container.append(value)
        elif self.key.is_attribute:
            vars(container)[self.key.key] = value
        else:
            container[self.key.key] = value


class Containers:
    """The lists, dictionaries and other objects among the arguments of a call, and what they held before it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._known: list[tuple[tuple[_Step, ...], Any, dict[Any, Any]]] = []
        for name, value in arguments.items():
            self._add((_Step(False, name),), value)

    def _add(self, path: tuple[_Step, ...], value: Any) -> None:
        held = _held(value)
        if held is None:
            return
        if not isinstance(value, tuple):
            self._known.append((path, value, held))
        for key, each in held.items():
            self._add((*path, _Step(attributes(value) is not None, key)), each)

    def writes(self) -> list[tuple[Write, Any]]:
        """What was added or replaced, with the values; removing values is allowed."""
        found = []
        for path, container, before in self._known:
            for key, value in _added(container, before):
                appends = isinstance(container, list) and key.key not in before
                found.append((Write(path, key, appends), value))
        return found

    def written(self) -> str | None:
        """The place of a value that was added or replaced, if any."""
        return next((write.label for write, _ in self.writes()), None)

    def only_filled(self) -> bool:
        """Whether the same writes can be made to the containers of another call, and need not be made each time.

        A list that has entries and gets more may grow at each call, which would then be of another kind each time.
        """
        lists = [(value, before) for _, value, before in self._known if isinstance(value, list)]
        return all(len(value) == len(before) or not before or not _added(value, before) for value, before in lists)


def _held(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, position or name; None for anything else."""
    if isinstance(value, dict | list):
        return content(value)
    if isinstance(value, tuple):
        return dict(enumerate(value))
    own = attributes(value)
    return None if own is None else dict(own)


def _added(container: Any, before: dict[Any, Any]) -> list[tuple[_Step, Any]]:
    """The values of a container that it did not hold before, with their keys."""
    now = _held(container) or {}
    if not isinstance(container, list):
        is_attribute = attributes(container) is not None
        new = [key for key, value in now.items() if before.get(key, MISSING) is not value]
        return [(_Step(is_attribute, key), now[key]) for key in new if not _is_default(container, key, before)]
    if len(now) >= len(before):
        places = [place for place, value in now.items() if before.get(place, MISSING) is not value]
        return [(_Step(False, place), now[place]) for place in places]
    rest = iter(before.values())
    return [(_Step(False, i), each) for i, each in now.items() if not any(each is other for other in rest)]


def _is_default(container: dict[Any, Any], key: Any, before: dict[Any, Any]) -> bool:
    """Whether a defaultdict created the value when it was read."""
    if type(container) is not defaultdict or container.default_factory is None or key in before:
        return False
    value = container[key]
    return id(type(value)) in PLAIN_IDS or (type(value) in (list, dict, set) and not value)


def noting(value: Any, note: Callable[[], None]) -> Any:
    """A copy of an argument whose lists and dictionaries call ``note`` before they are written to."""
    if isinstance(value, dict):
        return _noting_class(dict, note)({key: noting(each, note) for key, each in value.items()})
    if isinstance(value, list):
        return _noting_class(list, note)([noting(each, note) for each in value])
    return tuple(noting(each, note) for each in value) if type(value) is tuple else value


def _noting_class(base: type, note: Callable[[], None]) -> type:
    def noted(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            note()
            return method(*args, **kwargs)

        return call

    names = ("__setitem__", "append", "extend", "insert", "update", "setdefault", "__iadd__", "__ior__")
    return type(base.__name__, (base,), {name: noted(getattr(base, name)) for name in names if hasattr(base, name)})


def check_kinds(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Raises CaptureError for an argument that no graph can take."""
    for name, value in arguments.items():
        try:
            tree_flatten_with_path(value)
        except ValueError as error:  # torch can flatten it, but has no names for its parts
            raise CaptureError(
                f"the argument {name} of {type(model).__name__}.forward is or holds a container that torch.export "
                f"cannot take: {first_line(error)} Use a plain dictionary."
            ) from error
    for path, leaf in tree_flatten_with_path(arguments)[0]:
        if not isinstance(leaf, _LEAVES):
            name = keystr(path[:1])[2:-2] + keystr(path[1:])
            raise CaptureError(
                f"the argument {name} of {type(model).__name__}.forward is a {type(leaf).__qualname__}, which no graph "
                "can take. Pass tensors, numbers, strings, or lists, tuples and dictionaries of them; a dataclass may "
                "be registered with torch.utils._pytree.register_dataclass."
            )


def with_writes(model: nn.Module) -> nn.Module | None:
    """A module that also returns what forward writes to containers among its arguments, which then stay as they are.

    It shares all of the model's state. None where the model's forward is wrapped or has hooks, which would see other
    results.
    """
    cls = type(model)
    if "forward" in vars(model) or model._forward_hooks:
        return None

    def forward(self: nn.Module, **arguments: Any) -> tuple[Any, list[Any]]:
        copies = copy_containers(arguments)
        containers = Containers(copies)
        result = cls.forward(self, **copies)
        return result, [value for _, value in containers.writes()]

    view: nn.Module = object.__new__(type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__}))
    object.__setattr__(view, "__dict__", model.__dict__)
    return view


def check_results(model: nn.Module, results: list[Any]) -> None:
    """Raises CaptureError where forward returns anything but tensors and constants."""
    other = next((each for each in results if not isinstance(each, _LEAVES)), None)
    if other is not None:
        raise CaptureError(
            f"{type(model).__name__}.forward returns a {type(other).__qualname__} for these arguments, which no graph "
            "can return. Call the source model (duca_compile.restore), or leave out the option that asks for it."
        )
