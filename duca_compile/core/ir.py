"""A captured graph, and what the analyses know of it.

Nodes are referred to by name: every graph is a copy of the captured one, and copies keep the names. Planning an
artifact's steps needs these types too, so torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from duca_compile.core.ports import Port, PortKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx

    from duca_compile.core.guards import Read, Readings
    from duca_compile.core.outputs import OutputLayout


class Variance(IntEnum):
    """How often a value changes in a denoising loop; a node is as variable as its most variable input."""

    INVARIANT = 0
    TIMESTEP = 1
    LATENT = 2


class OpaqueCall(Protocol):
    """A submodule that runs as one operator, as far as the graph shows it."""

    number: int  # the operator's last operand
    path: str
    reason: str
    flops: int


class BroughtHook(Protocol):
    """One of the hooks that bring a weight."""

    name: str


class BroughtWeight(Protocol):
    """A weight that hooks bring for each call; as text it says which."""

    number: int  # the operand of the operator that makes it

    @property
    def hooks(self) -> Sequence[BroughtHook]: ...


@dataclass(frozen=True)
class CapturedGraph:
    """One forward pass: placeholders are the call's tensors, get_attr nodes the model's live weights."""

    graph: fx.Graph
    attributes: Mapping[str, Tensor]  # get_attr target -> the source model's own tensor, never a copy
    inputs: tuple[str, ...]  # placeholder names, one for each tensor leaf of the call
    output: OutputLayout
    lists: tuple[str, ...]  # for each input, its argument's path, without the place in a list
    given: Mapping[str, Read]  # inputs that the readings depend on
    readings: Readings | None  # what the graph takes for given
    opaque: tuple[OpaqueCall, ...]  # submodules that run as one operator
    away: tuple[BroughtWeight, ...]  # weights that hooks bring for each call
    casts: bool  # whether it does what autocast would do, so that it is to run with autocast turned off
    results: tuple[Any, ...] = ()  # the leaves of what the model itself gave, until a step is compared with it
    unread: frozenset[tuple[str, str]] = frozenset()  # attributes that forward changes at each call, and never reads


class TokenPlace(NamedTuple):
    """Where a value holds the stream's tokens: from ``start`` on along ``axis``, which has ``length`` entries."""

    axis: int
    start: int
    length: int


class Role(Enum):
    """What a residual stream carries."""

    MAIN = "main"  # the latent, to the output; in single-stream blocks the text with it
    TEXT = "text"  # other tokens, which meet the latent's in attention
    REFINER = "refiner"  # the latent, before the other tokens join it
    ENCODER = "encoder"  # what does not depend on the latent


@dataclass(frozen=True)
class Stream:
    """One residual stream: how many branches it has, the shape of its values, and whether they are cached.

    A text stream is not, where nothing but cached attention reads it. Nor is an encoder's.
    """

    role: Role
    branches: int
    shape: tuple[int, ...]
    cached: bool


@dataclass(frozen=True)
class Branch:
    """One residual branch ``stream + gate * core``; ``core`` is what the caches hold.

    ``shape`` is (batch, tokens, channels); ``flops`` counts the body at two per multiply-add.
    """

    index: int
    block: int
    chain: int  # the place of its stream among all streams
    path: str
    source: str
    role: Role
    kind: str  # "self_attention", "cross_attention", "attention+mlp", "mlp" or "mixing"
    stream: str
    core: str
    add: str
    gated: bool
    body: frozenset[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    flops: int
    input: str  # what its first product reads: in a transformer, the stream behind norm, scale and shift
    attention: str | None  # the scaled_dot_product_attention whose keys (in cross-attention, queries) are its tokens
    token_places: Mapping[str, TokenPlace] | None  # body node -> where its tokens are; None where they mix
    mixing_reason: str | None

    @property
    def slot(self) -> Port:
        """The cache of its output."""
        return Port(PortKind.BRANCH, self.index)

    @property
    def input_slot(self) -> Port:
        """The cache of what it reads."""
        return Port(PortKind.BRANCH_INPUT, self.index)

    @property
    def scale_slot(self) -> Port:
        """The cache of how far its output moves with its input."""
        return Port(PortKind.SCALE, self.index)

    @property
    def score_slot(self) -> Port:
        """The result with the scores of its tokens."""
        return Port(PortKind.SCORE, self.index)

    @property
    def pointwise(self) -> bool:
        """Whether chosen tokens can be recomputed on their own."""
        return self.token_places is not None

    @property
    def tokens(self) -> int:
        return self.shape[1]

    @property
    def cache_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Facts:
    """All that the analyses know of one captured graph."""

    latent: str
    timestep: str
    variance: Mapping[str, Variance]
    streams: tuple[Stream, ...]
    branches: tuple[Branch, ...]
    stream_end: str
    flops: Mapping[str, int]
    notes: tuple[str, ...]  # what was not understood, and why
    changing: frozenset[str]  # the inputs that change from step to step: the timestep and the latents
    batch: int  # rows of the latent
    grids: Mapping[int, tuple[int, ...]]  # how the latent's tokens lie, by their number, where the graph shows it

    @property
    def blocks(self) -> int:
        return self.branches[-1].block + 1

    @property
    def first(self) -> Branch:
        """The first branch whose tokens are the latent's: what it reads tells soonest how far the latent has moved."""
        return next((b for b in self.branches if b.role is not Role.TEXT), self.branches[0])

    def score_source(self, branch: Branch, scores: str | None) -> Branch | None:
        """The attention whose token scores choose the tokens of ``branch``: the nearest one before it.

        Scores by entropy come from a cross-attention, maybe the branch itself; the others from a self-attention.
        """
        if scores is None:
            return None
        kind = "cross" if scores == "entropy" else "self"
        earlier = [b for b in self.branches[: branch.index + 1] if b.attention and kind in b.kind]
        same_length = [b for b in earlier if b.tokens == branch.tokens]
        return same_length[-1] if same_length else None
