"""Moves what does not depend on the latent out of the step.

Loop-invariant values become inputs, computed once per request. Timestep-only values become pieces of one packed input
per dtype, called a row. A row is computed once per timestep, or for all timesteps of a request at once.
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

ALIGNMENT = 64  # bytes, a hardware cache line
FEW = 64  # vectors per batch row: a timestep-only value with more stays in the step
VIEWS = RESHAPES | EXPANDS | {
    "alias", "chunk", "getitem", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze",
}  # fmt: skip
_CASTS = {"to", "_to_copy"}
_SCALED = {"add", "mul", "neg", "rsub", "sub"}  # by a number: cheaper to recompute than to pass as an input


def row_port(dtype: torch.dtype) -> Port:
    """The input that carries the timestep-only values of one dtype, packed into one dimension."""
    return Port(PortKind.ROW, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Piece:
    """The place of one value in a row."""

    name: str
    start: int  # in elements
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


def frontier(graph: fx.Graph, facts: Facts) -> list[fx.Node]:
    """The loop-invariant tensors that are computed once per request and that the loop itself reads."""
    tiers = _tiers(graph, facts)
    return _read_by_others(graph, tiers, Variance.INVARIANT)


def row_layout(graph: fx.Graph, facts: Facts) -> dict[torch.dtype, tuple[Piece, ...]]:
    """The timestep-only tensors that the step reads, by dtype: the pieces of each row in order, without gaps.

    Pieces whose size is a multiple of ``ALIGNMENT`` come first, so that they are aligned. Each piece then starts at the
    batch size times a constant, which an export with a dynamic batch relies on.
    """
    pieces: dict[torch.dtype, list[Piece]] = {}
    nodes = _read_by_others(graph, _tiers(graph, facts), Variance.TIMESTEP)
    for node in sorted(nodes, key=lambda node: _bytes(node) % ALIGNMENT > 0):
        value = node.meta["val"]
        row = pieces.setdefault(value.dtype, [])
        row.append(Piece(node.name, row[-1].stop if row else 0, tuple(value.shape)))
    return {dtype: tuple(row) for dtype, row in pieces.items()}


def _tiers(graph: fx.Graph, facts: Facts) -> dict[fx.Node, Variance]:
    """The values that leave the step, and how often each is computed.

    A value computed from weights alone stays in the step unless it is smaller than they are, and so does the cast of a
    weight; otherwise a quantized weight that is widened for a product would be kept at full width. A timestep-only
    value with many vectors stays, such as the text's keys in the first block, and so does everything computed from it:
    it would have to be kept for each timestep, and computing it for all of them at once saves nothing.
    """
    weights: dict[fx.Node, frozenset[fx.Node] | None] = {}  # by node that depends on them; None if on arguments too
    tiers: dict[fx.Node, Variance] = {}
    many: set[fx.Node] = set()  # timestep-only values that stay
    for node in graph.nodes:
        if node.op == "get_attr" or node.target is fetch:
            weights[node] = frozenset((node,))
            continue
        weights[node] = None
        variance = facts.variance.get(node.name, Variance.LATENT)  # nodes added after the analysis stay
        if node.op != "call_function" or variance is Variance.LATENT or node.target is opaque:
            continue
        above = [weights[n] for n in node.all_input_nodes]
        if variance is Variance.INVARIANT and None not in above:
            sources = weights[node] = frozenset[fx.Node]().union(*filter(None, above))
            if sources and (op_name(node) in _CASTS or _bytes(node) >= sum(map(_bytes, sources))):
                continue
        if variance is Variance.TIMESTEP and (
            _has_many_vectors(node, facts.batch) or not many.isdisjoint(node.all_input_nodes)
        ):
            many.add(node)
            continue
        tiers[node] = variance
    return tiers


def _has_many_vectors(node: fx.Node, batch: int) -> bool:
    shape = value_shape(node) or ()
    return prod(shape[:-1]) > FEW * batch


def _read_by_others(graph: fx.Graph, tiers: Mapping[fx.Node, Variance], tier: Variance) -> list[fx.Node]:
    """The tensors of ``tier`` that other nodes read; a view, or a sum with a number, is traced to its source."""
    read: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if tiers.get(node) is tier and any(tiers.get(user) is not tier for user in node.users):
            read[_source(node, tiers)] = None
    return [node for node in read if isinstance(node.meta.get("val"), torch.Tensor) and not _is_view(node)]


def _source(node: fx.Node, tiers: Mapping[fx.Node, Variance]) -> fx.Node:
    """The value that ``node`` is cheaply computed from, within its tier."""
    while op_name(node) in VIEWS | _SCALED and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        if tiers.get(source) is not tiers[node] or (op_name(node) in _SCALED and _bytes(source) > _bytes(node)):
            break
        node = source
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether this is a view of a value that stays in the step, so that nothing is gained by moving it out."""
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

    Only the pieces named in ``needed`` are computed; the others are zero.
    """
    copy = copy_graph(graph)
    by_name = {n.name: n for n in copy.nodes}
    for node in frontier(graph, facts):
        computed = by_name[node.name]
        with copy.inserting_before(next(iter(copy.nodes))):
            placeholder = add_placeholder(copy, hoisted(node.name), node.meta["val"])
        computed.replace_all_uses_with(placeholder)
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
    """Reads loop-invariant values from inputs, and timestep-only values from pieces of the rows."""

    ensures = frozenset({"hoisted"})

    def apply(self, draft: VariantDraft) -> bool:
        nodes = frontier(draft.graph, draft.facts)
        rows = row_layout(draft.graph, draft.facts)
        for node in nodes:
            node.replace_all_uses_with(draft.input(hoisted(node.name), node.meta["val"]))
        for dtype, row in rows.items():
            sample = draft.node(row[0].name).meta["val"]
            packed = draft.input(row_port(dtype), sample.new_empty(row[-1].stop))
            for piece in row:
                _read(draft, packed, piece)
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
