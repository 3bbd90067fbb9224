"""What forecasts and scores come to in half precision: a few roundings from the same computed in float64."""

from __future__ import annotations

from math import factorial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional

import duca_compile
from duca_compile import RFC, ResidualGate, SpeCa, TaylorSeer
from duca_compile.core.fx_utils import copy_graph, op_name
from duca_compile.core.variants import ForecastVariant, FullVariant, Series
from duca_compile.frontend.operators import carried_value
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies import StepKind
from tests.test_memory import held
from tests.test_optimize import build, latent
from tests.unit.tracing import COMPUTE, Runner, analysed, names_of

HALF, ROWS = (torch.bfloat16, torch.float16), 4
Numbers = dict[str, Tensor]


def example(dtype: torch.dtype, seed: int = 0) -> Numbers:
    """The arguments of one call of a DiT."""
    return {
        "hidden_states": latent(seed).to(dtype),
        "timestep": torch.full((ROWS,), 900),
        "class_labels": torch.arange(ROWS),
    }


@pytest.fixture(scope="module", params=HALF, ids=str)
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(build(depth=2).to(request.param), **example(request.param))


def rounding(like: Tensor) -> float:
    """The most that a result is rounded by, as a share of it."""
    return torch.finfo(like.dtype).eps / 2


def least(like: Tensor) -> float:
    """The most that it is rounded by where it is very small."""
    return float(torch.finfo(like.dtype).smallest_normal * torch.finfo(like.dtype).eps)


@torch.no_grad()
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    order=st.integers(1, 4),
    distances=st.tuples(*[st.integers(1, 9)] * ROWS),
    size=st.floats(-3, 2),
    by_row=st.booleans(),
)
def test_a_forecast_is_a_few_roundings_from_the_exact_one(
    runner: Runner, seed: int, order: int, distances: tuple[int, ...], size: float, by_row: bool
) -> None:
    spec = ForecastVariant(Series(order), by_row=by_row)
    graph = copy_graph((module := build_variant(runner.captured, runner.facts, spec).module).graph)
    total = next(n for n in graph.nodes if op_name(n) == "addcmul" and op_name(next(iter(n.users))) != "addcmul")
    slots = [n.name for n in graph.find_nodes(op="placeholder") if n.name.startswith("cache_branch_0")]
    shape, dtype = total.meta["val"].shape, total.meta["val"].dtype
    torch.manual_seed(seed)
    values = [(10**size * torch.randn(shape) / (i + 1)).to(dtype) for i in range(order + 1)]
    steps = torch.tensor(distances if by_row else distances[:1], dtype=torch.float64)
    factors = [(steps**i / factorial(i)).float() for i in range(1, order + 1)]
    given = dict(zip(sorted(slots), values, strict=True))
    given |= {f"forecast_factor_{i}": f if by_row else f[0] for i, f in enumerate(factors, 1)}
    graph.output_node().args = (total,)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    found = fx.GraphModule(module, graph)(*[given.get(n.name) for n in graph.find_nodes(op="placeholder")])
    assert found.dtype is dtype
    terms = [values[i].double() * (steps.view(-1, 1, 1) ** i / factorial(i)) for i in range(order + 1)]
    # Each factor is rounded to the type once, and each sum: two roundings for each order, of all that is added up.
    sizes = torch.stack([term.abs() for term in terms]).sum(0)
    bound = (2 * order + 1) * rounding(found) * sizes + order * least(found)
    assert bool(((found.double() - sum(terms)).abs() <= bound).all())


@torch.no_grad()
@pytest.mark.parametrize("by_row", [False, True])
def test_differences_are_two_roundings_from_the_exact_ones(runner: Runner, by_row: bool) -> None:
    spec = FullVariant(Series(2), by_row=by_row)
    variant = build_variant(runner.captured, runner.facts, spec)
    kinds = {n.name: n.meta["val"] for n in variant.module.graph.find_nodes(op="placeholder")}
    torch.manual_seed(0)
    old = {name: torch.randn(kind.shape).to(kind.dtype) for name, kind in kinds.items() if name.startswith("cache_")}
    gaps = torch.tensor([3.0, 5.0, 7.0, 4.0])
    rows = {"forecast_gap": gaps, "forecast_orders": torch.full((ROWS,), 2.0), "full_rows": torch.ones(ROWS).bool()}
    numbers = rows if by_row else {name: value[0] for name, value in rows.items()}
    dtype = runner.captured.attributes["pos_embed.proj.weight"].dtype
    found = runner.run(variant, example(dtype), **old, **numbers)
    for slot in ("branch_0", "branch_3"):
        for name, before in (("_d1", ""), ("_d2", "_d1")):
            now = found[slot + before].double()
            exact = (now - old[f"cache_{slot}{before}"].double()) / (gaps if by_row else gaps[:1]).view(-1, 1, 1)
            result = found[slot + name]
            assert result.dtype is dtype
            assert bool(((result.double() - exact).abs() <= 2.1 * rounding(result) * exact.abs() + least(result)).all())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["v_norm", "attention"])
@torch.no_grad()
def test_scores_of_tokens_are_added_up_in_float32(dtype: torch.dtype, kind: str) -> None:
    """From the attention's own queries, keys and values; of a map, the logits alone are in the type."""
    model = build(depth=1).to(dtype)
    seen: list[tuple[Tensor, ...]] = []
    attend = functional.scaled_dot_product_attention

    def noted(*tensors: Tensor, **options: object) -> Tensor:
        seen.append(tensors)
        return attend(*tensors, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", noted)
        model(**example(dtype))
    query, key, value = (each.double() for each in seen[0][:3])
    runner = Runner(model, **example(dtype))
    found = runner.run(runner.variant(COMPUTE, scores=kind), example(dtype))["score_0"]
    assert found.dtype is torch.float32
    if kind == "v_norm":
        expected = (1 - value.norm(dim=-1)).sum(1)
        assert bool(((found - expected).abs() <= 1e-5).all())  # float32's rounding of a sum of 16 squares
        return
    logits = query @ key.mT * query.shape[-1] ** -0.5
    expected = logits.softmax(-1).mean(1).sum(1)
    # Each weight is off by as much as its logit and those of its row: by two roundings of the largest at most.
    assert bool(((found - expected).abs() <= 4 * rounding(seen[0][0]) * logits.abs().max() * expected).all())


@torch.no_grad()
def test_scores_of_large_products_in_float16_are_numbers() -> None:
    model = build(depth=1).half()
    attention = model.transformer_blocks[0].attn1
    for layer in (attention.to_q, attention.to_k):
        layer.weight.mul_(70 / layer.weight.norm(dim=1, keepdim=True))
    runner = Runner(model, **example(torch.float16))
    found = runner.run(runner.variant(COMPUTE, scores="attention"), example(torch.float16))["score_0"]
    assert found.isfinite().all()
    assert bool(((found.sum(1) - found.shape[1]).abs() < 1e-3).all()), "each query's weights add up to one"


@torch.no_grad()
def test_a_far_forecast_in_float16_is_a_number() -> None:
    """A factor of order 4 from 60 steps behind is more than float16 holds, and that difference is zero."""
    model = build(depth=1).half()
    far, near = (
        duca_compile.optimize(model, TaylorSeer(interval=100, max_order=order, first_full_steps=1), "eager")
        for order in (4, 0)
    )
    for step in range(62):
        call = example(torch.float16) | {"timestep": torch.full((ROWS,), 900 - step)}
        outputs = [each(**call).sample for each in (far, near)]
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_that_decide_for_themselves_keep_the_type(dtype: torch.dtype) -> None:
    model = build(depth=2).to(dtype)
    for policy in (
        SpeCa(base_threshold=0.02, decay_rate=1.0, decide_per="row"),
        RFC(threshold=0.2, decide_per="pair"),
        ResidualGate(threshold=0.2, cached="forecast", decide_per="row"),
    ):
        optimized = duca_compile.optimize(model, policy, "eager")
        for step in range(6):
            call = example(dtype, seed=step) | {"timestep": torch.full((ROWS,), 900 - step)}
            output, own = optimized(**call).sample, model(**call).sample
            rows = [kind is StepKind.FULL for kind in optimized.history[-1].rows]
            assert [torch.equal(a, b) for a, b in zip(output, own, strict=True)] == rows
        assert {cache.dtype for cache in held(optimized) if cache.dim() > 1} == {dtype}
        assert {cache.dtype for cache in held(optimized) if cache.dim() == 1} <= {torch.float32}


def test_numbers_of_forecasts_stay_wide_where_caches_are_narrow() -> None:
    captured, facts = analysed(build(depth=2), **example(torch.float32))
    variant = build_variant(captured, facts, FullVariant(Series(1, "inputs")), cache_dtype=torch.bfloat16)
    results = dict(zip(names_of(variant.outputs), variant.module.graph.output_node().args[0], strict=True))  # type: ignore[arg-type]
    assert results["scale_0"].meta["val"].dtype is torch.float32
    assert results["input_0"].meta["val"].dtype is results["branch_0_d1"].meta["val"].dtype is torch.bfloat16


def test_a_stream_that_is_widened_for_each_sum_is_cached_as_it_goes_on() -> None:
    graph = fx.Graph()
    narrow = graph.placeholder("x")
    narrow.meta["val"] = torch.empty(2, dtype=torch.bfloat16)

    def cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
        made = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
        made.meta["val"] = torch.empty(2, dtype=dtype)
        return made

    wide = cast(narrow, torch.float32)
    total = graph.call_function(torch.ops.aten.add.Tensor, (wide, wide))
    total.meta["val"] = torch.empty(2)
    end = cast(total, torch.bfloat16)
    assert [carried_value(each) for each in (narrow, wide, total, end)] == [narrow, narrow, end, end]
    graph.output((end, total))
    assert carried_value(total) is total, "who reads it wide needs it wide"
