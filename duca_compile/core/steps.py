"""What a denoising step does: its kind, what it keeps for later ones, and what is measured to decide it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum, Flag, auto
from typing import Literal


@dataclass(frozen=True)
class Verify:
    """How a forecast is held to account: the last block is computed on the forecast stream.

    Attributes:
        metric: "norm_ratio", for each row the norm of the difference over the norm of what was computed; or
            "relative_l1", the mean over the whole batch of the elementwise |difference| / |computed|, as released.
        of: "stream", its end; or "branch", the output of the last branch before its gate.
    """

    metric: Literal["norm_ratio", "relative_l1"] = "norm_ratio"
    of: Literal["stream", "branch"] = "stream"


@dataclass(frozen=True)
class Probe:
    """What is looked at before a step is decided: a small part of the model, computed at every step.

    Attributes:
        of: "modulated", the input of the first block's first branch behind norm and modulation; "first_block", what the
            first block adds to the stream; or "forecast", what the first branch of the latent reads, against what the
            last full steps let expect of it (relational feature caching).
        to_last_full: it is compared with the last full step; else with the last step. Not for "forecast".
    """

    of: Literal["modulated", "first_block", "forecast"] = "modulated"
    to_last_full: bool = False


class StepKind(Enum):
    """What one denoising step does with the model's blocks."""

    FULL = "full"
    PARTIAL = "partial"  # attention from the cache, MLPs on a few tokens (DuCa's conservative step)
    REUSE = "reuse"  # every branch from the cache, gates fresh
    SKIP = "skip"  # the end of the stream from the cache (DuCa's aggressive step)
    FORECAST = "forecast"  # every branch, or the end of the stream, extrapolated from the last full steps (TaylorSeer)
    PREDICT = "predict"  # the end of the stream from a trained network (DisCa)

    @property
    def letter(self) -> str:
        """One letter for schedules; T, as in Taylor, is a forecast, and L, as in learned, a prediction."""
        return {StepKind.FORECAST: "T", StepKind.PREDICT: "L"}.get(self, self.value[0].upper())


class CacheKinds(Flag):
    """Kinds of cached features."""

    NOTHING = 0
    BRANCHES = auto()  # what partial and reuse steps read
    END = auto()  # the end of the stream, which skip steps read
    ALL = BRANCHES | END

    @property
    def branches(self) -> bool:
        return bool(self & CacheKinds.BRANCHES)

    @property
    def end(self) -> bool:
        return bool(self & CacheKinds.END)


@dataclass(frozen=True)
class Step:
    """One step of a schedule.

    Attributes:
        kind: what the blocks do.
        interval: the nominal steps from one full step to the next; weighs how stale a token is.
        ratio: share of tokens to recompute in a partial step, before per-block and per-kind factors.
        leading_full: blocks at the front that run in full regardless of ``kind`` (the released ToCa and DuCa code
            changes its mind after the first block of some full steps).
        verified: whether a forecast is held to what the last block computes of it (SpeCa).
        kept: what steps of the schedule have to keep for later ones.
        live: what later steps read of that which is there after this one; the rest is dropped.
    """

    kind: StepKind
    interval: int = 1
    ratio: float = 0.0
    leading_full: int = 0
    verified: bool = False
    kept: CacheKinds = CacheKinds.ALL
    live: CacheKinds = CacheKinds.ALL

    def __post_init__(self) -> None:
        self.__dict__["_hash"] = hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        """Remembered: plans are looked up by it at every call."""
        return self.__dict__["_hash"]  # type: ignore[no-any-return]
