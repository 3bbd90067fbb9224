"""The containers among a call's arguments: forward gets copies, and may not write to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from duca_compile.errors import CaptureError, first_line
from duca_compile.frontend.snapshot import MISSING, PLAIN_IDS, content

_LEAVES = (Tensor, bool, int, float, str, type(None), Enum)  # what torch.export accepts, besides containers


def with_other_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with copies of all tensors, which reveals what depends on a tensor's identity."""
    cloned: dict[str, Any] = tree_map_only(Tensor, Tensor.clone, arguments)
    return cloned


class Containers:
    """The lists and dictionaries among the arguments of a call, and what they held before it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._known: list[tuple[str, Any, dict[Any, Any]]] = []
        for name, value in arguments.items():
            self._add(name, value)

    def _add(self, place: str, value: Any) -> None:
        if isinstance(value, dict | list):
            self._known.append((place, value, content(value)))
        if isinstance(value, dict | list | tuple):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                self._add(f"{place}[{key!r}]", each)

    def written(self) -> str | None:
        """The place of a value that was added or replaced, if any; removing values is allowed."""
        return next((found for place, *known in self._known if (found := _added(place, *known)) is not None), None)


def _added(place: str, container: Any, before: dict[Any, Any]) -> str | None:
    now = content(container)
    if isinstance(container, dict):
        new = [key for key, value in now.items() if before.get(key, MISSING) is not value]
        return next((f"{place}[{key!r}]" for key in new if not _is_default(container, key, before)), None)
    rest = iter(before.values())
    return next((f"{place}[{i}]" for i, each in now.items() if not any(each is other for other in rest)), None)


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


def check_results(model: nn.Module, results: list[Any]) -> None:
    """Raises CaptureError where forward returns anything but tensors and constants."""
    other = next((each for each in results if not isinstance(each, _LEAVES)), None)
    if other is not None:
        raise CaptureError(
            f"{type(model).__name__}.forward returns a {type(other).__qualname__} for these arguments, which no graph "
            "can return. Call the source model (duca_compile.restore), or leave out the option that asks for it."
        )
