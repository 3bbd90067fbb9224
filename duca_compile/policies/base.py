"""What a policy is: a sequence of steps, and how many tokens a partial step recomputes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from duca_compile.core.steps import Step
from duca_compile.errors import PolicyError
from duca_compile.policies.checks import check_number, check_whole
from duca_compile.policies.liveness import kept_until_last, with_liveness
from duca_compile.policies.predictor import Predictor

SelectionKind = Literal["v_norm", "attention", "entropy", "random"]


@dataclass(frozen=True)
class TokenQuery:
    """A branch that asks how many of its tokens to recompute: its block, the model's depth, and its kind.

    ``text`` is true in the text stream of a joint-attention model.
    """

    block: int
    blocks: int
    kind: str
    tokens: int
    text: bool = False


@dataclass(frozen=True)
class Selection:
    """How a partial step chooses its tokens.

    Attributes:
        kind: "v_norm" (small value norms first), "attention" (most attended first; ToCa's s1), "entropy" (most spread
            out cross-attention first; ToCa's s2) or "random".
        staleness: weight of the steps since a token was last computed, over the interval (ToCa's s3, lambda 3).
        patch_bonus: the best token of each patch has its score multiplied by 1 + this (ToCa's s4, lambda 4).
        patch: side of those patches in tokens.
        grid: (height, width) or (frames, height, width) of the tokens, for those patches, where the graph does not
            show it.
        paired: rows i and i + batch / 2 are the two halves of guidance and share one choice, by the mean of their
            attention maps or value norms.
        seed: of the random selection; one draw serves every row of the batch, so both CFG halves agree.
        shared: one choice for all layers, by the mean of their scores; by default where it is random. The other tokens
            then cost one pass over the caches instead of one for each layer.

    Raises:
        PolicyError: an unknown kind or invalid parameters.
    """

    kind: SelectionKind
    staleness: float = 0.0
    patch_bonus: float = 0.0
    patch: int = 2
    seed: int = 0
    grid: tuple[int, ...] | None = None
    paired: bool = False
    shared: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SelectionKind):
            raise PolicyError(f"selection={self.kind!r} is unknown; choose one of {get_args(SelectionKind)}")
        check_number("staleness", self.staleness, least=0)
        check_number("patch_bonus", self.patch_bonus, least=0)
        check_whole("patch", self.patch, least=1)
        check_whole("seed", self.seed, least=0)
        if self.grid is not None:
            if len(self.grid) not in (2, 3):
                raise PolicyError(f"grid={self.grid!r} is invalid: it is (height, width) or (frames, height, width)")
            for i, size in enumerate(self.grid):
                check_whole(f"grid[{i}]", size, least=1)
        if not isinstance(self.paired, bool):
            raise PolicyError(f"paired={self.paired!r} is invalid: it must be True or False")
        if self.shared is None:
            object.__setattr__(self, "shared", self.kind == "random")


@dataclass(frozen=True)
class FittedFactors:
    """What the differences of orders 1, 2, ... count in a step's forecast; ``last_full`` is the full step before."""

    last_full: int
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """How cached features are extrapolated.

    Attributes:
        order: the highest difference that is kept and used; 0 reuses what the last full step computed.
        lite: only the end of the stream is kept and forecast, and all blocks are skipped.
        first: the step, counted from 0, from which on differences are built.
        relational: a series gives the direction of a branch's change alone; how far it goes follows from how far its
            input has gone, which is computed (RFC).
        measured: for each step what takes the place of the factors of Taylor's series; None at a full step.
    """

    order: int
    lite: bool = False
    first: int = 1
    relational: bool = False
    measured: tuple[FittedFactors | None, ...] = ()

    def measured_at(self, step: int) -> FittedFactors | None:
        return self.measured[step] if step < len(self.measured) else None


class Policy(ABC):
    """A caching method. Policies are immutable; one object may serve any number of models."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for tables."""

    @property
    def caches(self) -> bool:
        """Whether any step reads what an earlier one computed; where not, full steps keep nothing."""
        return True

    @property
    def selection(self) -> Selection | None:
        """How partial steps choose tokens; None where there are none."""
        return None

    @property
    def forecast(self) -> Forecast | None:
        """How forecast steps extrapolate; None where there are none. Only full steps fill the caches then."""
        return None

    @property
    def predictor(self) -> Predictor | None:
        """The trained network of predict steps; None where there are none. Only the stream's end is cached then."""
        return None

    @abstractmethod
    def steps(self, total: int | None) -> Iterator[Step]:
        """The steps of one request in order: ``total`` of them, or without end where ``total`` is None.

        Raises:
            PolicyError: this policy needs to know the number of steps.
        """

    def planned(self, total: int | None) -> Iterator[Step]:
        """The same steps, with what later ones read of each. Where features are forecast, all is until the last one."""
        return (with_liveness if self.forecast is None else kept_until_last)(self.steps(total))

    def fresh_tokens(self, step: Step, query: TokenQuery) -> int:
        """How many tokens of a branch to recompute in a partial step; 0 reuses the branch."""
        del step, query
        return 0
