"""ToCa, token-wise feature caching (arXiv 2410.05317): steps between full ones recompute the most important tokens."""

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

    Source: arXiv 2410.05317.

    Attributes:
        interval: number of steps from one full step to the next; an int, or an ``Interval`` that varies along the loop.
        fresh_ratio: share of the MLP tokens that a partial step recomputes, in [0, 1], before the factors below.
        selection: how those tokens are chosen. "attention" recomputes the tokens that others attend to most (the
            paper's s1), "entropy" those whose cross-attention to the prompt is most evenly spread (s2). A name alone
            adds 0.25 times the steps since a token was last computed, over the interval (s3). A ``Selection`` sets that
            weight, and the bonus of the best token of each patch (s4).
        step_factor: multiplies the ratio; a line over the progress of the loop.
        block_factor: multiplies the ratio; a line from the first block (0) to the last (1).
        kind_factor: multiplies the ratio, for each kind of branch ("mlp", "cross_attention"); other kinds are reused.
        text_factor: multiplies the ratio in the text stream of joint-attention models; 0 reuses it.
        latched: whether a step's kind is fixed before it runs. False is the released code: where a full step changes
            the interval so that it no longer counts as full, only its first block runs in full.

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
