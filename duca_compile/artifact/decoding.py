"""Reads the JSON files of an artifact into typed objects.

msgspec does the checking. What this adds is the message of an error: the file, the path of the field, what it must be
and what it is.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from duca_compile.core.text import printable
from duca_compile.errors import ArtifactError

SCHEMA = 1  # the newest format of these files that this version reads, and the one that it writes
MAX_DEPTH = 64  # of nested objects and lists, which recursive code reads later
_SHOWN = 80  # characters of a wrong value that a message quotes
_LARGEST = 2**24  # bytes of a file
_LONGEST = 500  # characters of a message
_MISSING = "Object missing required field "

T = TypeVar("T")


class ImpossibleError(ValueError):
    """A dataclass cannot have such values; the message begins with the name of one of its fields."""


def problem(file: str, what: str) -> ArtifactError:
    """An error about the content of a file; cuts a long description short, and shows control characters as escapes."""
    shown = what if len(what) <= _LONGEST else f"{what[:_LONGEST]}..."
    return ArtifactError(f"{file}: {printable(shown)}")


def read_text(path: Path) -> str:
    """The text of a JSON file of an artifact.

    Raises:
        OSError, ValueError: it is no regular file, is too large, or holds no text.
    """
    if not S_ISREG(path.stat().st_mode):  # a pipe or a device may have no end
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    return data.decode("utf-8")


def parse(text: str, file: str) -> Any:
    """The JSON value in ``text``, in which numbers are finite and no object repeats a name.

    Raises:
        ArtifactError: the text holds anything else; the message begins with ``file``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in entries if names.count(name) > 1)
            raise problem(file, f"an object has more than one field named {repeated!r}")
        return entries

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(f"{digits[:_SHOWN]} is too large for a number")
        return number

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from error
    except RecursionError:
        raise _too_deep(file) from None
    if _deeper_than(MAX_DEPTH, value):
        raise _too_deep(file)
    return value


def decode(value: Any, kind: type[T], file: str, place: str = "") -> T:
    """A JSON value as an instance of a dataclass, and its parts as instances of their annotated types.

    An error that the ``__post_init__`` of a dataclass raises, ``ImpossibleError`` or another ``ValueError``, counts as
    a wrong value.

    Args:
        value: what ``parse`` returned, or a part of it.
        kind: the dataclass.
        file: the name of the file, for messages.
        place: the path of ``value`` in the file, for messages.

    Raises:
        ArtifactError: a field is missing, unknown or wrong.
    """
    try:
        made = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explained(value, kind, file, place, error) from error
    unknown = next(_unknown(value, kind, place), None)
    if unknown is not None:
        raise problem(file, f"{unknown} is unknown in schema {SCHEMA}")
    return made


def _too_deep(file: str) -> ArtifactError:
    return ArtifactError(f"{file} is nested more than {MAX_DEPTH} levels deep, which no artifact of duca_compile is")


def _deeper_than(levels: int, value: Any) -> bool:
    level = [value]
    for _ in range(levels + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unknown(value: Any, kind: Any, place: str) -> Iterator[str]:
    """The paths of fields that their dataclass does not have; msgspec ignores them."""
    kind = _plain_type(kind)
    hints = _hints(kind)
    if hints is not None and isinstance(value, dict):
        yield from (_join(place, name) for name in value if name not in hints)
    for path, part, part_kind in _parts(value, kind, place):
        yield from _unknown(part, part_kind, path)


def _explained(value: Any, kind: Any, file: str, place: str, error: msgspec.ValidationError) -> ArtifactError:
    """The error of the innermost wrong part. msgspec's own message lacks the value, and keys of dictionaries."""
    for path, part, part_kind in _parts(value, kind, place):
        try:
            msgspec.convert(part, part_kind)
        except msgspec.ValidationError as inner:
            return _explained(part, part_kind, file, path, inner)
    reason = str(error)
    if isinstance(error.__cause__, ImpossibleError):
        return problem(file, _join(place, reason))
    if error.__cause__ is not None:  # raised by a dataclass of another package
        return problem(file, f"{place}: {reason}" if place else reason)
    if reason.startswith(_MISSING):
        return problem(file, f"{_join(place, reason.removeprefix(_MISSING).strip('`'))} is missing")
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return problem(file, f"{place or 'the content'} must be {_wanted(kind, reason)}, not {shown}")


def _wanted(kind: Any, reason: str) -> str:
    kind = _plain_type(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {tuple(member.value for member in kind.__members__.values())}"
    if get_origin(kind) is Literal:
        return f"one of {get_args(kind)}"
    if not reason.startswith("Expected "):  # an integer too large for a float
        return "a number of another size"
    return reason.removeprefix("Expected ").partition(", got ")[0].replace("`", "")


def _parts(value: Any, kind: Any, place: str) -> list[tuple[str, Any, Any]]:
    """The parts of a value, with their paths and the types that they must have."""
    kind = _plain_type(kind)
    hints, origin, arguments = _hints(kind), get_origin(kind), get_args(kind)
    if hints is not None and isinstance(value, dict):
        return [(_join(place, name), value[name], hint) for name, hint in hints.items() if name in value]
    if origin is dict and isinstance(value, dict):
        return [(_join(place, name), part, arguments[1]) for name, part in value.items()]
    if origin is tuple and isinstance(value, list):
        return [(f"{place}[{i}]", part, arguments[0]) for i, part in enumerate(value)]
    return []


@cache
def _hints(kind: Any) -> dict[str, Any] | None:
    """The types of the fields of a dataclass; None for another type."""
    return get_type_hints(kind, include_extras=True) if is_dataclass(kind) else None


@cache
def _plain_type(kind: Any) -> Any:
    """A type without its bounds, and without None as an alternative."""
    if get_origin(kind) is Annotated:
        return _plain_type(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        rest = [alternative for alternative in get_args(kind) if alternative is not types.NoneType]
        return _plain_type(rest[0]) if len(rest) == 1 else kind
    return kind


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
