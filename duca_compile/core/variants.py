"""What a variant of a graph does, and the rewritten graph itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from duca_compile.core.ports import Port, PortKind
from duca_compile.core.steps import CacheKinds, HighPass, Probe, Restores, Verify

if TYPE_CHECKING:
    from torch import Tensor, fx


class Action(Enum):
    """What a variant does with one branch."""

    COMPUTE = "compute"
    PARTIAL = "partial"
    REUSE = "reuse"
    FORECAST = "forecast"


@dataclass(frozen=True)
class Scores:
    """The token scores that computed attentions return.

    Attributes:
        kind: "v_norm", "attention" or "entropy".
        paired: whether they are averaged over both halves of the batch.
    """

    kind: str
    paired: bool = False


@dataclass(frozen=True)
class Series:
    """What full steps keep for forecasts: differences up to ``order``, and weighted sums over all full steps.

    Attributes:
        order: the highest difference. With sums and an order of 0, nothing but the sums is kept.
        of: "branches"; "inputs", branches whose forecasts are scaled by the change of their inputs (RFC); or "end",
            only the end of the stream.
        sums: how many sums; only of the end of the stream.
        high_pass: the filter of the differences of the end of the stream, from the first order on.
    """

    order: int
    of: Literal["branches", "inputs", "end"] = "branches"
    sums: int = 0
    high_pass: HighPass | None = None

    @property
    def differences(self) -> bool:
        """Whether differences are kept, the feature itself included."""
        return self.order > 0 or not self.sums


@dataclass(frozen=True)
class Changes:
    """Full steps keep what each stream gains from its start to its end (TeaCache)."""


@dataclass(frozen=True)
class Boundary:
    """Full steps keep the latent and the output, and how far the output moves with the latent (EasyCache)."""


Keeps: TypeAlias = "CacheKinds | Series | Changes | Boundary"


class _Spec:
    kind: ClassVar[str]  # the steps that run the variant, in words

    def action(self, index: int) -> Action:
        """What the variant does with the branch of this index."""
        raise NotImplementedError

    def tokens_input(self, index: int) -> Port:
        """The (batch, k) int64 input that says which tokens of the branch of this index to recompute."""
        return Port(PortKind.TOKENS, index)


@dataclass(frozen=True)
class FullVariant(_Spec):
    """Computes every branch.

    Attributes:
        keeps: what it returns for later steps.
        scores: the scores to return.
        after: the probe of the same step, from which it continues.
        by_row: whether it refreshes only the batch rows that an input selects; the numbers of forecasts then differ by
            batch row.
    """

    keeps: Keeps = CacheKinds.ALL
    scores: Scores | None = None
    after: Probe | None = None
    by_row: bool = False
    kind: ClassVar[str] = "full steps"

    def action(self, index: int) -> Action:
        del index
        return Action.COMPUTE


@dataclass(frozen=True)
class PartialVariant(_Spec):
    """Recomputes some tokens of some branches; ``keeps``, ``scores`` and ``after`` are as in ``FullVariant``.

    Attributes:
        branches: for each branch, whether it is computed or reused, or the input that says which of its tokens to
            recompute; branches may share such an input.
    """

    branches: tuple[Literal[Action.COMPUTE, Action.REUSE] | Port, ...]
    keeps: CacheKinds = CacheKinds.ALL
    scores: Scores | None = None
    after: Probe | None = None
    kind: ClassVar[str] = "partial steps"

    def action(self, index: int) -> Action:
        entry = self.branches[index]
        return Action.PARTIAL if isinstance(entry, Port) else entry

    def tokens_input(self, index: int) -> Port:
        entry = self.branches[index]
        return entry if isinstance(entry, Port) else super().tokens_input(index)


@dataclass(frozen=True)
class ReuseVariant(_Spec):
    """Takes the branches from the cache; ``keeps``, ``scores`` and ``after`` are as in ``FullVariant``.

    Attributes:
        leading: the number of branches at the front that are computed.
    """

    leading: int = 0
    keeps: CacheKinds = CacheKinds.ALL
    scores: Scores | None = None
    after: Probe | None = None
    kind: ClassVar[str] = "reuse steps"

    def action(self, index: int) -> Action:
        return Action.COMPUTE if index < self.leading else Action.REUSE


@dataclass(frozen=True)
class SkipVariant(ReuseVariant):
    """Takes the end of the stream from the cache, or its change, or that of the output.

    Attributes:
        restores: what the cache holds.
    """

    restores: Restores = "end"
    kind: ClassVar[str] = "skip steps"


@dataclass(frozen=True)
class ForecastVariant(_Spec):
    """Extrapolates the branches or the end of the stream; ``after`` and ``by_row`` are as in ``FullVariant``.

    Attributes:
        series: what is extrapolated.
        leading: the number of branches at the front that are computed.
        verify: how the forecast is compared with what the last block computes, if it is.
    """

    series: Series
    leading: int = 0
    verify: Verify | None = None
    after: Probe | None = None
    by_row: bool = False
    kind: ClassVar[str] = "forecast steps"

    def action(self, index: int) -> Action:
        return Action.COMPUTE if index < self.leading else Action.FORECAST


@dataclass(frozen=True)
class PredictVariant(_Spec):
    """Takes the end of the stream from a trained network (DisCa).

    Attributes:
        weights: the names of the network's weights.
    """

    weights: frozenset[str]
    kind: ClassVar[str] = "predict steps"

    def action(self, index: int) -> Action:
        del index
        return Action.COMPUTE


@dataclass(frozen=True)
class ProbeVariant(_Spec):
    """Measures a small part of the model before a step is decided.

    Attributes:
        probe: what is measured.
        order: the highest difference of the forecast that the probed value is compared with; 0 without a forecast.
        by_row: whether the numbers of that forecast differ by batch row.
    """

    probe: Probe
    order: int = 0
    by_row: bool = False
    kind: ClassVar[str] = "the probe before a decision"

    def action(self, index: int) -> Action:
        del index
        return Action.COMPUTE


VariantSpec: TypeAlias = (
    FullVariant | PartialVariant | ReuseVariant | SkipVariant | ForecastVariant | PredictVariant | ProbeVariant
)


@dataclass(frozen=True)
class Variant:
    """A rewritten graph as a module, with flat tensors as inputs and outputs, each with its port."""

    spec: VariantSpec
    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dynamic_inputs: tuple[Port, ...]  # token index inputs: their second dimension changes from step to step
    pieces: frozenset[str]  # the timestep-only values that it reads
    kept: Mapping[Port, int]  # bytes of each cache that it returns
    flops_fixed: int
    flops_per_token: Mapping[int, float]  # branch index -> FLOPs for one recomputed token position, all batch rows

    def flops(self, tokens: Mapping[int, int]) -> float:
        """FLOPs of one call that recomputes ``tokens[branch]`` positions of each partial branch."""
        return self.flops_fixed + sum(flops * tokens[index] for index, flops in self.flops_per_token.items())


VariantFunction = Callable[..., "tuple[Tensor, ...]"]
