"""Finds residual streams and their branches: additions of a value and something computed from that value."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from duca_compile.analysis.closure import Ancestors, ancestors, closure
from duca_compile.analysis.layout import Body, default_layout, find_layout, follow
from duca_compile.analysis.stream import NORMS, PASSTHROUGH, SUMS, Trails
from duca_compile.analysis.tokens import (
    CONCATENATIONS,
    ELEMENTWISE,
    Mixing,
    Places,
    key_offset,
    mixed_operands,
    observed,
    overlapped,
)
from duca_compile.core.fx_utils import module_path, op_name, source_line, value_shape
from duca_compile.core.ir import Branch, Role, Stream, TokenLayout, Variance
from duca_compile.core.ports import STREAM_END, Port, PortKind
from duca_compile.errors import StructureError
from duca_compile.frontend.operators import carried_value

_SOFTMAX = {"softmax", "_softmax"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
# Products that may be of two activations, as in attention.
_ACTIVATION_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"}
_FUSED_SELF_ATTENTION = "_native_multi_head_attention"  # with its projections: its one operand is query, key and value


@dataclass(frozen=True)
class _Graph:
    """A graph with what is known of its nodes."""

    graph: fx.Graph
    order: dict[fx.Node, int]
    variance: dict[str, Variance]
    flops: dict[str, int]
    trails: Trails
    batch: int  # batch rows of the latent
    uncounted: Set[fx.Node]  # operators that may do work, though ``flops`` says none


@dataclass(frozen=True)
class _Residual:
    """A candidate: ``add`` = ``carried`` + ``result``, where the nodes of ``body`` compute ``result`` from ``stream``.

    Both operands may be scaled or weighed. ``stream`` is the value that ``carried`` carries on: itself, the value
    before a cast or a scale or, for parallel branches (x + f(x) + g(x)), that before those added so far.
    """

    add: fx.Node
    carried: fx.Node
    stream: fx.Node
    result: fx.Node
    body: frozenset[fx.Node]
    flops: int


@dataclass(frozen=True)
class _Core:
    """What a residual's caches hold: ``node``, computed from the stream by ``inside`` (in graph order).

    ``places`` says where these hold the tokens; None where they mix, for ``reason``.
    """

    node: fx.Node
    gated: bool
    inside: list[fx.Node]
    places: Places | None
    reason: str | None


class Structure(NamedTuple):
    """What was found: the branches to cache, the values that skip steps restore, all streams, and embeddings."""

    branches: tuple[Branch, ...]  # in graph order
    ends: dict[Port, str]
    streams: tuple[Stream, ...]
    embeddings: tuple[str, ...]  # the convolutions that are added to a stream before its first block


_Chain = list[_Residual]


def find_branches(
    graph: fx.Graph, variance: dict[str, Variance], flops: dict[str, int], batch: int, uncounted: Set[fx.Node]
) -> Structure:
    """Finds the residual streams, and which of their branches and values to cache.

    Cached are the branches whose sums a step reads that takes these branches from the cache: not those of a stream that
    only cached attention reads, as that of the text. Streams that do not depend on the latent are listed, but have no
    branches to cache. ``batch`` is the number of batch rows of the latent; ``uncounted`` are operators that may do
    work, though ``flops`` says none.

    Raises:
        StructureError: there is no residual addition whose branch does any work.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    known = _Graph(graph, order, variance, flops, Trails(order, variance), batch, uncounted)
    latent, encoders = (
        _chains(_without_long_skips(_residuals(known, changing), known), known) for changing in (True, False)
    )
    embeddings = [chain.pop(0) for chain in latent if _starts_with_embedding(chain, known)]
    layouts = [_layout(chain, known) for chain in latent]
    cores = {
        each.add: _core(each, layout, known) for chain, layout in zip(latent, layouts, strict=True) for each in chain
    }
    cached = sorted(_cached(known, cores), key=order.__getitem__)
    if not cached:
        raise StructureError(
            "no residual branch found: no addition joins a latent-dependent value with something computed from it by "
            "matrix products. There is nothing to cache in this model; run it without duca_compile."
        )
    roles = _roles(known, latent, set(cached))
    found = {each.add: (number, each) for number, chain in enumerate(latent) for each in chain}
    branches: list[Branch] = []
    for index, add in enumerate(cached):
        chain, residual = found[add]
        path = module_path(add)
        same_block = bool(branches) and branches[-1].path == path
        block = branches[-1].block + (not same_block) if branches else 0
        branches.append(_branch(index, block, chain, roles[chain], residual, layouts[chain], cores[add], known))
    streams = [
        Stream(role, len(chain), layout.grid, any(each.add in cached for each in chain))
        for chain, role, layout in zip(latent, roles, layouts, strict=True)
    ]
    streams += [
        Stream(Role.ENCODER, len(chain), default_layout(value_shape(chain[0].add) or ()).grid, cached=False)
        for chain in encoders
    ]
    named = tuple(f"{module_path(each.add) or 'model'} ({source_line(each.add)})" for each in embeddings)
    return Structure(tuple(branches), _ends(graph, cached), tuple(streams), named)


def _starts_with_embedding(chain: _Chain, known: _Graph) -> bool:
    """Whether a stream's first sum, and no later one, adds a convolution of tokens that nothing else goes into.

    It is part of the embedding, as in audio models: positions for all blocks, and no block of its own.
    """
    first, *rest = chain
    if not rest or not _convolves(first, known) or any(_convolves(each, known) for each in rest):
        return False
    outside = {n for node in first.body for n in node.all_input_nodes} - first.body - {first.stream}
    return all(known.variance[n.name] is Variance.INVARIANT for n in outside)


def _convolves(residual: _Residual, known: _Graph) -> bool:
    """Whether convolutions are its only products."""
    products = [n for n in residual.body if known.flops[n.name] or n in known.uncounted]
    return all(op_name(n) in _CONVOLUTIONS for n in products)


def _cached(known: _Graph, cores: dict[fx.Node, _Core]) -> set[fx.Node]:
    """The sums that a step reads if it takes every branch from the cache, or recomputes some of its tokens."""
    stops = {core.node for core in cores.values()}
    seen: set[fx.Node] = set()

    def unseen(node: fx.Node) -> list[fx.Node]:
        return [] if node in stops else [each for each in node.all_input_nodes if each not in seen]

    roots, reached = [known.graph.output_node()], set[fx.Node]()
    while roots:
        for root in roots:
            seen.update({root, *closure(root, unseen)})
        new = (cores.keys() & seen) - reached
        reached |= new
        roots = [each for add in new for each in _read_in_partial_steps(cores[add]) if each not in seen]
    return reached


def _read_in_partial_steps(core: _Core) -> list[fx.Node]:
    """What the recomputed tokens of a branch are computed from, besides their stream and tokens joined with it."""
    reading = [] if core.places is None else [n for n in core.inside if op_name(n) not in CONCATENATIONS]
    inside = set(core.inside)
    return [each for node in reading for each in node.all_input_nodes if each not in inside]


def _ends(graph: fx.Graph, cached: list[fx.Node]) -> dict[Port, str]:
    """The values of streams that the model's outputs read if no block is computed: the last one, and others by branch.

    There are several where a model also returns values from the middle of a stream, or denoises two latents.
    """
    numbers = {add: index for index, add in enumerate(cached)}
    read = closure(graph.output_node(), lambda node: [] if node in numbers else node.all_input_nodes)
    indices = sorted(numbers[node] for node in read if node in numbers)
    ports = {index: STREAM_END if index == indices[-1] else Port(PortKind.STREAM_END, index) for index in indices}
    return {port: carried_value(cached[index]).name for index, port in ports.items()}


def _layout(chain: _Chain, known: _Graph) -> TokenLayout:
    """The layout of a stream, by its first and its last attention."""
    attentions = [each for each in chain if any(map(_multiplies_activations, each.body))]
    telling = dict.fromkeys((*attentions[:1], *attentions[-1:]))
    bodies = [_body(each, _before_gate(each, known)[0], known) for each in telling]
    return find_layout(value_shape(chain[0].add) or (), bodies, known.batch)


def _body(residual: _Residual, core: fx.Node, known: _Graph) -> Body:
    above = closure(core, lambda n: residual.body.intersection(n.all_input_nodes))
    return Body(residual.stream, sorted(residual.body & {core, *above}, key=known.order.__getitem__), core)


def _roles(known: _Graph, chains: list[_Chain], cached: set[fx.Node]) -> list[Role]:
    """The role of each chain."""
    lineage = _lineage(known.graph, {each.add: each.carried for chain in chains for each in chain}, known.variance)
    candidates = [chain for chain in chains if any(each.add in cached for each in chain)]
    own = [chain for chain in candidates if lineage[chain[0].stream] is Variance.LATENT]
    heaviest = max(own or candidates, key=_work)
    above = ancestors(heaviest[0].stream)
    return [_role(chain, chain is heaviest, above, known.variance, lineage) for chain in chains]


def _role(
    chain: list[_Residual],
    is_heaviest: bool,
    above: set[fx.Node],
    variance: dict[str, Variance],
    lineage: dict[fx.Node, Variance],
) -> Role:
    """Text where the tokens are not the latent's; a refiner where an input of the main stream joins only later.

    ``above`` is everything that the start of the main stream is computed from.
    """
    if lineage[chain[0].stream] is not Variance.LATENT:
        return Role.TEXT
    if is_heaviest or chain[-1].add not in above:
        return Role.MAIN
    inputs, main_inputs = (_inputs(nodes, variance) for nodes in (ancestors(chain[-1].add), above))
    return Role.REFINER if main_inputs - inputs else Role.MAIN


def _lineage(
    graph: fx.Graph, carried: dict[fx.Node, fx.Node], variance: dict[str, Variance]
) -> dict[fx.Node, Variance]:
    """The variance of each value without what branches add to it: that of the tokens its stream starts from."""
    found: dict[fx.Node, Variance] = {}
    for node in graph.nodes:
        sources = [carried[node]] if node in carried else _sliced_from(node)
        found[node] = max((found[n] for n in sources), default=variance[node.name])
    return found


def _sliced_from(node: fx.Node) -> list[fx.Node]:
    """The operands of a value; for a slice of a concatenation, the pieces that it takes entries from."""
    if op_name(node) != "slice":
        return node.all_input_nodes
    source = node.all_input_nodes[0]
    while op_name(source) in ELEMENTWISE:
        source = source.all_input_nodes[0]
    return overlapped(node, source) if op_name(source) in CONCATENATIONS else node.all_input_nodes


def _inputs(nodes: set[fx.Node], variance: dict[str, Variance]) -> set[fx.Node]:
    """The inputs of the graph among ``nodes``, other than the timestep and the latent."""
    return {n for n in nodes if n.op == "placeholder" and variance[n.name] is Variance.INVARIANT}


def _residuals(known: _Graph, changing: bool) -> list[_Residual]:
    """The residual additions of values that depend on the latent (``changing``), or of those that do not."""
    found: list[_Residual] = []
    onwards: dict[fx.Node, fx.Node] = {}
    for node in known.order:
        if op_name(node) in SUMS and (known.variance[node.name] is Variance.LATENT) == changing:
            residual = _residual(node, onwards, known)
            if residual is not None:
                found.append(residual)
                onwards[node] = residual.carried
    return found


def _residual(node: fx.Node, onwards: dict[fx.Node, fx.Node], known: _Graph) -> _Residual | None:
    """The residual that ``node`` adds, if it does; ``onwards`` has what each earlier residual sum carries on."""
    operands = known.trails.summands(node)
    if len(operands) != 2 or any(value_shape(operand) != value_shape(node) for operand in operands):
        return None
    orders = [(a, b, Ancestors(b, known.order)) for a, b in (operands, operands[::-1])]
    sources = [(a, a, b, above) for a, b, above in orders if a in above]
    if not sources:
        trails = [(a, known.trails.back(a, onwards), b, above) for a, b, above in orders]
        earlier = [(a, next((n for n in trail if n in above), None), b, above) for a, trail, b, above in trails]
        sources = [(a, stream, b, above) for a, stream, b, above in earlier if stream is not None]
    for carried, stream, result, above in sources:
        body = frozenset(above.computed_from(stream) | {result})
        work = sum(known.flops[n.name] for n in body)
        if work or not known.uncounted.isdisjoint(body):
            return _Residual(node, carried, stream, result, body, work)
    return None


def _without_long_skips(candidates: list[_Residual], known: _Graph) -> list[_Residual]:
    """Drops additions that join the stream's start to its end, and then residuals inside another's branch.

    An addition that spans two or more residuals in a row from the same start is such a skip; one that spans a single
    residual is the branch itself (AuraFlow: x + mlp(norm(x + attention(x)))). One that spans a row of residuals after
    an embedding, x + network(x), is a skip as well if it is alone.
    """
    sums = {each.add for each in candidates}
    alone = {chain[0].add for chain in _chains(candidates, known) if len(chain) == 1}
    followers: dict[fx.Node, list[_Residual]] = {}
    for each in candidates:
        followers.setdefault(known.trails.origin(each.carried, sums), []).append(each)

    def skips(outer: _Residual) -> bool:
        node, passed = known.trails.origin(outer.stream, sums), 0
        while inner := [r for r in followers.get(node, []) if r is not outer and r.add in outer.body]:
            node, passed = inner[0].add, passed + 1
        inside = [r for r in candidates if r is not outer and r.add in outer.body]
        rows = [row for row in _chains(inside, known) if len(row) > 1]
        return passed > 1 or (bool(rows) and outer.add in alone)

    short = [each for each in candidates if not skips(each)]
    inside = set[fx.Node]().union(*(each.body for each in short))
    return [each for each in short if each.add not in inside]


def _chains(candidates: list[_Residual], known: _Graph) -> list[_Chain]:
    chains: list[_Chain] = []
    sums = {each.add for each in candidates}
    ends: dict[fx.Node, _Chain] = {}
    for each in candidates:
        chain = ends.pop(known.trails.origin(each.carried, sums), None)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(each)
        ends[each.add] = chain
    return chains


def _work(chain: _Chain) -> int:
    return sum(residual.flops for residual in chain)


def _core(residual: _Residual, layout: TokenLayout, known: _Graph) -> _Core:
    core, gated = _before_gate(residual, known)
    body = _body(residual, core, known)
    try:
        return _Core(core, gated, body.nodes, follow(body, layout), None)
    except Mixing as mixing:
        reason = f"{mixing} at {source_line(mixing.node) or module_path(mixing.node)}"
        return _Core(core, gated, body.nodes, None, reason)


def _branch(
    index: int,
    block: int,
    chain: int,
    role: Role,
    residual: _Residual,
    layout: TokenLayout,
    core: _Core,
    known: _Graph,
) -> Branch:
    value = core.node.meta["val"]
    shape = tuple(value.shape)
    kind = _kind(residual, core.inside, core.places)
    attention = [n for n in core.inside if op_name(n) == "scaled_dot_product_attention"]
    scored = [n for n in attention if _is_scored(n, kind, layout.rows, layout.tokens)]
    return Branch(
        index=index,
        block=block,
        chain=chain,
        path=module_path(residual.add),
        source=source_line(residual.add),
        role=role,
        kind=kind,
        stream=residual.stream.name,
        carried=residual.carried.name,
        core=core.node.name,
        add=residual.add.name,
        gated=core.gated,
        body=frozenset(n.name for n in core.inside),
        shape=shape,
        layout=layout,
        dtype=value.dtype,
        flops=residual.flops,
        input=_input(residual.stream, core.inside, shape[0], known.flops).name,
        attention=scored[0].name if scored else None,
        token_places=core.places,
        mixing_reason=core.reason,
    )


def _input(stream: fx.Node, inside: list[fx.Node], rows: int, flops: dict[str, int]) -> fx.Node:
    """What the first product of a branch reads, at the point where its first dimension is the batch of ``rows``."""
    nodes = {stream, *inside}
    product = next((n for n in inside if flops[n.name]), inside[0])
    node = next(n for n in product.all_input_nodes if n in nodes)
    while node is not stream and (value_shape(node) or (0,))[0] != rows:
        node = next(n for n in node.all_input_nodes if n in nodes)
    return node


def _is_scored(attention: fx.Node, kind: str, rows: int, tokens: int) -> bool:
    """Whether its attention map scores each token of the branch: as a key, or as a query of a cross-attention."""
    if kind != "cross_attention":
        return key_offset(attention, rows, tokens) is not None
    query = attention.args[0]
    shape = (value_shape(query) if isinstance(query, fx.Node) else None) or ()
    return len(shape) == 4 and (shape[0], shape[2]) == (rows, tokens)


def _before_gate(residual: _Residual, known: _Graph) -> tuple[fx.Node, bool]:
    """The result before multiplications by values that do not depend on the latent, which is what methods cache.

    Nor does it hold the stream itself, as the sums in ``x + a * (f(x) - x)`` and ``where(mask, x + f(x), x)`` do. Also
    returns whether there was such a gate.
    """
    node, gated = residual.result, op_name(residual.add) in ("addcmul", "addcdiv", "lerp")
    while True:
        inner, is_gate = _under_gate(node, residual, known)
        if inner is None:
            inner, is_gate = _beside_stream(node, residual, known), False
        if inner is None or value_shape(inner) != value_shape(node) or len(inner.users) != 1:
            return node, gated
        node, gated = inner, gated or is_gate


def _under_gate(node: fx.Node, residual: _Residual, known: _Graph) -> tuple[fx.Node | None, bool]:
    """What a gate multiplies or a cast converts, and whether it is a gate."""
    if op_name(node) in PASSTHROUGH:
        inner, is_gate = [n for n in node.all_input_nodes if n in residual.body], False
    elif op_name(node) == "mul" and len(node.all_input_nodes) == 2:
        inner, is_gate = [n for n in node.all_input_nodes if known.variance[n.name] is Variance.LATENT], True
    else:
        return None, False
    return (inner[0], is_gate) if len(inner) == 1 else (None, False)


def _beside_stream(node: fx.Node, residual: _Residual, known: _Graph) -> fx.Node | None:
    """What is added to the stream within a result, which may then be scaled."""
    trails = known.trails
    while node in residual.body:
        operands = trails.summands(node)
        if len(operands) == 2:
            others = [each for each in operands if not trails.carries(each, residual.stream)]
            return others[0] if len(others) == 1 and others[0] in residual.body else None
        inner = trails.carried_from(node)
        if len(inner) != 1 or op_name(node) in NORMS:
            return None
        node = inner[0]
    return None


def _uncast(node: fx.Node) -> fx.Node:
    """The value that a node is a cast or a copy of."""
    while op_name(node) in PASSTHROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_attention(node: fx.Node) -> bool:
    """Whether it is an attention, or a product with weights from a softmax."""
    if op_name(node) in ("scaled_dot_product_attention", _FUSED_SELF_ATTENTION):
        return True
    if (known := observed(node)) is not None and known.attention:
        return True
    return op_name(node) in _ACTIVATION_PRODUCTS and any(op_name(_uncast(n)) in _SOFTMAX for n in node.all_input_nodes)


def _multiplies_activations(node: fx.Node) -> bool:
    return op_name(node) in _ACTIVATION_PRODUCTS or _is_attention(node)


def _multiplies(node: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether it multiplies two of ``nodes``, or is an attention on keys and values among them."""
    if op_name(node) == _FUSED_SELF_ATTENTION:
        return True
    if (known := observed(node)) is not None:
        return known.attention and not nodes.isdisjoint(mixed_operands(node, known))
    return op_name(node) in _ACTIVATION_PRODUCTS and len(nodes.intersection(node.all_input_nodes)) > 1


def _kind(residual: _Residual, inside: list[fx.Node], places: Places | None) -> str:
    """Self-attention multiplies two values of the stream; cross-attention weighs other values with a softmax."""
    attends = any(_is_attention(n) for n in inside)
    if places is not None:
        return "cross_attention" if attends else "mlp"
    nodes = {residual.stream, *inside}
    if not any(_multiplies(n, nodes) for n in inside):
        return "cross_attention" if attends else "mixing"
    activates = any(op_name(n) in ("gelu", "silu", "relu") for n in inside)
    return "attention+mlp" if attends and activates else "self_attention"
