"""Tells steps, passes and requests apart from the timesteps of the calls alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_PASSES = 8  # calls at one timestep beyond this are taken for new requests, so that state stays bounded


class Tick(NamedTuple):
    """Where one call falls: ``step`` of the request and ``pass_index`` among the calls at that timestep.

    ``timestep`` is its value, the same for all rows; None where it differs by row or was not read.
    """

    step: int
    pass_index: int
    new_request: bool
    timestep: float | None = None


class StepClock:
    """A changed timestep is a new step; one that jumps back against the loop's direction is a new request.

    Calls that repeat a timestep are further passes of the same step (the unconditional pass of separate
    classifier-free guidance, the second stage of a solver). Values are compared; on an accelerator, where reading one
    waits for the device, they are not read while the timesteps are views of one schedule, as ``for t in timesteps``
    gives: their order in memory says the same.
    """

    def __init__(self, total: int | None) -> None:
        self.expect(total)
        self.reset()

    def expect(self, total: int | None, monotone: bool = True) -> None:
        """Says how many steps a request has, and whether its timesteps keep one direction."""
        self._total, self._monotone = total, monotone

    def reset(self) -> None:
        """The next call starts a new request."""
        self._step, self._pass = -1, 0
        self._first: _Seen | None = None
        self._last: _Seen | None = None

    def tick(self, timestep: Tensor) -> Tick:
        now = _Seen(timestep)
        if self._first is None or self._last is None:
            return self._start(now)
        order = _order(self._last, now)
        if order == 0:
            if self._pass + 1 >= MAX_PASSES:
                return self._start(now)
            self._pass += 1
            return Tick(self._step, self._pass, False, now.single)
        if self._turns_back(self._first, self._last, now):
            return self._start(now)
        self._step, self._pass, self._last = self._step + 1, 0, now
        return Tick(self._step, 0, False, now.single)

    def _start(self, now: _Seen) -> Tick:
        self._step, self._pass, self._first, self._last = 0, 0, now, now
        return Tick(0, 0, True, now.single)

    def _turns_back(self, first: _Seen, last: _Seen, now: _Seen) -> bool:
        if self._step == 0 or now.rewrites(last):  # no direction yet, or none to be had
            return self._total is not None and self._step + 1 >= self._total
        if not self._monotone:
            return False
        by_memory = now.shares_schedule(last) and last.shares_schedule(first)
        return _order(last, now, by_memory) != _order(first, last, by_memory)


class _Seen:
    """One timestep: held, so that its memory is not handed to the next one, and read only if need be."""

    __slots__ = ("_tensor", "_value", "_version", "single")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, version(tensor)
        self._value: tuple[float, ...] | None = None
        self.single: float | None = None  # the value, where it is one for all rows and has been read
        if self._version < 0 or tensor.is_cpu:  # what may be rewritten unseen is read now
            self._read()

    def _read(self) -> tuple[float, ...]:
        values = self._tensor.flatten().tolist()
        if len(values) == 1 or len(set(values)) == 1:
            self.single = float(values[0])
            self._value = (self.single,)
        else:
            self._value = tuple(map(float, values))
        return self._value

    @property
    def value(self) -> tuple[float, ...]:
        return self._read() if self._value is None else self._value

    @property
    def place(self) -> int:
        return self._tensor.data_ptr()

    def shares_schedule(self, other: _Seen) -> bool:
        """Whether both are unread views of the same memory, so that their places can stand for their values."""
        unread = self._value is None and other._value is None
        return unread and self._tensor.untyped_storage().data_ptr() == other._tensor.untyped_storage().data_ptr()

    def rewrites(self, other: _Seen) -> bool:
        """Whether this is the other's memory on an accelerator, written since: the old value is lost."""
        if self._value is not None or other._value is not None:
            return False
        return self.place == other.place and self._version != other._version


def _order(before: _Seen, after: _Seen, by_memory: bool | None = None) -> int:
    """0 where both hold the same timestep, else the sign of the change."""
    old, new = before.single, after.single
    if old is not None and new is not None:
        return (new > old) - (new < old)
    if after.rewrites(before):
        return 1
    if by_memory if by_memory is not None else after.shares_schedule(before):
        return (after.place > before.place) - (after.place < before.place)
    return (after.value > before.value) - (after.value < before.value)


def version(tensor: Tensor) -> int:
    """How often the tensor was written in place; -1 for inference tensors and numpy's arrays, which do not count."""
    return -1 if isinstance(tensor, np.ndarray) or tensor.is_inference() else tensor._version


def held(tensor: Tensor) -> Tensor:
    """It, or a copy where nothing would tell that it was written to."""
    return tensor.copy() if isinstance(tensor, np.ndarray) else tensor


@dataclass(frozen=True)
class Sight:
    """Tensors as they were at one time: the same objects, not written to since, still hold the same.

    Of numpy's arrays, which do not tell, the values are compared.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Sight:
        """It is safe from what is written to arrays later."""
        return Sight(tuple(map(held, tensors)), tuple(map(version, tensors)))

    def holds_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are they, and hold what they held; asked at every call."""
        if len(tensors) != len(self.tensors):
            return False
        for now, then, at_version in zip(tensors, self.tensors, self.versions, strict=True):
            if now is not then or at_version < 0 or now._version != at_version:
                arrays = isinstance(now, np.ndarray) and isinstance(then, np.ndarray)
                if not arrays or not np.array_equal(now, then):
                    return False
        return True
