"""Moves what does not depend on the latent out of the step.

Loop-invariant values become inputs, computed once per request. Timestep-only values are pieces of one packed input for
each type, a row that is computed once per timestep, or for all timesteps of a request at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from duca_compile.analysis.tokens import EXPANDS, RESHAPES
from duca_compile.core.fx_utils import add_placeholder, copy_graph, op_name, value_shape
from duca_compile.core.ir import Facts, Variance
from duca_compile.core.ports import Port, PortKind, hoisted
from duca_compile.frontend.offloading import fetch
from duca_compile.frontend.opaque import opaque
from duca_compile.passes.base import ExactPass, VariantDraft

aten = torch.ops.aten

ALIGNMENT = 64  # bytes of a line of memory
FEW = 64  # vectors for each row of the batch: a timestep-only value of more stays in the step
VIEWS = RESHAPES | EXPANDS | {
    "alias", "chunk", "getitem", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze",
}  # fmt: skip
_CASTS = {"to", "_to_copy"}
_SCALED = {"add", "mul", "neg", "rsub", "sub"}  # by a number: cheaper to do again than to hand over


def row_port(dtype: torch.dtype) -> Port:
    """The input that carries the timestep-only values of one dtype, packed into one dimension."""
    return Port(PortKind.ROW, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Piece:
    """Where a row holds one value."""

    name: str
    start: int  # in elements
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


def frontier(graph: fx.Graph, facts: Facts) -> list[fx.Node]:
    """The loop-invariant tensors that are computed once per request and that the loop itself reads."""
    tiers = _tiers(graph, facts)
    return _read_outside(graph, tiers, Variance.INVARIANT)


def row_layout(graph: fx.Graph, facts: Facts) -> dict[torch.dtype, tuple[Piece, ...]]:
    """The timestep-only tensors that the step reads, by type: the pieces of each row in order, without gaps.

    Those that fill whole lines of memory come first, so that they begin at one. Where a piece begins is then a multiple
    of the batch size and a constant, which an export that leaves the batch open relies on.
    """
    pieces: dict[torch.dtype, list[Piece]] = {}
    nodes = _read_outside(graph, _tiers(graph, facts), Variance.TIMESTEP)
    for node in sorted(nodes, key=lambda node: _bytes(node) % ALIGNMENT > 0):
        value = node.meta["val"]
        row = pieces.setdefault(value.dtype, [])
        row.append(Piece(node.name, row[-1].stop if row else 0, tuple(value.shape)))
    return {dtype: tuple(row) for dtype, row in pieces.items()}


def _tiers(graph: fx.Graph, facts: Facts) -> dict[fx.Node, Variance]:
    """What leaves the step, and how often it is computed.

    What is computed from weights alone stays unless it is smaller than they are, and so does the cast of a weight: a
    quantized weight that is widened for a product would else be kept at full width. A timestep-only value with many
    vectors stays, and all that is computed from it, such as the text's keys in the first block: it would be kept for
    each timestep, and computing it for all of them at once saves nothing.
    """
    weights: dict[fx.Node, frozenset[fx.Node] | None] = {}  # what a node is computed from; None where arguments too
    found: dict[fx.Node, Variance] = {}
    many: set[fx.Node] = set()  # timestep-only values that stay
    for node in graph.nodes:
        if node.op == "get_attr" or node.target is fetch:
            weights[node] = frozenset((node,))
            continue
        weights[node] = None
        variance = facts.variance.get(node.name, Variance.LATENT)  # of a node that is new since: it stays
        if node.op != "call_function" or variance is Variance.LATENT or node.target is opaque:
            continue
        above = [weights[n] for n in node.all_input_nodes]
        if variance is Variance.INVARIANT and None not in above:
            own = weights[node] = frozenset[fx.Node]().union(*filter(None, above))
            if own and (op_name(node) in _CASTS or _bytes(node) >= sum(map(_bytes, own))):
                continue
        if variance is Variance.TIMESTEP and (
            _has_many_vectors(node, facts.batch) or not many.isdisjoint(node.all_input_nodes)
        ):
            many.add(node)
            continue
        found[node] = variance
    return found


def _has_many_vectors(node: fx.Node, batch: int) -> bool:
    shape = value_shape(node) or ()
    return prod(shape[:-1]) > FEW * batch


def _read_outside(graph: fx.Graph, tiers: Mapping[fx.Node, Variance], tier: Variance) -> list[fx.Node]:
    """The tensors of ``tier`` that others read; in the place of a view of one, or of its sum with a number, itself."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if tiers.get(node) is tier and any(tiers.get(user) is not tier for user in node.users):
            found[_source(node, tiers)] = None
    return [node for node in found if isinstance(node.meta.get("val"), torch.Tensor) and not _is_view(node)]


def _source(node: fx.Node, tiers: Mapping[fx.Node, Variance]) -> fx.Node:
    """The value that ``node`` is cheaply computed from, within its tier."""
    while op_name(node) in VIEWS | _SCALED and len(node.all_input_nodes) == 1:
        (above,) = node.all_input_nodes
        if tiers.get(above) is not tiers[node] or (op_name(node) in _SCALED and _bytes(above) > _bytes(node)):
            break
        node = above
    return node


def _is_view(node: fx.Node) -> bool:
    """Of something that stays in the step, so that nothing is gained by taking it out."""
    return op_name(node) in VIEWS and len(node.all_input_nodes) == 1


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0


def invariant_graph(graph: fx.Graph, facts: Facts) -> fx.Graph:
    """The graph that computes the frontier from the call's loop-invariant inputs, in the frontier's order."""
    prologue = copy_graph(graph)
    by_name = {n.name: n for n in prologue.nodes}
    prologue.output_node().args = (tuple(by_name[n.name] for n in frontier(graph, facts)),)
    return prologue


def timestep_graph(graph: fx.Graph, facts: Facts, needed: frozenset[str]) -> fx.Graph:
    """The graph that computes the rows from the timestep and the loop-invariant values, in the layout's order.

    Only the pieces called ``needed`` are computed; the others are zero.
    """
    copy = copy_graph(graph)
    by_name = {n.name: n for n in copy.nodes}
    for node in frontier(graph, facts):
        own = by_name[node.name]
        with copy.inserting_before(next(iter(copy.nodes))):
            given = add_placeholder(copy, hoisted(node.name), node.meta["val"])
        own.replace_all_uses_with(given)
    output = copy.output_node()
    with copy.inserting_before(output):
        rows = [_row(copy, by_name, dtype, row, needed) for dtype, row in row_layout(graph, facts).items()]
    output.args = (tuple(rows),)
    return copy


def _row(
    graph: fx.Graph, by_name: Mapping[str, fx.Node], dtype: torch.dtype, row: Sequence[Piece], needed: frozenset[str]
) -> fx.Node:
    options = {"dtype": dtype, "device": by_name[row[0].name].meta["val"].device}
    parts: list[fx.Node] = []
    for piece in row:
        if piece.name in needed:
            parts.append(graph.call_function(aten.reshape.default, (by_name[piece.name], [-1])))
        else:
            parts.append(graph.call_function(aten.zeros.default, ([piece.stop - piece.start],), options))
    packed = graph.call_function(aten.cat.default, (parts,))
    packed.meta["val"] = by_name[row[0].name].meta["val"].new_empty(row[-1].stop)
    return packed


@dataclass(frozen=True)
class Hoist(ExactPass[VariantDraft]):
    """Reads loop-invariant values from inputs, and timestep-only ones from pieces of the rows."""

    ensures = frozenset({"hoisted"})

    def apply(self, draft: VariantDraft) -> bool:
        nodes = frontier(draft.graph, draft.facts)
        rows = row_layout(draft.graph, draft.facts)
        for node in nodes:
            node.replace_all_uses_with(draft.input(hoisted(node.name), node.meta["val"]))
        for dtype, row in rows.items():
            sample = draft.node(row[0].name).meta["val"]
            given = draft.input(row_port(dtype), sample.new_empty(row[-1].stop))
            for piece in row:
                _read(draft, given, piece)
        return bool(nodes or rows)


def _read(draft: VariantDraft, row: fx.Node, piece: Piece) -> None:
    node = draft.node(piece.name)
    with draft.graph.inserting_after(row):
        flat = draft.graph.call_function(aten.slice.Tensor, (row, 0, piece.start, piece.stop))
    with draft.graph.inserting_after(flat):
        value = draft.graph.call_function(aten.reshape.default, (flat, list(piece.shape)))
    flat.meta["val"] = node.meta["val"].reshape(-1)
    value.meta |= {"val": node.meta["val"], "piece": piece.name}
    node.replace_all_uses_with(value)
