"""ToCa, token-wise feature caching (arXiv 2410.05317): cached steps recompute the tokens that matter most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duca_compile.core.steps import StepKind
from duca_compile.policies.base import Selection, SelectionKind
from duca_compile.policies.schedule import Interval
from duca_compile.policies.tokens import TokenCaching


@dataclass(frozen=True)
class ToCa(TokenCaching):
    """Every step between two full ones is partial.

    Attributes, beside those of ``TokenCaching``:
        selection: "attention" refreshes the tokens that others attend to most (s1), "entropy" those whose
            cross-attention to the prompt is most spread out (s2). By its name alone, a selection adds 0.25 of the steps
            since a token was computed over the interval (s3); a ``Selection`` sets this, and the bonus of the best
            token of each patch (s4).

    Raises:
        PolicyError: an invalid parameter.
    """

    staleness: ClassVar[float] = 0.25

    interval: int | Interval = 4
    selection: SelectionKind | Selection = "attention"

    @property
    def name(self) -> str:
        return f"ToCa (N={self._interval.length})"

    def between(self, residue: int) -> StepKind:
        return StepKind.PARTIAL
