"""The policy that caches nothing: what every other one is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.core.steps import Step, StepKind
from duca_compile.policies.base import Policy


@dataclass(frozen=True)
class Uncached(Policy):
    """Every step in full, bit for bit the model's own results under the eager backend."""

    @property
    def name(self) -> str:
        return "uncached"

    @property
    def caches(self) -> bool:
        return False

    def steps(self, total: int | None) -> Iterator[Step]:
        for _ in count() if total is None else range(total):
            yield Step(StepKind.FULL)
