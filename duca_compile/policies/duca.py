"""DuCa, dual feature caching (arXiv 2412.18911): aggressive and conservative steps between full ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duca_compile.core.steps import StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.tokens import TokenCaching


@dataclass(frozen=True)
class DuCa(TokenCaching):
    """After each full step, partial and skip steps alternate until the interval ends.

    Attributes, beside those of ``TokenCaching``:
        selection: the default is the method's second version ("Rethinking Token-wise Feature Caching"): random choice
            matches scores, needs no attention to score by, and full steps emit nothing for it. "v_norm" is the first.
        first: which of the two comes right after a full step when ``interval`` counts up.

    Raises:
        PolicyError: an invalid parameter.
    """

    first: Literal["partial", "skip"] = "partial"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in ("partial", "skip"):
            raise PolicyError(f"first={self.first!r} is unknown; choose 'partial' or 'skip'")

    @property
    def name(self) -> str:
        return f"DuCa (N={self._interval.length})"

    def between(self, residue: int) -> StepKind:
        return StepKind.PARTIAL if (residue % 2 == 1) == (self.first == "partial") else StepKind.SKIP
