"""Every method on every kind of model: what runs, what it yields and holds. ``METHODS`` has a line for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

from duca_compile import (
    FORA,
    RFC,
    Calibrated,
    DuCa,
    Explanation,
    FreqCa,
    HiCache,
    MagCache,
    OptimizedModel,
    Policy,
    ResidualGate,
    SpeCa,
    Spectrum,
    TaylorSeer,
    ToCa,
)
from duca_compile.backends.inductor import private
from duca_compile.frontend.binder import Binder
from duca_compile.policies import AdaptivePolicy, StepKind
from duca_compile.policies.base import FittedFactors
from tests.support import Shared, sampled
from tests.test_models import sample
from tests.zoo import ZOO, Entry

STEPS, DEPTH = 12, 2
MODELS = ("DiT", "PixArt", "SD3", "FLUX", "Wan", "HunyuanVideo")


def measured(*full: int) -> tuple[FittedFactors | None, ...]:
    """Factors as if they had been measured, for ``STEPS`` steps."""
    last = [max(each for each in full if each <= step) for step in range(STEPS)]
    orders = [min(2, sum(each <= step for each in full) - 1) for step in range(STEPS)]
    return tuple(
        None if step in full else FittedFactors(last[step], (0.4, 0.1)[: orders[step]]) for step in range(STEPS)
    )


METHODS: dict[str, tuple[Policy, str]] = {  # and the model that it is compiled on in CI
    "FORA": (FORA(3), "Wan"),
    "DuCa": (DuCa(interval=4, fresh_ratio=0.3), "PixArt"),
    "ToCa": (ToCa(interval=4, fresh_ratio=0.3, text_factor=1.0), "SD3"),
    "TaylorSeer": (TaylorSeer(interval=4, max_order=2), "DiT"),
    "TaylorSeer lite": (TaylorSeer(interval=4, max_order=2, lite=True), "DiT"),
    "HiCache": (HiCache(interval=4), "PixArt"),
    "Spectrum": (Spectrum(first_full_steps=3, share=0.5), "SD3"),
    "FreqCa": (FreqCa(interval=4, transform="fft", cutoff=0.4), "Wan"),
    "MagCache": (MagCache((1.0, *[1.03] * (STEPS - 1)), threshold=0.2), "FLUX"),
    "calibrated": (Calibrated(measured(0, 1, 4, 9), max_order=2), "Wan"),
    "SpeCa": (SpeCa(base_threshold=0.02, decay_rate=1.0, max_taylor_steps=3), "DiT"),
    "SpeCa by row": (SpeCa(base_threshold=0.02, decay_rate=1.0, max_taylor_steps=3, decide_per="row"), "DiT"),
    "SpeCa released": (SpeCa(base_threshold=2.0, min_taylor_steps=1, compat="released", verify_of="branch"), "PixArt"),
    "gate": (ResidualGate(threshold=0.4), "FLUX"),
    "gate by row": (ResidualGate(threshold=0.4, decide_per="row"), "DiT"),
    "gate, first block": (ResidualGate(threshold=0.34, probe="first_block", accumulate=False), "HunyuanVideo"),
    "gate, forecast": (ResidualGate(threshold=0.4, cached="forecast", max_cached_steps=3), "DiT"),
    "TaylorSeer relational": (TaylorSeer(interval=4, max_order=2, relational=True), "FLUX"),
    "RFC": (RFC(threshold=0.5), "HunyuanVideo"),
    "RFC by row": (RFC(threshold=0.5, decide_per="row"), "PixArt"),
}


@dataclass(eq=False)
class Case:
    """A model of the zoo, captured once for all methods."""

    entry: Entry
    shared: Shared
    arguments: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        return self.shared.model

    @cached_property
    @torch.no_grad()
    def own(self) -> list[list[Tensor]]:
        """What the model itself yields at each step."""
        return [sample(self.model(**arguments)) for arguments in self.calls()]

    def explained(self, policy: Policy) -> Explanation:
        captured, facts, _ = self.shared.captured(Binder(self.model)((), self.arguments))
        return Explanation(self.entry.name, captured, facts, policy)

    def calls(self) -> Iterator[dict[str, Any]]:
        """The arguments of each step of a loop: timesteps fall, and the latent moves a little."""
        for step in range(STEPS):
            torch.manual_seed(step)
            latent = self.arguments["hidden_states"]
            latent = latent * (1 + 0.02 * step) + 0.05 * torch.randn_like(latent)
            time = self.arguments["timestep"]
            time = time - 10 * step if time.max() > 1 else time * (1 - step / STEPS)
            yield self.arguments | {"hidden_states": latent, "timestep": time}


def make(name: str) -> Case:
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(DEPTH)
    return Case(ZOO[name], Shared(model.eval()), arguments)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def held(optimized: OptimizedModel) -> int:
    """Bytes of all memory that the request's caches and scores keep alive, each once."""
    states = [s for states in optimized._requests.current()._states.values() for s in states.values()]
    groups = [group for s in states if s.selector is not None for group in s.selector._groups]
    tensors = [t for s in states for t in s.caches.values()]
    tensors += [t for g in groups for t in (g._scores, g._staleness) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_twelve_steps_are_those_that_were_planned(case: Case, name: str) -> None:
    """Full steps are the model's own, bit for bit, and the others are not; no more is held than was announced."""
    policy, _ = METHODS[name]
    optimized = case.shared.optimized(policy, STEPS)
    plan = case.explained(policy).schedule(policy, STEPS)
    most = 0
    for arguments, own in zip(case.calls(), case.own, strict=True):
        outputs = sample(optimized(**arguments))
        most = max(most, held(optimized))
        done = optimized.history[-1]
        for row, kind in enumerate(done.rows or (done.kind,) * len(own[0])):
            assert all(torch.isfinite(each[row]).all() for each in outputs)
            same = [torch.equal(a[row], b[row]) for a, b in zip(outputs, own, strict=True)]
            assert same == [kind is StepKind.FULL] * len(own)
    kinds = [done.kind for done in optimized.history]
    if isinstance(policy, AdaptivePolicy):
        assert {StepKind.FULL} < set(kinds) <= {step.kind for step in plan.steps}
    else:
        assert kinds == [step.kind for step in plan.steps]
        assert [done.flops for done in optimized.history] == [step.flops for step in plan.steps]
    assert plan.cache_bytes == optimized.cache_bytes
    assert abs(most - plan.cache_bytes) <= 0.01 * plan.cache_bytes


COMPILED = [sampled(name, model, slow=model == chosen) for name, (_, chosen) in METHODS.items() for model in MODELS]


@torch.no_grad()
@pytest.mark.parametrize(("name", "model"), COMPILED)
def test_compiled_steps_agree_with_eager_ones(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for each variant."""
    policy, _ = METHODS[name]
    compiled: list[fx.GraphModule] = []

    def counted(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(module)
        return compile_fx(module, inputs)

    monkeypatch.setattr(private, "compile_fx", counted)
    case = make(model)
    eager, optimized = (case.shared.optimized(policy, STEPS, backend) for backend in ("eager", "inductor"))
    for arguments in case.calls():
        for a, b in zip(sample(optimized(**arguments)), sample(eager(**arguments)), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    assert [done.kind for done in optimized.history] == [done.kind for done in eager.history]
    (captured,) = optimized._compiled.values()
    assert len(compiled) == len(captured.dispatcher.planner.by_spec) > 1
