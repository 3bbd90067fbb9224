"""Each pass: before and after, a near miss, nothing to do, and a second run that changes nothing and says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import models
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812
from tracing import COMPUTE, PARTIAL, REUSE, Runner, analysed, mixed, module, names, names_of, node, raw

from duca_compile.analysis.closure import ancestors
from duca_compile.core.fx_utils import copy_graph, op_name, to_module
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.ports import Port, PortKind
from duca_compile.core.steps import CacheKinds
from duca_compile.core.variants import (
    Action,
    Boundary,
    Changes,
    ForecastVariant,
    FullVariant,
    PredictVariant,
    ProbeVariant,
    ReuseVariant,
    Scores,
    Series,
    SkipVariant,
    VariantSpec,
)
from duca_compile.errors import InternalError
from duca_compile.passes.base import Draft, Pass, VariantDraft
from duca_compile.passes.caching.forecast import Forecast
from duca_compile.passes.caching.output import RestoreOutput
from duca_compile.passes.caching.partial import RecomputeTokens
from duca_compile.passes.caching.probe import ResumeFromProbe
from duca_compile.passes.caching.residual import AddChanges
from duca_compile.passes.caching.reuse import ReuseBranches
from duca_compile.passes.caching.rows import KeepRows
from duca_compile.passes.caching.skip import SkipBlocks
from duca_compile.passes.exact.boundary import EmitBoundary
from duca_compile.passes.exact.changes import EmitChanges
from duca_compile.passes.exact.clean import Clean
from duca_compile.passes.exact.dead_code import RemoveDeadCode
from duca_compile.passes.exact.deduplicate import Deduplicate
from duca_compile.passes.exact.differences import EmitDifferences
from duca_compile.passes.exact.emit import EmitCaches
from duca_compile.passes.exact.empties import Empties
from duca_compile.passes.exact.hoist import FEW, Hoist, row_layout
from duca_compile.passes.exact.probe import EmitProbe
from duca_compile.passes.exact.scores import EmitScores
from duca_compile.passes.exact.sums import EmitSums
from duca_compile.passes.exact.verification import VerifyForecast
from duca_compile.passes.exact.write_last import WriteLast
from duca_compile.passes.pipeline import PREPARE, run_passes
from duca_compile.policies import Probe, Verify

X = torch.randn(2, 4, 8)
OUTPUT = Port(PortKind.OUTPUT, 0)


def operators(graph: fx.Graph) -> list[str]:
    return [op_name(n) for n in graph.nodes if n.op == "call_function"]


def results_of(captured: CapturedGraph, graph: fx.Graph, *tensors: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return to_module(captured, graph)(*tensors)  # type: ignore[no-any-return]


def exact(a_pass: Pass[Draft], model: nn.Module, **arguments: Tensor) -> tuple[list[str], list[str], bool]:
    """Operators before and after the pass, and what it says; checks what every exact pass must keep."""
    captured = raw(model, **arguments)
    draft = Draft(copy_graph(captured.graph))
    changed = a_pass.apply(draft)
    draft.graph.lint()
    after = operators(draft.graph)
    assert a_pass.apply(draft) is False, "a second run says that it changed nothing"
    assert operators(draft.graph) == after, "and changes nothing"
    kept = [n.name for n in draft.graph.nodes if n.op == "placeholder"]
    values = dict(zip(captured.inputs, arguments.values(), strict=True))
    before = results_of(captured, captured.graph, *arguments.values())
    for a, b in zip(before, results_of(captured, draft.graph, *[values[name] for name in kept]), strict=True):
        assert torch.equal(a, b)
    return operators(captured.graph), after, changed


class TestClean:
    def test_removes_trace_residue(self) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return F.dropout(x.to(torch.float32).sin(), 0.5, training=False).to(torch.float32)

        before, after, changed = exact(Clean(), module(forward), x=X)
        assert {"to", "_assert_tensor_metadata", "dropout", "sin"} == set(before)
        assert (after, changed) == (["sin"], True)

    def test_a_cast_to_the_type_of_another_value_does_not_read_it(self) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return x.double().sin().type_as(x).type_as(x.cos())

        before, after, changed = exact(Clean(), module(forward), x=X)
        assert [name for name in before if name != "_assert_tensor_metadata"] == [
            "to",
            "sin",
            "type_as",
            "cos",
            "type_as",
        ]
        assert (after, changed) == (["to", "sin", "to", "cos"], True), "the second changes nothing"

    def test_keeps_what_changes_the_value(self) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=True).to(torch.float64).to(torch.float32, copy=True).clone()

        before, after, _ = exact(Clean(), module(forward), x=X)
        assert (
            after == [name for name in before if name != "_assert_tensor_metadata"] == ["dropout", "to", "to", "clone"]
        )

    def test_has_nothing_to_do(self) -> None:
        assert exact(Clean(), module(lambda self, x: x.sin()), x=X) == (["sin"], ["sin"], False)


class TestDeduplicate:
    def test_merges_equal_expressions_down_the_line(self) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return self.w(x.sin()).chunk(2, -1)[0] + self.w(x.sin()).chunk(2, -1)[0] * x.sum([1, 2], keepdim=True)

        before, after, changed = exact(Deduplicate(), module(forward, w=nn.Linear(8, 8)), x=X)
        assert before.count("sin") == before.count("linear") == before.count("chunk") == 2
        assert after == ["sin", "linear", "chunk", "getitem", "getitem", "sum", "mul", "add"]
        assert changed

    def test_tells_near_equal_operands_apart(self) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            integers = x.to(torch.int64)
            sums = integers * 1 + integers * 1.0 + x.sum(1, True) + x.sum(1, True, dtype=torch.float64)
            return sums + self.a(x) + self.b(x)

        before, after, changed = exact(Deduplicate(), module(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), x=X)
        assert (after, changed) == (before, False)

    @pytest.mark.parametrize("draw", [torch.rand_like, lambda x: F.dropout(x, 0.5, True), torch.bernoulli])
    def test_leaves_two_random_draws_apart(self, draw: Callable[[Tensor], Tensor]) -> None:
        before, after, changed = exact(Deduplicate(), module(lambda self, x: draw(x) - draw(x)), x=torch.rand(4, 4))
        assert (after, changed) == (before, False)

    def test_merges_attention_without_dropout(self) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x) - F.scaled_dot_product_attention(x, x, x)

        assert exact(Deduplicate(), module(forward), x=X)[1:] == (["scaled_dot_product_attention", "sub"], True)


class TestRemoveDeadCode:
    def test_removes_unused_attention_dropout_and_inputs(self) -> None:
        def forward(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            F.dropout(F.scaled_dot_product_attention(y, y, y), 0.5, training=True)
            return x.sin()

        before, after, changed = exact(RemoveDeadCode(), module(forward), x=X, y=X + 1)
        assert "scaled_dot_product_attention" in before
        assert "dropout" in before
        assert (after, changed) == (["sin"], True)

    def test_an_unused_input_alone_is_a_change(self) -> None:
        assert exact(RemoveDeadCode(), module(lambda self, x, y: x.sin()), x=X, y=X + 1)[2] is True

    def test_keeps_an_operator_of_which_a_part_is_used(self) -> None:
        def forward(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, y, y).max(-1)[0]

        before, after, changed = exact(RemoveDeadCode(), module(forward), x=X, y=X + 1)
        assert "scaled_dot_product_attention" in after
        assert after == [*before[:-1]], "only the operator's unused second result goes"
        assert changed

    def test_has_nothing_to_do(self) -> None:
        assert exact(RemoveDeadCode(), module(lambda self, x: x.sin()), x=X) == (["sin"], ["sin"], False)


class TestPipeline:
    def test_a_pass_that_lacks_what_it_requires_is_a_bug(self) -> None:
        captured = raw(module(lambda self, x: x.sin()), x=X)
        with pytest.raises(InternalError, match=r"Deduplicate needs \['clean'\]"):
            run_passes(Draft(captured.graph), (Deduplicate(),))

    def test_a_pass_that_breaks_the_graph_is_a_bug(self) -> None:
        @dataclass(frozen=True)
        class Break(Pass[Draft]):
            def apply(self, draft: Draft) -> bool:
                sin, cos = (n for n in draft.graph.nodes if n.op == "call_function")
                sin.append(cos)
                cos.append(sin)
                return True

        captured = raw(module(lambda self, x: x.sin().cos()), x=X)
        with pytest.raises(InternalError, match="Break left a malformed graph"):
            run_passes(Draft(captured.graph), (Break(),))

    def test_properties_are_what_the_passes_ensured(self) -> None:
        captured = raw(module(lambda self, x: x.sin()), x=X)
        assert run_passes(Draft(captured.graph), PREPARE).properties == {"clean", "no_dead_code"}


class TestWriteLast:
    index = torch.tensor([[1, 3], [2, 0]])

    def write(self, cache: Tensor, tokens: Tensor) -> Tensor:
        return torch.ops.aten.index_put(cache, [torch.arange(2)[:, None], self.index], tokens)

    def apply(self, model: nn.Module) -> tuple[list[str], list[str], bool]:
        """Operators before and after, with all writes in place, as partial steps have them, and what the pass says."""
        arguments = {"x": X, "one": X + 1, "two": X + 2}
        captured = raw(model, **arguments)
        for each in captured.graph.find_nodes(op="call_function", target=torch.ops.aten.index_put.default):
            each.target = torch.ops.aten.index_put_.default
        before, draft = copy_graph(captured.graph), Draft(captured.graph)
        changed = WriteLast().apply(draft)
        draft.graph.lint()
        assert WriteLast().apply(draft) is False, "a second run says that it changed nothing"
        for graph in (before, draft.graph):
            given = [value.clone() for value in arguments.values()]
            assert torch.equal(results_of(captured, graph, *given)[0], model(**arguments))
        return operators(before), operators(draft.graph), changed

    def test_computes_what_is_written_before_what_reads_the_whole(self) -> None:
        def forward(_: nn.Module, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
            some = x[:, :2].sin()
            return (x + self.write(one, some)).cos() + self.write(two, some.exp())

        before, after, changed = self.apply(module(forward))
        assert changed
        assert before.index("exp") > before.index("cos")
        assert after.index("exp") < min(after.index(name) for name in ("index_put_", "add", "cos"))

    def test_leaves_a_token_that_depends_on_an_earlier_write(self) -> None:
        def forward(_: nn.Module, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
            whole = x + self.write(one, x[:, :2])
            return x.cos() + self.write(two, whole.sin()[:, :2])

        before, after, changed = self.apply(module(forward))
        assert (after, changed) == (before, False)

    def test_has_nothing_to_do(self) -> None:
        assert exact(WriteLast(), module(lambda self, x: x.sin()), x=X) == (["sin"], ["sin"], False)


class TestCaching:
    """Passes that work on the facts of a model: one DiT of two blocks, self-attention and MLP each."""

    model: ClassVar[tuple[CapturedGraph, Facts]]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _model(cls) -> None:
        cls.model = analysed(models.build(), **models.example())

    def draft(self, *actions: Action) -> VariantDraft:
        return self.of(mixed(*actions))

    def of(self, spec: VariantSpec) -> VariantDraft:
        captured, facts = self.model
        return VariantDraft(copy_graph(captured.graph), facts, spec, [OUTPUT])

    def apply(self, a_pass: Pass[VariantDraft], draft: VariantDraft) -> bool:
        """Applies the pass twice: the second time must change nothing."""
        changed = a_pass.apply(draft)
        draft.graph.lint()
        after, results = str(draft.graph), list(draft.results)
        assert a_pass.apply(draft) is False
        assert (str(draft.graph), draft.results) == (after, results)
        assert len(draft.results) == len(draft.graph.output_node().args[0])
        return changed

    def unchanged(self, a_pass: Pass[VariantDraft], draft: VariantDraft) -> bool:
        before = str(draft.graph)
        return not self.apply(a_pass, draft) and str(draft.graph) == before

    def returned(self, draft: VariantDraft) -> dict[str, str]:
        return dict(zip(names_of(draft.results), (n.name for n in draft.graph.output_node().args[0]), strict=True))

    def readers(self, draft: VariantDraft, name: str) -> set[str]:
        return {user.name for user in node(draft.graph, name).users}

    def test_hoisting_reads_the_frontier_from_inputs(self) -> None:
        captured, facts = analysed(models.build(models.CrossBlock), **models.example())
        draft = VariantDraft(copy_graph(captured.graph), facts, FullVariant(), [OUTPUT])
        assert self.apply(Hoist(), draft)
        hoisted = [n.name for n in draft.graph.nodes if n.name.startswith("hoisted_")]
        assert len(hoisted) == 4 + 1, "keys and values of two blocks, and the frequencies of the timestep"
        assert {n.name for n in draft.graph.nodes if n.name.startswith("timestep_")} == {"timestep_float32"}
        RemoveDeadCode().apply(draft)
        assert "text" not in [n.name for n in draft.graph.nodes], "the text itself is not read in the step"
        assert "timestep" not in [n.name for n in draft.graph.nodes], "nor is the timestep"

    @pytest.mark.parametrize(("words", "shapes"), [(FEW, [(2, FEW, 8), (2, 8)]), (FEW + 1, [(2, 8)])])
    def test_timestep_only_values_of_many_vectors_stay_with_what_follows(
        self, words: int, shapes: list[tuple[int, ...]]
    ) -> None:
        def forward(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            shift = self.shift(timestep[:, None].expand(-1, 8))
            keys = self.keys(text + shift[:, None])
            return x + self.out(F.scaled_dot_product_attention(x, keys, keys) + keys.mean(1, keepdim=True))

        layers = {name: nn.Linear(8, 8) for name in ("shift", "keys", "out")}
        call = {"x": X, "timestep": torch.ones(2), "text": torch.randn(2, words, 8)}
        run = Runner(module(forward, **layers), **call)
        (row,) = row_layout(run.captured.graph, run.facts).values()
        assert [tuple(size for size in piece.shape if size != 1) for piece in row] == shapes
        assert torch.equal(run.run(run.variant(COMPUTE), call)["output_0"], run.model(**call))

    def test_hoisting_has_nothing_to_do(self) -> None:
        def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
            return x + self.a(x * timestep[:, None, None])

        captured, facts = analysed(module(forward, a=nn.Linear(8, 8)), x=X, timestep=torch.ones(2))
        draft = VariantDraft(copy_graph(captured.graph), facts, FullVariant(), [OUTPUT])
        assert self.unchanged(Hoist(), draft)

    def test_computed_branches_and_the_end_of_the_stream_are_returned(self) -> None:
        _, facts = self.model
        draft = self.draft(COMPUTE, REUSE, PARTIAL, COMPUTE)
        assert self.apply(EmitCaches(), draft)
        cores = [b.core for b in facts.branches]
        returned = self.returned(draft)
        assert list(returned) == ["output_0", "branch_0", "branch_3", "stream_end"]
        assert [returned["branch_0"], returned["branch_3"], returned["stream_end"]] == [
            cores[0],
            cores[3],
            facts.stream_end,
        ]

    def test_a_skipped_stream_is_not_returned(self) -> None:
        assert self.unchanged(EmitCaches(), self.of(SkipVariant()))
        leading = self.of(SkipVariant(leading=1))
        assert self.apply(EmitCaches(), leading)
        assert list(self.returned(leading)) == ["output_0", "branch_0"]

    def test_reuse_replaces_the_core_and_keeps_the_gate(self) -> None:
        _, facts = self.model
        draft = self.draft(COMPUTE, REUSE, COMPUTE, REUSE)
        gates = {b.index: self.readers(draft, b.core) for b in facts.branches}
        assert self.apply(ReuseBranches(), draft)
        for branch in facts.branches:
            reused = branch.index % 2 == 1
            assert self.readers(draft, branch.core) == (set() if reused else gates[branch.index])
            if reused:
                assert self.readers(draft, f"cache_branch_{branch.index}") == gates[branch.index]
                assert node(draft.graph, f"cache_branch_{branch.index}").meta["val"].shape == branch.shape

    def test_reuse_has_nothing_to_do(self) -> None:
        assert self.unchanged(ReuseBranches(), self.draft(COMPUTE, PARTIAL, COMPUTE, PARTIAL))

    def test_skip_replaces_the_end_of_the_stream(self) -> None:
        _, facts = self.model
        draft = self.of(SkipVariant())
        head = self.readers(draft, facts.stream_end)
        assert self.apply(SkipBlocks(), draft)
        assert self.readers(draft, facts.stream_end) == set()
        assert self.readers(draft, "cache_stream_end") == head

    def test_skip_has_nothing_to_do(self) -> None:
        assert self.unchanged(SkipBlocks(), self.of(ReuseVariant()))

    def test_only_what_forecasts_read_is_returned(self) -> None:
        branches = [f"branch_{index}" for index in range(4)]
        for of, expected in (("branches", branches), ("end", ["stream_end"])):
            draft = self.of(FullVariant(Series(1, of)))  # type: ignore[arg-type]
            assert self.apply(EmitCaches(), draft)
            assert list(self.returned(draft)) == ["output_0", *expected]

    def test_differences_are_returned_beside_the_caches(self) -> None:
        _, facts = self.model
        draft = self.of(FullVariant(Series(2)))
        EmitCaches().apply(draft)
        assert self.apply(EmitDifferences(), draft)
        returned = self.returned(draft)
        slots = [f"branch_{i}{difference}" for i in range(4) for difference in ("", "_d1", "_d2")]
        assert sorted(returned) == sorted(["output_0", *slots])
        for branch in facts.branches:
            first, second = (node(draft.graph, returned[f"branch_{branch.index}_d{order}"]) for order in (1, 2))
            assert op_name(first) == op_name(second) == "where"
            assert returned[branch.slot.result_name] == branch.core
            changes = [n.args[1].args[0] for n in (first, second)]
            now = [node(draft.graph, branch.core), first]
            old = [node(draft.graph, f"cache_branch_{branch.index}{difference}") for difference in ("", "_d1")]
            assert [change.args for change in changes] == [*zip(now, old, strict=True)]
            assert second.meta["val"].shape == branch.shape
        numbers = [n.name for n in draft.graph.nodes if n.name.startswith("forecast_")]
        assert sorted(numbers) == ["forecast_gap", "forecast_orders"]
        assert all(node(draft.graph, name).meta["val"].shape == () for name in numbers)

    def test_differences_of_the_end_alone(self) -> None:
        draft = self.of(FullVariant(Series(1, "end")))
        EmitCaches().apply(draft)
        assert self.apply(EmitDifferences(), draft)
        assert list(self.returned(draft)) == ["output_0", "stream_end", "stream_end_d1"]

    @pytest.mark.parametrize("keeps", [CacheKinds.ALL, Series(0), CacheKinds.NOTHING])
    def test_no_differences_are_asked_for(self, keeps: CacheKinds | Series) -> None:
        draft = self.of(FullVariant(keeps))
        EmitCaches().apply(draft)
        assert self.unchanged(EmitDifferences(), draft)

    def test_sums_of_the_end_are_returned_beside_differences_or_alone(self) -> None:
        _, facts = self.model
        for order, kept in ((0, []), (1, ["stream_end", "stream_end_d1"])):
            draft = self.of(FullVariant(Series(order, "end", sums=3)))
            EmitCaches().apply(draft)
            EmitDifferences().apply(draft)
            assert self.apply(EmitSums(), draft)
            returned = self.returned(draft)
            assert list(returned) == ["output_0", *kept, "stream_sum_0", "stream_sum_1", "stream_sum_2"]
            for i in range(3):
                total = node(draft.graph, returned[f"stream_sum_{i}"])
                old, end, weight = total.args
                assert (end.name, weight.name) == (facts.stream_end, f"forecast_weight_{i}")
                assert (op_name(old), old.args[1].name) == ("where", f"cache_stream_sum_{i}")

    @pytest.mark.parametrize("spec", [FullVariant(), FullVariant(Series(2)), SkipVariant()])
    def test_no_sums_are_asked_for(self, spec: VariantSpec) -> None:
        assert self.unchanged(EmitSums(), self.of(spec))

    def test_a_forecast_from_sums_reads_nothing_else_but_its_factors(self) -> None:
        _, facts = self.model
        draft = self.of(ForecastVariant(Series(0, "end", sums=2)))
        head = self.readers(draft, facts.stream_end)
        known = {n.name for n in draft.graph.nodes if n.op == "placeholder"}
        assert self.apply(Forecast(), draft)
        new = {n.name for n in draft.graph.nodes if n.op == "placeholder"} - known
        assert new == {f"{name}_{i}" for name in ("cache_stream_sum", "forecast_sum_factor") for i in range(2)}
        assert self.readers(draft, facts.stream_end) == set()
        (total,) = [n for n in draft.graph.nodes if op_name(n) == "addcmul"]
        assert {user.name for user in total.users} == head

    def test_what_the_model_was_given_and_yields_is_returned(self) -> None:
        _, facts = self.model
        draft = self.of(FullVariant(Boundary()))
        assert self.unchanged(EmitCaches(), draft)
        assert self.apply(EmitBoundary(), draft)
        returned = self.returned(draft)
        assert list(returned) == ["output_0", "boundary_latent", "boundary_output", "boundary_rate"]
        copies = [node(draft.graph, returned[name]) for name in ("boundary_latent", "boundary_output")]
        assert [(op_name(n), n.args[0].name) for n in copies] == [
            ("clone", facts.latent),
            ("clone", returned["output_0"]),
        ]

    def test_a_skipped_model_yields_the_latent_and_the_cached_change(self) -> None:
        _, facts = self.model
        draft = self.of(SkipVariant(restores="output"))
        assert self.unchanged(SkipBlocks(), draft)
        assert self.unchanged(AddChanges(), draft)
        assert self.apply(RestoreOutput(), draft)
        restored = node(draft.graph, self.returned(draft)["output_0"])
        latent, change = restored.args
        assert (op_name(restored), latent.name) == ("add", facts.latent)
        assert [n.name for n in change.args] == ["cache_boundary_output", "cache_boundary_latent"]

    @pytest.mark.parametrize("spec", [FullVariant(), SkipVariant(), SkipVariant(restores="change")])
    def test_no_boundary_is_asked_for(self, spec: VariantSpec) -> None:
        assert self.unchanged(EmitBoundary(), self.of(spec))
        assert self.unchanged(RestoreOutput(), self.of(spec))

    def test_a_forecast_replaces_the_core_and_keeps_the_gate(self) -> None:
        _, facts = self.model
        draft = self.of(ForecastVariant(Series(2), leading=2))
        gates = {b.index: self.readers(draft, b.core) for b in facts.branches}
        assert self.apply(Forecast(), draft)
        for branch in facts.branches:
            if branch.index < 2:
                assert self.readers(draft, branch.core) == gates[branch.index], "computed ones are not its"
                continue
            assert self.readers(draft, branch.core) == set()
            (first,) = node(draft.graph, f"cache_{branch.slot}").users
            (second,) = first.users
            assert [n.args[1].name for n in (first, second)] == [f"cache_{branch.slot}_d1", f"cache_{branch.slot}_d2"]
            assert [n.args[2].name for n in (first, second)] == ["forecast_factor_1", "forecast_factor_2"]
            assert {user.name for user in second.users} == gates[branch.index]
            assert second.meta["val"].shape == branch.shape
        for name in ("forecast_factor_1", "forecast_factor_2"):
            factor = node(draft.graph, name)
            assert (factor.op, factor.meta["val"].shape) == ("placeholder", ())
        assert len(names(draft.graph, "addcmul")) == 4

    def test_a_lite_forecast_replaces_the_end_of_the_stream(self) -> None:
        _, facts = self.model
        draft = self.of(ForecastVariant(Series(1, "end")))
        head = self.readers(draft, facts.stream_end)
        assert self.apply(Forecast(), draft)
        assert self.unchanged(SkipBlocks(), draft), "the end is replaced already"
        assert self.readers(draft, facts.stream_end) == set()
        (total,) = node(draft.graph, "cache_stream_end").users
        assert {user.name for user in total.users} == head
        assert not [n for n in draft.graph.nodes if n.name.startswith("cache_branch")]

    def test_a_forecast_of_order_zero_is_the_cache(self) -> None:
        forecast, reuse = self.of(ForecastVariant(Series(0))), self.of(ReuseVariant())
        assert self.apply(Forecast(), forecast)
        assert self.apply(ReuseBranches(), reuse)
        assert str(forecast.graph) == str(reuse.graph)

    @pytest.mark.parametrize("spec", [mixed(COMPUTE, REUSE, PARTIAL, REUSE), SkipVariant(), FullVariant(Series(2))])
    def test_forecasting_has_nothing_to_do(self, spec: VariantSpec) -> None:
        assert self.unchanged(Forecast(), self.of(spec))

    def test_recomputed_tokens_are_scattered_into_the_cache(self) -> None:
        _, facts = self.model
        draft = self.draft(REUSE, PARTIAL, REUSE, PARTIAL)
        gate = self.readers(draft, facts.branches[1].core)
        assert self.apply(RecomputeTokens(), draft)
        returned = self.returned(draft)
        assert list(returned) == ["output_0", "branch_1", "branch_3"]
        updated = node(draft.graph, returned["branch_1"])
        assert op_name(updated) == "index_put_"
        assert updated.args[0] is node(draft.graph, "cache_branch_1")
        assert {user.name for user in updated.users} == gate | {"output"}
        assert self.readers(draft, facts.branches[1].core) == set()

    def test_recomputing_has_nothing_to_do(self) -> None:
        assert self.unchanged(RecomputeTokens(), self.draft(COMPUTE, REUSE, COMPUTE, REUSE))

    def test_recomputing_a_branch_that_mixes_tokens_is_a_bug(self) -> None:
        with pytest.raises(InternalError, match=r"branch 0 \(blocks.0\) is not pointwise"):
            RecomputeTokens().apply(self.draft(PARTIAL, REUSE, REUSE, REUSE))

    @pytest.mark.parametrize("kind", ["v_norm", "attention"])
    def test_scores_are_returned_for_the_attentions_that_mlps_ask(self, kind: str) -> None:
        draft = self.of(mixed(COMPUTE, COMPUTE, REUSE, REUSE, scores=Scores(kind)))
        assert self.apply(EmitScores(), draft)
        assert list(self.returned(draft)) == ["output_0", "score_0"]
        assert names(draft.graph, "linalg_vector_norm" if kind == "v_norm" else "softmax.int")

    @pytest.mark.parametrize("spec", [FullVariant(), PredictVariant(frozenset())])
    def test_no_scores_are_asked_for(self, spec: VariantSpec) -> None:
        assert self.unchanged(EmitScores(), self.of(spec))

    def test_no_attention_is_computed(self) -> None:
        assert self.unchanged(EmitScores(), self.of(mixed(REUSE, COMPUTE, REUSE, COMPUTE, scores=Scores("v_norm"))))

    @pytest.mark.parametrize(("of", "compared"), [("stream", "add"), ("branch", "linear")])
    def test_a_forecast_is_compared_with_a_copy_of_the_last_block(self, of: Any, compared: str) -> None:
        _, facts = self.model
        draft = self.of(ForecastVariant(Series(1), verify=Verify("norm_ratio", of)))
        before = operators(draft.graph)
        assert self.apply(VerifyForecast(), draft)
        assert list(self.returned(draft)) == ["output_0", "verify_error"]
        own = node(draft.graph, facts.stream_end if of == "stream" else facts.branches[-1].core)
        copies = {n.meta["copy_of"]: n for n in draft.graph.nodes if "copy_of" in n.meta}
        last = {name for b in facts.branches[2:] for name in b.body}
        assert last <= copies.keys() | ({own.name} if of == "branch" else set())
        assert not copies.keys() & {name for b in facts.branches[:2] for name in b.body}, "the first is not"
        assert op_name(own) == op_name(copies[own.name]) == compared
        assert operators(draft.graph)[: len(before)] == before, "the forecast itself stays"
        assert Forecast().apply(draft)
        draft.graph.lint()
        drafted = {n.name for n in draft.graph.nodes if "addcmul" in n.name}
        reads = {name for n in copies.values() for each in n.all_input_nodes for name in above(each)}
        assert reads & drafted, "the copy reads the drafted stream"

    def test_nothing_is_verified(self) -> None:
        assert self.unchanged(VerifyForecast(), self.of(ForecastVariant(Series(1))))

    def test_a_look_returns_the_change_and_what_it_saw_and_nothing_else(self) -> None:
        _, facts = self.model
        for of, seen in (("modulated", "add"), ("first_block", "sub")):
            draft = self.of(ProbeVariant(Probe(of)))  # type: ignore[arg-type]
            assert self.apply(EmitProbe(), draft)
            returned = self.returned(draft)
            assert list(returned) == ["probe_change", "probe_seen", "probe_stream"]
            stream = facts.branches[0].stream if of == "modulated" else facts.branches[1].add
            assert returned["probe_stream"] == stream
            assert op_name(node(draft.graph, returned["probe_seen"])) == seen
            RemoveDeadCode().apply(draft)
            attentions = len(names(draft.graph, "scaled_dot_product"))
            assert attentions == (0 if of == "modulated" else 1), "it computes no more than it must"

    def test_there_is_nothing_to_look_at(self) -> None:
        for after in (None, Probe()):
            assert self.unchanged(EmitProbe(), self.of(FullVariant(after=after)))

    def test_a_variant_goes_on_from_the_look(self) -> None:
        _, facts = self.model
        draft = self.of(FullVariant(after=Probe("first_block")))
        readers = self.readers(draft, facts.branches[1].add)
        assert self.apply(ResumeFromProbe(), draft)
        assert self.readers(draft, "probe_stream") == readers
        RemoveDeadCode().apply(draft)
        assert len(names(draft.graph, "scaled_dot_product")) == 1, "the first block is not computed again"

    def test_there_is_nothing_to_go_on_from(self) -> None:
        assert self.unchanged(ResumeFromProbe(), self.of(FullVariant()))
        assert self.unchanged(ResumeFromProbe(), self.of(ProbeVariant(Probe())))

    def test_what_a_stream_gains_is_returned(self) -> None:
        _, facts = self.model
        for probe, start in ((None, facts.branches[0].stream), (Probe("first_block"), facts.branches[1].add)):
            draft = self.of(FullVariant(Changes(), after=probe))
            assert self.unchanged(EmitCaches(), draft)
            assert self.apply(EmitChanges(), draft)
            returned = self.returned(draft)
            assert list(returned) == ["output_0", "change_3"]
            change = node(draft.graph, returned["change_3"])
            assert (op_name(change), [n.name for n in change.args]) == ("sub", [facts.stream_end, start])

    def test_a_stretch_ends_where_something_else_reads_the_stream(self) -> None:
        """A long skip from behind the first block: two stretches, of which the second starts where the first ends."""
        captured, facts = analysed(models.build(depth=3, long_skip="late"), **models.example())
        draft = VariantDraft(copy_graph(captured.graph), facts, FullVariant(Changes()), [OUTPUT])
        assert self.apply(EmitChanges(), draft)
        adds = [b.add for b in facts.branches]
        ends = [[n.name for n in node(draft.graph, name).args] for name in list(self.returned(draft).values())[1:]]
        assert ends == [[adds[1], facts.branches[0].stream], [adds[5], adds[1]]]

    @pytest.mark.parametrize("spec", [FullVariant(), SkipVariant(restores="change")])
    def test_no_change_is_asked_for(self, spec: VariantSpec) -> None:
        assert self.unchanged(EmitChanges(), self.of(spec))

    def test_a_cached_change_is_added_to_the_start(self) -> None:
        _, facts = self.model
        draft = self.of(SkipVariant(restores="change"))
        head = self.readers(draft, facts.stream_end)
        assert self.unchanged(SkipBlocks(), draft)
        assert self.apply(AddChanges(), draft)
        assert self.readers(draft, facts.stream_end) == set()
        (restored,) = node(draft.graph, "cache_change_3").users
        assert [n.name for n in restored.args] == [facts.branches[0].stream, "cache_change_3"]
        assert {user.name for user in restored.users} == head

    @pytest.mark.parametrize("spec", [FullVariant(), SkipVariant(), FullVariant(Changes())])
    def test_no_change_is_added(self, spec: VariantSpec) -> None:
        assert self.unchanged(AddChanges(), self.of(spec))

    @pytest.mark.parametrize("order", [None, 1])
    def test_rows_that_a_full_step_is_not_for_keep_their_caches(self, order: int | None) -> None:
        draft = self.of(FullVariant(CacheKinds.ALL if order is None else Series(order), by_row=True))
        EmitCaches().apply(draft)
        EmitDifferences().apply(draft)
        new = self.returned(draft)
        assert self.apply(KeepRows(), draft)
        returned = self.returned(draft)
        assert list(returned) == list(new)
        assert returned["output_0"] == new["output_0"], "the model's own results have no old ones"
        for slot in list(returned)[1:]:
            merged = node(draft.graph, returned[slot])
            rows, now, old = merged.args
            assert (op_name(merged), now.name, old.name) == ("where", new[slot], f"cache_{slot}")
            assert (op_name(rows), rows.args[0].name, rows.args[1]) == ("reshape", "full_rows", [2, 1, 1])
        inputs = [n.name for n in draft.graph.nodes if n.op == "placeholder"]
        assert len(inputs) == len(set(inputs)), "an old cache is one input, for differences too"
        gap = [n for n in draft.graph.nodes if n.name == "forecast_gap"]
        assert [n.meta["val"].shape for n in gap] == ([] if order is None else [(2,)])

    @pytest.mark.parametrize("spec", [FullVariant(), FullVariant(CacheKinds.NOTHING, by_row=True)])
    def test_all_rows_are_alike(self, spec: VariantSpec) -> None:
        draft = self.of(spec)
        EmitCaches().apply(draft)
        assert self.unchanged(KeepRows(), draft)

    def test_a_forecast_by_row_has_factors_for_each(self) -> None:
        draft = self.of(ForecastVariant(Series(2), by_row=True))
        assert self.apply(Forecast(), draft)
        assert node(draft.graph, "forecast_factor_2").meta["val"].shape == (2,)
        factors = [n.args[2] for n in draft.graph.nodes if op_name(n) == "addcmul"]
        assert {(op_name(factor), tuple(factor.args[1])) for factor in factors} == {("reshape", (2, 1, 1))}

    def test_a_node_that_is_gone_is_a_bug(self) -> None:
        with pytest.raises(InternalError, match="node 'nowhere' is no longer"):
            self.draft(*[COMPUTE] * 4).node("nowhere")


def above(value: fx.Node) -> set[str]:
    """The value and all that it is computed from, by name."""
    return {n.name for n in {value, *ancestors(value)}}


def attention_model(mask: Tensor | None, scale: float | None) -> nn.Module:
    """One self-attention of two heads and one MLP."""

    def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        q, k, v = (part.view(2, 4, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = self.mask if hasattr(self, "mask") else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).reshape(2, 4, 8)
        x = x + timestep.sin()[:, None, None] * y
        return x + self.mlp(x)

    torch.manual_seed(0)
    made = module(forward, qkv=nn.Linear(8, 24), mlp=nn.Linear(8, 8))
    if mask is not None:
        made.register_buffer("mask", mask)
    return made


MASK = torch.rand(2, 1, 4, 4) > 0.3
MASK |= torch.eye(4, dtype=torch.bool)


@pytest.mark.parametrize("kind", ["v_norm", "attention"])
@pytest.mark.parametrize(
    ("mask", "scale"), [(None, None), (None, 0.9), (MASK.float(), None), (MASK, None)],
    ids=["plain", "scale", "added mask", "boolean mask"],
)  # fmt: skip
def test_scores_equal_their_formulas(kind: str, mask: Tensor | None, scale: float | None) -> None:
    model = attention_model(mask, scale)
    captured, facts = analysed(model, x=X, timestep=torch.ones(2))
    draft = VariantDraft(copy_graph(captured.graph), facts, FullVariant(scores=Scores(kind)), [OUTPUT])
    assert EmitScores().apply(draft)
    draft.graph.lint()
    got = to_module(captured, draft.graph)(X, torch.ones(2))[1]
    q, k, v = (part.view(2, 4, 2, 4).transpose(1, 2) for part in model.qkv(X).chunk(3, -1))  # type: ignore[operator]
    if kind == "v_norm":
        expected = (1 - v.square().sum(-1).sqrt()).sum(1)
    else:
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * (scale or 4**-0.5)
        bias = torch.zeros(()) if mask is None else mask if mask.is_floating_point() else torch.log(mask.float())
        expected = torch.softmax(logits + bias, -1).sum(2).mean(1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


EMPTY: dict[str, Callable[..., Tensor]] = {
    "a slice": lambda self, x: torch.cat([x[..., :8], x[..., 8:] * 2], -1),
    "no indices": lambda self, x: torch.cat([x[self.none], x]),
    "a split": lambda self, x: torch.cat([part + 1 for part in x.split([5, 0, 3], -1)], -1),
    "all parts": lambda self, x: x + torch.cat([x[:0], x[2:]]).sum(),
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_is_empty_is_made_from_nothing_and_joined_to_nothing(name: str) -> None:
    x = torch.randn(2, 4, 8)
    captured = raw(module(EMPTY[name], none=torch.zeros(0, dtype=torch.long)), x=x)
    draft = Draft(copy_graph(captured.graph))
    run_passes(draft, (Empties(), RemoveDeadCode()))
    assert Empties().apply(draft) is False
    empty = [n for n in draft.graph.nodes if isinstance(n.meta.get("val"), Tensor) and not n.meta["val"].numel()]
    assert [op_name(n) for n in empty] == (["zeros"] if name == "all parts" else [])
    assert torch.equal(to_module(captured, draft.graph)(x)[0], to_module(captured, captured.graph)(x)[0])


def test_passes_are_frozen_options() -> None:
    every: Sequence[type[Pass[Any]]] = [
        Clean, Deduplicate, RemoveDeadCode, Hoist, EmitProbe, EmitBoundary, EmitCaches, EmitChanges, EmitDifferences,
        EmitSums, KeepRows, RestoreOutput,
        EmitScores, VerifyForecast, RecomputeTokens, Forecast, ReuseBranches, SkipBlocks, AddChanges, ResumeFromProbe,
    ]  # fmt: skip
    for each in every:
        assert each() == each()
        assert hash(each()) == hash(each())
