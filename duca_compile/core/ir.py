"""The few types that capture, analyses, passes and the runtime speak in.

Nodes are referred to by name: every graph is a copy of the captured one, and copies keep the names. The names of inputs
and the kinds of actions serve exported artifacts too, so torch is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cache, cached_property
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from duca_compile.policies.adaptive import Probe, Verify
from duca_compile.policies.base import Kept

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx
    from torch.utils._pytree import TreeSpec

    from duca_compile.away import Away
    from duca_compile.opaque import CallSite

STREAM_END = "stream_end"
BRANCH = "branch_"
SCALE = "scale_"  # how far a branch moves for each unit that its input does: a number for each row
# 0-dimensional float32 inputs of the variants of policies that forecast (TaylorSeer).
FORECAST_GAP = "forecast_gap"  # steps from the last full step to this one
FORECAST_ORDERS = "forecast_orders"  # how many differences the full steps so far allow; the others stay zero
FORECAST_FACTORS = tuple(f"forecast_factor_{i}" for i in range(1, 5))  # what differences of each order count
# Of adaptive policies. What decisions are made from is float32 and has one value for each row.
FULL_ROWS = "full_rows"  # input, bool (batch,): the rows that the full step is for; the caches of others stay
VERIFY_ERROR = "verify_error"  # result: how far a forecast is from what the last block computes of it
PROBE_CHANGE = "probe_change"  # result: how much what the probe looks at has changed
PROBE_SEEN = "probe_seen"  # result: what it looked at; the cache of the same name is what it compares with
PROBE_STREAM = "probe_stream"  # result, and input of the variant that goes on from there
MEASURED = frozenset({VERIFY_ERROR, PROBE_CHANGE, PROBE_SEEN, PROBE_STREAM})
_OURS = str(Path(__file__).parent)


class Variance(IntEnum):
    """How often a value changes in a denoising loop; a node is as variable as its most variable input."""

    INVARIANT = 0
    TIMESTEP = 1
    LATENT = 2


class Action(Enum):
    """What a variant does with one branch."""

    COMPUTE = "compute"
    PARTIAL = "partial"
    REUSE = "reuse"
    FORECAST = "forecast"


@dataclass(frozen=True)
class OutputLayout:
    """How the flat tensors a graph returns become the model's own output object."""

    spec: TreeSpec
    constants: Mapping[int, Any]  # leaf position -> value, for leaves that are not tensors

    @cached_property
    def _flat(self) -> Callable[[Sequence[Tensor]], Any] | None:
        """Makes the output where it is one container of tensors, as most are: a walk of the tree takes longer."""
        from torch.utils._pytree import SUPPORTED_NODES

        if self.constants or self.spec.num_nodes != self.spec.num_leaves + 1:
            return None
        unflatten, context = SUPPORTED_NODES[self.spec.type].unflatten_fn, self.spec.context
        return lambda tensors: unflatten(tensors, context)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        if self._flat is not None:
            return self._flat(tensors)
        from torch.utils._pytree import tree_unflatten

        if not self.constants:
            return tree_unflatten(tensors, self.spec)
        rest = iter(tensors)
        leaves = [self.constants[i] if i in self.constants else next(rest) for i in range(self.spec.num_leaves)]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Read:
    """Who reads values that depend on an input in Python: the first source line, and the modules' paths."""

    source: str
    paths: frozenset[str]


@dataclass(frozen=True)
class Readings:
    """All that forward's Python read in one call: how to compute it from the call's tensors, and what it was.

    The graph of that call is right for every call with the same readings, whatever the rest of its values.
    """

    module: fx.GraphModule  # computes them from the tensors at ``places`` of a call
    places: tuple[int, ...]
    values: tuple[Tensor, ...]

    @property
    def attributes(self) -> dict[str, Tensor]:
        """The model's own tensors that they depend on, by the names that the graph has for them."""
        names = {str(n.target) for n in self.module.graph.find_nodes(op="get_attr")}
        return {name: attrgetter(name)(self.module) for name in names}

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a call with these tensors reads the same."""
        from duca_compile.runtime.arrays import same_values

        try:
            now = self.module(*[tensors[place] for place in self.places])
        except (RuntimeError, IndexError):  # an earlier reading differs, and what follows does not fit it
            return False
        return all(map(same_values, now, self.values))


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
    opaque: tuple[CallSite, ...]  # submodules that run as one operator
    away: tuple[Away, ...]  # weights that hooks bring for each call
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
    def slot(self) -> str:
        return f"{BRANCH}{self.index}"

    @property
    def input_slot(self) -> str:
        return f"input_{self.index}"

    @property
    def scale_slot(self) -> str:
        return f"{SCALE}{self.index}"

    @property
    def score_slot(self) -> str:
        return f"score_{self.index}"

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

    def tokens_input(self, index: int) -> str:
        """Name of the (batch, k) int64 input that says which tokens of branch ``index`` to recompute."""
        return f"tokens_{self.chosen_with[index] if self.chosen_with else index}"


@dataclass(frozen=True)
class Variant:
    """A rewritten graph as a module: flat tensors in by name, flat tensors out by name."""

    spec: VariantSpec
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_inputs: tuple[str, ...]  # token index inputs: their second dimension changes from step to step
    pieces: frozenset[str]  # the timestep-only values that it reads
    kept: Mapping[str, int]  # bytes of each cache that it returns
    flops_fixed: int
    flops_per_token: Mapping[int, float]  # branch index -> FLOPs for one recomputed token position, all batch rows

    def flops(self, tokens: Mapping[int, int]) -> float:
        """FLOPs of one call that recomputes ``tokens[branch]`` positions of each partial branch."""
        return self.flops_fixed + sum(each * tokens[index] for index, each in self.flops_per_token.items())


VariantFunction = Callable[..., "tuple[Tensor, ...]"]


def cache_input(slot: str) -> str:
    """Name of the placeholder that carries the cached value of ``slot``."""
    return f"cache_{slot}"


# What the names of the inputs that variants have beside a call's own begin with.
RESERVED = (
    cache_input(""),
    "forecast_",
    FULL_ROWS,
    "hoisted_",
    "probe_",
    "timestep_bfloat",
    "timestep_float",
    "tokens_",
)


def difference_slot(slot: str, order: int) -> str:
    """The slot of the difference of this order of what ``slot`` holds; of order 0 it is ``slot`` itself."""
    return f"{slot}_d{order}" if order else slot


@cache
def dead_slots(live: Kept) -> tuple[str, ...]:
    """What the slots begin with whose caches are read no more, where caches of the kinds ``live`` are."""
    if live is Kept.NOTHING:
        return ("",)
    return (STREAM_END,) * (not live.end) + (BRANCH,) * (not live.branches)


def dead_caches(live: Kept, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the placeholders ``names`` whose caches are read no more."""
    dead = tuple(map(cache_input, dead_slots(live)))
    return tuple(name for name in names if name.startswith(dead))


def is_written(result: str) -> bool:
    """Whether a result of this name fills a cache at once: all but the model's own, scores and measures."""
    return not result.startswith(("output_", "score_")) and result not in MEASURED


def is_cache(result: str) -> bool:
    """Whether a result of this name is kept until the next step; what a probe has seen is, once it was compared."""
    return result == PROBE_SEEN or is_written(result)


def change_slot(index: int) -> str:
    """The slot of what a stretch of a stream's branches, of which this is the last, add to it together."""
    return f"change_{index}"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names; get_attr nodes go on naming the same live weights."""
    from torch import fx

    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, lambda n: mapping[n])
        if mapping[node].name != node.name:
            mapping[node].name = node.name
    return copy


def value_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of the tensor a node yields, or None where it yields something else."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(shape)


def op_name(node: fx.Node) -> str:
    """The operator without namespace and overload: ``linear``, ``add``, ``getitem``."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the Python statement the node came from, or "" where the trace does not say."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in lines if line.startswith('File "') and not line.startswith(f'File "{_OURS}')]
    if not files:
        return ""
    path, number = files[-1].split('"')[1], files[-1].split("line ")[1].split(",")[0]
    return f"{path}:{number}"
