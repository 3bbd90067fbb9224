"""What is known of a denoising loop before it runs: its steps, and its timesteps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from duca_compile.core.steps import Step
from duca_compile.core.tensors import Array
from duca_compile.policies.base import Policy

REMEMBERED_LOOPS = 8


class LoopSchedule(Protocol):
    """Knows the timesteps of a run of the loop before the run starts, as the scheduler of a pipeline does."""

    def name(self) -> str:
        """What makes the timesteps: requests with another one have nothing in common."""

    def run(self) -> object | None:
        """The current run: another object for each run, or None if it is not known."""

    def timesteps(self, first: Array) -> Sequence[float]:
        """The timestep of each step of this run, from the step whose first model call gets ``first``."""

    def as_called(self, times: Sequence[float], timestep: Array, first: float) -> tuple[float, ...]:
        """``times`` in the unit of the model's calls; the first call gets ``timestep``, whose value is ``first``."""

    def step(self) -> int | None:
        """The current step, counted from the run's first step; None if it is not known."""


class PlannedSteps:
    """The steps of one policy, planned on demand; threads may share it.

    Equal steps are one object, so that looking something up by a step need not compare fields.
    """

    def __init__(self, plan: Callable[[], Iterator[Step]]) -> None:
        self._plan, self._coming, self._lock = plan, plan(), threading.Lock()
        self._unique, self._known = dict[Step, Step](), list[Step]()
        self.at(0)  # a policy that cannot plan raises here

    def __len__(self) -> int:
        """How many steps are planned so far."""
        return len(self._known)

    def at(self, index: int) -> Step | None:
        """The step at ``index``; None after the last one."""
        if index >= len(self._known):
            with self._lock:
                self._extend(index + 1)
        return self._known[index] if index < len(self._known) else None

    def _extend(self, count: int) -> None:
        try:
            for step in islice(self._coming, max(0, count - len(self._known))):
                self._known.append(self._unique.setdefault(step, step))
        except BaseException:  # a generator that has raised is exhausted; a new one raises again for the next caller
            self._coming = islice(self._plan(), len(self._known), None)
            raise


class LoopMemory:
    """The timesteps of earlier loops, and the steps planned for each number of steps.

    A loop that starts with the timestep of an earlier one usually has the same timesteps.
    """

    def __init__(self) -> None:
        self._known: dict[float, tuple[float, ...]] = {}  # by the first timestep
        self._planned: dict[int | None, PlannedSteps] = {}

    def steps(self, policy: Policy, total: int | None) -> PlannedSteps:
        """The policy's steps for a loop of ``total`` steps.

        Raises:
            PolicyError: the policy cannot plan them.
        """
        if total not in self._planned:
            steps = PlannedSteps(lambda: policy.planned(total))
            if total is not None:
                steps.at(total)  # plans all of them, so that an invalid step raises before the loop
            self._planned[total] = steps
        return self._planned[total]

    def remember(self, times: Sequence[float | None]) -> None:
        """Remembers the timesteps of a loop, unless one of them was not read."""
        values = tuple(dict.fromkeys(time for time in times if time is not None))
        if len(values) < 2 or None in times:
            return
        self._known.pop(values[0], None)
        self._known[values[0]] = values
        while len(self._known) > REMEMBERED_LOOPS:
            self._known.pop(next(iter(self._known)), None)

    def starting_at(self, first: float) -> tuple[float, ...]:
        """The timesteps of the last loop that started with ``first``; empty if there was none."""
        return self._known.get(first, ())


def schedule_of_view(timestep: Array) -> tuple[float, ...]:
    """The timesteps from this one on, if it is a view of all of them, as ``for t in scheduler.timesteps`` gives."""
    base = getattr(timestep, "_base", None)
    if base is None or base.dim() != 1 or base.numel() < 2 or base.is_inference() or not base.is_contiguous():
        return ()
    return tuple(dict.fromkeys(map(float, base[timestep.storage_offset() - base.storage_offset() :].tolist())))
