"""The state of one denoising loop that all captured shapes of a model share: its steps and what has run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duca_compile.graph import Facts
from duca_compile.policies.base import Policy, Step, StepKind
from duca_compile.runtime.clock import StepClock, Tick, version

log = logging.getLogger("duca_compile")


@dataclass(frozen=True)
class Executed:
    """One call as it ran: for reports and tests."""

    step: int
    pass_index: int
    kind: StepKind
    flops: float
    seconds: float  # of host time; on an accelerator work may still be queued


class Request:
    """Which step a call is, and what the policy wants done at it.

    One request may run through several captured shapes (another prompt length for the unconditional pass, guidance
    switched off half way), so this is not theirs.
    """

    def __init__(self, policy: Policy, total: int | None) -> None:
        self._policy, self._total = policy, total
        self._clock = StepClock(total)
        self._warned = False
        self.number = 0  # counts requests, so that caches know whose they are
        self.history: list[Executed] = []
        self._start()

    def reset(self) -> None:
        """The next call starts a new request."""
        self._clock.reset()

    def _start(self) -> None:
        self.number += 1
        self.history.clear()
        self._steps: list[Step] = []
        self._coming: Iterator[Step] = self._policy.steps(self._total)
        self._opening: dict[str, tuple[Tensor, int]] = {}

    def tick(self, facts: Facts, call: Mapping[str, Tensor]) -> Tick:
        """The clock's verdict, but a first timestep that repeats is a further pass only if the latent does too.

        Anything else at the first timestep is a new request from the same start: another latent, or the very same
        call again.
        """
        tick = self._clock.tick(call[facts.timestep])
        if tick.step == 0 and tick.pass_index > 0 and not self._is_further_pass(facts, call):
            self._clock.reset()
            tick = self._clock.tick(call[facts.timestep])
        if tick.new_request:
            self._start()
        if tick.step == 0:
            self._opening = {name: (tensor, version(tensor)) for name, tensor in call.items()}
        return tick

    def _is_further_pass(self, facts: Facts, call: Mapping[str, Tensor]) -> bool:
        if facts.latent not in self._opening:
            return False
        same = {
            name: name in self._opening and _unchanged(tensor, *self._opening[name])
            for name, tensor in call.items()
            if name != facts.timestep
        }
        return same.pop(facts.latent) and not all(same.values())

    def step_at(self, index: int) -> Step:
        """The policy's step; beyond the planned ones a full step, with one warning."""
        while len(self._steps) <= index:
            step = next(self._coming, None)
            if step is None:
                self._warn(index)
                step = Step(StepKind.FULL)
            self._steps.append(step)
        return self._steps[index]

    def _warn(self, index: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "step %d is more than the %s planned steps; it and later ones are computed in full. Pass "
                "optimize(..., num_inference_steps=N) with the number your scheduler runs.",
                index + 1,
                self._total,
            )


def _unchanged(tensor: Tensor, known: Tensor, at_version: int) -> bool:
    """Whether ``tensor`` holds what ``known`` held at ``at_version``; reads both where it cannot tell otherwise."""
    if version(known) != at_version:
        return False
    return (tensor is known and at_version >= 0) or (tensor.shape == known.shape and torch.equal(tensor, known))
