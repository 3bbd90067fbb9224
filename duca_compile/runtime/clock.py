"""Tells steps and requests apart from the timesteps of the calls, and from what is said of them."""

from __future__ import annotations

from enum import Enum
from math import floor, frexp, log2
from typing import NamedTuple

from numpy import ndarray

from duca_compile.core.tensors import Array, TensorVersions, version

SAME_TIME = 4e-6  # timesteps that differ by less, relatively, are one: samplers come back to one by exp and log
NO_TIME = 2e-6  # so are those that differ by less of the loop's first one: near 0 nothing is relative
_BITS = {"bfloat16": 8, "float16": 11}  # of a number, its first one included
_ROUNDED = 2  # neighbours that rounding may make equal are no farther apart than this many of its spacings


class Tick(NamedTuple):
    """Where one call falls: ``step`` of the request and ``pass_index`` among the calls at that timestep.

    ``timestep`` is its value, the same for all rows; None where it differs by row or was not read. ``condition`` is
    what the pass is conditioned on: the same object for as long as that stays.
    """

    step: int
    pass_index: int
    new_request: bool
    timestep: float | None = None
    condition: TensorVersions | None = None


class Move(Enum):
    """What a call is to the one before it."""

    START = "the first of a request"
    AGAIN = "another one of the same step"
    NEXT = "the first of the next step"


START, AGAIN, NEXT = Move.START, Move.AGAIN, Move.NEXT  # looking one up takes a while in some versions of Python


class Place(NamedTuple):
    """Where the loop is, as far as it is said: ``step`` counts from 0."""

    step: int
    by_caller: bool  # else by a scheduler, which need not know of all calls


class StepClock:
    """A changed timestep is a new step; one that jumps back against the loop's direction is a new request.

    Calls that repeat a timestep are further passes of the same step (the unconditional pass of separate
    classifier-free guidance, the second stage of a solver), if nobody who looks at more than timesteps says otherwise.
    Values are compared; on an accelerator, where reading one waits for the device, they are not read while the
    timesteps are views of one schedule, as ``for t in timesteps`` gives: their order in memory says the same.
    """

    def __init__(self, total: int | None) -> None:
        self.expect(total)
        self.reset()

    def expect(self, total: int | None, monotone: bool = True) -> None:
        """Says how many steps a request has, and whether its timesteps keep one direction."""
        self.total, self._monotone = total, monotone

    def reset(self) -> None:
        """The next call starts a new request."""
        self.step, self._pass = -1, 0
        self._first: _Seen | None = None
        self._before: _Seen | None = None  # of the step before the last one
        self._last: _Seen | None = None
        self._now: _Seen | None = None
        self._scale = 0.0  # the first timestep
        self._sense = 0  # the sign of the timesteps' change, once two values were read
        self._place: Place | None = None
        self._said: Place | None = None  # of the call that is looked at

    def tick(self, timestep: Array, place: Place | None = None) -> Tick:
        """By timesteps and what is said alone."""
        move = self.look(timestep, place)
        time = self.go(move)
        return Tick(self.step, self._pass, move is START, time)

    def look(self, timestep: Array, place: Place | None = None) -> Move:
        """What the call is, by its timestep and by what is said; ``go`` has to follow."""
        now = self._now = _Seen(timestep)
        self._said = place
        if self._last is None:
            return START
        if place is not None:
            if place.by_caller:
                return _compared(place.step, self.step)
            if self._place is not None and place.step != self._place.step:
                back = self._direction(now)[0] and self._goes_back(now, _order(self._last, now, None, self._scale))
                return START if back else _compared(place.step, self._place.step)
        order = _order(self._last, now, None, self._scale)
        if order == 0:
            return AGAIN
        if order == self._sense and now.single is not None:  # as most often
            return NEXT
        return START if self._turns_back(now, order) else NEXT

    def go(self, move: Move) -> float | None:
        """Goes where the call that was looked at is. Returns its timestep, if it is one for all rows and was read."""
        now = self._now
        assert now is not None
        if move is AGAIN:
            self._pass += 1
            return now.single
        if move is START:
            said, self.step = self._said, 0
            self._first, self._before, self._sense = now, None, 0
            self._scale = now.single or 0.0
        else:
            said, last = self._place, self._last
            assert last is not None
            self.step += 1 if said is None or self._said is None else max(1, self._said.step - said.step)
            if now.single is None and now.rewrites(last):  # its direction is that of the steps to come
                now.read()
                self._first, self._before = now, None
            else:
                self._before = last
                if not self._sense and now.single is not None:
                    self._sense = self._direction(now)[0] or _order(last, now)
        if self._said is not None and self._said.by_caller:
            self.step = self._said.step
        self._pass, self._last, self._place = 0, now, self._said
        return now.single

    @property
    def advances(self) -> bool:
        """Whether the call that was looked at is at another place of the same schedule than the last one."""
        return self._now is not None and self._last is not None and self._now.is_elsewhere(self._last)

    @property
    def told(self) -> bool:
        """Whether the caller says at which step the call is that was looked at."""
        return self._said is not None and self._said.by_caller

    @property
    def coarse(self) -> bool:
        """Whether the timesteps' type is one that rounds neighbours to one value."""
        return self._now is not None and self._now.spacing(typed=True) is not None

    @property
    def rounded(self) -> bool | None:
        """Whether a timestep that came again may be the next one, rounded; None at the first step of a loop.

        Schedules are smooth: where the change before was of several spacings of the type, rounding merges nothing.
        """
        now, last, before = self._now, self._last, self._before
        if now is None or last is None or self._said is not None or now.is_at(last):
            return False
        if before is None:
            return None if self.coarse else False
        spacing = max((s for s in (now.spacing(), before.spacing()) if s is not None), default=0.0)
        if not spacing or before.spacing() is None or last.single is None or before.single is None:
            return False
        return abs(last.single - before.single) <= _ROUNDED * spacing

    def is_midway(self, start: bool) -> bool:
        """Whether the call that was looked at goes back within the loop, or to its ``start``."""
        first, last, now = self._first, self._last, self._now
        if first is None or last is None or now is None or (self.total is not None and self.step + 1 >= self.total):
            return False
        direction, place = _order(first, last), _order(first, now, None, self._scale)
        return direction != 0 and place in ((0, direction) if start else (direction,))

    def _turns_back(self, now: _Seen, order: int) -> bool:
        """Whether another timestep, ``order`` by that before it, starts a request."""
        last = self._last
        assert last is not None
        if (self._sense or self._direction(now)[0]) and not now.rewrites(last):
            return self._goes_back(now, order)
        return self.total is not None and self.step + 1 >= self.total  # no direction yet, or none to be had

    def _goes_back(self, now: _Seen, order: int) -> bool:
        """Whether it goes against the direction of the steps so far."""
        if not self._monotone:
            return False
        if self._sense and now.single is not None:
            return order == -self._sense
        assert self._last is not None
        direction, by_memory = self._direction(now)
        return _order(self._last, now, by_memory, self._scale) == -direction

    def _direction(self, now: _Seen) -> tuple[int, bool]:
        """The sign of the timesteps' change so far, and whether it is that of their places in memory, as ``now``'s."""
        first, last = self._first, self._last
        assert first is not None and last is not None  # noqa: PT018
        by_memory = now.shares_schedule(last) and last.shares_schedule(first)
        return _order(first, last, by_memory), by_memory


def _compared(now: int, before: int) -> Move:
    if now == before:
        return AGAIN
    return NEXT if now > before else START


class _Seen:
    """One timestep: held, so that its memory is not handed to the next one, and read only if need be."""

    __slots__ = ("_tensor", "_value", "_version", "single")

    def __init__(self, tensor: Array) -> None:
        self._tensor, self._version = tensor, version(tensor)
        self._value: tuple[float, ...] | None = None
        self.single: float | None = None  # the value, where it is one for all rows and has been read
        if self._version < 0 or tensor.is_cpu:  # what may be rewritten unseen is read now
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
    def place(self) -> int:
        address: int = self._tensor.data_ptr()
        return address

    def shares_schedule(self, other: _Seen) -> bool:
        """Whether both are unread views of the same memory, so that their places can stand for their values."""
        return self._value is None and other._value is None and self._shares_memory(other)

    def _shares_memory(self, other: _Seen) -> bool:
        one, two = self._tensor, other._tensor
        if isinstance(one, ndarray) or isinstance(two, ndarray):
            return False
        return bool(one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr())

    def is_at(self, other: _Seen) -> bool:
        """Whether this is the other's memory, not written to since."""
        same = self._version == other._version >= 0 and self.place == other.place
        return same and self._shares_memory(other)

    def is_elsewhere(self, other: _Seen) -> bool:
        """Whether both are views of one tensor, at different places."""
        return self._shares_memory(other) and self.place != other.place

    def rewrites(self, other: _Seen) -> bool:
        """Whether this is the other's memory on an accelerator, written since: the old value is lost."""
        if self._value is not None or other._value is not None:
            return False
        return self.place == other.place and self._version != other._version

    def spacing(self, typed: bool = False) -> float | None:
        """How far from it its next neighbour is, in a type that may have rounded it; None where none has, it seems.

        Of wider types, where not only the type counts (``typed``), a value that a narrow one holds may come of it.
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
    """Whether a number of that many bits is this value."""
    return float(frexp(value)[0] * 2.0**bits).is_integer()


def _order(before: _Seen, after: _Seen, by_memory: bool | None = None, scale: float = 0.0) -> int:
    """0 where both hold the same timestep of a loop of that ``scale``, else the sign of the change."""
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
        return (after.place > before.place) - (after.place < before.place)
    return (after.value > before.value) - (after.value < before.value)


def same_time(one: float, other: float, scale: float) -> bool:
    """Whether two timesteps of a loop that starts with ``scale`` are the same but for the last bits."""
    return abs(one - other) <= SAME_TIME * abs(one) + NO_TIME * abs(scale)
