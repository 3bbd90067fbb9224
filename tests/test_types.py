"""Every method on every kind of model in bfloat16 and float16: what runs, what it yields, what types it keeps."""

from __future__ import annotations

from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import duca_compile
from duca_compile import RFC, DisCa, DuCa, Policy, ResidualGate, SpeCa, TaylorSeer, ToCa
from duca_compile.core.ports import PortKind
from duca_compile.methods.training import TrainingSettings, train_predictor
from duca_compile.policies import AdaptivePolicy, StepKind
from tests import models
from tests.support import Shared
from tests.test_methods import DEPTH, METHODS, MODELS, STEPS, Case, held
from tests.test_models import sample
from tests.zoo import ZOO

HALF = (torch.bfloat16, torch.float16)
POLICIES: dict[str, Policy] = {name: policy for name, (policy, _) in METHODS.items()} | {
    "DuCa, v_norm": DuCa(interval=4, fresh_ratio=0.3, selection="v_norm"),
    "DuCa, attention": DuCa(interval=4, fresh_ratio=0.3, selection="attention"),
    "SpeCa by pair": SpeCa(base_threshold=0.02, decay_rate=1.0, max_taylor_steps=3, decide_per="pair"),
    "gate by pair": ResidualGate(threshold=0.4, decide_per="pair"),
    "RFC by pair": RFC(threshold=0.5, decide_per="pair"),
}
ENTROPY = ToCa(interval=4, fresh_ratio=0.3, selection="entropy")  # of cross-attention, which few have
EVERY = [(name, model) for model in MODELS for name in POLICIES] + [("ToCa, entropy", m) for m in ("PixArt", "Wan")]


def make(name: str, dtype: torch.dtype, depth: int = DEPTH) -> Case:
    """A model as ``from_pretrained(torch_dtype=...)`` loads it: some modules of some models stay in float32."""
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(depth)
    kept = set(getattr(type(model), "_keep_in_fp32_modules", None) or ())
    for path, parameter in model.named_parameters():
        if kept.isdisjoint(path.split(".")):
            parameter.data = parameter.data.to(dtype)
    return Case(ZOO[name], Shared(model.eval()), {key: _typed(key, value, dtype) for key, value in arguments.items()})


def _typed(name: str, value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and name != "timestep" else value


CASES: dict[tuple[str, torch.dtype], Case] = {}


def case_of(name: str, dtype: torch.dtype) -> Case:
    if (name, dtype) not in CASES:
        CASES[name, dtype] = make(name, dtype)
    return CASES[name, dtype]


def in_slow(chosen: bool, *values: object) -> Any:
    mark = pytest.mark.slow if chosen else pytest.mark.exhaustive
    return pytest.param(*values, marks=mark, id="-".join(str(each).removeprefix("torch.") for each in values))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "name", "dtype"),
    [
        in_slow(dtype is HALF[(EVERY.index((name, model)) + MODELS.index(model)) % 2], model, name, dtype)
        for dtype in HALF
        for name, model in EVERY
    ],
)
def test_steps_in_half_precision_are_as_planned(model: str, name: str, dtype: torch.dtype) -> None:
    """Full steps are the model's own, bit for bit; caches of features are of their type, and as large as announced.

    Sums that Spectrum fits by are in float32.
    """
    case, policy = case_of(model, dtype), POLICIES.get(name, ENTROPY)
    optimized = case.shared.optimized(policy, STEPS)
    plan = case.explained(policy).schedule(policy, STEPS)
    types: set[torch.dtype] = set()
    most = 0
    for arguments, own in zip(case.calls(), case.own, strict=True):
        outputs = sample(optimized(**arguments))
        done = optimized.history[-1]
        for row, kind in enumerate(done.rows or (done.kind,) * len(own[0])):
            assert all(each[row].isfinite().all() for each in outputs)
            same = [torch.equal(a[row], b[row]) for a, b in zip(outputs, own, strict=True)]
            assert same == [kind is StepKind.FULL] * len(own)
        assert [each.dtype for each in outputs] == [each.dtype for each in own]
        types |= {cache.dtype for cache in kept(optimized) if cache.dim() > 1}
        assert all(cache.dtype is torch.float32 for cache in kept(optimized) if cache.dim() == 1)  # numbers of rows
        most = max(most, held(optimized))
    assert types == ({dtype, torch.float32} if name.startswith("Spectrum") else {dtype})
    assert (kept(optimized), plan.cache_bytes) == ([], optimized.cache_bytes)
    assert abs(most - plan.cache_bytes) <= 0.01 * plan.cache_bytes
    kinds = [done.kind for done in optimized.history]
    if isinstance(policy, AdaptivePolicy):
        assert {StepKind.FULL} < set(kinds) <= {step.kind for step in plan.steps}
    else:
        assert kinds == [step.kind for step in plan.steps]


def kept(optimized: Any) -> list[Tensor]:
    states = [s for states in optimized._requests.current()._states.values() for s in states.values()]
    return [cache for state in states for cache in state.caches.values()]


COMPILED = [  # in CI: each kind of model, each way to decide, each kind of step
    ("SpeCa by row", "PixArt", torch.bfloat16),
    ("RFC by pair", "SD3", torch.float16),
    ("gate by row", "Wan", torch.float16),
    ("TaylorSeer lite", "Wan", torch.bfloat16),
    ("DuCa, v_norm", "DiT", torch.bfloat16),
    ("gate, first block", "HunyuanVideo", torch.bfloat16),
    ("RFC by row", "FLUX", torch.float16),
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "model", "dtype"),
    [in_slow((name, model, dtype) in COMPILED, name, model, dtype) for dtype in HALF for name, model in EVERY],
)
def test_compiled_steps_in_half_precision_agree_with_eager_ones(name: str, model: str, dtype: torch.dtype) -> None:
    """As far as both decide alike: what was measured agrees within the tolerance, and may lie on either side.

    The dozens of roundings on the way to a result are of random sign, half an eps each at most, and fused operators
    leave some out: results are an eps or two apart. A forecast of order 2 from 3 steps behind counts those of three
    full steps 1, 6 and 18 times at most.
    """
    case, policy = make(model, dtype), POLICIES.get(name, ENTROPY)
    eps = torch.finfo(dtype).eps
    eager, compiled = (case.shared.optimized(policy, STEPS, backend) for backend in ("eager", "inductor"))
    for arguments in case.calls():
        found, expected = sample(compiled(**arguments)), sample(eager(**arguments))
        one, other = compiled.history[-1], eager.history[-1]
        for a, b in zip(one.measured, other.measured, strict=True):
            assert abs(a - b) <= 4 * eps * max(1, abs(b))
        if (one.kind, one.rows) != (other.kind, other.rows):
            return
        bound = 25 * eps if StepKind.FORECAST in (one.kind, *one.rows) else 2 * eps
        for a, b in zip(found, expected, strict=True):
            assert (a.float() - b.float()).norm() <= bound * b.float().norm() < inf


class MixedBlock(models.Block):
    """The stream in float32, attention in half precision with tables in complex128, the MLP's last layer in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention.to(dtype)
        self.mlp[:2].to(dtype)
        self.dtype = dtype

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(models.TOKENS, dtype=torch.float64)[:, None] / torch.arange(1, models.WIDTH // 2 + 1)
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        parts = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        y = (self.norm(x) * (1 + scale_a) + shift_a).to(self.dtype)
        x = x + gate_a * self.attention(self.turned(y))
        y = (self.norm(x) * (1 + scale_m) + shift_m).to(self.dtype)
        return x + gate_m * self.mlp[2](self.mlp[:2](y).float())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [HALF[0], pytest.param(HALF[1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "policy",
    [
        DuCa(interval=3, fresh_ratio=0.5),
        TaylorSeer(interval=3, max_order=2),
        SpeCa(base_threshold=0.05, decay_rate=1.0, decide_per="row"),
        RFC(threshold=0.05, decide_per="row"),
        ResidualGate(threshold=0.05, probe="first_block", cached="forecast", decide_per="pair"),
    ],
    ids=lambda policy: policy.name,
)
def test_each_cache_has_the_type_of_its_own_feature(dtype: torch.dtype, policy: Policy) -> None:
    model = models.build(lambda: MixedBlock(dtype))
    optimized = duca_compile.optimize(model, policy, "eager")
    for step in range(7):
        call = models.example(step, 900.0 - 10 * step)
        output, own = optimized(**call), model(**call)
        done = optimized.history[-1]
        rows = done.rows or (done.kind,) * len(own)
        assert [torch.equal(a, b) for a, b in zip(output, own, strict=True)] == [k is StepKind.FULL for k in rows]
        assert output.isfinite().all()
    (captured,) = optimized._compiled.values()
    features = {b.slot: b.dtype for b in captured.facts.branches}
    assert set(features.values()) == {dtype, torch.float32}
    (state,) = [s for states in optimized._requests.current()._states.values() for s in states.values()]
    for port, cache in state.caches.items():
        if port.kind is PortKind.BRANCH:
            assert cache.dtype is features[port.difference(0)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_predictor_for_a_stream_that_is_widened_for_each_sum(dtype: torch.dtype, tmp_path: Path) -> None:
    case = make("Wan", dtype, depth=3)

    @torch.no_grad()
    def run(drop_in: nn.Module, number: int) -> list[Tensor]:
        return [sample(drop_in(**arguments))[0] for arguments in islice(case.calls(), 5)]

    predictor = train_predictor(case.model, run, tmp_path / "p.safetensors", TrainingSettings(1, 2))
    optimized = duca_compile.optimize(case.model, DisCa(predictor, 4), "eager")
    for step, (output, own) in enumerate(zip(run(optimized, 0), run(case.model, 0), strict=True)):
        assert output.isfinite().all()
        assert torch.equal(output, own) == (step in (0, 4))
    assert {cache.dtype for cache in kept(optimized)} == {dtype}
