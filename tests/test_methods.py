"""Every method on every kind of model: what runs, what it yields, and what it holds. One line for each in ``METHODS``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import duca_compile
from duca_compile import FORA, DuCa, OptimizedModel, Policy, ResidualGate, SpeCa, TaylorSeer, ToCa
from duca_compile.api import analyze_call
from duca_compile.backends import make_backend
from duca_compile.capture import Binder, live_tensors
from duca_compile.captures import Captures, Compiled
from duca_compile.policies import AdaptivePolicy, StepKind
from tests.test_models import sample, same
from tests.zoo import ZOO, Entry

STEPS, DEPTH = 12, 2
MODELS = ("DiT", "PixArt", "SD3", "FLUX", "Wan", "HunyuanVideo")
METHODS: dict[str, Policy] = {
    "FORA": FORA(3),
    "DuCa": DuCa(interval=4, fresh_ratio=0.3),
    "DuCa, v_norm": DuCa(interval=4, fresh_ratio=0.3, selection="v_norm", text_factor=1.0),
    "ToCa": ToCa(interval=4, fresh_ratio=0.3),
    "TaylorSeer": TaylorSeer(interval=4, max_order=2),
    "TaylorSeer lite": TaylorSeer(interval=4, max_order=2, lite=True),
    "SpeCa": SpeCa(base_threshold=0.02, decay_rate=1.0, max_taylor_steps=3),
    "SpeCa by row": SpeCa(base_threshold=0.02, decay_rate=1.0, max_taylor_steps=3, decide_per="row"),
    "SpeCa released": SpeCa(base_threshold=2.0, min_taylor_steps=1, compat="released", verify_of="branch"),
    "gate": ResidualGate(threshold=0.4),
    "gate by row": ResidualGate(threshold=0.4, decide_per="row"),
    "gate, first block": ResidualGate(threshold=0.2, probe="first_block", accumulate=False),
    "gate, branches": ResidualGate(threshold=0.4, cached="branches"),
    "gate, forecast": ResidualGate(threshold=0.4, cached="forecast", max_cached_steps=3),
}


@dataclass(frozen=True)
class Case:
    """A model of the zoo, captured once for all methods."""

    entry: Entry
    model: nn.Module
    arguments: dict[str, Any]
    found: Any

    def optimized(self, policy: Policy, backend: str = "eager") -> OptimizedModel:
        """As ``optimize`` gives it, but with the capture that is there."""
        made: OptimizedModel = duca_compile.optimize(self.model, policy, backend, STEPS, strict=True)
        engine = make_backend(backend, strict=True)
        live = live_tensors(self.model)
        made.__dict__["_compiled"] = Captures(self.model, lambda _: Compiled(*self.found, policy, engine, live))
        return made

    def calls(self) -> Iterator[dict[str, Any]]:
        """The arguments of each step of a loop: timesteps fall, and the latent moves a little."""
        for step in range(STEPS):
            torch.manual_seed(step)
            latent = tree_map(lambda x: x * (1 + 0.02 * step) + 0.05 * torch.randn_like(x), self.arguments["hidden_states"])
            time = self.arguments["timestep"]
            time = time - 10 * step if time.max() > 1 else time * (1 - step / STEPS)
            yield self.arguments | {"hidden_states": latent, "timestep": time}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    entry = ZOO[request.param]
    model, arguments = entry.build(DEPTH)
    call = Binder(model.eval())((), arguments)
    return Case(entry, model, arguments, analyze_call(model, call, None))


def held(optimized: OptimizedModel) -> int:
    """Bytes of all memory that the request's caches and scores keep alive, each once."""
    states = [s for states in optimized._requests.current()._states.values() for s in states.values()]
    groups = [group for s in states if s.selector is not None for group in s.selector._groups]
    tensors = [t for s in states for t in s.caches.values()]
    tensors += [t for g in groups for t in (g._scores, g._staleness) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def close(left: list[Tensor], right: list[Tensor], tolerance: float) -> bool:
    return all((a - b).norm() <= tolerance * b.norm() for a, b in zip(left, right, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_twelve_steps_are_those_that_were_planned(case: Case, name: str) -> None:
    policy = METHODS[name]
    optimized = case.optimized(policy)
    plan = duca_compile.Explanation(case.entry.name, *case.found[:2], policy).schedule(policy, STEPS)
    for arguments in case.calls():
        outputs, own = sample(optimized(**arguments)), sample(case.model(**arguments))
        assert all(torch.isfinite(each).all() for each in outputs)
        done = optimized.history[-1]
        rows = done.rows or (done.kind,) * len(own[0])
        full = torch.tensor([kind is StepKind.FULL for kind in rows])
        assert all(torch.equal(a[full], b[full]) for a, b in zip(outputs, own, strict=True))
        assert not any(torch.equal(a[i], b[i]) for a, b in zip(outputs, own, strict=True) for i in range(len(full)) if not full[i])
    kinds = [done.kind for done in optimized.history]
    if isinstance(policy, AdaptivePolicy):
        assert set(kinds) <= {step.kind for step in plan.steps}
    else:
        assert kinds == [step.kind for step in plan.steps]
        assert [done.flops for done in optimized.history] == [step.flops for step in plan.steps]
    assert plan.cache_bytes == optimized.cache_bytes
    assert abs(held(optimized) - plan.cache_bytes) <= 0.01 * plan.cache_bytes
