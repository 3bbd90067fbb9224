"""Finds residual streams and their branches: additions of a value and something computed from that value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from duca_compile.analysis.closure import Ancestors, ancestors, closure, descendants
from duca_compile.analysis.tokens import (
    CONCATENATIONS,
    ELEMENTWISE,
    Mixing,
    Places,
    follow_tokens,
    key_offset,
    overlapped,
)
from duca_compile.core.fx_utils import module_path, op_name, source_line, value_shape
from duca_compile.core.ir import Branch, Role, Stream, Variance
from duca_compile.errors import StructureError
from duca_compile.frontend.operators import carried_value

_SUMS = {"add", "addcmul"}
_SOFTMAX = {"softmax", "_softmax"}
# Products that may be of two activations, as in attention.
_ACTIVATION_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"}
_FUSED_SELF_ATTENTION = "_native_multi_head_attention"  # with its projections: its one operand is query, key and value
_PASSTHROUGH = {"to", "_to_copy", "clone", "contiguous", "dropout", "alias", "detach", "clamp", "clip"}


@dataclass(frozen=True)
class _Residual:
    """A candidate: ``add`` = ``carried`` + ``result``, where the nodes of ``body`` compute ``result`` from ``stream``.

    ``stream`` is ``carried``; for parallel branches (x + f(x) + g(x)) it is the value before those added so far.
    """

    add: fx.Node
    carried: fx.Node
    stream: fx.Node
    result: fx.Node
    body: frozenset[fx.Node]
    flops: int


def find_branches(
    graph: fx.Graph, variance: dict[str, Variance], flops: dict[str, int]
) -> tuple[tuple[Branch, ...], str, tuple[Stream, ...]]:
    """The branches to cache in graph order, the name of the main stream's last value, and all streams.

    The main stream consists of the chain of residual additions with the most FLOPs in its branches, the chains that
    continue it (after a long skip, a projection or a concatenation), and every chain that leads into one of these.
    Streams that do not depend on the latent are listed, but have no branches to cache.

    Raises:
        StructureError: there is no residual addition whose branch does any work.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    latent, encoders = (
        _chains(_without_long_skips(_residuals(order, variance, flops, changing))) for changing in (True, False)
    )
    main = _main_stream(latent)
    if not main:
        raise StructureError(
            "no residual branch found: no addition joins a latent-dependent value with something computed from it by "
            "matrix products. There is nothing to cache in this model; run it without duca_compile."
        )
    heaviest = max(main, key=_work)
    lineage = _lineage(graph, {each.add: each.carried for chain in latent for each in chain}, variance)
    above = ancestors(heaviest[0].stream)
    roles = [_role(chain, chain is heaviest, above, variance, lineage) for chain in latent]
    role_of = {each.add: role for chain, role in zip(latent, roles, strict=True) for each in chain}
    chain_of = {each.add: number for number, chain in enumerate(latent) for each in chain}
    cached = sorted((each for chain in main for each in chain), key=lambda each: order[each.add])
    branches: list[Branch] = []
    for index, residual in enumerate(cached):
        path = module_path(residual.add)
        same_block = bool(branches) and branches[-1].path == path
        block = branches[-1].block + (not same_block) if branches else 0
        branches.append(
            _branch(index, block, chain_of[residual.add], role_of[residual.add], residual, variance, order, flops)
        )
    streams = [_stream(chain, role, chain in main) for chain, role in zip(latent, roles, strict=True)]
    streams += [_stream(chain, Role.ENCODER, cached=False) for chain in encoders]
    return tuple(branches), carried_value(cached[-1].add).name, tuple(streams)


def _stream(chain: list[_Residual], role: Role, cached: bool) -> Stream:
    return Stream(role, len(chain), value_shape(chain[0].add) or (), cached)


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


def _residuals(
    order: dict[fx.Node, int], variance: dict[str, Variance], flops: dict[str, int], changing: bool
) -> list[_Residual]:
    """The residual additions of values that depend on the latent (``changing``), or of those that do not."""
    found: dict[fx.Node, _Residual] = {}
    for node in order:
        if op_name(node) in _SUMS and (variance[node.name] is Variance.LATENT) == changing:
            residual = _residual(node, order, found, variance, flops)
            if residual is not None:
                found[node] = residual
    return list(found.values())


def _residual(
    node: fx.Node,
    order: dict[fx.Node, int],
    found: dict[fx.Node, _Residual],
    variance: dict[str, Variance],
    flops: dict[str, int],
) -> _Residual | None:
    operands = _summands(node, variance)
    if len(operands) != 2 or any(value_shape(operand) != value_shape(node) for operand in operands):
        return None
    orders = [(a, b, Ancestors(b, order)) for a, b in (operands, operands[::-1])]
    sources = [(a, a, b, above) for a, b, above in orders if a in above]
    if not sources:
        earlier = [(a, _earlier_stream(a, above, found), b, above) for a, b, above in orders]
        sources = [(a, stream, b, above) for a, stream, b, above in earlier if stream is not None]
    if not sources:
        return None
    carried, stream, result, above = sources[0]
    body = frozenset(above.computed_from(stream) | {result})
    work = sum(flops[n.name] for n in body)
    return _Residual(node, carried, stream, result, body, work) if work else None


def _summands(node: fx.Node, variance: dict[str, Variance]) -> list[fx.Node]:
    """The values that are added; for ``addcmul``, x + gate * f(x), the stream and the gated value."""
    if op_name(node) == "add":
        return node.all_input_nodes
    stream, *factors = node.all_input_nodes
    gated = [factor for factor in factors if variance[factor.name] is Variance.LATENT]
    return [stream, *gated] if len(factors) == 2 else []


def _earlier_stream(carried: fx.Node, above: Ancestors, found: dict[fx.Node, _Residual]) -> fx.Node | None:
    """The nearest earlier value of the stream of ``carried`` that is in ``above``."""
    while carried not in above:
        residual = found.get(_origin(carried))
        if residual is None:
            return None
        carried = residual.carried
    return carried


def _origin(node: fx.Node) -> fx.Node:
    """The value that a stream operand is a cast or a copy of."""
    while op_name(node) in _PASSTHROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _without_long_skips(candidates: list[_Residual]) -> list[_Residual]:
    """Drops additions that join the stream's start to its end, and then residuals inside another's branch.

    An addition that spans two or more residuals in a row from the same start is such a skip; one that spans a single
    residual is the branch itself (AuraFlow: x + mlp(norm(x + attention(x)))). A lone addition that spans a row of
    residuals after an embedding, x + network(x), is a skip as well.
    """
    alone = {chain[0].add for chain in _chains(candidates) if len(chain) == 1}
    followers: dict[fx.Node, list[_Residual]] = {}
    for each in candidates:
        followers.setdefault(_origin(each.carried), []).append(each)

    def skips(outer: _Residual) -> bool:
        node, passed = _origin(outer.stream), 0
        while inner := [r for r in followers.get(node, []) if r is not outer and r.add in outer.body]:
            node, passed = inner[0].add, passed + 1
        if passed > 1 or outer.add not in alone:
            return passed > 1
        return any(len(row) > 1 for row in _chains([r for r in candidates if r is not outer and r.add in outer.body]))

    short = [each for each in candidates if not skips(each)]
    inside = set[fx.Node]().union(*(each.body for each in short))
    return [each for each in short if each.add not in inside]


def _chains(candidates: list[_Residual]) -> list[list[_Residual]]:
    chains: list[list[_Residual]] = []
    ends: dict[fx.Node, list[_Residual]] = {}
    for each in candidates:
        chain = ends.pop(_origin(each.carried), None)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(each)
        ends[each.add] = chain
    return chains


def _work(chain: list[_Residual]) -> int:
    return sum(residual.flops for residual in chain)


def _main_stream(chains: list[list[_Residual]]) -> list[list[_Residual]]:
    """The heaviest chain, those that continue it, and all that lead into these."""
    if not chains:
        return []
    rest = sorted(chains, key=_work, reverse=True)
    main = [rest.pop(0)]
    while following := _first_after(main[-1][-1].add, rest):
        main.append(following)
        rest.remove(following)
    seen: set[fx.Node] = set()

    def unseen(node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if each not in seen]

    for chain in main:  # grows during the loop
        above = set(closure(chain[0].stream, unseen))
        before = [other for other in rest if other[-1].add in above]
        rest = [other for other in rest if other not in before]
        main += before
        seen.update(above)
    return main


def _first_after(node: fx.Node, chains: list[list[_Residual]]) -> list[_Residual] | None:
    below = set(descendants(node))
    return next((chain for chain in chains if chain[0].stream in below), None)


def _branch(
    index: int,
    block: int,
    chain: int,
    role: Role,
    residual: _Residual,
    variance: dict[str, Variance],
    order: dict[fx.Node, int],
    flops: dict[str, int],
) -> Branch:
    core, gated = _before_gate(residual, variance)
    value = core.meta["val"]
    shape = tuple(value.shape)
    above = closure(core, lambda n: residual.body.intersection(n.all_input_nodes))
    inside = sorted(residual.body & {core, *above}, key=order.__getitem__)
    attention = [n for n in inside if op_name(n) == "scaled_dot_product_attention"]
    places: Places | None = None
    reason: str | None = None
    try:
        places = follow_tokens(residual.stream, inside, core)
    except Mixing as mixing:
        reason = f"{mixing} at {source_line(mixing.node) or module_path(mixing.node)}"
    kind = _kind(residual, inside, places)
    scored = [n for n in attention if len(shape) == 3 and _is_scored(n, kind, *shape[:2])]
    return Branch(
        index=index,
        block=block,
        chain=chain,
        path=module_path(residual.add),
        source=source_line(residual.add),
        role=role,
        kind=kind,
        stream=residual.stream.name,
        core=core.name,
        add=residual.add.name,
        gated=gated,
        body=frozenset(n.name for n in inside),
        shape=shape,
        dtype=value.dtype,
        flops=residual.flops,
        input=_input(residual.stream, inside, shape[0], flops).name,
        attention=scored[0].name if scored else None,
        token_places=places,
        mixing_reason=reason,
    )


def _input(stream: fx.Node, inside: list[fx.Node], rows: int, flops: dict[str, int]) -> fx.Node:
    """What the first product of a branch reads, at the point where its first dimension is the batch of ``rows``."""
    nodes = {stream, *inside}
    product = next((n for n in inside if flops[n.name]), inside[0])
    node = next(n for n in product.all_input_nodes if n in nodes)
    while node is not stream and (value_shape(node) or (0,))[0] != rows:
        node = next(n for n in node.all_input_nodes if n in nodes)
    return node


def _is_scored(attention: fx.Node, kind: str, batch: int, tokens: int) -> bool:
    """Whether its attention map scores each token of the branch: as a key, or as a query of a cross-attention."""
    if kind != "cross_attention":
        return key_offset(attention, batch, tokens) is not None
    query = attention.args[0]
    shape = (value_shape(query) if isinstance(query, fx.Node) else None) or ()
    return len(shape) == 4 and (shape[0], shape[2]) == (batch, tokens)


def _before_gate(residual: _Residual, variance: dict[str, Variance]) -> tuple[fx.Node, bool]:
    """The result before multiplications by values that do not depend on the latent, which is what methods cache.

    Also returns whether there was such a gate.
    """
    node, gated = residual.result, op_name(residual.add) == "addcmul"
    while True:
        if op_name(node) in _PASSTHROUGH:
            inner = [n for n in node.all_input_nodes if n in residual.body]
        elif op_name(node) == "mul":
            inner = [n for n in node.all_input_nodes if variance[n.name] is Variance.LATENT]
            if len(node.all_input_nodes) != 2 or len(inner) != 1:
                return node, gated
        else:
            return node, gated
        if len(inner) != 1 or value_shape(inner[0]) != value_shape(node) or len(inner[0].users) != 1:
            return node, gated
        gated = gated or op_name(node) == "mul"
        node = inner[0]


def _is_attention(node: fx.Node) -> bool:
    """Whether it is an attention, or a product with weights from a softmax."""
    if op_name(node) in ("scaled_dot_product_attention", _FUSED_SELF_ATTENTION):
        return True
    return op_name(node) in _ACTIVATION_PRODUCTS and any(op_name(_origin(n)) in _SOFTMAX for n in node.all_input_nodes)


def _multiplies(node: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether it multiplies two of ``nodes``, as self-attention does."""
    if op_name(node) == _FUSED_SELF_ATTENTION:
        return True
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
