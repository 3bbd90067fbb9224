"""Models whose own forward reads the timestep in Python, and calls a network: it runs as it is, the network cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import CaptureError, DuCa
from duca_compile.policies import StepKind
from tests import models

STEPS = 8
POLICY = DuCa(interval=4, fresh_ratio=0.3)


class Wrapper(nn.Module):
    """Guidance inside, whose scale falls with the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = models.build(models.CrossBlock)
        self.calls = 0

    def guided(self, x: Tensor, timestep: Tensor, text: Tensor, scale: float) -> Tensor:
        network: Any = self.network
        both = [torch.cat([each, each]) for each in (x, timestep)]
        with_text, without = network(*both, torch.cat([text, text * 0])).chunk(2)
        return torch.lerp(without, with_text, scale)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        return self.guided(x, timestep, text, 1 + float(timestep[0]) / 4)


class Interval(Wrapper):
    """Guidance for some steps only, by two calls."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        found: Tensor = self.network(x, timestep, text)
        if 2 <= timestep[0].item() < 6:
            found = torch.lerp(self.network(x, timestep, text * 0), found, 3.0)
        return found


class Experts(Wrapper):
    """Another network for steps with much noise."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy = models.build(models.CrossBlock)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        network = self.noisy if timestep[0] > 4 else self.network
        found: Tensor = network(x, timestep, text)
        return found


class Nested(nn.Module):
    """A wrapper within another module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Wrapper()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        found: Tensor = self.inner(x * 0.5, timestep, text)
        return found * 2


def calls() -> list[dict[str, Tensor]]:
    first = models.example()
    return [
        {**first, "x": first["x"] + 0.05 * step, "timestep": torch.full((2,), float(STEPS - step))}
        for step in range(STEPS)
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [Interval, *(pytest.param(each, marks=pytest.mark.slow) for each in (Wrapper, Experts, Nested))]
)
def test_its_network_is_cached_and_full_steps_are_its_own(kind: type[nn.Module]) -> None:
    model = kind().eval()
    fast = duca_compile.optimize(model, POLICY, "eager", STEPS)
    kinds = []
    for call in calls():
        before = len(fast.history)
        found, expected = fast(**call), model(**call)
        step = {each.kind for each in fast.history[before:]} or {fast.history[-1].kind}
        kinds.append(step)
        if step == {StepKind.FULL}:
            assert torch.equal(found, expected)
        else:
            assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    assert {StepKind.FULL} in kinds
    assert {StepKind.SKIP} in kinds


@torch.no_grad()
def test_what_forward_sets_is_set_on_the_model() -> None:
    model = Wrapper().eval()
    fast = duca_compile.optimize(model, POLICY, "eager", STEPS)
    for call in calls():
        fast(**call)
    assert model.calls == fast.calls
    alone = Wrapper().eval()
    for call in calls():
        alone(**call)
    assert model.calls == alone.calls, "that the first call was tried as a graph left nothing"
    assert model.network is fast.network
    assert type(model.network) is models.DiT


def test_what_cannot_go_around_it_says_what_to_pass() -> None:
    with pytest.raises(CaptureError, match=r"reads a value .* optimize\(\) runs it as it is, and caches 'network'"):
        duca_compile.explain(Wrapper().eval(), **calls()[0])


@pytest.mark.slow
@torch.no_grad()
def test_it_equals_the_network_optimized_by_hand() -> None:
    model, by_hand = Wrapper().eval(), Wrapper().eval()
    by_hand.network = duca_compile.optimize(by_hand.network, POLICY, "eager", STEPS)
    fast = duca_compile.optimize(model, POLICY, "eager", STEPS)
    for call in calls() * 2:
        assert torch.equal(fast(**call), by_hand(**call))
    assert [each.kind for each in fast.history] == [each.kind for each in by_hand.network.history]


@pytest.mark.slow
@torch.no_grad()
def test_a_new_network_takes_its_place() -> None:
    model = Wrapper().eval()
    fast = duca_compile.optimize(model, POLICY, "eager", STEPS)
    fast(**calls()[0])
    torch.manual_seed(1)
    model.network = models.build(models.CrossBlock).eval()
    fast.reset()
    assert torch.equal(fast(**calls()[0]), model(**calls()[0]))


@pytest.mark.slow
@torch.no_grad()
def test_passes_and_sessions_keep_their_caches() -> None:
    model = Wrapper().eval()
    fast = duca_compile.optimize(model, POLICY, "eager", STEPS)
    alone = duca_compile.optimize(model, POLICY, "eager", STEPS)
    session, expected = fast.session(), []
    for call in calls():
        expected.append(alone(**call))
    for call, right in zip(calls(), expected, strict=True):
        with fast.cache_context("other"):
            fast(**{**call, "x": -call["x"]})
        assert torch.equal(session(**call), right)


@torch.no_grad()
def test_a_model_without_a_network_of_its_own_is_refused() -> None:
    class Early(models.DiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            if timestep[0] > 4:
                x = 2 * x
            return super().forward(x, timestep, text)

    model = Early(models.CrossBlock).eval()
    with pytest.raises(CaptureError, match=r"Early.forward reads a value .* one opaque operator\.$"):
        duca_compile.optimize(model, POLICY, "eager", STEPS)(**calls()[0])


@torch.no_grad()
def test_a_part_that_is_no_network_is_refused_for_the_wrappers_reason() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = models.mlp()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x + self.mlp(x)
            return found

    class Sequenced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(models.CHANNELS, models.WIDTH), nn.Linear(models.WIDTH, models.CHANNELS)
            self.blocks = nn.Sequential(Sum(), Sum())

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            x = self.blocks(self.enter(x) + models.embed(timestep, models.WIDTH)[:, None])
            found: Tensor = self.leave(x)
            return found if timestep[0] > 4 else found * 2

    fast = duca_compile.optimize(Sequenced().eval(), POLICY, "eager", STEPS)
    for call in calls()[:2]:
        with pytest.raises(CaptureError, match=r"Sequenced\.forward reads a value that depends on 'timestep'"):
            fast(**call)
