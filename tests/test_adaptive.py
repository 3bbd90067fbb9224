"""SpeCa and residual gates over whole loops: held to values computed by hand with the model's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import OptimizedModel, Policy, PolicyError, ResidualGate, SpeCa, TaylorSeer
from duca_compile.policies import StepKind
from tests.support import Shared
from tests.test_optimize import build
from tests.zoo import ZOO

STEPS = 10


SHARED = Shared(build(depth=3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return SHARED.model


def call(step: int, requests: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
    """One step of each request; they move at speeds that differ."""
    rows = []
    for request in requests:
        fixed = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(request))
        noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1000 * request + step))
        rows.append(fixed * (1 + 0.1 * step * request) + 0.02 * noise)
    labels = torch.tensor([request % 10 for request in requests])
    return {
        "hidden_states": torch.stack(rows),
        "timestep": torch.full((len(rows),), 900 - 30 * step),
        "class_labels": labels,
    }


def loop(model: nn.Module, steps: int = STEPS, requests: tuple[int, ...] = (0, 1)) -> list[Tensor]:
    return [model(**call(step, requests)).sample for step in range(steps)]


def letters(optimized: OptimizedModel) -> str:
    return "".join(executed.kind.letter for executed in optimized.history)


def optimize(model: nn.Module, policy: Policy) -> OptimizedModel:
    assert model is SHARED.model
    return SHARED.optimized(policy, STEPS)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((left - right).norm() <= tolerance * right.norm())


@contextmanager
def hooked(module: nn.Module, hook: Callable[[tuple[Any, ...], dict[str, Any], Any], Any]) -> Iterator[None]:
    """Calls ``hook(args, kwargs, output)`` behind the module; what it returns takes the output's place."""
    handle = module.register_forward_hook(lambda _, args, kwargs, out: hook(args, kwargs, out), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def seen(model: nn.Module, module: nn.Module, step: int) -> tuple[Tensor, Tensor]:
    """What the module reads and yields at a step of the plain model."""
    found: list[tuple[Tensor, Tensor]] = []
    with hooked(module, lambda args, kwargs, out: found.append((args[0] if args else kwargs["hidden_states"], out))):
        model(**call(step))
    return found[0]


def relative_change(now: Tensor, before: Tensor) -> list[float]:
    """mean |now - before| / mean |before|, row by row."""
    return [float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, before, strict=True)]


@torch.no_grad()
def test_drafts_that_are_all_accepted_are_taylorseers_forecasts(model: nn.Module) -> None:
    policy = SpeCa(max_order=2, base_threshold=1e9, decay_rate=1.0, max_taylor_steps=3, first_full_steps=2)
    optimized, seer = optimize(model, policy), optimize(model, TaylorSeer(interval=4, max_order=2))
    for a, b in zip(loop(optimized), loop(seer), strict=True):
        assert torch.equal(a, b)
    assert letters(optimized) == letters(seer) == "FFTTTFTTTF"


@torch.no_grad()
def test_a_rejected_draft_is_computed_in_full_in_the_same_step(model: nn.Module) -> None:
    optimized = optimize(model, SpeCa(base_threshold=0.0, decay_rate=1.0, first_full_steps=2))
    for a, b in zip(loop(optimized), loop(model), strict=True):
        assert torch.equal(a, b)
    assert letters(optimized) == "F" * STEPS
    full, tried = optimized.history[0].flops, optimized.history[2].flops
    draft = optimized_flops(model, "FORECAST")
    assert tried == full + draft
    assert all(executed.measured for executed in optimized.history[2:])


def optimized_flops(model: nn.Module, kind: str) -> float:
    """FLOPs of SpeCa's step of one kind, as ``explain`` says."""
    found = duca_compile.explain(model, **call(0)).schedule(SpeCa(decay_rate=1.0), STEPS)
    return next(step.flops for step in found.steps if step.kind is StepKind[kind])


@torch.no_grad()
def test_rejections_are_full_steps_of_the_forecasts_that_follow(model: nn.Module) -> None:
    """A threshold between the errors: the steps that are full are the model's own, bit for bit, and the others not."""
    policy = SpeCa(base_threshold=0.02, decay_rate=1.0, first_full_steps=2, max_taylor_steps=9)
    optimized = optimize(model, policy)
    own = loop(model)
    outputs = loop(optimized)
    assert set(letters(optimized)[2:]) == {"F", "T"}
    for executed, a, b in zip(optimized.history, outputs, own, strict=True):
        assert torch.equal(a, b) == (executed.kind is StepKind.FULL)
        if executed.step >= 2:
            assert (executed.kind is StepKind.FULL) == (max(executed.measured) > 0.02)


@torch.no_grad()
@pytest.mark.parametrize("metric", ["norm_ratio", "relative_l1"])
def test_the_error_is_that_of_the_last_block_on_the_drafted_stream(model: nn.Module, metric: str) -> None:
    """By hand: at order 0 a draft is the branches of the last full step, added under this step's gates.

    The first blocks of the plain model are made to add these, which gives the drafted stream; the last block runs as it
    is, and once more with its branches replaced.
    """
    compat = "paper" if metric == "norm_ratio" else "released"
    policy = SpeCa(0, 1e9, 1.0, first_full_steps=1, max_taylor_steps=9, compat=compat)
    optimized = optimize(model, policy)
    loop(optimized, 3)
    step = next(executed.step for executed in optimized.history if executed.measured)
    cores: dict[nn.Module, Tensor] = {}
    parts = [part for block in model.transformer_blocks for part in (block.attn1, block.ff)]  # type: ignore[union-attr]

    def record(part: nn.Module) -> Callable[..., None]:
        return lambda args, kwargs, out: cores.__setitem__(part, out)

    with several(*(hooked(part, record(part)) for part in parts)):
        model(**call(0))

    def end(replaced: list[nn.Module]) -> Tensor:
        with several(*(hooked(part, lambda args, kwargs, out, part=part: cores[part]) for part in replaced)):
            return seen(model, model.transformer_blocks[-1], step)[1]  # type: ignore[index, arg-type]

    drafted, computed = end(parts), end(parts[:-2])
    if metric == "norm_ratio":
        expected = [float((a - b).norm() / b.norm()) for a, b in zip(drafted, computed, strict=True)]
    else:
        expected = [float(((drafted - computed).abs() / (computed.abs() + 1e-10)).mean())]
    assert optimized.history[step].measured == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 1e-3, "there is something to measure"


@contextmanager
def several(*contexts: Any) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], several(*contexts[1:]):
        yield


@torch.no_grad()
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("probe", ["modulated", "first_block"])
def test_a_probe_measures_the_relative_change(model: nn.Module, probe: str, accumulate: bool) -> None:
    policy = ResidualGate(1e9, probe, accumulate, max_cached_steps=3)  # type: ignore[arg-type]
    optimized = optimize(model, policy)
    loop(optimized, 6)
    assert letters(optimized) == "FSSSFS"
    block = model.transformer_blocks[0]  # type: ignore[index]

    def looked_at(step: int) -> Tensor:
        if probe == "modulated":
            return seen(model, block.attn1, step)[0]
        before, after = seen(model, block, step)
        return after - before

    for step in range(1, 6):
        before = step - 1 if accumulate else 4 if step > 4 else 0
        expected = relative_change(looked_at(step), looked_at(before))
        assert optimized.history[step].measured == pytest.approx(expected, rel=1e-4)
    assert optimized.history[0].measured == ()


@torch.no_grad()
@pytest.mark.parametrize("probe", ["modulated", "first_block"])
def test_a_cheap_step_adds_the_change_of_the_last_full_one(model: nn.Module, probe: str) -> None:
    """Behind the probe: of all blocks, or of all but the first."""
    optimized = optimize(model, ResidualGate(1e9, probe))  # type: ignore[arg-type]
    blocks = model.transformer_blocks
    first, last = blocks[0], blocks[-1]  # type: ignore[index]
    found = loop(optimized, 3)

    def start(step: int) -> Tensor:
        return seen(model, first, step)[0 if probe == "modulated" else 1]  # type: ignore[arg-type]

    change = seen(model, last, 0)[1] - start(0)  # type: ignore[arg-type]
    for step in (1, 2):
        restored = start(step) + change
        with hooked(last, lambda args, kwargs, out, restored=restored: restored):  # type: ignore[arg-type]
            expected = model(**call(step)).sample
        assert close(found[step], expected)
        assert not close(model(**call(step)).sample, expected, 1e-3), "the cache matters"


@torch.no_grad()
def test_cheap_steps_that_forecast_or_reuse_are_those_of_the_other_methods(model: nn.Module) -> None:
    seer = loop(optimize(model, TaylorSeer(interval=3, max_order=1, first_full_steps=1)), 9)
    gate = optimize(model, ResidualGate(1e9, cached="forecast", max_cached_steps=2))
    assert all(map(torch.equal, loop(gate, 9), seer))
    assert letters(gate) == "FTTFTTFTT"
    fora = loop(optimize(model, duca_compile.FORA(3)), 9)
    gate = optimize(model, ResidualGate(1e9, cached="branches", max_cached_steps=2))
    assert all(map(torch.equal, loop(gate, 9), fora))


@torch.no_grad()
@pytest.mark.parametrize("cached", ["change", "branches", "forecast"])
@pytest.mark.parametrize("probe", ["modulated", "first_block"])
def test_a_threshold_of_none_is_the_model_bit_for_bit(model: nn.Module, probe: str, cached: str) -> None:
    optimized = optimize(model, ResidualGate(0.0, probe, cached=cached))  # type: ignore[arg-type]
    assert all(map(torch.equal, loop(optimized), loop(model)))
    assert letters(optimized) == "F" * STEPS


BY_ROW: dict[str, Callable[[str], Policy]] = {
    "SpeCa": lambda per: SpeCa(2, 0.02, 1.0, first_full_steps=2, decide_per=per),  # type: ignore[arg-type]
    "gate, change": lambda per: ResidualGate(0.12, decide_per=per),  # type: ignore[arg-type]
    "gate, branches": lambda per: ResidualGate(0.12, cached="branches", decide_per=per),  # type: ignore[arg-type]
    "gate, forecast": lambda per: ResidualGate(0.12, cached="forecast", max_order=2, decide_per=per),  # type: ignore[arg-type]
    "gate, first block": lambda per: ResidualGate(0.2, "first_block", False, decide_per=per),  # type: ignore[arg-type]
}


@torch.no_grad()
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_that_decide_for_themselves_give_what_they_give_alone(model: nn.Module, name: str) -> None:
    """Three requests that do not all do the same; at the strictest row, they would."""
    requests = (0, 1, 3)
    together = optimize(model, BY_ROW[name]("row"))
    found = loop(together, requests=requests)
    patterns = ["".join(executed.rows[row].letter for executed in together.history) for row in range(3)]
    assert len(set(patterns)) > 1
    for row, request in enumerate(requests):
        alone = optimize(model, BY_ROW[name]("row"))
        for a, b in zip(found, loop(alone, requests=(request,)), strict=True):
            assert close(a[row], b[0], 1e-5)
        assert letters(alone) == patterns[row]
        strict = optimize(model, BY_ROW[name]("batch"))
        loop(strict, requests=(request,))
        assert letters(strict) == patterns[row], "alone, a row is the batch"
    strictest = optimize(model, BY_ROW[name]("batch"))
    changed = loop(strictest, requests=requests)
    assert not all(close(a, b, 1e-5) for a, b in zip(found, changed, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["SpeCa", "gate, change"])
def test_pairs_that_decide_for_themselves_give_what_they_give_alone(model: nn.Module, name: str) -> None:
    """Rows 0 and 2 are the two halves of one request, 1 and 3 those of another."""
    together = optimize(model, BY_ROW[name]("pair"))
    found = loop(together, requests=(0, 3, 1, 5))
    patterns = ["".join(executed.rows[row].letter for executed in together.history) for row in range(4)]
    assert patterns[0] == patterns[2] != patterns[1] == patterns[3]
    for rows, requests in (((0, 2), (0, 1)), ((1, 3), (3, 5))):
        alone = optimize(model, BY_ROW[name]("pair"))
        for a, b in zip(found, loop(alone, requests=requests), strict=True):
            assert close(a[list(rows)], b, 1e-5)
        assert letters(alone) == patterns[rows[0]]


@torch.no_grad()
@pytest.mark.parametrize("policy", [SpeCa(2, 0.02, 1.0, first_full_steps=2), ResidualGate(0.12)])
def test_passes_decide_on_their_own_and_one_that_joins_late_starts_in_full(model: nn.Module, policy: Policy) -> None:
    optimized = optimize(model, policy)
    alone = {request: optimize(model, policy) for request in (0, 3)}
    for step in range(STEPS):
        for name, request in (("a", 0), ("b", 3)):
            if name == "b" and step < 4:
                continue
            with optimized.cache_context(name):
                output = optimized(**call(step, (request,))).sample
            if name == "a":
                assert torch.equal(output, alone[request](**call(step, (request,))).sample)
    late = [executed for executed in optimized.history if executed.pass_name == "b"]
    assert [executed.step for executed in late] == list(range(4, STEPS))
    assert late[0].kind is StepKind.FULL
    assert late[0].measured == ()
    first = "".join(executed.kind.letter for executed in optimized.history if executed.pass_name == "a")
    assert first == letters(alone[0])


@torch.no_grad()
@pytest.mark.parametrize("policy", [SpeCa(2, 0.02, 1.0, first_full_steps=2), ResidualGate(0.12)])
def test_request_b_after_a_equals_b_alone(model: nn.Module, policy: Policy) -> None:
    optimized = optimize(model, policy)
    loop(optimized, requests=(3, 5))
    again = loop(optimized)
    assert all(map(torch.equal, again, loop(optimize(model, policy))))


@torch.no_grad()
def test_it_warms_up_every_variant_and_touches_no_request(model: nn.Module) -> None:
    for policy in (SpeCa(1, 0.02, 1.0, min_taylor_steps=1), ResidualGate(0.12, decide_per="row")):
        optimized = optimize(model, policy)
        optimized.warm_up(**call(0))
        (compiled,) = optimized._compiled.values()
        built = set(compiled.dispatcher.planner.by_spec)
        assert optimized.history == ()
        assert all(map(torch.equal, loop(optimized), loop(optimize(model, policy))))
        assert set(compiled.dispatcher.planner.by_spec) == built
        assert len(built) == 3, "full, cheap, and the probe or the verified draft"


def test_the_schedule_says_that_it_is_the_cheapest_there_can_be(model: nn.Module) -> None:
    report = duca_compile.explain(model, **call(0))
    found = report.schedule(SpeCa(decay_rate=1.0, first_full_steps=2, max_taylor_steps=3), STEPS)
    assert "decided at run time" in str(found)
    assert "decided at run time" not in str(report.schedule("fora", STEPS))
    assert "".join(step.kind.letter for step in found.steps) == "FFTTTFTTTF"
    assert [step.kind.letter for step in report.schedule("gate", 5).steps] == ["F", "S", "S", "S", "F"]


def test_rows_that_there_are_none_of_are_refused() -> None:
    torch.manual_seed(0)
    latte, arguments = ZOO["Latte"].build(1)
    with pytest.raises(PolicyError, match=r"decide_per='row' needs .* has 6 rows, not 2; use decide_per='batch'"):
        duca_compile.optimize(latte.eval(), ResidualGate(decide_per="row"), "eager")(**arguments)
    with pytest.raises(PolicyError, match="decide_per='pair' needs an even batch, and there are 3 rows"):
        SHARED.optimized(ResidualGate(decide_per="pair"), STEPS)(**call(0, (0, 1, 2)))


def test_a_threshold_that_falls_needs_the_number_of_steps(model: nn.Module) -> None:
    with pytest.raises(PolicyError, match="num_inference_steps"):
        duca_compile.optimize(model, "speca", "eager")


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "share"),
    [(ResidualGate(0.12, "first_block", decide_per="row"), 0.75), (SpeCa(2, 0.02, 1.0, decide_per="row"), 0.5)],
)
def test_caches_may_be_narrow_and_measures_are_not(model: nn.Module, policy: Policy, share: float) -> None:
    """What a probe compares with stays as wide as it is."""
    wide = optimize(model, policy)
    narrow = duca_compile.optimize(model, policy, "eager", STEPS, cache_dtype=torch.bfloat16)
    for a, b in zip(loop(narrow), loop(wide), strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()
    assert narrow.cache_bytes == wide.cache_bytes * share
    values = torch.tensor([value for executed in narrow.history for value in executed.measured])
    assert not torch.equal(values, values.bfloat16().float())


def test_a_budget_that_it_does_not_fit_is_refused_and_never_changes_the_method(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, ResidualGate(), "eager", STEPS, cache_budget_bytes=100)
    with torch.no_grad(), pytest.raises(PolicyError, match="the least is 6144 bytes, for residual gate"):
        optimized(**call(0))
