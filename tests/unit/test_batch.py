"""Leaving the batch size of a graph open: what differs between two sizes becomes an expression of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from duca_compile import DuCa, ExportError
from duca_compile.artifact.manifest import BATCH, Size
from duca_compile.export.batch import BatchError, OpenGraph, Seen, open_graph
from duca_compile.export.trace import Traced
from tests.artifacts import example, optimized, tiny_dit

aten = torch.ops.aten
Built = Callable[[fx.Graph, fx.Node, int], fx.Node]


def seen(batch: int, build: Built) -> Seen:
    """A graph of one input ``x``, (batch, 4)."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(batch, 4, device="meta")
    result = build(graph, x, batch)
    graph.output((result,))
    module = fx.GraphModule({}, graph)
    result.meta["val"] = torch.empty_like(module(torch.zeros(batch, 4))[0], device="meta")
    return Seen(batch, module, ("x",), ("output_0",))


def opened(build: Built) -> OpenGraph:
    return open_graph("test", seen(2, build), seen(6, build))


def test_sizes_become_multiples_of_the_batch_and_a_constant() -> None:
    def build(graph: fx.Graph, x: fx.Node, batch: int) -> fx.Node:
        flat = graph.call_function(aten.reshape.default, (x, [4 * batch]))
        more = graph.call_function(aten.zeros.default, ([3],))
        joined = graph.call_function(aten.cat.default, ([flat, more],))
        return graph.call_function(aten.slice.Tensor, (joined, 0, 1, 4 * batch + 2))

    found = opened(build)
    assert found.inputs[0].shape == (Size(BATCH), 4)
    assert found.outputs[0].shape == (Size(BATCH, 4, 1),)
    for batch in (1, 2, 5):
        x = torch.arange(4.0 * batch).reshape(batch, 4)
        expected = torch.cat([x.flatten(), torch.zeros(3)])[1 : 4 * batch + 2]
        assert torch.equal(found.module(x)[0], expected)
        assert found.outputs[0].at(batch) == expected.shape


def test_a_graph_without_the_batch_stays_as_it_is() -> None:
    found = opened(lambda graph, x, batch: graph.call_function(aten.mul.Tensor, (x, 2.0)))
    assert [n.op for n in found.module.graph.nodes] == ["placeholder", "call_function", "output"]


def frequencies(graph: fx.Graph, x: fx.Node, batch: int) -> fx.Node:
    """Adds frequencies of sines, and what looks like them but depends on the batch, or is written to, or is drawn."""

    def call(shape: list[int], target: torch._ops.OpOverload, *args: Any) -> fx.Node:
        node: fx.Node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(shape, device="meta")
        return node

    places = call([4], aten.mul.Tensor, call([4], aten.arange.default, 4), -0.1)
    constant = call([4], aten.exp.default, places)
    of_rows = call([batch, 1], aten.exp.default, call([batch, 1], aten.full.default, [batch, 1], 0.5))
    filled = call([4], aten.fill_.Scalar, call([4], aten.zeros.default, [4]), 3.0)
    result = x
    for term in (constant, of_rows, filled, call([4], aten.rand.default, [4])):
        result = call([batch, 4], aten.add.Tensor, result, term)
    return result


def test_small_numbers_that_depend_on_nothing_are_computed_at_export() -> None:
    found = opened(frequencies)
    left = [str(n.target) for n in found.module.graph.nodes if n.op == "call_function"]
    assert "aten.arange.default" not in left
    assert {"aten.full.default", "aten.fill_.Scalar", "aten.rand.default"} < set(left)
    for batch in (1, 2, 5):
        torch.manual_seed(0)
        (result,) = found.module(torch.zeros(batch, 4))
        torch.manual_seed(0)
        expected = (torch.arange(4) * -0.1).exp() + torch.full((1,), 0.5).exp() + 3.0 + torch.rand(4)
        assert torch.equal(result, expected.expand(batch, 4))


def with_constant(batch: int, constant: Tensor) -> Seen:
    """A graph that adds a constant to its input."""
    made = seen(batch, lambda graph, x, _: graph.call_function(aten.add.Tensor, (x, 0.0)))
    add = next(iter(made.module.graph.find_nodes(op="call_function", target=aten.add.Tensor)))
    with made.module.graph.inserting_before(add):
        read = made.module.graph.get_attr("table")
    made.module.table = constant
    read.meta["val"], add.args = constant, (add.args[0], read)
    made.module.recompile()
    return made


def test_a_constant_that_repeats_with_the_rows_is_repeated() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = open_graph("test", with_constant(2, rows.repeat(2, 1)), with_constant(6, rows.repeat(6, 1)))
    for batch in (1, 2, 5):
        (result,) = found.module(torch.zeros(batch, 4))
        assert torch.equal(result, rows.repeat(batch, 1))


def test_any_other_constant_that_depends_on_the_batch_is_refused() -> None:
    one, other = (with_constant(batch, torch.arange(4.0 * batch).reshape(batch, 4)) for batch in (2, 6))
    with pytest.raises(BatchError, match=r"the constant that aten\.add\.Tensor reads depends on the batch"):
        open_graph("test", one, other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g, x, n: g.call_function(aten.mul.Tensor, (x, 1.0 / n)), r"0\.5 becomes 0\.16"),
        (lambda g, x, n: g.call_function(aten.slice.Tensor, (x, 0, 0, 1 + n // 3)), "not linear in it"),
        (lambda g, x, n: g.call_function((aten.mul if n == 2 else aten.add).Tensor, (x, x)), "different operators"),
    ],
)
def test_what_is_no_size_of_the_batch_is_refused(build: Built, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        opened(build)


def test_a_constant_that_depends_on_the_batch_is_refused() -> None:
    def of(batch: int) -> Seen:
        found = seen(batch, lambda graph, x, _: graph.call_function(aten.add.Tensor, (x, 1)))
        root = nn.Module()
        root.register_buffer("table", torch.full((4,), batch))
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(batch, 4, device="meta")
        table = graph.get_attr("table")
        result = graph.call_function(aten.add.Tensor, (x, table))
        result.meta["val"] = x.meta["val"]
        graph.output((result,))
        return Seen(batch, fx.GraphModule(root, graph), found.inputs, found.outputs)

    with pytest.raises(ExportError, match=r"the constant that aten\.add\.Tensor reads depends on the batch"):
        open_graph("test", of(2), of(6))


def test_writes_in_place_become_results_that_may_take_the_inputs_memory() -> None:
    def of(batch: int, again: bool) -> Seen:
        graph = fx.Graph()
        cache, index = graph.placeholder("cache"), graph.placeholder("index")
        cache.meta["val"] = torch.empty(batch, 4, device="meta")
        index.meta["val"] = torch.empty(1, dtype=torch.int64, device="meta")
        one = graph.call_function(aten.ones.default, ([],))
        written = graph.call_function(aten.index_put_.default, (cache, [index], one))
        result = graph.call_function(aten.add.Tensor, (written, cache if again else 0.0))
        written.meta["val"] = result.meta["val"] = cache.meta["val"]
        graph.output((result, written))
        return Seen(batch, fx.GraphModule({}, graph), ("cache", "index"), ("output_0", "slot"))

    found = open_graph("test", of(2, False), of(6, False))
    assert found.in_place == {"slot": "cache"}
    cache = torch.zeros(3, 4)
    assert found.module(cache, torch.tensor([1]))[1][1].eq(1).all()
    assert cache.eq(0).all()
    assert open_graph("test", of(2, True), of(6, True)).in_place == {}  # something else reads the input


@pytest.mark.parametrize("rows", [1, 3])
def test_values_that_fill_no_whole_lines_of_memory_are_packed_alike_at_any_batch(rows: int) -> None:
    """A width of 12 gives pieces of 72 numbers for each row, and 24 at the end."""
    traced = Traced(optimized(DuCa(interval=3), tiny_dit(width=12)), example(rows), None)
    traced.schedule()
    variants = list(traced.variants.values())
    graphs = [traced.prologue(), *(v.graph for v in variants), *(traced.rows("rows", v.pieces) for v in variants)]
    for graph in graphs:
        for batch in (2, 5):
            given = [_zeros(spec.at(batch), spec.dtype) for spec in graph.inputs]
            results = graph.module(*given)
            assert [tuple(r.shape) for r in results] == [spec.at(batch) for spec in graph.outputs]


def _zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype))
