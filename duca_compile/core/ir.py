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

from duca_compile.core.ports import STREAM_END, Port, PortKind

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


OTHER = -1  # of a span that enumerates neither batch rows nor tokens: channels, heads
ROWS = 0  # the axis of the batch rows; those of the tokens are 1, 2, ...


class Span(NamedTuple):
    """A factor of a dimension: ``size`` entries along one axis of the stream, of which its own begin at ``start``."""

    axis: int
    size: int
    start: int = 0


# For each dimension of a value its factors, slowest first. Factors of size 1 are left out.
Place = tuple[tuple[Span, ...], ...]


@dataclass(frozen=True)
class TokenLayout:
    """Which dimensions of a stream hold its batch rows, and which its tokens.

    Attributes:
        dims: for each dimension the axes that it enumerates, slowest first; none for channels.
        sizes: the number of batch rows, and the sizes of the tokens' axes.
    """

    dims: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.sizes[ROWS]

    @property
    def tokens(self) -> int:
        return prod(self.sizes[1:])

    @property
    def grid(self) -> tuple[int, ...]:
        return self.sizes[1:]

    @property
    def lead(self) -> int:
        """The axis along which chosen tokens lie when they are recomputed; the tokens' other axes then have size 1."""
        return next((axis for axis, size in enumerate(self.grid, 1) if size > 1), 1)

    @property
    def is_sequence(self) -> bool:
        """Whether values are (batch, tokens, channels)."""
        return self.dims == ((ROWS,), (1,), ())

    @property
    def rows_first(self) -> bool:
        """Whether the first dimension is the batch's."""
        return self.dims[0] == (ROWS,)

    def place(self, shape: Sequence[int]) -> Place:
        """Where a value of the stream, which has this shape, holds rows and tokens."""
        spans = [
            tuple(Span(axis, self.sizes[axis]) for axis in axes) if axes else (Span(OTHER, size),)
            for axes, size in zip(self.dims, shape, strict=True)
        ]
        return tuple(tuple(span for span in dim if span.size > 1) for dim in spans)

    def __str__(self) -> str:
        names = {ROWS: "batch", 1: "tokens"} if len(self.grid) < 2 else {ROWS: "batch"}
        grid = ("frames", "height", "width")[-len(self.grid) :]
        names |= {axis: name for axis, name in enumerate(grid, 1) if axis not in names}
        return f"({', '.join(' x '.join(names.get(a, 'tokens') for a in axes) or 'channels' for axes in self.dims)})"


@dataclass(frozen=True)
class Behaviour:
    """What the values of an operator show of it.

    Attributes:
        links: by tensor operand and result, for each dimension of the operand the dimension of the result in which an
            entry has effect at its own index alone; None where it has effect at others, -1 where there is one index.
            A result on which an operand has no effect is left out.
        attention: whether results are means of one operand's entries, with weights that depend on other entries.
    """

    links: Mapping[tuple[int, int], tuple[int | None, ...]]
    attention: bool


class Role(Enum):
    """What a residual stream carries."""

    MAIN = "main"  # the latent, on its way to the output; in single-stream blocks together with the text
    TEXT = "text"  # other tokens, which attention combines with the latent's
    REFINER = "refiner"  # the latent, before other tokens join it
    ENCODER = "encoder"  # values that do not depend on the latent


@dataclass(frozen=True)
class Stream:
    """One residual stream: its number of branches, the sizes of its tokens' axes, and whether its branches are cached.

    Those of a text stream that only cached attention reads are not, nor are those of an encoder.
    """

    role: Role
    branches: int
    grid: tuple[int, ...]
    cached: bool


@dataclass(frozen=True)
class Branch:
    """One residual branch, ``stream + gate * core``; the caches hold ``core``.

    ``layout`` says which dimensions of ``shape`` are rows, tokens and channels; ``flops`` counts the body at two per
    multiply-add.
    """

    index: int
    block: int
    chain: int  # the position of its stream among all streams
    path: str
    source: str
    role: Role
    kind: str  # "self_attention", "cross_attention", "attention+mlp", "mlp" or "mixing"
    stream: str
    carried: str  # what the sum adds the branch to: the stream, which may be cast or scaled before
    core: str
    add: str
    gated: bool
    body: frozenset[str]
    shape: tuple[int, ...]
    layout: TokenLayout
    dtype: torch.dtype
    flops: int
    input: str  # what its first product reads: in a transformer, the stream after norm, scale and shift
    attention: str | None  # the scaled_dot_product_attention whose keys (in cross-attention, queries) are its tokens
    token_places: Mapping[str, Place] | None  # body node -> where it holds the tokens; None where tokens mix
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
    def rows(self) -> int:
        return self.layout.rows

    @property
    def tokens(self) -> int:
        """The number of tokens in each batch row."""
        return self.layout.tokens

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
    ends: Mapping[Port, str]  # what skip steps restore: the end of the stream, and other values that outputs read
    flops: Mapping[str, int]
    notes: tuple[str, ...]  # what was not understood, and why
    uncounted: tuple[str, ...]  # operators whose FLOPs are unknown, and what to do about it
    changing: frozenset[str]  # the inputs that change from step to step: the timestep and the latents
    batch: int  # batch rows of the latent
    grids: Mapping[int, tuple[int, ...]]  # number of tokens -> the grid that they form, where the graph shows it
    embeddings: tuple[str, ...] = ()  # convolutions added to a stream before its first block, each with its line
    listed: bool = False  # whether the latent is a list of tensors

    @property
    def blocks(self) -> int:
        return self.branches[-1].block + 1

    @property
    def stream_end(self) -> str:
        return self.ends[STREAM_END]

    @property
    def other_end(self) -> Branch | None:
        """A branch behind which the outputs read a stream, besides that of the last end; None if there is none."""
        return next((self.branches[int(port.of)] for port in self.ends if port is not STREAM_END), None)

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
