"""What a variant does, and the rewritten graph that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from duca_compile.core.ports import Port, PortKind
from duca_compile.core.steps import Kept, Probe, Verify

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx


class Action(Enum):
    """What a variant does with one branch."""

    COMPUTE = "compute"
    PARTIAL = "partial"
    REUSE = "reuse"
    FORECAST = "forecast"


@dataclass(frozen=True)
class VariantSpec:
    """What to do with each branch, and whether the end of the stream comes from the cache instead."""

    actions: tuple[Action, ...]
    skip: bool = False
    scores: str | None = None  # "v_norm", "attention" or "entropy": emitted for computed attentions
    paired: bool = False  # scores are the mean of both halves of the batch
    emit: bool = True  # whether later steps will read caches
    order: int | None = None  # the highest difference kept of each cache; None where nothing is forecast
    lite: bool = False  # the stream's end is all that is cached
    relational: bool = False  # where forecast: the change of each branch's input says how far (RFC)
    predict: frozenset[str] = frozenset()  # where a trained network gives the stream's end: its weights' names (DisCa)
    verify: Verify | None = None  # how a forecast is held to what the last block computes of it
    probe: Probe | None = None  # what was looked at before; the variant goes on from there
    probing: bool = False  # the variant is that look itself
    change: bool = False  # the streams' change from start to end is cached, not the end
    by_row: bool = False  # full steps are for chosen rows of the batch; numbers of forecasts differ by row
    chosen_with: tuple[int, ...] = ()  # for each branch, the one whose token input it shares; empty: each its own
    keeps: Kept = Kept.ALL  # the kinds of caches that later steps will read
    cache_dtype: torch.dtype | None = None  # what caches are kept in, where that is narrower

    @property
    def kind(self) -> str:
        """What runs it, in words."""
        if self.probing:
            return "the probe before a decision"
        if self.predict:
            return "predict steps"
        for action in (Action.PARTIAL, Action.FORECAST):
            if action in self.actions:
                return f"{action.value} steps"
        return "skip steps" if self.skip else "reuse steps" if Action.REUSE in self.actions else "full steps"

    def tokens_input(self, index: int) -> Port:
        """The (batch, k) int64 input that says which tokens of branch ``index`` to recompute."""
        return Port(PortKind.TOKENS, self.chosen_with[index] if self.chosen_with else index)


@dataclass(frozen=True)
class Variant:
    """A rewritten graph as a module: flat tensors in and out, each with its port."""

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
        return self.flops_fixed + sum(each * tokens[index] for index, each in self.flops_per_token.items())


VariantFunction = Callable[..., "tuple[Tensor, ...]"]
