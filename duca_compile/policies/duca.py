"""DuCa, dual feature caching (arXiv 2412.18911): partial and skip steps alternate between full steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duca_compile.core.steps import StepKind
from duca_compile.errors import PolicyError
from duca_compile.policies.tokens import TokenCaching


@dataclass(frozen=True)
class DuCa(TokenCaching):
    """After each full step, partial ("conservative") and skip ("aggressive") steps alternate until the next one.

    Source: arXiv 2412.18911. The default random selection is that of its second version, "Rethinking Token-wise Feature
    Caching", which found it to match scores; full steps then emit none. "v_norm" is that of the first version.

    Attributes:
        interval: number of steps from one full step to the next; an int, or an ``Interval`` that varies along the loop.
        fresh_ratio: share of the MLP tokens that a partial step recomputes, in [0, 1], before the factors below.
        selection: how those tokens are chosen: a kind such as "random", or a ``Selection``.
        step_factor: multiplies the ratio; a line over the progress of the loop.
        block_factor: multiplies the ratio; a line from the first block (0) to the last (1).
        kind_factor: multiplies the ratio, for each kind of branch ("mlp", "cross_attention"); other kinds are reused.
        text_factor: multiplies the ratio in the text stream of joint-attention models; 0 reuses it.
        latched: whether a step's kind is fixed before it runs. False is the released code: where a full step changes
            the interval so that it no longer counts as full, only its first block runs in full.
        first: the kind of step that follows a full one, where ``interval`` counts up.

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
