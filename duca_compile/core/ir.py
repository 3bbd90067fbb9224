"""A captured graph, and the facts that the analyses derive from it.

Nodes are referred to by name: every graph is a copy of the captured one, and copies keep the names. An artifact needs
these types as well, to plan its steps, so torch is not imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from duca_compile.core.ports import Port, PortKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx

    from duca_compile.core.guards import ValueGuards, ValueRead
    from duca_compile.core.outputs import OutputLayout


class Variance(IntEnum):
    """How often a value changes in a denoising loop. A node is as variable as its most variable input."""

    INVARIANT = 0
    TIMESTEP = 1
    LATENT = 2


class OpaqueCall(Protocol):
    """A call of a submodule that runs as one operator."""

    number: int  # the operator's last operand
    path: str
    reason: str
    flops: int


class OffloadingHook(Protocol):
    """A hook that puts a weight in place before a call and removes it afterwards."""

    name: str


class OffloadedWeight(Protocol):
    """A weight that hooks put in place for each call. ``str`` gives its path and the hooks."""

    number: int  # the operand of the operator that fetches it

    @property
    def hooks(self) -> Sequence[OffloadingHook]: ...


class ArgumentWrite(Protocol):
    """A place in a container among the arguments that forward writes to."""

    @property
    def label(self) -> str: ...

    def put(self, arguments: Mapping[str, Any], value: Any) -> None: ...


@dataclass(frozen=True)
class CapturedGraph:
    """One call of forward as a graph: placeholders are the call's tensors, get_attr nodes the model's live weights."""

    graph: fx.Graph
    attributes: Mapping[str, Tensor]  # get_attr target -> the source model's own tensor, never a copy
    inputs: tuple[str, ...]  # placeholder names, one for each tensor leaf of the call
    output: OutputLayout
    argument_paths: tuple[str, ...]  # for each input, the path of its argument, without the position in a list
    guarded_inputs: Mapping[str, ValueRead]  # inputs that the guards read
    guards: ValueGuards | None  # the values read by forward that the graph is specialized to
    opaque: tuple[OpaqueCall, ...]  # submodules that run as one operator
    fetched: tuple[OffloadedWeight, ...]  # weights that hooks put in place for each call
    explicit_casts: bool  # whether autocast's casts are in the graph, which therefore runs with autocast turned off
    eager_results: tuple[Any, ...] = ()  # the leaves of the model's own results, until a step is compared with them
    writes: tuple[ArgumentWrite, ...] = ()  # where forward writes to its arguments: a second result, the values
    write_only: frozenset[tuple[str, str]] = frozenset()  # attributes that forward changes at each call and never reads

    @property
    def given(self) -> Mapping[str, ValueRead]:
        """Deprecated: the old name of ``guarded_inputs``."""
        warnings.warn("CapturedGraph.given is now called guarded_inputs", DeprecationWarning, stacklevel=2)
        return self.guarded_inputs


class TokenPlace(NamedTuple):
    """Where a value holds the stream's tokens: from index ``start`` along ``axis``, which has ``length`` entries."""

    axis: int
    start: int
    length: int


class Role(Enum):
    """What a residual stream carries."""

    MAIN = "main"  # the latent, on its way to the output; in single-stream blocks together with the text
    TEXT = "text"  # other tokens, which attention combines with the latent's
    REFINER = "refiner"  # the latent, before other tokens join it
    ENCODER = "encoder"  # values that do not depend on the latent


@dataclass(frozen=True)
class Stream:
    """One residual stream: its number of branches, the shape of its values, and whether its branches are cached.

    Those of a text stream that only cached attention reads are not, nor are those of an encoder.
    """

    role: Role
    branches: int
    shape: tuple[int, ...]
    cached: bool


@dataclass(frozen=True)
class Branch:
    """One residual branch, ``stream + gate * core``; the caches hold ``core``.

    ``shape`` is (batch, tokens, channels); ``flops`` counts the body at two per multiply-add.
    """

    index: int
    block: int
    chain: int  # the position of its stream among all streams
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
    input: str  # what its first product reads: in a transformer, the stream after norm, scale and shift
    attention: str | None  # the scaled_dot_product_attention whose keys (in cross-attention, queries) are its tokens
    token_places: Mapping[str, TokenPlace] | None  # body node -> where it holds the tokens; None where tokens mix
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
        """Whether some tokens can be recomputed without the others."""
        return self.token_places is not None

    @property
    def tokens(self) -> int:
        return self.shape[1]

    @property
    def cache_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Facts:
    """Everything that the analyses know about one captured graph."""

    latent: str
    timestep: str
    variance: Mapping[str, Variance]
    streams: tuple[Stream, ...]
    branches: tuple[Branch, ...]
    stream_end: str
    flops: Mapping[str, int]
    notes: tuple[str, ...]  # what was not understood, and why
    changing: frozenset[str]  # the inputs that change from step to step: the timestep and the latents
    batch: int  # batch rows of the latent
    grids: Mapping[int, tuple[int, ...]]  # number of tokens -> the grid that they form, where the graph shows it

    @property
    def blocks(self) -> int:
        return self.branches[-1].block + 1

    @property
    def first(self) -> Branch:
        """The first branch whose tokens are the latent's: its input shows earliest how far the latent has moved."""
        return next((b for b in self.branches if b.role is not Role.TEXT), self.branches[0])

    def score_source(self, branch: Branch, scores: str | None) -> Branch | None:
        """The attention whose token scores choose the tokens of ``branch``: the nearest one up to it.

        Scores by entropy come from a cross-attention, which may be the branch itself; others from a self-attention.
        """
        if scores is None:
            return None
        kind = "cross" if scores == "entropy" else "self"
        earlier = [b for b in self.branches[: branch.index + 1] if b.attention and kind in b.kind]
        same_length = [b for b in earlier if b.tokens == branch.tokens]
        return same_length[-1] if same_length else None
