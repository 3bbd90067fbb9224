"""Policies that decide a step's kind from what is measured in that step. No graph code here: plain numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

from duca_compile.core.steps import Probe, Step, Verify
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Policy

DecidePer = Literal["batch", "row", "pair"]


class Decider(ABC):
    """Decides the steps of one pass of one request, for the whole batch or for some of its rows."""

    @abstractmethod
    def propose(self, index: int) -> Step:
        """What step ``index`` is to be, as far as that is known before anything ran; the first one asked for is full.

        Steps are asked for in order, none is left out.
        """

    @abstractmethod
    def decide(self, index: int, proposed: Step, measured: float | None) -> Step:
        """What the step is: ``proposed``, or a full one in its place.

        ``measured`` is the largest value over the decider's rows; None where nothing was measured.
        """


class AdaptivePolicy(Policy):
    """A policy whose steps depend on what is measured; ``steps`` gives the cheapest ones that it may choose."""

    @property
    @abstractmethod
    def measure(self) -> Verify | Probe:
        """What decisions are made from."""

    @property
    @abstractmethod
    def per(self) -> DecidePer:
        """Who decides: the strictest row for all, each row for itself, or both halves of guidance together."""

    @property
    @abstractmethod
    def choices(self) -> tuple[Step, ...]:
        """All steps that its deciders may propose or decide on, each once; the full one comes first."""

    def planned(self, total: int | None) -> Iterator[Step]:
        """The same as ``steps``: what is cached is kept until the last step has been decided."""
        return self.steps(total)

    @property
    def change(self) -> bool:
        """Whether skip steps add the cached change of the streams to their starts, rather than restore the end."""
        return False

    @abstractmethod
    def decider(self, total: int | None) -> Decider:
        """A new decider, for one request of ``total`` steps."""


def check_per(per: str) -> None:
    """Raises PolicyError where ``per`` names nobody who decides."""
    if per not in ("batch", "row", "pair"):
        raise PolicyError(f"decide_per={per!r} is unknown; choose 'batch', 'row' or 'pair'")
