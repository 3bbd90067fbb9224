"""What was measured so far, in a file that is written whole after each trial, so that tuning can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from duca_compile.core.files import atomic_write
from duca_compile.core.steps import StepKind
from duca_compile.errors import UsageError
from duca_compile.policies import Policy
from duca_compile.policies.files import as_fields

FILE = "trials.json"
_FORMAT = 1
_CLOSE = 1e-2  # relative difference of values up to which they are of the same calls


@dataclass(frozen=True)
class Trial:
    """One call with one policy.

    Attributes:
        policy: the policy.
        call: the number of the call.
        quality: how close the result is to the uncached one.
        seconds: wall time of the call, without compilation.
        uncached_seconds: the same without caching.
        cache_bytes: the most bytes that caches held.
        letters: the kind of each step of the first pass, by its letter.
        step_seconds: seconds of a call of the model, by the letter of the step's kind.
        full_seconds: seconds of an uncached call of the model.
    """

    policy: Policy
    call: int
    quality: float
    seconds: float
    uncached_seconds: float
    cache_bytes: int
    letters: str
    step_seconds: Mapping[str, float]
    full_seconds: float

    @property
    def speedup(self) -> float:
        """Over the uncached loop; no more than 1 if all steps were full, since any difference is chance then."""
        speedup = self.uncached_seconds / self.seconds
        return speedup if cached(self.letters) else min(1.0, speedup)


def cached(letters: str) -> bool:
    """Whether any of these steps is not full."""
    return any(letter != StepKind.FULL.letter for letter in letters)


_FIELDS = {field.name for field in fields(Trial)} - {"policy"}


class Journal:
    """The trials of one tuning. With a folder, they are on disk, and those of an earlier process are known.

    Args:
        folder: where the file is; None keeps nothing.
        identity: what must be the same for trials of an earlier process to count.
        signature: some values of each uncached result.

    Raises:
        UsageError: the file is of another tuning, or is damaged; or the folder cannot be written to.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], signature: Sequence[Sequence[float]]) -> None:
        self._path = None if folder is None else folder / FILE
        self._identity, self._signature = dict(identity), [list(values) for values in signature]
        self._known: dict[tuple[str, int], dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            self._known = self._read(self._path)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, policy: Policy, call: int) -> Trial | None:
        """The trial of a policy on a call; None if there is none."""
        found = self._known.get((_key(policy), call))
        return None if found is None else Trial(policy, **found)

    def add(self, trial: Trial) -> None:
        """Notes a trial, and writes all of them."""
        values = {name: getattr(trial, name) for name in _FIELDS}
        self._known[_key(trial.policy), trial.call] = values
        if self._path is None:
            return
        trials = [{"setting": key, **found} for (key, _), found in self._known.items()]
        content = {"format": _FORMAT, "of": self._identity, "signature": self._signature, "trials": trials}
        try:
            with atomic_write(self._path) as temporary:
                temporary.write_text(json.dumps(content, indent=1))
        except OSError as error:
            raise UsageError(f"cannot write {self._path}: {error.strerror}") from error

    def _read(self, path: Path) -> dict[tuple[str, int], dict[str, Any]]:
        try:
            content = json.loads(path.read_text())
            if content["format"] != _FORMAT:
                raise ValueError("another version of duca_compile wrote it")
            identity, signature = dict(content["of"]), content["signature"]
            trials = {(each.pop("setting"), each["call"]): each for each in content["trials"]}
            if any(each.keys() != _FIELDS for each in trials.values()):
                raise ValueError("its trials have other fields")
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} cannot be resumed: {error}; remove it, or choose another folder") from error
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise _of_another(path, f"{name}={identity.get(name)!r}, and now it is {value!r}")
        if not _alike(signature, self._signature):
            raise _of_another(path, "other calls, noise or weights: its uncached results differ")
        return trials


def _of_another(path: Path, difference: str) -> UsageError:
    return UsageError(f"{path} belongs to a tuning with {difference}; choose another folder, or remove it")


def _key(policy: Policy) -> str:
    try:
        return json.dumps(as_fields(policy), sort_keys=True)
    except UsageError:  # of the user's own: it says all in its repr, or is not found again
        return repr(policy)


def _alike(one: Any, other: Sequence[Sequence[float]]) -> bool:
    if [len(values) for values in one] != [len(values) for values in other]:
        return False
    scale = max((abs(value) for values in other for value in values), default=1.0) or 1.0
    pairs = ((a, b) for values, others in zip(one, other, strict=True) for a, b in zip(values, others, strict=True))
    return all(math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE * scale) for a, b in pairs)
