"""What a denoising step does: its kind, what it keeps for later steps, and what is measured to decide on it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum, Flag, auto
from typing import Literal


@dataclass(frozen=True)
class Verify:
    """How a forecast is verified: its last block is also computed, on the forecast stream.

    Attributes:
        metric: "norm_ratio", for each batch row the norm of the difference over the norm of what was computed; or
            "relative_l1", the mean over the whole batch of the elementwise |difference| / |computed|, as in the
            released code.
        of: "stream", the end of the stream; or "branch", the output of the last branch before its gate.
    """

    metric: Literal["norm_ratio", "relative_l1"] = "norm_ratio"
    of: Literal["stream", "branch"] = "stream"


# What skip steps take from the cache: the end of the stream; what the blocks added to each stream, for its start; or
# the change from the latent to the model's output, for the latent.
Restores = Literal["end", "change", "output"]
Transform = Literal["dct", "fft"]  # of a filter over tokens


@dataclass(frozen=True)
class NoiseFilter:
    """A Wiener filter over the grid of tokens, which keeps what noise of the step's level does not hide (SeaCache).

    Attributes:
        exponent: the power of a frequency by which the spectrum of a clean latent is taken to fall.
        pure_noise: the timestep that stands for pure noise; the noise level is the timestep's share of it.
        grid: the layout of the tokens, (height, width) or (frames, height, width); None where the graph shows it.
    """

    exponent: float
    pure_noise: float
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class HighPass:
    """A filter over the tokens that takes out low frequencies (FreqCa).

    Attributes:
        transform: "dct", two-dimensional over the grid of the tokens; or "fft", over the tokens in a row.
        cutoff: frequencies up to this share of the highest one are low.
        grid: the layout of the tokens, (height, width); None where the graph shows it.
    """

    transform: Transform
    cutoff: float
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Probe:
    """What is measured before a step is decided: a small part of the model, computed at every step.

    Attributes:
        of: "modulated", the input of the first block's first branch after norm and modulation; "first_block", what the
            first block adds to the stream; "forecast", the input of the latent's first branch, compared with its
            forecast from the last full steps (relational feature caching); or "latent", the latent itself, whose change
            is scaled by how far the model's output has moved with it between the last two full steps (EasyCache).
        to_last_full: whether to compare with the last full step, rather than the last step. Not for "forecast".
        filter: what the probed value goes through first; only for "modulated".
    """

    of: Literal["modulated", "first_block", "forecast", "latent"] = "modulated"
    to_last_full: bool = False
    filter: NoiseFilter | None = None


class StepKind(Enum):
    """What one denoising step does with the model's blocks."""

    FULL = "full"
    PARTIAL = "partial"  # attention from the cache, MLPs on a few tokens (DuCa's conservative step)
    REUSE = "reuse"  # every branch from the cache, gates computed
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
        interval: the nominal number of steps from one full step to the next; scales the staleness of tokens.
        ratio: the share of tokens to recompute in a partial step, before factors for the block and the branch's kind.
        leading_full: blocks at the front that run in full regardless of ``kind`` (the released ToCa and DuCa code
            switches from full to another kind after the first block of some steps).
        verified: whether a forecast is compared with what its last block computes (SpeCa).
        kept: the kinds of caches that the steps of the schedule fill for later ones.
        live: the kinds of caches that later steps still read after this one; the others are dropped.
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
        """Computed once, because every call looks up its plan by step."""
        return self.__dict__["_hash"]  # type: ignore[no-any-return]
