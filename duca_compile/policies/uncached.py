"""The policy that caches nothing, which all others are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.core.steps import Step, StepKind
from duca_compile.policies.base import Policy


@dataclass(frozen=True)
class Uncached(Policy):
    """Every step is full.

    Under the eager backend, results equal the model's own, bit for bit. Loop-invariant values are still computed only
    once per request.
    """

    @property
    def name(self) -> str:
        return "uncached"

    @property
    def caches(self) -> bool:
        return False

    def steps(self, total: int | None) -> Iterator[Step]:
        for _ in count() if total is None else range(total):
            yield Step(StepKind.FULL)
