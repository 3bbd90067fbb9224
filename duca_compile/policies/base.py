"""The base of all policies: a sequence of steps, and how many tokens a partial step recomputes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

from duca_compile.core.steps import HighPass, Restores, Step
from duca_compile.errors import PolicyError
from duca_compile.policies.checks import check_flag, check_grid, check_number, check_whole
from duca_compile.policies.factors import Chebyshev
from duca_compile.policies.liveness import kept_until_last, with_liveness
from duca_compile.policies.predictor import Predictor

SelectionKind = Literal["v_norm", "attention", "entropy", "random"]


@dataclass(frozen=True)
class TokenQuery:
    """A branch, for the question how many of its tokens to recompute.

    Attributes:
        block: index of its block.
        blocks: number of blocks of the model.
        kind: "mlp" or "cross_attention".
        tokens: number of its tokens.
        text: whether it is in the text stream of a joint-attention model.
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
        kind: "v_norm" (tokens with the smallest value vectors first), "attention" (those that receive the most
            attention first; s1 of ToCa, arXiv 2410.05317), "entropy" (those with the most evenly spread cross-attention
            first; ToCa's s2) or "random".
        staleness: weight of the number of steps since a token was last computed, relative to the interval (ToCa's s3,
            lambda 3).
        patch_bonus: the score of the best token of each patch is multiplied by 1 + this (ToCa's s4, lambda 4).
        patch: side of those patches, in tokens.
        seed: seed of the random selection. One draw serves all batch rows, so both halves of guidance agree.
        grid: layout of the tokens, (height, width) or (frames, height, width), for those patches; needed only if the
            graph does not show it.
        paired: whether batch rows i and i + batch / 2, the two halves of guidance, share one choice, by the mean of
            their attention maps or value norms.
        shared: whether all layers share one choice, by the mean of their scores; None means only where it is random.
            Writing into the caches then takes one sweep over them instead of one for each layer.

    Raises:
        PolicyError: an unknown kind or an invalid parameter.
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
        check_grid(self.grid)
        check_flag("paired", self.paired)
        if self.shared is None:
            object.__setattr__(self, "shared", self.kind == "random")


@dataclass(frozen=True)
class FittedFactors:
    """Factors of a step's forecast that were fitted to the model.

    Attributes:
        last_full: the full step that the forecast starts from.
        factors: those of the differences of orders 1, 2, ...
    """

    last_full: int
    factors: tuple[float, ...]

    def later(self, steps: int) -> FittedFactors:
        """The same, so many steps later."""
        return FittedFactors(self.last_full + steps, self.factors)


@dataclass(frozen=True)
class Forecast:
    """How cached features are extrapolated.

    Attributes:
        order: the highest order of difference that is kept and used; 0 reuses the features of the last full step.
        lite: whether only the end of the stream is kept and forecast; then all blocks are skipped.
        first: the first step, counted from 0, at which differences are built.
        relational: whether the series gives only the direction of a branch's change, and its length follows from how
            far the branch's input has moved, which is computed (RFC, arXiv 2602.19506).
        measured: for each step, fitted factors in place of those of the Taylor series; None at a full step.
        hermite: the scale of Hermite polynomials, which then replace the powers of the Taylor series (HiCache).
        chebyshev: the series that is fitted to all full steps (Spectrum). Its sums are kept in place of differences;
            with an order of 1, beside them. Only with ``lite``.
        high_pass: what the differences go through, so that forecasts leave out low frequencies; only with ``lite``.
        least: how many full steps a guidance pass needs before its first forecast; further steps are full until then.
    """

    order: int
    lite: bool = False
    first: int = 1
    relational: bool = False
    measured: tuple[FittedFactors | None, ...] = ()
    hermite: float | None = None
    chebyshev: Chebyshev | None = None
    high_pass: HighPass | None = None
    least: int = 1

    def __post_init__(self) -> None:
        self.__dict__["_hash"] = hash(tuple(getattr(self, each.name) for each in fields(self)))

    def __hash__(self) -> int:
        """Computed once, because every call looks up its numbers by forecast."""
        return self.__dict__["_hash"]  # type: ignore[no-any-return]

    def measured_at(self, step: int) -> FittedFactors | None:
        """The fitted factors of a step; None if there are none."""
        return self.measured[step] if step < len(self.measured) else None


Series: TypeAlias = "tuple[Policy, ...]"  # settings of one method that differ in how much they cache


class Policy(ABC):
    """A caching method: which kind of step runs when.

    Policies are immutable, and one object may serve any number of models. Subclass it for a policy of your own:
    implement ``name`` and ``steps``, and override ``selection`` and ``fresh_tokens`` for partial steps, or ``forecast``
    for forecast steps.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for tables."""

    @property
    def caches(self) -> bool:
        """Whether any step reads features of an earlier one; if not, full steps keep none."""
        return True

    @property
    def selection(self) -> Selection | None:
        """How partial steps choose tokens; None if there are no partial steps."""
        return None

    @property
    def forecast(self) -> Forecast | None:
        """How forecast steps extrapolate; None if there are none. With forecasts, only full steps fill the caches."""
        return None

    @property
    def predictor(self) -> Predictor | None:
        """The trained network of predict steps; None if there are none. With it, only the stream's end is cached."""
        return None

    @property
    def restores(self) -> Restores:
        """What skip steps take from the cache."""
        return "end"

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        """The settings that ``tune`` tries in loops of ``steps`` steps.

        Returns:
            Series of policies, each from the one that stays closest to the uncached loop to the fastest. None at all,
            unless a policy overrides this.
        """
        del steps
        return ()

    @abstractmethod
    def steps(self, total: int | None) -> Iterator[Step]:
        """The steps of one request, in order.

        Args:
            total: how many steps; None for an endless sequence.

        Raises:
            PolicyError: the policy needs to know the number of steps.
        """

    def planned(self, total: int | None) -> Iterator[Step]:
        """The same steps, each with the kinds of caches that later ones read.

        With forecasts, all caches are kept until the last step.
        """
        return (with_liveness if self.forecast is None else kept_until_last)(self.steps(total))

    def to_compile(self, total: int | None) -> Iterator[Step]:
        """Steps that need every variant that a request may need, for a warm-up."""
        return self.planned(total)

    def fresh_tokens(self, step: Step, query: TokenQuery) -> int:
        """How many tokens of a branch a partial step recomputes; 0 reuses the whole branch."""
        del step, query
        return 0
