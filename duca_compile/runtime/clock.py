"""Tells steps, passes and requests apart from the timesteps of the calls alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_PASSES = 8  # calls at one timestep beyond this are taken for new requests, so that state stays bounded


@dataclass(frozen=True)
class Tick:
    """Where one call falls: ``step`` of the request and ``pass_index`` among the calls at that timestep."""

    step: int
    pass_index: int
    new_request: bool


class StepClock:
    """A changed timestep is a new step; one that jumps back against the loop's direction is a new request.

    Calls that repeat a timestep are further passes of the same step (the unconditional pass of separate
    classifier-free guidance, the second stage of a solver). On the CPU the values are read. On an accelerator that
    would wait for the device, so where ``total`` is known steps are told by the tensor's memory and how often it was
    written, and requests by counting; where it is not, the value is read once per call.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self.reset()

    def reset(self) -> None:
        """The next call starts a new request."""
        self._step, self._pass = -1, 0
        self._direction: int | None = None
        self._last: tuple[float, ...] = ()
        self._last_tensor: Tensor | None = None  # held, so that its memory is not handed to the next timestep
        self._last_version = 0

    def tick(self, timestep: Tensor) -> Tick:
        readable = timestep.device.type == "cpu" or self._total is None
        value = _values(timestep) if readable else ()
        if self._step < 0:
            return self._start(timestep, value)
        if self._is_same(timestep, value):
            if self._pass + 1 >= MAX_PASSES:
                return self._start(timestep, value)
            self._pass += 1
            return Tick(self._step, self._pass, False)
        if self._turns_back(value):
            return self._start(timestep, value)
        if value and self._direction is None:
            self._direction = 1 if value > self._last else -1
        return self._enter(self._step + 1, timestep, value)

    def _start(self, timestep: Tensor, value: tuple[float, ...]) -> Tick:
        self._direction = None
        return self._enter(0, timestep, value)

    def _enter(self, step: int, timestep: Tensor, value: tuple[float, ...]) -> Tick:
        self._step, self._pass = step, 0
        self._last, self._last_tensor, self._last_version = value, timestep, _version(timestep)
        return Tick(step, 0, step == 0)

    def _is_same(self, timestep: Tensor, value: tuple[float, ...]) -> bool:
        if value:
            return value == self._last
        last = self._last_tensor
        if last is None or last.data_ptr() != timestep.data_ptr():
            return False
        return self._last_version == _version(timestep)

    def _turns_back(self, value: tuple[float, ...]) -> bool:
        complete = self._total is not None and self._step + 1 >= self._total
        if not value or self._direction is None:
            return complete
        return (1 if value > self._last else -1) != self._direction


def _version(timestep: Tensor) -> int:
    """How often the tensor was written in place; inference tensors do not count."""
    return 0 if timestep.is_inference() else timestep._version


def _values(timestep: Tensor) -> tuple[float, ...]:
    flat = timestep.flatten().tolist()
    return tuple(map(float, flat if len(set(flat)) > 1 else flat[:1]))
