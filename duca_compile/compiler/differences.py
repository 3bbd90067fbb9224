"""The differences between two kinds of call, in words, for the log."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from textwrap import shorten

import torch

from duca_compile.frontend.binder import Key

_LONGEST = 60  # characters of a value that is shown


def differences(now: Key, before: Key) -> list[str]:
    """The arguments in which a call differs from an earlier one, with their kinds in both."""
    new, old = _by_argument(now), _by_argument(before)
    names = [name for name in {**new, **old} if new.get(name) != old.get(name)]
    return [f"{name}: {_kinds(old.get(name))} before, {_kinds(new.get(name))} now" for name in names]


def _by_argument(key: Key) -> dict[str, list[Hashable]]:
    *parts, autocast = key.parts
    found: dict[str, list[Hashable]] = {"torch.autocast": [autocast]}
    name = ""
    for part in parts:
        if isinstance(part, str):
            name = part
            found[name] = []
        else:
            found[name].append(part)
    return found


def _kinds(kinds: list[Hashable] | None) -> str:
    if kinds is None:
        return "not given"
    return shorten(", ".join(map(_kind, kinds)), _LONGEST, placeholder=" ...")


def _kind(kind: Hashable) -> str:
    """The kind of one leaf of an argument: a tensor's dtype, shape and device, or a value; else a container."""
    if isinstance(kind, tuple) and isinstance(kind[0], torch.Size):
        shape, dtype, device = kind
        return f"{str(dtype).removeprefix('torch.')}{[*shape]} on {device}"
    if isinstance(kind, tuple):
        return reprlib.repr(kind[1])  # the repr of any object may be long, or raise
    if kind is None or isinstance(kind, torch.dtype):
        return str(kind)
    return "a container"
