"""Policies that decide the kind of a step from what is measured in that step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Literal

from duca_compile.core.steps import Probe, Step, Verify
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Policy

DecidePer = Literal["batch", "row", "pair"]


class Decider(ABC):
    """Decides the steps of one guidance pass of one request, for the whole batch or for some of its rows."""

    @abstractmethod
    def propose(self, index: int) -> Step:
        """What step ``index`` would be, before anything is measured. The first step that it is asked for is full.

        Steps are asked for in order, and none is left out.

        Args:
            index: the step, counted from 0.
        """

    @abstractmethod
    def decide(self, index: int, proposed: Step, measured: float | None) -> Step:
        """What step ``index`` is: ``proposed``, or a full step instead.

        Args:
            index: the step, counted from 0.
            proposed: what ``propose`` returned for it.
            measured: the largest value over the decider's batch rows; None if nothing was measured.
        """


class AdaptivePolicy(Policy):
    """A policy whose steps depend on what is measured. ``steps`` gives the cheapest ones that it may choose."""

    @property
    @abstractmethod
    def measure(self) -> Verify | Probe:
        """What decisions are based on."""

    @property
    @abstractmethod
    def per(self) -> DecidePer:
        """Which batch rows decide together.

        "batch": all of them, by the row with the largest measured value; "row": each for itself; "pair": rows i and
        i + batch / 2, the two halves of classifier-free guidance.
        """

    @property
    @abstractmethod
    def choices(self) -> tuple[Step, ...]:
        """Every step that its deciders may propose or decide on, each once; the full step comes first."""

    def planned(self, total: int | None) -> Iterator[Step]:
        """The same as ``steps``: caches are kept until the last step has been decided."""
        return self.steps(total)

    def steps(self, total: int | None) -> Iterator[Step]:
        """What its decider decides if nothing is measured."""
        decider = self.decider(total)
        for index in count() if total is None else range(total):
            yield decider.decide(index, decider.propose(index), None)

    @abstractmethod
    def decider(self, total: int | None) -> Decider:
        """A new decider, for one request of ``total`` steps; None if the number is not known."""


def check_per(per: str) -> None:
    """Raises PolicyError unless ``per`` is a ``DecidePer``."""
    if per not in ("batch", "row", "pair"):
        raise PolicyError(f"decide_per={per!r} is unknown; choose 'batch', 'row' or 'pair'")
