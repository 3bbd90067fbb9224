"""Policies in JSON files."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from duca_compile.core.files import atomic_write
from duca_compile.errors import UsageError
from duca_compile.policies.base import Policy
from duca_compile.policies.calibrated import Calibrated

log = logging.getLogger("duca_compile")

FORMAT = 1


def as_fields(policy: Policy) -> dict[str, Any]:
    """A policy of the package in JSON's types: the name of its class, and the values of its fields.

    Raises:
        UsageError: it is of another class, or has a trained predictor.
    """
    name = type(policy).__name__
    if not in_package(policy) or not is_dataclass(policy):
        raise UsageError(
            f"{policy.name} cannot be written to a JSON file: {name} is no policy of duca_compile, or has a predictor"
        )
    return {"policy": name, "fields": {f.name: msgspec.to_builtins(getattr(policy, f.name)) for f in fields(policy)}}


def in_package(policy: Policy) -> bool:
    """Whether a JSON file can hold the policy: it is of the package, and numbers and names are all that it has."""
    return known().get(type(policy).__name__) is type(policy) and policy.predictor is None


def from_fields(written: Mapping[str, Any]) -> Policy:
    """The policy that ``as_fields`` wrote.

    Raises:
        ValueError: it is none, or its fields have impossible values.
    """
    kind = known().get(written["policy"])
    if kind is None:
        raise ValueError(f"policy={written['policy']!r} is not one of {sorted(known())}")
    made: Policy = msgspec.convert(written["fields"], kind)
    return made


def known() -> dict[str, Any]:
    """The policies of the package by the names of their classes."""
    kinds = [kind for kind in _below(Policy) if kind.__module__.startswith(f"{__package__}.")]
    return {kind.__name__: kind for kind in kinds if not inspect.isabstract(kind)}


def _below(kind: type[Any]) -> Iterator[type[Any]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


def save_policy(policy: Policy, path: str | os.PathLike[str], about: dict[str, Any]) -> None:
    """Writes a policy to a JSON file, atomically, with what else is to be known ``about`` it.

    Raises:
        UsageError: the policy cannot be written, or the file.
    """
    text = json.dumps({"format": FORMAT, **as_fields(policy), "about": about}, indent=1)
    try:
        with atomic_write(Path(path)) as temporary:
            temporary.write_text(text + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads a file that ``Tuned.save`` or ``Calibrated.save`` wrote.

    Raises:
        UsageError: there is no such file, or it holds no policy.
    """
    try:
        written = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise _no_policy(path, error) from error
    if isinstance(written, dict) and "measured" in written:
        return Calibrated.load(path)
    try:
        if written["format"] != FORMAT:
            raise ValueError("another version of duca_compile wrote it")
        policy, about = from_fields(written), written.get("about", {})
        missed = about.get("met") is False
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _no_policy(path, error) from error
    if missed:
        log.warning("%s: the wish that it was tuned for was not met; %s is what came closest", path, policy.name)
    return policy


def _no_policy(path: str | os.PathLike[str], error: Exception) -> UsageError:
    return UsageError(f"{path} does not hold a policy: {error}; make one with tune() or calibrate()")
