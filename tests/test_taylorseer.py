"""TaylorSeer over whole loops: against series computed by hand, on polynomials, and where passes come and go."""

from __future__ import annotations

from fractions import Fraction
from math import comb, factorial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, OptimizedModel, TaylorSeer
from duca_compile.core.ports import STREAM_END, Port, PortKind
from duca_compile.core.variants import FullVariant, ReuseVariant, SkipVariant
from duca_compile.frontend.binder import Binder
from duca_compile.passes.pipeline import build_variant
from tests.support import values_of_step
from tests.test_models import loop as calls
from tests.test_models import sample
from tests.test_optimize import LABELS, build, latent, loop, same
from tests.zoo import ZOO

STEPS = 8


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


def letters(optimized: OptimizedModel) -> str:
    return "".join(executed.kind.letter for executed in optimized.history)


class Differences:
    """D_0 to D_m of named values over the full steps, and their series, written down once more."""

    def __init__(self, order: int, first: int) -> None:
        self.order, self.first, self.last = order, first, -1
        self.orders: list[dict[Port, Tensor]] = []

    def update(self, step: int, values: dict[Port, Tensor]) -> None:
        orders, kept = [values], self.orders if step >= self.first else []
        for old in kept[: self.order]:
            orders.append({n: (v - old[n]) / (step - self.last) for n, v in orders[-1].items()})
        self.orders, self.last = orders, step

    def at(self, step: int) -> dict[Port, Tensor]:
        terms = [(step - self.last) ** i / factorial(i) for i in range(len(self.orders))]
        return {n: sum(w * d[n] for w, d in zip(terms, self.orders, strict=True)) for n in self.orders[0]}  # type: ignore[misc]


@torch.no_grad()
@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("name", ["FLUX", "PixArt"])
def test_each_step_is_the_series_by_hand(name: str, lite: bool) -> None:
    """The reference runs the plain reuse or skip variant, with caches that were forecast outside of the graph."""
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(2)
    policy = TaylorSeer(interval=3, max_order=2, lite=lite)
    optimized = duca_compile.optimize(model.eval(), policy, "eager")
    by_hand = Differences(order=2, first=1)
    for step, each in enumerate(calls(ZOO[name], arguments)):
        outputs = sample(optimized(**each))
        (compiled,) = optimized._compiled.values()
        values = values_of_step(compiled, Binder(model)((), each).tensors)
        full = step < 2 or step % 3 == 1
        spec = FullVariant() if full else SkipVariant() if lite else ReuseVariant()
        if not full:
            values |= by_hand.at(step)
        variant = build_variant(compiled.captured, compiled.facts, spec)
        results = dict(zip(variant.outputs, variant.module(*[values[n] for n in variant.inputs]), strict=True))
        if full:
            slots = [STREAM_END] if lite else [b.slot for b in compiled.facts.branches]
            by_hand.update(step, {slot: results[slot] for slot in slots})
        for i, output in enumerate(outputs):
            expected = results[Port(PortKind.OUTPUT, i)]
            assert torch.equal(output, expected) if full else (output - expected).norm() <= 1e-5 * expected.norm()
    assert letters(optimized) == "FFTTFTTF"


class Shown(nn.Module):
    """One branch whose value is the latent, under a gate that is the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(2, 2, bias=False)
        self.branch.weight.data.copy_(torch.eye(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + timestep[:, None, None] * self.branch(x)


@torch.no_grad()
def features(policy: TaylorSeer, values: list[Fraction | int]) -> list[float]:
    """What the branch yields at each step, where ``values`` is what it computes, in float64."""
    model = Shown().double().eval()
    optimized = duca_compile.optimize(model, policy, "eager", timestep="timestep")
    seen = []
    for step, value in enumerate(values):
        x = torch.full((1, 1, 2), float(value), dtype=torch.float64)
        time = torch.tensor([64.0 - step], dtype=torch.float64)
        seen.append(float(((optimized(x, time) - x) / time)[0, 0, 0]))
    return seen


def close(left: float, right: Fraction | int, scale: float) -> bool:
    return abs(left - float(right)) <= 1e-12 * scale


whole = st.integers(-9, 9)


@settings(max_examples=25, deadline=None)
@given(start=whole, slope=whole, interval=st.integers(2, 6), order=st.integers(1, 4), first=st.integers(1, 3))
def test_what_is_linear_in_the_step_is_forecast_exactly(
    start: int, slope: int, interval: int, order: int, first: int
) -> None:
    """At any gaps, from the second of the full steps that differences are built from on."""
    values = [Fraction(start + slope * step) for step in range(20)]
    seen = features(TaylorSeer(interval, order, first), values)
    settled = interval if first == 1 else 0
    assert all(close(a, b, 1e3) for a, b in list(zip(seen, values, strict=True))[settled:])


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(whole, min_size=1, max_size=5), interval=st.integers(2, 4), data=st.data())
def test_a_polynomial_is_forecast_by_its_backward_differences(weights: list[int], interval: int, data: Any) -> None:
    """Of degree m, once m+1 full steps were seen: no higher order adds anything, and the m-th difference is m! a_m."""
    degree = len(weights) - 1
    order = data.draw(st.integers(degree, 4))

    def value(step: int) -> int:
        return sum(weight * step**power for power, weight in enumerate(weights))

    def difference(step: int, i: int) -> Fraction:
        return Fraction(sum((-1) ** j * comb(i, j) * value(step - j * interval) for j in range(i + 1)), interval**i)

    steps = (order + 2) * interval
    seen = features(TaylorSeer(interval, order, first_full_steps=1), [value(step) for step in range(steps)])
    for step in range(degree * interval, steps):
        last = step - step % interval
        if last // interval < order:
            continue  # of a lower degree than the order: as many orders as full steps
        series = sum(difference(last, i) * Fraction((step - last) ** i, factorial(i)) for i in range(degree + 1))
        assert difference(last, degree) == factorial(degree) * weights[-1]
        assert close(seen[step], series, 1e3 * max(1, abs(value(steps))))


@torch.no_grad()
@pytest.mark.parametrize("lite", [False, True])
def test_constant_inputs_are_forecast_as_they_are(model: nn.Module, lite: bool) -> None:
    """All differences are zero, so a forecast is the model's own result, bit for bit, at the time it was made."""
    optimized = duca_compile.optimize(model, TaylorSeer(4, 3, lite=lite), "eager")
    outputs = []
    for step in range(STEPS):
        with optimized.cache_context("only", step_index=step):
            outputs.append(optimized(latent(0), timestep=torch.full((4,), 500), class_labels=LABELS).sample)
    assert same(outputs, [outputs[0]] * STEPS)
    assert letters(optimized) == "FFTTTFTT"


@torch.no_grad()
def test_order_zero_is_reuse(model: nn.Module) -> None:
    seer = duca_compile.optimize(model, TaylorSeer(3, 0, first_full_steps=1), "eager")
    assert same(loop(seer), loop(duca_compile.optimize(model, FORA(3), "eager")))
    assert letters(seer) == "FTTFTTFT"


@torch.no_grad()
@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("order", [0, 2])
def test_caches_have_the_announced_size(model: nn.Module, order: int, lite: bool) -> None:
    optimized = duca_compile.optimize(model, TaylorSeer(3, order, lite=lite), "eager")
    loop(optimized)
    found = duca_compile.explain(optimized, latent(0), timestep=torch.full((4,), 5), class_labels=LABELS)
    stream = 4 * 16 * 32 * 4
    assert optimized.cache_bytes == found.cache_bytes == (order + 1) * (stream if lite else 6 * stream)
    plan = found.schedule(num_inference_steps=STEPS)
    assert plan.cache_bytes == found.cache_bytes
    assert [(s.kind, s.flops) for s in plan.steps] == [(e.kind, e.flops) for e in optimized.history]
    assert "FFTTFTTF" in str(plan)
    assert f"caches hold {found.cache_bytes / 2**20:.2f} MiB" in str(plan)


@torch.no_grad()
def test_a_lite_forecast_costs_what_a_skip_step_does(model: nn.Module) -> None:
    found = duca_compile.explain(model, latent(0), timestep=torch.full((4,), 5), class_labels=LABELS)
    lite, plain = (found.schedule(TaylorSeer(lite=lite), 3).steps[2].flops for lite in (True, False))
    skip = found.schedule(duca_compile.DuCa(first="skip"), 2).steps[1].flops
    reuse = found.schedule(FORA(), 2).steps[1].flops
    assert (lite, plain) == (skip, reuse)


def call(target: nn.Module, step: int, label: int = 3) -> Tensor:
    time = torch.full((4,), 990 - 10 * step)
    return target(latent(step), timestep=time, class_labels=torch.full((4,), label)).sample  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_pass_that_missed_steps_starts_again_without_differences(model: nn.Module) -> None:
    """A second pass runs steps 0 to 2 and comes back at 6, a forecast step: that one is full, and the next reuse it."""
    optimized = duca_compile.optimize(model, TaylorSeer(4, 2), "eager")
    reused = duca_compile.optimize(model, FORA(9), "eager")
    for step in range(11):
        call(optimized, step)
        if step in (3, 4, 5):
            continue
        output = call(optimized, step, label=5)
        if step >= 7:
            reused.reset()
            full = 9 if step >= 9 else 6
            reference = [call(reused, s, label=5) for s in sorted({full, step})][-1]
            assert torch.equal(output, reference) == (step < 10), "the full step at 9 gave it a slope"
    assert "".join(e.kind.letter for e in optimized.history if e.pass_index == 1) == "FFT" + "FTTFT"


@torch.no_grad()
def test_a_pass_that_joins_at_a_forecast_starts_in_full(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, TaylorSeer(5, 2), "eager")
    reused = duca_compile.optimize(model, FORA(9), "eager")
    for step in range(6):
        call(optimized, step)
        if step >= 3:
            assert torch.equal(call(optimized, step, label=5), call(reused, step, label=5))
    assert "".join(e.kind.letter for e in optimized.history if e.pass_index == 1) == "FTT"


@torch.no_grad()
def test_requests_do_not_share_differences(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, TaylorSeer(3, 2), "eager")
    alone = loop(optimized)
    optimized.reset()
    loop(optimized, steps=3)  # abandoned; the timestep jumps back up
    assert same(loop(optimized), alone)
    one, other = optimized.session(), optimized.session()
    outputs = []
    for step in range(STEPS):
        time = torch.full((4,), 990 - 10 * step)
        outputs.append(one(latent(step), timestep=time, class_labels=LABELS).sample)
        other(latent(step + 100), timestep=time, class_labels=LABELS.flip(0))
    assert same(outputs, alone)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_caches_and_results_keep_the_models_type(dtype: torch.dtype) -> None:
    model = build(2).to(dtype)
    optimized = duca_compile.optimize(model, TaylorSeer(3, 2), "eager")
    for step in range(6):
        time = torch.full((4,), 990 - 10 * step)
        output = optimized(latent(step).to(dtype), timestep=time, class_labels=LABELS).sample
        assert output.dtype is dtype
        assert output.isfinite().all()
    found = duca_compile.explain(optimized, latent(0).to(dtype), timestep=time, class_labels=LABELS)
    assert optimized.cache_bytes == found.cache_bytes
