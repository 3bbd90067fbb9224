"""Relational feature caching: against the method by hand, on what it forecasts exactly, and what it decides."""

from __future__ import annotations

from collections.abc import Iterable
from math import factorial
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BATCH, WIDTH
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F  # noqa: N812
from tracing import analysed

import duca_compile
from duca_compile import RFC, OptimizedModel, TaylorSeer
from duca_compile.backends.inductor import private
from duca_compile.core.fx_utils import copy_graph
from duca_compile.core.ports import Port, PortKind
from duca_compile.core.variants import ForecastVariant, FullVariant, Series
from duca_compile.passes.base import VariantDraft
from duca_compile.passes.caching.relate import ForecastFromInputs
from duca_compile.passes.exact.differences import EmitDifferences
from duca_compile.passes.exact.emit import EmitCaches
from duca_compile.passes.exact.relate import EmitRelations
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies import Policy, StepKind
from tests.test_optimize import LABELS, build, latent
from tests.zoo import ZOO

STEPS = 12
OUTPUT = Port(PortKind.OUTPUT, 0)


def norm(x: Tensor, power: int = 2) -> Tensor:
    return x.flatten(1).norm(power, dim=1)


def letters(optimized: OptimizedModel) -> str:
    return "".join(executed.kind.letter for executed in optimized.history)


def call(step: int) -> dict[str, Tensor]:
    """A latent that moves smoothly, faster in the second row and late in the loop."""
    first, second, third = (models.example(seed)["x"] for seed in (1, 2, 3))
    pace = torch.tensor([1.0, 1.5]).view(BATCH, 1, 1)
    turn = 0.02 * pace * step**1.5
    latent = first * torch.cos(turn) + second * torch.sin(turn) + 0.02 * pace * step * third
    return models.example() | {"x": latent, "timestep": torch.full((BATCH,), 9.0 - 0.1 * step)}


class ByHand:
    """The method on the model of ``models.Block``, in plain PyTorch."""

    def __init__(self, model: nn.Module, order: int, first_full: int, threshold: float) -> None:
        self.model, self.order, self.first_full, self.threshold = model, order, first_full, threshold
        self.last, self.orders, self.errors = -1, 0, torch.zeros(BATCH)
        self.cache: list[dict[str, Any]] = [{} for _ in range(2 * len(model.blocks))]

    def series(self, differences: list[Tensor], distance: int) -> Tensor:
        terms = [d * distance**i / factorial(i) for i, d in enumerate(differences[1 : self.orders + 1], 1)]
        return sum(terms, torch.zeros_like(differences[0]))

    def differences(self, value: Tensor, old: list[Tensor] | None, gap: int) -> list[Tensor]:
        found = [value]
        for i in range(self.orders):
            found.append((found[i] - old[i]) / gap if old is not None else torch.zeros_like(value))
        return found

    def branch(self, index: int, step: int, full: bool, given: Tensor, body: Any) -> Tensor:
        cache, distance = self.cache[index], step - self.last
        if full:
            output = body(given)
            old = cache.get("O") if self.orders else None
            if old is not None:
                cache["s"] = norm(output - old[0]) / norm(given - cache["I"][0])
            cache["O"] = self.differences(output, old, distance)
            cache["I"] = self.differences(given, cache.get("I") if self.orders else None, distance)
            return output
        start = cache["O"][0]
        if not self.orders:
            return start
        direction = self.series(cache["O"], distance)
        length = cache["s"] * norm(given - cache["I"][0]) / norm(direction)
        return start + length.view(-1, 1, 1) * direction

    def __call__(self, step: int, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, bool]:
        model = self.model
        condition = F.silu(model.embed_t(models.embed(timestep, WIDTH)))
        x = model.embed_x(x) + model.position

        def modulated(block: nn.Module, x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
            return block.norm(x) * (1 + parts[1]) + parts[0]

        full = step < self.first_full
        for index, block in enumerate(model.blocks):
            parts = block.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
            for place, body in ((0, block.attention), (1, block.mlp)):
                own = parts[3 * place : 3 * place + 3]
                given = modulated(block, x, own)
                if index == place == 0:
                    full = full or self.astray(step, given)
                    if full:
                        self.errors = torch.zeros(BATCH)
                        self.orders = (
                            min(self.order, self.orders + 1) if self.last >= 0 and step >= self.first_full - 1 else 0
                        )
                x = x + own[2] * self.branch(2 * index + place, step, full, given, body)
        if full:
            self.last = step
        return model.head(x * (1 + model.head_modulation(condition)[:, None])), full

    def astray(self, step: int, given: Tensor) -> bool:
        known = self.cache[0]["I"]
        expected = known[0] + self.series(known, step - self.last)
        self.errors = self.errors + norm(given - expected, 1) / norm(given, 1)
        return bool((self.errors > self.threshold).any())


@torch.no_grad()
@pytest.mark.parametrize(("order", "first_full"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("threshold", [0.0, 0.02, 1e9])
def test_each_step_and_decision_is_the_method_by_hand(order: int, first_full: int, threshold: float) -> None:
    model = models.build(models.Block, depth=3)
    optimized = duca_compile.optimize(model, RFC(threshold, order, first_full), "eager")
    by_hand = ByHand(model, order, first_full, threshold)
    decided = []
    for step in range(STEPS):
        output, (expected, full) = optimized(**call(step)), by_hand(step, **call(step))
        assert (output - expected).norm() <= 1e-5 * expected.norm(), f"step {step}"
        decided.append("F" if full else "T")
        if full:
            assert torch.equal(output, model(**call(step)))
    assert letters(optimized) == "".join(decided)
    after = set(decided[first_full:])
    assert after == ({"F"} if threshold == 0 else {"T"} if threshold == 1e9 else {"F", "T"})


@torch.no_grad()
def test_the_row_that_strays_most_decides_for_the_batch_or_each_for_itself() -> None:
    """Alone, the calm row would run in full less often than the restless one, and the batch as often as that."""
    model = models.build(models.Block, depth=2)
    alone = []
    for row in range(BATCH):
        optimized = duca_compile.optimize(model, RFC(0.02), "eager")
        outputs = [optimized(**{name: value[[row]] for name, value in call(step).items()}) for step in range(STEPS)]
        alone.append((letters(optimized), outputs))
    (calm, _), (restless, _) = alone
    assert calm.count("F") < restless.count("F")
    together = duca_compile.optimize(model, RFC(0.02), "eager")
    apart = duca_compile.optimize(model, RFC(0.02, decide_per="row"), "eager")
    for step in range(STEPS):
        together(**call(step))
        output = apart(**call(step))
        for row, (_, outputs) in enumerate(alone):
            assert (output[row] - outputs[step][0]).norm() <= 1e-5 * output[row].norm()
    assert letters(together) == restless
    decided = ["".join((e.rows[row] if e.rows else e.kind).letter for e in apart.history) for row in range(BATCH)]
    assert decided == [calm, restless]


class Affine(nn.Module):
    """One branch, A x + b, under a gate that is the timestep: what it yields can be read off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch = nn.Linear(3, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + timestep[:, None, None] * self.branch(x)


def errors(policy: Any, paces: Iterable[float]) -> list[float]:
    """Relative errors of the branch's value where the latent moves along one direction, by these paces in sum."""
    model = Affine().double().eval().requires_grad_(False)
    optimized = duca_compile.optimize(model, policy, "eager", timestep="timestep")
    generator = torch.Generator().manual_seed(1)
    start, way = (torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    found, place = [], 0.0
    for step, pace in enumerate(paces):
        place += pace
        x, time = start + place * way, torch.full((2,), 64.0 - step, dtype=torch.float64)
        with torch.no_grad():
            seen, true = (optimized(x, time) - x) / time[:, None, None], model.branch(x)
        found.append(float((seen - true).norm() / true.norm()))
    return found


@settings(max_examples=20, deadline=None)
@given(paces=st.lists(st.floats(0.01, 10), min_size=12, max_size=12), interval=st.integers(2, 5))
def test_what_is_affine_in_an_input_of_one_direction_is_exact_at_any_pace(paces: list[float], interval: int) -> None:
    assert max(errors(TaylorSeer(interval, 1, relational=True), paces)) <= 1e-9


def test_a_taylor_series_alone_is_not_exact_there() -> None:
    paces = [1, 1, 4, 1, 7, 1, 1, 2, 9, 1, 1, 5]
    assert max(errors(TaylorSeer(4, 1), paces)) > 0.1


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), order=st.integers(1, 3), distance=st.integers(1, 6))
def test_it_is_taylorseer_where_the_relation_gives_the_length_of_the_series(
    seed: int, order: int, distance: int
) -> None:
    captured, facts = analysed(Affine().eval(), x=torch.randn(2, 4, 3), timestep=torch.ones(2))
    generator = torch.Generator().manual_seed(seed)
    values = {"x": torch.randn(2, 4, 3, generator=generator), "timestep": torch.rand(2, generator=generator)}
    slots = ["branch_0", *(f"branch_0_d{i}" for i in range(1, order + 1))]
    values |= {f"cache_{slot}": torch.randn(2, 4, 3, generator=generator) for slot in [*slots, "input_0"]}
    factors = {f"forecast_factor_{i}": distance**i / factorial(i) for i in range(1, order + 1)}
    values |= {name: torch.tensor(factor) for name, factor in factors.items()}
    series = sum(values[f"cache_branch_0_d{i}"] * factors[f"forecast_factor_{i}"] for i in range(1, order + 1))
    values["cache_scale_0"] = norm(series) / norm(values["x"] - values["cache_input_0"])
    results = []
    for of in ("branches", "inputs"):
        variant = build_variant(captured, facts, ForecastVariant(Series(order, of)))  # type: ignore[arg-type]
        inputs = {**values, "timestep_float32": values["timestep"]}
        results.append(variant.module(*[inputs[port.input_name] for port in variant.inputs])[0])
    taylor, relational_ = results
    assert (relational_ - taylor).norm() <= 1e-5 * taylor.norm()


@torch.no_grad()
def test_constant_inputs_are_forecast_as_they_are() -> None:
    model = models.build(models.CrossBlock)
    optimized = duca_compile.optimize(model, RFC(), "eager")
    fixed = call(3) | {"timestep": torch.full((BATCH,), 5.0, dtype=torch.float64)}
    steps = [fixed | {"timestep": fixed["timestep"] - step * 1e-12} for step in range(6)]
    outputs = []
    for step, each in enumerate(steps):
        with optimized.cache_context("only", step_index=step):  # so small a change of the timestep is none
            outputs.append(optimized(**each))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert letters(optimized) == "FFTTTT"


@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [pytest.param(RFC(0.02), marks=pytest.mark.slow), TaylorSeer(4, 1, relational=True)],
    ids=["decided", "interval"],
)
def test_compiled_variants_agree_and_are_one_graph_each(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def counted(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(module)
        return compile_fx(module, inputs)

    monkeypatch.setattr(private, "compile_fx", counted)
    model = models.build(models.Block, depth=2)
    eager = duca_compile.optimize(model, policy, "eager")
    optimized = duca_compile.optimize(model, policy, "inductor", strict=True)
    optimized.warm_up(**call(0))
    variants = 3 if isinstance(policy, RFC) else 2
    assert len(compiled) == variants
    for step in range(STEPS):
        output, expected = optimized(**call(step)), eager(**call(step))
        assert (output - expected).norm() <= 1e-5 * expected.norm()
    assert letters(optimized) == letters(eager)
    assert {*letters(eager)} == {"F", "T"}
    assert len(compiled) == variants


@torch.no_grad()
@pytest.mark.parametrize("policy", [RFC(0.02), TaylorSeer(3, 1, relational=True)], ids=["decided", "interval"])
def test_caches_and_flops_are_as_announced(policy: RFC | TaylorSeer) -> None:
    model = models.build(models.Block, depth=2)
    optimized = duca_compile.optimize(model, policy, "eager")
    plan = duca_compile.explain(model, **call(0)).schedule(policy, STEPS)
    for step in range(STEPS):
        optimized(**call(step))
    branch = BATCH * models.TOKENS * WIDTH * 4
    order = policy.max_order
    decided = isinstance(policy, RFC)
    first = order * branch if decided else 0  # differences of what the probe forecasts
    assert optimized.cache_bytes == plan.cache_bytes == 4 * (branch * (order + 2) + BATCH * 4) + first
    assert [(s.kind, s.flops) for s in plan.steps if s.kind is StepKind.FULL][:2] == [
        (e.kind, e.flops) for e in optimized.history[:2]
    ]
    planned = {step.kind: step.flops for step in plan.steps}
    assert all(executed.flops == planned[executed.kind] for executed in optimized.history)
    full = duca_compile.explain(model, **call(0)).schedule("none", 1).steps[0].flops
    embedding = 2 * BATCH * WIDTH * (models.TOKENS * models.CHANNELS + WIDTH)  # of the latent and the timestep
    probe = embedding + 2 * BATCH * WIDTH * 6 * WIDTH - 2 * BATCH * WIDTH * models.TOKENS * models.CHANNELS
    assert planned[StepKind.FULL] - full == (probe if decided else 0), "the latent is embedded once, by the probe"


@torch.no_grad()
def test_requests_and_passes_decide_on_their_own() -> None:
    model = models.build(models.Block, depth=2)
    optimized = duca_compile.optimize(model, RFC(0.02), "eager")
    alone = [optimized(**call(step)) for step in range(STEPS)]
    decided = letters(optimized)
    optimized.reset()
    for step in range(5):
        optimized(**call(step))  # abandoned
    optimized.reset()
    for step in range(STEPS):
        assert torch.equal(optimized(**call(step)), alone[step])
        optimized(**(call(step) | {"x": call(0)["x"], "text": call(step)["text"] + 1}))
    assert "".join(e.kind.letter for e in optimized.history if e.pass_index == 0) == decided
    assert "".join(e.kind.letter for e in optimized.history if e.pass_index == 1) != decided


@torch.no_grad()
@pytest.mark.parametrize("name", ["FLUX", "PixArt", "SD3", "Sana"])
def test_other_structures_run(name: str) -> None:
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(2)
    optimized = duca_compile.optimize(model.eval(), TaylorSeer(4, 2, relational=True), "eager")
    for step in range(6):
        each = {**arguments, "timestep": arguments["timestep"] - step * torch.ones_like(arguments["timestep"]) / 100}
        output, plain = (m(**each, return_dict=False)[0] for m in (optimized, model))
        assert output.isfinite().all()
        assert torch.equal(output, plain) == (step in (0, 1, 5))
    assert letters(optimized) == "FFTTTF"


@torch.no_grad()
def test_a_budget_narrows_the_caches_or_forecasts_the_end_alone() -> None:
    model = models.build(models.Block, depth=2)
    policy = TaylorSeer(3, 1, relational=True)
    whole = duca_compile.explain(model, **call(0)).schedule(policy, STEPS).cache_bytes
    numbers = 4 * BATCH * 4  # how far each of four branches moves: in float32, whatever features are kept in
    narrow = (whole + numbers) // 2
    for budget, expected in ((narrow, narrow), (whole // 4, 2 * BATCH * models.TOKENS * WIDTH * 4)):
        optimized = duca_compile.optimize(model, policy, "eager", cache_budget_bytes=budget)
        outputs = [optimized(**call(step)) for step in range(STEPS)]
        assert all(output.isfinite().all() for output in outputs)
        assert optimized.cache_bytes == expected
        assert letters(optimized) == "FFTTFTTFTTFT"


def test_passes_change_a_graph_once_and_no_other() -> None:
    captured, facts = analysed(models.build(models.Block), **call(0))
    for relational in (True, False):
        series = Series(2, "inputs" if relational else "branches")
        draft = VariantDraft(copy_graph(captured.graph), facts, FullVariant(series), [OUTPUT])
        EmitCaches().apply(draft)
        EmitDifferences().apply(draft)
        assert [EmitRelations().apply(draft) for _ in range(2)] == [relational, False]
        draft.graph.lint()
        draft = VariantDraft(copy_graph(captured.graph), facts, ForecastVariant(series), [OUTPUT])
        assert [ForecastFromInputs().apply(draft) for _ in range(2)] == [relational, False]
        draft.graph.lint()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lengths_are_float32_in_models_of_half_precision(dtype: torch.dtype) -> None:
    model = build(2).to(dtype)
    optimized = duca_compile.optimize(model, RFC(1e9), "eager")
    outputs = loop_of(optimized, dtype)
    assert all(output.dtype is dtype and output.isfinite().all() for output in outputs)
    (compiled,) = optimized._compiled.values()
    (state,) = optimized._requests.current()._states[compiled.dispatcher].values()
    assert state.caches[Port(PortKind.SCALE, 0)].dtype is torch.float32


def loop_of(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    times = [torch.full((4,), 900 - 10 * step) for step in range(5)]
    moved = [latent(0) + step * latent(1) / 10 for step in range(5)]
    return [model(x.to(dtype), timestep=t, class_labels=LABELS).sample for x, t in zip(moved, times, strict=True)]
