"""Finds the residual stream and its branches: adds of a value and something computed from that value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from duca_compile.analysis.tokens import Axes, Mixing, follow_tokens, own_keys
from duca_compile.analysis.variance import ancestors, descendants
from duca_compile.errors import StructureError
from duca_compile.graph import Branch, Variance, module_path, op_name, source_line, value_shape

_PASSTHROUGH = {"to", "_to_copy", "clone", "contiguous", "dropout", "alias", "detach", "clamp"}


@dataclass(frozen=True)
class _Residual:
    """One candidate: ``add`` = ``carried`` + ``result``, where the nodes of ``body`` compute result from ``stream``.

    ``stream`` is ``carried``, or for parallel branches (x + f(x) + g(x)) the value before the branches added so far.
    """

    add: fx.Node
    carried: fx.Node
    stream: fx.Node
    result: fx.Node
    body: frozenset[fx.Node]
    flops: int


def find_branches(
    graph: fx.Graph, variance: dict[str, Variance], flops: dict[str, int]
) -> tuple[tuple[Branch, ...], str]:
    """The branches of the main stream in order, and the name of the stream's last value.

    The main stream is the chain of residual adds with the most FLOPs in its branches, the chains that go on behind it
    (a long skip, a projection or a concatenation lies between them), and every chain that leads into one of these.

    Raises:
        StructureError: there is no residual add whose branch does any work.
    """
    candidates: dict[fx.Node, _Residual] = {}
    for node in graph.nodes:
        residual = _residual(node, candidates, variance, flops)
        if residual is not None:
            candidates[node] = residual
    order = {node: i for i, node in enumerate(graph.nodes)}
    main = _main_stream(_chains(_without_long_skips(list(candidates.values()))), order)
    if not main:
        raise StructureError(
            "no residual branch found: no add joins a latent-dependent value with something computed from it by "
            "matrix products. There is nothing to cache in this model; run it as it is."
        )
    branches: list[Branch] = []
    for index, residual in enumerate(main):
        path = module_path(residual.add)
        same_block = bool(branches) and branches[-1].path == path
        block = branches[-1].block + (not same_block) if branches else 0
        branches.append(_branch(index, block, residual, variance, order))
    return tuple(_same_tokens(branches)), main[-1].add.name


def _residual(
    node: fx.Node, found: dict[fx.Node, _Residual], variance: dict[str, Variance], flops: dict[str, int]
) -> _Residual | None:
    if op_name(node) != "add" or variance[node.name] is not Variance.LATENT or len(node.all_input_nodes) != 2:
        return None
    if any(value_shape(operand) != value_shape(node) for operand in node.all_input_nodes):
        return None
    orders = [(a, b, ancestors(b)) for a, b in (node.all_input_nodes, node.all_input_nodes[::-1])]
    sources = [(a, a, b, above) for a, b, above in orders if a in above]
    if not sources:
        earlier = [(a, _earlier_stream(a, above, found), b, above) for a, b, above in orders]
        sources = [(a, stream, b, above) for a, stream, b, above in earlier if stream is not None]
    if not sources:
        return None
    carried, stream, result, above = sources[0]
    body = frozenset(descendants(stream) & above | {result})
    work = sum(flops[n.name] for n in body)
    return _Residual(node, carried, stream, result, body, work) if work else None


def _earlier_stream(carried: fx.Node, above: set[fx.Node], found: dict[fx.Node, _Residual]) -> fx.Node | None:
    """The nearest earlier value of the stream ``carried`` that is in ``above``."""
    while carried not in above:
        residual = found.get(_origin(carried))
        if residual is None:
            return None
        carried = residual.carried
    return carried


def _origin(node: fx.Node) -> fx.Node:
    """The value a stream operand really is, behind casts and copies."""
    while op_name(node) in _PASSTHROUGH:
        node = node.all_input_nodes[0]
    return node


def _without_long_skips(candidates: list[_Residual]) -> list[_Residual]:
    """Drops adds that join the stream's start to its end, and then residuals inside another's branch.

    An add over two or more residuals in a row that start where it does is such a skip; over a single one it is the
    branch itself (AuraFlow: x + mlp(norm(x + attention(x)))). So is one that stands alone over a row of residuals
    behind an embedding: x + network(x).
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
    return [each for each in short if not any(each.add in other.body for other in short)]


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


def _main_stream(chains: list[list[_Residual]], order: dict[fx.Node, int]) -> list[_Residual]:
    """The heaviest chain, those that go on behind it and all that lead into these, in graph order."""
    if not chains:
        return []
    rest = sorted(chains, key=lambda chain: sum(r.flops for r in chain), reverse=True)
    main = [rest.pop(0)]
    while after := [chain for chain in rest if main[-1][-1].add in ancestors(chain[0].stream)]:
        main.append(after[0])
        rest.remove(after[0])
    for chain in main:  # grows while it is walked
        above = ancestors(chain[0].stream)
        before = [other for other in rest if other[-1].add in above]
        rest = [other for other in rest if other not in before]
        main += before
    return sorted((each for chain in main for each in chain), key=lambda each: order[each.add])


def _same_tokens(branches: list[Branch]) -> list[Branch]:
    """Leaves one set of tokens to choose from, the heaviest; branches over other tokens are reused whole."""
    work: dict[tuple[int, ...], int] = {}
    for branch in branches:
        if branch.pointwise:
            work[branch.shape[:2]] = work.get(branch.shape[:2], 0) + branch.flops
    if len(work) < 2:
        return branches
    chosen = max(work, key=lambda shape: work[shape])
    reason = f"only the branches over {chosen[1]} tokens are recomputed in part"
    return [
        b if not b.pointwise or b.shape[:2] == chosen else replace(b, token_axes=None, mixing_reason=reason)
        for b in branches
    ]


def _branch(
    index: int, block: int, residual: _Residual, variance: dict[str, Variance], order: dict[fx.Node, int]
) -> Branch:
    core, gated = _behind_gate(residual, variance)
    value = core.meta["val"]
    shape = tuple(value.shape)
    inside = sorted(residual.body & (ancestors(core) | {core}), key=order.__getitem__)
    attention = [n for n in inside if op_name(n) == "scaled_dot_product_attention"]
    scored = [n for n in attention if len(shape) == 3 and own_keys(n, *shape[:2]) is not None]
    axes: Axes | None = None
    reason: str | None = None
    try:
        axes = follow_tokens(residual.stream, inside, core)
    except Mixing as mixing:
        reason = f"{mixing} at {source_line(mixing.node) or module_path(mixing.node)}"
    return Branch(
        index=index,
        block=block,
        path=module_path(residual.add),
        source=source_line(residual.add),
        kind=_kind(attention, axes, inside),
        stream=residual.stream.name,
        core=core.name,
        add=residual.add.name,
        gated=gated,
        body=frozenset(n.name for n in inside),
        shape=shape,
        dtype=value.dtype,
        flops=residual.flops,
        attention=scored[0].name if scored else None,
        token_axes=axes,
        mixing_reason=reason,
    )


def _behind_gate(residual: _Residual, variance: dict[str, Variance]) -> tuple[fx.Node, bool]:
    """Peels multiplications by values that do not depend on the latent: what the literature caches is before them."""
    node, gated = residual.result, False
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


def _kind(attention: list[fx.Node], axes: Axes | None, inside: list[fx.Node]) -> str:
    if not attention:
        return "mlp" if axes is not None else "mixing"
    if axes is not None:
        return "cross_attention"
    if attention[0].args[1] not in inside:
        return "cross_attention"
    wide = sum(op_name(n) in ("gelu", "silu", "relu") for n in inside)
    return "attention+mlp" if wide else "self_attention"
