"""What caches hold: their type, their budget, how long they live, and what a run allocates at most."""

from __future__ import annotations

import logging
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import duca_compile
from duca_compile import (
    FORA,
    RFC,
    Calibrated,
    DuCa,
    Interval,
    OptimizedModel,
    Policy,
    PolicyError,
    ResidualGate,
    SpeCa,
    TaylorSeer,
    UsageError,
)
from duca_compile.analysis.memory import peak_bytes
from duca_compile.core.steps import CacheKinds
from duca_compile.policies import Step, StepKind
from duca_compile.policies.base import FittedFactors
from duca_compile.policies.liveness import kept_until_last, with_liveness
from tests.support import Shared
from tests.test_optimize import build, kinds, latent, loop

ROWS, TOKENS, WIDTH, DEPTH = 4, 16, 32, 3
SLOT = ROWS * TOKENS * WIDTH * 4  # bytes of one cached value
POLICIES = [DuCa(interval=4, fresh_ratio=0.5), FORA(3), TaylorSeer(interval=3, max_order=1)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(DEPTH)


@pytest.fixture(scope="module")
def shared(model: nn.Module) -> Shared:
    return Shared(model)


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    a, b = torch.stack(found), torch.stack(expected)
    return float((a - b).norm() / b.norm())


def held(optimized: OptimizedModel) -> list[Tensor]:
    states = optimized._requests.current()._states.values()
    return [cache for each in states for state in each.values() for cache in state.caches.values()]


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_narrow_caches_hold_half_and_round_what_is_reused(model: nn.Module, policy: Policy) -> None:
    wide = duca_compile.optimize(model, policy, "eager")
    narrow = duca_compile.optimize(model, policy, "eager", cache_dtype=torch.bfloat16)
    expected, found = loop(wide, 5), loop(narrow, 5)
    assert torch.equal(found[0], expected[0]), "a full step reads no cache"
    assert kinds(narrow) == kinds(wide)
    assert narrow.cache_bytes == wide.cache_bytes / 2
    assert {cache.dtype for cache in held(narrow)} == {torch.bfloat16}
    # bfloat16 keeps 8 bits, so a cached value is off by 2**-9 at most; forecasts add up several of them.
    assert 0 < error(found, expected) < 2**-7


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_narrow_caches_are_the_same_under_inductor(model: nn.Module, policy: Policy) -> None:
    eager = duca_compile.optimize(model, policy, "eager", cache_dtype=torch.bfloat16)
    compiled = duca_compile.optimize(model, policy, "inductor", strict=True, cache_dtype=torch.bfloat16)
    expected = loop(eager)
    # What is rounded may fall on the other side, one bit of eight.
    assert error(loop(compiled), expected) < 2**-8
    assert compiled.cache_bytes == eager.cache_bytes


@torch.no_grad()
@pytest.mark.parametrize(
    ("slots", "run", "bytes_held"),
    [
        (2 * DEPTH + 1, "fpspfpsp", (2 * DEPTH + 1) * SLOT),
        (2 * DEPTH, "fpspfpsp", (2 * DEPTH + 1) * SLOT / 2),
        (2, "fsssfsss", SLOT),
        (0.5, "fsssfsss", SLOT / 2),
    ],
)
def test_a_budget_is_met_by_cheaper_caches(
    model: nn.Module, caplog: pytest.LogCaptureFixture, slots: float, run: str, bytes_held: float
) -> None:
    budget = int(slots * SLOT)
    optimized = duca_compile.optimize(model, DuCa(interval=4), "eager", 8, cache_budget_bytes=budget)
    with caplog.at_level(logging.WARNING, "duca_compile"):
        found = loop(optimized)
    assert kinds(optimized) == run
    assert optimized.cache_bytes == bytes_held <= budget
    assert all(each.isfinite().all() for each in found)
    warned = [each.getMessage() for each in caplog.records if "cache_budget_bytes" in each.getMessage()]
    assert len(warned) == (slots < 2 * DEPTH + 1)
    assert all(f"which hold {int(bytes_held)}" in message for message in warned)


@torch.no_grad()
def test_forecasts_fall_back_to_the_end_of_the_stream(model: nn.Module) -> None:
    policy = TaylorSeer(interval=3, max_order=1)
    optimized = duca_compile.optimize(model, policy, "eager", 8, cache_budget_bytes=2 * SLOT)
    lite = duca_compile.optimize(model, TaylorSeer(interval=3, max_order=1, lite=True), "eager", 8)
    assert all(torch.equal(a, b) for a, b in zip(loop(optimized), loop(lite), strict=True))
    assert optimized.cache_bytes == 2 * SLOT


@torch.no_grad()
def test_a_budget_that_nothing_meets_is_refused_with_the_least(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, DuCa(interval=4), "eager", cache_budget_bytes=SLOT // 2 - 1)
    with pytest.raises(PolicyError, match=f"too small for DuCa.*hold {(2 * DEPTH + 1) * SLOT} bytes.*{SLOT // 2} byt"):
        loop(optimized)
    uncached = duca_compile.optimize(model, "none", "eager", cache_budget_bytes=0)
    assert torch.equal(loop(uncached)[3], loop(model)[3])


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_type_that_holds_no_features_is_refused(model: nn.Module, dtype: object) -> None:
    with pytest.raises(UsageError, match=r"cache_dtype=.*floating"):
        duca_compile.optimize(model, cache_dtype=dtype)
    with pytest.raises(PolicyError, match="cache_budget_bytes=-1"):
        duca_compile.optimize(model, cache_budget_bytes=-1)


# ---- how long caches live


@given(kinds=st.lists(st.sampled_from([kind for kind in StepKind if kind is not StepKind.FORECAST]), max_size=12))
def test_what_is_live_is_what_the_steps_up_to_the_next_full_one_read(kinds: list[StepKind]) -> None:
    """Against the definition: something is live behind a step if a later one reads it before any replaces it."""
    reads = {StepKind.PARTIAL: {"branches"}, StepKind.REUSE: {"branches"}, StepKind.SKIP: {"end"}}
    reads[StepKind.PREDICT] = {"end"}
    replaces = {StepKind.FULL: {"branches", "end"}, StepKind.PARTIAL: {"end"}, StepKind.REUSE: {"end"}}
    found = list(with_liveness(iter([Step(kind) for kind in kinds])))
    assert [step.kind for step in found] == kinds
    for place, step in enumerate(found):
        for what, live in (("branches", step.live.branches), ("end", step.live.end)):
            later = [k for k in kinds[place + 1 :] if what in reads.get(k, ()) or what in replaces.get(k, ())]
            assert live == bool(later and what in reads.get(later[0], ()))
        assert step.kept.branches == any(each.live.branches for each in found)
        assert step.kept.end == any(each.live.end for each in found)


def test_where_features_are_forecast_all_is_kept_but_behind_the_last_step() -> None:
    steps = [Step(StepKind.FULL), Step(StepKind.FORECAST), Step(StepKind.FULL)]
    assert [step.live for step in kept_until_last(iter(steps))] == [CacheKinds.ALL, CacheKinds.ALL, CacheKinds.NOTHING]
    assert [*kept_until_last(iter([]))] == []
    assert {step.live for step in islice(TaylorSeer().planned(None), 600)} == {CacheKinds.ALL}


def test_schedules_without_end_are_read_as_they_come() -> None:
    endless = islice(with_liveness(Step(StepKind.REUSE) for _ in iter(int, 1)), 600)
    assert {step.live for step in endless} == {CacheKinds.ALL, CacheKinds.BRANCHES}


@torch.no_grad()
def test_a_stretch_of_skips_keeps_one_tensor_and_the_last_step_none(model: nn.Module) -> None:
    """The interval shrinks from 4 to 2 along the loop: full, skip, partial, skip; then full, skip."""
    interval = Interval(4, lambda progress: 1.0 if progress < 0.5 else 2.0)
    optimized = duca_compile.optimize(model, DuCa(interval, 0.5, first="skip"), "eager", 8)
    sizes, kept = [], []
    for step in range(8):
        time = torch.full((4,), 990 - 10 * step)
        optimized(latent(step), timestep=time, class_labels=torch.zeros(4, dtype=torch.int64))
        kept.append(len(held(optimized)))
        sizes.append(optimized.cache_bytes)
    assert kinds(optimized) == "fspsfsfs"
    # Behind full: branches and end; behind skip: branches; behind partial: end; behind the last skip before full: none.
    assert kept == [2 * DEPTH + 1, 2 * DEPTH, 1, 0, 1, 0, 1, 0]
    assert set(sizes) == {(2 * DEPTH + 1) * SLOT}


@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [
        TaylorSeer(interval=3, max_order=1),
        TaylorSeer(interval=3, max_order=2, relational=True),
        Calibrated((None, None, FittedFactors(1, (0.5,)), None, FittedFactors(3, (0.5,))), max_order=1),
        RFC(),
        SpeCa(decay_rate=1.0, first_full_steps=1),
        SpeCa(decay_rate=1.0, decide_per="row"),
        ResidualGate(),
        ResidualGate(probe="first_block", accumulate=False, cached="branches", last_full=False),
    ],
    ids=lambda policy: policy.name,
)
def test_behind_the_last_step_nothing_is_kept(shared: Shared, policy: Policy) -> None:
    """The next request is as the first one; a loop that goes on starts anew, and keeps what it computes."""
    known, endless = (shared.optimized(policy, total) for total in (5, None))
    loop(known, 4)
    before = len(held(known))
    assert before > 0
    known.reset()
    expected = loop(known, 5)
    assert held(known) == []
    loop(endless, 5)
    if not isinstance(policy, Calibrated):  # which has an end of its own
        assert len(held(endless)) >= before
    assert known.cache_bytes == endless.cache_bytes > 0
    again = loop(known, 6)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=False))
    assert known.history[5].kind is StepKind.FULL
    assert len(again) == 6


@torch.no_grad()
def test_reuse_alone_keeps_no_end_of_the_stream(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, FORA(3), "eager", 8)
    loop(optimized)
    assert optimized.cache_bytes == 2 * DEPTH * SLOT
    assert held(optimized) == []


# ---- what a run allocates


def most_allocated(profiled: profile) -> int:
    now = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_what_a_variant_allocates_is_known_before_it_runs(model: nn.Module, policy: Policy) -> None:
    optimized = duca_compile.optimize(model, policy, "eager", 8)
    loop(optimized)
    for variant, _ in optimized._compiled.find(
        optimized._bind((latent(0),), {"timestep": torch.full((4,), 5), "class_labels": torch.zeros(4).long()})
    ).programs.by_spec.values():
        count = dict.fromkeys(variant.dynamic_inputs, (ROWS, 8))
        kinds = [node.meta["val"] for node in variant.module.graph.find_nodes(op="placeholder")]
        inputs = zip(variant.inputs, kinds, strict=True)
        tensors = [torch.zeros(count.get(port, kind.shape), dtype=kind.dtype) for port, kind in inputs]
        variant.module.forward(*tensors)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            results = variant.module.forward(*tensors)
        assert results
        assert peak_bytes(variant.module, count) == pytest.approx(most_allocated(profiled), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("policy", [*POLICIES, DuCa(interval=4, first="skip")], ids=lambda policy: policy.name)
def test_the_peak_of_a_request_is_known_before_it_runs(model: nn.Module, policy: Policy) -> None:
    call = {"timestep": torch.full((4,), 990), "class_labels": torch.zeros(4, dtype=torch.int64)}
    said = duca_compile.explain(model, latent(0), **call).peak_bytes(policy, 8)
    optimized = duca_compile.optimize(model, policy, "eager", 8)
    loop(optimized)
    optimized.reset()
    latents = [latent(step) for step in range(8)]
    times = [torch.full((4,), 990 - 10 * step) for step in range(8)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for each, time in zip(latents, times, strict=True):
            optimized(each, timestep=time, class_labels=call["class_labels"])
    assert said == pytest.approx(most_allocated(profiled), rel=0.05)
