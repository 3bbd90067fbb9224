"""Finds the steps and requests of a loop from the timesteps of its calls, and from what is reported about them."""

from __future__ import annotations

from enum import Enum
from math import floor, frexp, log2
from typing import NamedTuple

from numpy import ndarray

from duca_compile.core.tensors import Array, TensorVersions, version
from duca_compile.errors import InternalError

SAME_TIME = 4e-6  # timesteps with a smaller relative difference are equal: samplers recompute them with exp and log
NO_TIME = 2e-6  # and so are those whose difference is a smaller share of the loop's first timestep, for values near 0
_BITS = {"bfloat16": 8, "float16": 11}  # significant bits, with the leading one
_NO_CALL = "the clock has seen no call to compare with"
_ROUNDED = 2  # rounding can merge neighbours that are at most this many spacings apart


class CallPosition(NamedTuple):
    """Where one call falls.

    Attributes:
        step: the step of the request, counted from 0.
        pass_index: which guidance pass it is, among the calls of its name at that timestep.
        new_request: whether it starts a request.
        timestep: its value, if it is the same for all batch rows and was read.
        condition: what the pass is conditioned on: the same object for as long as that stays the same.
    """

    step: int
    pass_index: int
    new_request: bool
    timestep: float | None = None
    condition: TensorVersions | None = None


class Transition(Enum):
    """How a call relates to the one before it."""

    NEW_REQUEST = "the first of a request"
    SAME_STEP = "another one of the same step"
    NEXT_STEP = "the first of the next step"


# Enum lookups are slow in some versions of Python.
NEW_REQUEST, SAME_STEP, NEXT_STEP = Transition.NEW_REQUEST, Transition.SAME_STEP, Transition.NEXT_STEP


class ReportedStep(NamedTuple):
    """The step that the caller or a scheduler reports.

    Attributes:
        step: counted from 0.
        by_caller: whether the caller reports it; a scheduler need not know of every call.
    """

    step: int
    by_caller: bool


class StepClock:
    """Finds steps and requests from timesteps alone.

    Another timestep is a new step; one that goes back against the loop's direction is a new request. Calls that repeat
    a timestep are further passes of the same step (the unconditional pass of classifier-free guidance, the second stage
    of a solver), unless the caller of ``advance`` decides otherwise, from more than timesteps.

    Timesteps are compared by value. On an accelerator, where reading a value waits for the device, they are not read as
    long as they are views of one schedule, as ``for t in timesteps`` gives: then their order in memory is enough.

    Args:
        total: the number of steps of a request, if it is known.
    """

    def __init__(self, total: int | None) -> None:
        self.expect(total)
        self.reset()

    def expect(self, total: int | None, monotone: bool = True) -> None:
        """Sets the number of steps of a request, and whether its timesteps keep one direction."""
        self.total, self._monotone = total, monotone

    def reset(self) -> None:
        """The next call starts a new request."""
        self.step, self._pass = -1, 0
        self._first: _Timestep | None = None
        self._previous: _Timestep | None = None  # of the step before the last one
        self._last: _Timestep | None = None
        self._now: _Timestep | None = None  # of the call that is being classified
        self._scale = 0.0  # the first timestep
        self._sense = 0  # the sign of the timesteps' change, once two values were read
        self._last_reported: ReportedStep | None = None
        self._reported: ReportedStep | None = None  # of the call that is being classified

    def locate(self, timestep: Array, reported: ReportedStep | None = None) -> CallPosition:
        """The position of a call, from its timestep and what is reported alone."""
        transition = self.classify(timestep, reported)
        time = self.advance(transition)
        return CallPosition(self.step, self._pass, transition is NEW_REQUEST, time)

    def classify(self, timestep: Array, reported: ReportedStep | None = None) -> Transition:
        """The transition to a call, by its timestep and what is reported. ``advance`` must follow."""
        now = self._now = _Timestep(timestep)
        self._reported = reported
        if self._last is None:
            return NEW_REQUEST
        if reported is not None:
            if reported.by_caller:
                return _compared(reported.step, self.step)
            if self._last_reported is not None and reported.step != self._last_reported.step:
                back = self._direction(now)[0] and self._goes_back(now, _order(self._last, now, None, self._scale))
                return NEW_REQUEST if back else _compared(reported.step, self._last_reported.step)
        order = _order(self._last, now, None, self._scale)
        if order == 0:
            return SAME_STEP
        if order == self._sense and now.single is not None:  # the usual case
            return NEXT_STEP
        return NEW_REQUEST if self._turns_back(now, order) else NEXT_STEP

    def advance(self, transition: Transition) -> float | None:
        """Makes the transition to the call that was classified.

        Returns:
            Its timestep, if it is the same for all batch rows and was read.
        """
        now, last = self._now, self._last
        if now is None:
            raise InternalError(_NO_CALL)
        if transition is SAME_STEP:
            self._pass += 1
            return now.single
        reported, before = self._reported, self._last_reported
        if transition is NEW_REQUEST:
            self.step = 0
            self._first, self._previous, self._sense = now, None, 0
            self._scale = now.single or 0.0
        else:
            if last is None:
                raise InternalError(_NO_CALL)
            self.step += 1 if before is None or reported is None else max(1, reported.step - before.step)
            if now.single is None and now.rewrites(last):  # the direction is that of the steps to come
                now.read()
                self._first, self._previous = now, None
            else:
                self._previous = last
                if not self._sense and now.single is not None:
                    self._sense = self._direction(now)[0] or _order(last, now)
        if reported is not None and reported.by_caller:
            self.step = reported.step
        self._pass, self._last, self._last_reported = 0, now, reported
        return now.single

    @property
    def advances(self) -> bool:
        """Whether the timestep of the classified call is another element of the last one's schedule tensor."""
        return self._now is not None and self._last is not None and self._now.is_elsewhere(self._last)

    @property
    def step_given(self) -> bool:
        """Whether the caller reported the step of the classified call."""
        return self._reported is not None and self._reported.by_caller

    @property
    def coarse(self) -> bool:
        """Whether the dtype of the timesteps may round neighbours to one value."""
        return self._now is not None and self._now.spacing(typed=True) is not None

    @property
    def rounded(self) -> bool | None:
        """Whether a repeated timestep may be the next one, rounded to the same value; None at the first step of a loop.

        Schedules are smooth: where the previous change was several spacings of the dtype, rounding merges nothing.
        """
        now, last, before = self._now, self._last, self._previous
        if now is None or last is None or self._reported is not None or now.is_at(last):
            return False
        if before is None:
            return None if self.coarse else False
        spacing = max((s for s in (now.spacing(), before.spacing()) if s is not None), default=0.0)
        if not spacing or before.spacing() is None or last.single is None or before.single is None:
            return False
        return abs(last.single - before.single) <= _ROUNDED * spacing

    def is_midway(self, start: bool) -> bool:
        """Whether the classified call goes back within the loop, or with ``start``, to its first timestep."""
        first, last, now = self._first, self._last, self._now
        if first is None or last is None or now is None or (self.total is not None and self.step + 1 >= self.total):
            return False
        direction, order = _order(first, last), _order(first, now, None, self._scale)
        return direction != 0 and order in ((0, direction) if start else (direction,))

    def _turns_back(self, now: _Timestep, order: int) -> bool:
        """Whether another timestep, which changed in the direction ``order``, starts a request."""
        last = self._last
        if last is None:
            raise InternalError(_NO_CALL)
        if (self._sense or self._direction(now)[0]) and not now.rewrites(last):
            return self._goes_back(now, order)
        return self.total is not None and self.step + 1 >= self.total  # the direction is not known

    def _goes_back(self, now: _Timestep, order: int) -> bool:
        """Whether a timestep goes against the direction of the steps so far."""
        if not self._monotone:
            return False
        if self._sense and now.single is not None:
            return order == -self._sense
        if self._last is None:
            raise InternalError(_NO_CALL)
        direction, by_memory = self._direction(now)
        return _order(self._last, now, by_memory, self._scale) == -direction

    def _direction(self, now: _Timestep) -> tuple[int, bool]:
        """The sign of the timesteps' change so far, and whether it was found from their order in memory."""
        first, last = self._first, self._last
        if first is None or last is None:
            raise InternalError(_NO_CALL)
        by_memory = now.shares_schedule(last) and last.shares_schedule(first)
        return _order(first, last, by_memory), by_memory


def _compared(now: int, before: int) -> Transition:
    if now == before:
        return SAME_STEP
    return NEXT_STEP if now > before else NEW_REQUEST


class _Timestep:
    """One timestep. The tensor is referenced, so that its memory is not reused, and read only if needed.

    Attributes:
        single: the value, if it is the same for all batch rows and was read.
    """

    __slots__ = ("_tensor", "_value", "_version", "single")

    def __init__(self, tensor: Array) -> None:
        self._tensor, self._version = tensor, version(tensor)
        self._value: tuple[float, ...] | None = None
        self.single: float | None = None
        if self._version < 0 or tensor.is_cpu:  # a tensor without a version may be overwritten unnoticed
            self.read()

    def read(self) -> tuple[float, ...]:
        tensor = self._tensor
        values = (tensor if tensor.ndim == 1 else tensor.flatten()).tolist()
        if len(values) == 1 or len(set(values)) == 1:
            self.single = float(values[0])
            self._value = (self.single,)
        else:
            self._value = tuple(map(float, values))
        return self._value

    @property
    def value(self) -> tuple[float, ...]:
        return self.read() if self._value is None else self._value

    @property
    def address(self) -> int:
        address: int = self._tensor.data_ptr()
        return address

    def shares_schedule(self, other: _Timestep) -> bool:
        """Whether both are unread views of the same memory, so that their addresses can stand for their values."""
        return self._value is None and other._value is None and self._shares_memory(other)

    def _shares_memory(self, other: _Timestep) -> bool:
        one, two = self._tensor, other._tensor
        if isinstance(one, ndarray) or isinstance(two, ndarray):
            return False
        return bool(one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr())

    def is_at(self, other: _Timestep) -> bool:
        """Whether this is the same memory, unchanged."""
        same = self._version == other._version >= 0 and self.address == other.address
        return same and self._shares_memory(other)

    def is_elsewhere(self, other: _Timestep) -> bool:
        """Whether both are views of one tensor, at different addresses."""
        return self._shares_memory(other) and self.address != other.address

    def rewrites(self, other: _Timestep) -> bool:
        """Whether this is the same memory on an accelerator, overwritten, so that the old value is lost."""
        if self._value is not None or other._value is not None:
            return False
        return self.address == other.address and self._version != other._version

    def spacing(self, typed: bool = False) -> float | None:
        """The distance to the next number in the dtype that may have rounded it; None if none seems to have.

        With ``typed``, only the tensor's own dtype counts. Else a value in a wider dtype that a narrow one can hold may
        have been rounded to it before.
        """
        if self.single is None:
            return None
        kind = str(self._tensor.dtype).removeprefix("torch.")
        if "int" in kind:
            return 1.0
        bits = _BITS.get(kind)
        if bits is None and not typed:
            bits = next((bits for bits in _BITS.values() if _holds(self.single, bits)), None)
        return None if bits is None else 2.0 ** (floor(log2(abs(self.single) or 1.0)) + 1 - bits)


def _holds(value: float, bits: int) -> bool:
    """Whether ``bits`` significant bits can hold the value."""
    return float(frexp(value)[0] * 2.0**bits).is_integer()


def _order(before: _Timestep, after: _Timestep, by_memory: bool | None = None, scale: float = 0.0) -> int:
    """0 if both are the same timestep of a loop that starts with ``scale``, else the sign of the change."""
    old, new = before.single, after.single
    if old is not None and new is not None:
        if same_time(old, new, scale):
            return 0
        return 1 if new > old else -1
    if after.rewrites(before):
        return 1
    if after.is_at(before):
        return 0
    if by_memory if by_memory is not None else after.shares_schedule(before):
        return (after.address > before.address) - (after.address < before.address)
    return (after.value > before.value) - (after.value < before.value)


def same_time(one: float, other: float, scale: float) -> bool:
    """Whether two timesteps of a loop that starts with ``scale`` are equal but for rounding."""
    return abs(one - other) <= SAME_TIME * abs(one) + NO_TIME * abs(scale)
