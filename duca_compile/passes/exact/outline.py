"""Turns what repeats from block to block into one region, which a backend compiles once however deep the model is.

The graph is cut into cells where residual branches are added. Runs of cells that differ only in their operands become
calls of one subgraph, ``torch.ops.higher_order.invoke_subgraph``.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from duca_compile.core.fx_utils import op_name
from duca_compile.frontend.offloading import fetch
from duca_compile.passes.exact.hoist import VIEWS

aten = torch.ops.aten

_invoke = torch.ops.higher_order.invoke_subgraph
Cell = list[fx.Node]


@dataclass(frozen=True)
class Run:
    """``period`` cells that repeat ``count`` times, starting at cell ``start``."""

    start: int
    period: int
    count: int


@dataclass(frozen=True)
class Form:
    """What a stretch of the graph computes, independent of the names of its operands."""

    text: Hashable
    operands: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


def outline(module: fx.GraphModule, cuts: frozenset[str]) -> None:
    """Rewrites ``module`` so that what repeats between ``cuts`` is one subgraph with several calls.

    ``cuts`` are names of nodes that end a cell. Every node needs its fake value (``meta["val"]``).
    """
    cells = _cells(module.graph, _ends(module.graph, cuts))
    for run in repeats([form_of(cell).text for cell in cells]):
        starts = range(run.start, run.start + run.period * run.count, run.period)
        stretches = [[node for cell in cells[at : at + run.period] for node in cell] for at in starts]
        _call_one(module, f"repeated_{run.start}", stretches)
    module.graph.lint()
    module.recompile()


def repeats(labels: Sequence[Hashable]) -> list[Run]:
    """The runs of equal periods in a sequence, without overlap; at each place, the run that covers most."""
    runs: list[Run] = []
    at = 0
    while at < len(labels):
        best: Run | None = None
        for period in range(1, (len(labels) - at) // 2 + 1):
            count = 1
            while labels[at : at + period] == labels[at + count * period : at + (count + 1) * period]:
                count += 1
            if count > 1 and (best is None or period * count > best.period * best.count):
                best = Run(at, period, count)
        if best is not None:
            runs.append(best)
        at += best.period * best.count if best else 1
    return runs


def _ends(graph: fx.Graph, cuts: frozenset[str]) -> set[fx.Node]:
    """The nodes of ``cuts``, or their copies in the stream of the chosen tokens if these have one of their own.

    In that case only a chain of adds is left for all tokens, which is best compiled as a whole.
    """
    chosen = {node for node in graph.nodes if node.meta.get("some_of") in cuts}
    return chosen or {node for node in graph.nodes if node.name in cuts}


def _cells(graph: fx.Graph, ends: set[fx.Node]) -> list[Cell]:
    """The graph's operators in order, cut after each of ``ends``.

    Each cell that reads a view gets a copy of it, since a region must not return views of its operands. Values that
    cross a cut are made contiguous, so that the first block is like the others.
    """
    cells: list[Cell] = [[]]
    home: dict[fx.Node, Cell] = {}
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target is not fetch]:
        _copy_views(graph, node, cells[-1], home, {})
        cells[-1].append(node)
        home[node] = cells[-1]
        if node in ends:
            _make_contiguous(graph, node, cells[-1], home)
            cells.append([])
    for node in reversed(list(graph.nodes)):
        if node in home and not node.users:
            home[node].remove(node)
            graph.erase_node(node)
    return [cell for cell in cells if cell]


def _copy_views(
    graph: fx.Graph, node: fx.Node, cell: Cell, home: dict[fx.Node, Cell], copies: dict[fx.Node, fx.Node]
) -> None:
    """Makes ``node`` read copies, in its own cell, of the views that other cells make."""
    for source in node.all_input_nodes:
        if op_name(source) not in VIEWS or home.get(source) is cell or "piece" in source.meta:
            continue  # a piece of a row is an operand: its offset differs by block
        if source not in copies:
            with graph.inserting_before(node):
                copies[source] = graph.node_copy(source)
            _copy_views(graph, copies[source], cell, home, copies)
            cell.append(copies[source])
            home[copies[source]] = cell
        node.replace_input_with(source, copies[source])


def _make_contiguous(graph: fx.Graph, node: fx.Node, cell: Cell, home: dict[fx.Node, Cell]) -> None:
    value = node.meta["val"]
    if value.is_contiguous():
        return
    with graph.inserting_after(node):
        copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    copy.meta["val"] = value.clone(memory_format=torch.contiguous_format)
    cell.append(copy)
    home[copy] = cell


def form_of(stretch: Sequence[fx.Node]) -> Form:
    """The form of a stretch. Stretches with equal ``text`` compute the same results from their operands, in order."""
    places = {node: place for place, node in enumerate(stretch)}
    operands: dict[fx.Node, int] = {}

    def described(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            if value in places:
                return "own", places[value]
            return "operand", operands.setdefault(value, len(operands)), _kind(value)
        if isinstance(value, list | tuple):
            return type(value).__name__, *map(described, value)
        return type(value).__name__, repr(value)

    text = [
        (str(n.target), described(n.args), *((k, described(v)) for k, v in sorted(n.kwargs.items()))) for n in stretch
    ]
    results = tuple(node for node in stretch if any(user not in places for user in node.users))
    returned = tuple(places[node] for node in results)
    return Form((tuple(text), returned), tuple(operands), results)


def _kind(node: fx.Node) -> Hashable:
    value = node.meta.get("val")
    return kind_of(value) if isinstance(value, Tensor) else node  # anything but a tensor equals only itself


def kind_of(value: Tensor) -> Hashable:
    """Equal for tensors that differ at most in their values; sizes may be symbols."""
    return str(value.shape), str(value.stride()), value.dtype, value.device


def _counts(module: fx.GraphModule, operands: Sequence[fx.Node]) -> list[fx.Node]:
    """The symbols in the operands' shapes, as values: a region knows only the symbols that are passed to it."""
    sizes = [size for operand in operands for size in operand.meta["val"].shape if isinstance(size, torch.SymInt)]
    symbols = dict.fromkeys(symbol for size in sizes for symbol in size.node.expr.free_symbols)
    inputs = module.graph.find_nodes(op="placeholder")
    counts = []
    for symbol in sorted(symbols, key=str):
        source, dim = next(
            (node, dim)
            for node in inputs
            for dim, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt) and size.node.expr == symbol
        )
        with module.graph.inserting_after(inputs[-1]):
            counts.append(module.graph.call_function(aten.sym_size.int, (source, dim)))
        counts[-1].meta["val"] = source.meta["val"].shape[dim]
    return counts


def _call_one(module: fx.GraphModule, name: str, stretches: list[list[fx.Node]]) -> None:
    """Replaces each stretch by a call of one subgraph, made from the first stretch."""
    first, graph = form_of(stretches[0]), module.graph
    body, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    counts = _counts(module, first.operands)
    for place, operand in enumerate([*counts, *first.operands]):
        copies[operand] = body.placeholder(f"operand_{place}")
        copies[operand].meta["val"] = operand.meta["val"]
    for node in stretches[0]:
        copies[node] = body.node_copy(node, lambda n: copies[n])
    body.output(tuple(copies[node] for node in first.results))
    module.add_submodule(name, fx.GraphModule({}, body))
    for stretch in stretches:
        form = form_of(stretch)  # again, since its operands are now results of earlier calls
        with graph.inserting_after(stretch[-1]):
            region = graph.get_attr(name)
        with graph.inserting_after(region):
            call = last = graph.call_function(_invoke, (region, name, *counts, *form.operands))
        for place, result in enumerate(form.results):
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, place))
            last.meta["val"] = result.meta["val"]
            for user in [user for user in result.users if user not in stretch]:
                user.replace_input_with(result, last)
        for node in reversed(stretch):
            graph.erase_node(node)
