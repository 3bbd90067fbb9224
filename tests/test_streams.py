"""The forms in which a residual stream comes: whatever its sums, a step gives what a model cached by hand gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import duca_compile
from duca_compile import FORA, DuCa, Policy, PolicyError, TaylorSeer
from duca_compile.core.ir import Facts, Role
from duca_compile.passes.caching.predict import last_blocks
from duca_compile.policies import StepKind
from tests.support import Shared

STEPS, INTERVAL, WIDTH, TOKENS, DEPTH = 7, 3, 16, 6, 3
Branch = Callable[[], Tensor]


class Hand:
    """Caches the branches of a model by hand: what it is told to keep, at steps that it is told the kind of."""

    def __init__(self) -> None:
        self.kind, self.step, self.full, self.gap = StepKind.FULL, 0, 0, 1  # of the last full step and the one before
        self.kept: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}

    def start(self, step: int, kind: StepKind) -> None:
        self.step, self.kind = step, kind
        if kind is StepKind.FULL:
            self.full, self.gap = step, step - self.full

    def __call__(self, name: str, branch: Branch) -> Tensor:
        """The value of a branch before its gate."""
        if self.kind is StepKind.FULL or (self.kind is StepKind.PARTIAL and "mlp" in name):
            return self._renew(name, branch())
        if self.kind is StepKind.FORECAST:
            slope = self.slopes.get(name)
            return self.kept[name] if slope is None else self.kept[name] + slope * (self.step - self.full)
        return self.kept[name]

    def _renew(self, name: str, value: Tensor) -> Tensor:
        if name in self.kept:
            self.slopes[name] = (value - self.kept[name]) / self.gap
        self.kept[name] = value
        return value

    def end(self, name: str, value: Tensor) -> Tensor:
        """A value that skip steps restore."""
        if self.kind is not StepKind.SKIP:
            self.kept[name] = value
        return self.kept[name]


def norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


def waves(t: Tensor) -> Tensor:
    angles = t[:, None] * torch.exp(torch.linspace(0, -9, WIDTH // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Parts(nn.Module):
    """The parts of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.token_gate, self.gates = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.scale, self.start_scale = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.3))

    def attend(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.mix(self.qkv(x)))
        return result

    def mix(self, qkv: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in qkv.chunk(3, dim=-1))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# How a stream ``x`` takes in what ``branch`` gives; ``gate`` depends on the timestep alone.
Form = Callable[[Parts, Tensor, Tensor, Callable[[Callable[[Tensor], Tensor]], Tensor]], Tensor]
MASK = (torch.arange(TOKENS) < TOKENS - 2)[None, :, None].expand(1, TOKENS, WIDTH)
FORMS: dict[str, Form] = {
    "plain": lambda p, x, gate, branch: x + gate * branch(norm),
    "cast in front": lambda p, x, gate, branch: (x.double() + gate * branch(norm)).float(),
    "two casts": lambda p, x, gate, branch: (x.double().to(torch.float64) + branch(norm).double()).bfloat16().float(),
    "narrow between blocks": lambda p, x, gate, branch: (x.float() + gate * branch(norm)).bfloat16(),
    "lerp": lambda p, x, gate, branch: torch.lerp(x, branch(norm), gate.sigmoid()),
    "lerp by a number": lambda p, x, gate, branch: x.lerp(branch(norm), 0.3),
    "lerp by hand": lambda p, x, gate, branch: x + gate * (branch(norm) - x),
    "lerp by a weight of each token": lambda p, x, gate, branch: x.lerp(branch(norm), p.token_gate(x).sigmoid()),
    "both scaled": lambda p, x, gate, branch: x * p.scale + branch(norm) * gate,
    "divided": lambda p, x, gate, branch: (x + gate * branch(norm)) / math.sqrt(2),
    "alpha": lambda p, x, gate, branch: torch.add(x, branch(norm), alpha=0.5),
    "alpha of the stream": lambda p, x, gate, branch: torch.add(branch(norm), x, alpha=0.9),
    "addcmul": lambda p, x, gate, branch: torch.addcmul(x, gate.expand(len(x), TOKENS, WIDTH), branch(norm)),
    "addcdiv": lambda p, x, gate, branch: torch.addcdiv(x, branch(norm), 2 + gate.sigmoid()),
    "difference": lambda p, x, gate, branch: x - gate * branch(norm),
    "where": lambda p, x, gate, branch: torch.where(MASK, x + branch(norm), x),
    "masked": lambda p, x, gate, branch: (x + gate * branch(norm)) * MASK,
    "masked_fill": lambda p, x, gate, branch: (x + gate * branch(norm)).masked_fill(~MASK, 0.0),
    "sandwich": lambda p, x, gate, branch: x + gate * branch(lambda x: norm(x) * 2),
    "behind a norm": lambda p, x, gate, branch: norm(x + branch(lambda x: x)),
    "on a sphere": lambda p, x, gate, branch: functional.normalize(x.lerp(branch(lambda x: x), 0.2), dim=-1),
    "moved in time": lambda p, x, gate, branch: x + gate + branch(norm),
}  # fmt: skip
QUICK = ("narrow between blocks", "lerp by hand", "both scaled", "where", "on a sphere")


class Model(nn.Module):
    """Blocks whose sums are of one form; ``taps`` are blocks behind which the stream is returned as well."""

    def __init__(self, form: Form = FORMS["plain"], taps: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.taps = form, taps
        self.enter, self.leave, self.time = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Parts() for _ in range(DEPTH))
        self.hand: Hand | None = None

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        c = self.time(waves(t))
        return tuple(self.leave(each.float()) for each in self.stream(self.enter(x) + c[:, None], c))

    def stream(self, x: Tensor, c: Tensor) -> list[Tensor]:
        """The values that the outputs are made from."""
        returned = []
        for i in range(DEPTH):
            x = self.block(i, x, c)
            if i in self.taps:
                returned.append(self.end(f"behind {i}", x))
        return [self.end("end", x), *returned]

    def block(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        parts = self.blocks[i]
        gates = parts.gates(c)[:, None].chunk(2, dim=-1)
        for name, gate, part in zip(("attend", "mlp"), gates, (parts.attend, parts.mlp), strict=True):
            take = partial(self._branch, f"{name} {i}", part, x)
            x = self.form(parts, x, gate, take)
        return x

    @staticmethod
    def calls() -> list[tuple[Tensor, ...]]:
        """The arguments of the steps of a loop."""
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(2, TOKENS, 4, generator=generator)
        moved = [latent + 0.1 * step * torch.randn(2, TOKENS, 4, generator=generator) for step in range(STEPS)]
        return [(x, torch.full((2,), 900.0 - 100 * step)) for step, x in enumerate(moved)]

    def _branch(
        self, name: str, part: Callable[[Tensor], Tensor], x: Tensor, ahead: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return self.kept(name, lambda: part(ahead(x).float()))

    def kept(self, name: str, branch: Branch) -> Tensor:
        return branch() if self.hand is None else self.hand(name, branch)

    def end(self, name: str, value: Tensor) -> Tensor:
        return value if self.hand is None else self.hand.end(name, value)


class MixedWithStart(Model):
    """x = a * x + b * start in front of each block."""

    def stream(self, x: Tensor, c: Tensor) -> list[Tensor]:
        start = x
        for i, parts in enumerate(self.blocks):
            x = self.block(i, parts.scale * x + parts.start_scale * start, c)
        return [self.end("end", x)]


class TwoCopies(Model):
    """Two streams that are mixed in front of each branch and behind it, as hyper-connections have them."""

    def stream(self, x: Tensor, c: Tensor) -> list[Tensor]:
        one, two = x, x * 0.5
        for i, parts in enumerate(self.blocks):
            for name, part in (("attend", parts.attend), ("mlp", parts.mlp)):
                mixed = one * parts.scale + two * parts.start_scale
                result = self.kept(f"{name} {i}", lambda part=part, mixed=mixed: part(norm(mixed)))  # type: ignore[misc]
                one, two = one * 0.9 + two * 0.1 + result * 0.7, one * 0.2 + two * 0.8 + result * 0.3
        return [self.end("one", one) + self.end("two", two)]


class Preconditioned(Model):
    """The latent itself is part of the result."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        noise = t[:, None, None] / 1000
        (result,) = super().forward(x * (1 + noise**2).rsqrt(), t)
        return (x / (1 + noise**2) + result * noise,)


class Convolved(Model):
    """Positions by a convolution, which is added to the stream before the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def stream(self, x: Tensor, c: Tensor) -> list[Tensor]:
        return super().stream(x + functional.mish(self.positions(x.transpose(1, 2))).transpose(1, 2), c)


class Pair(Model):
    """Two latents that meet in attention, each with a result of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter_other, self.leave_other = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.others = nn.ModuleList(Parts() for _ in range(DEPTH))

    def forward(self, video: Tensor, audio: Tensor, t: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        time = self.time(waves(t))[:, None]
        x, y = self.enter(video) + time, self.enter_other(audio) + time
        for i, (one, other) in enumerate(zip(self.blocks, self.others, strict=True)):
            both = one.mix(torch.cat([one.qkv(norm(x)), other.qkv(norm(y))], 1))
            x = x + self.kept(f"attend {i}", partial(one.out, both[:, :TOKENS]))
            y = y + self.kept(f"attend other {i}", partial(other.out, both[:, TOKENS:]))
            x = x + self.kept(f"mlp {i}", partial(one.mlp, norm(x)))
            y = y + self.kept(f"mlp other {i}", partial(other.mlp, norm(y)))
        return self.leave(self.end("end", x)), self.leave_other(self.end("other end", y))

    @staticmethod
    def calls() -> list[tuple[Tensor, ...]]:
        return [(x, x[:, :4, :3] * 0.9, t) for x, t in Model.calls()]


class Returned(Model):
    """A branch is a result as well."""

    def stream(self, x: Tensor, c: Tensor) -> list[Tensor]:
        x = self.end("behind 0", self.block(0, x, c))
        result = self.kept("mlp 1", partial(self.blocks[1].mlp, norm(x)))
        return [self.end("end", self.block(2, x + result, c)), result]


def by_hand(model: Model, kinds: list[StepKind]) -> list[tuple[Tensor, ...]]:
    """The results of a loop in which the model caches by hand."""
    model.hand, results = Hand(), []
    for step, (call, kind) in enumerate(zip(model.calls(), kinds, strict=True)):
        model.hand.start(step, kind)
        results.append(model(*call))
    model.hand = None
    return results


POLICIES: list[Policy] = [
    FORA(INTERVAL),
    DuCa(INTERVAL, fresh_ratio=1.0, text_factor=1.0),
    TaylorSeer(INTERVAL, max_order=1),
]


@torch.no_grad()
def check(model: Model) -> Facts:
    """Every kind of step runs as planned and gives what the model by hand gives; full ones bit for bit."""
    shared = Shared(model.eval())
    for policy in POLICIES:
        optimized = shared.optimized(policy, STEPS)
        results = []
        for step, call in enumerate(model.calls()):
            with optimized.cache_context("pass", step_index=step):
                results.append(optimized(*call))
        kinds = [each.kind for each in optimized.history]
        assert kinds == [step.kind for step in policy.planned(STEPS)]
        for kind, found, expected, call in zip(kinds, results, by_hand(model, kinds), model.calls(), strict=True):
            if kind is StepKind.FULL:
                assert all(map(torch.equal, found, model(*call)))
            for one, other in zip(found, expected, strict=True):
                assert (one - other).norm() <= 2e-5 * other.norm(), (policy.name, kind)
    (compiled,) = optimized._compiled.values()
    facts: Facts = compiled.facts
    return facts


def kinds_of(facts: Facts) -> list[str]:
    return [branch.kind for branch in facts.branches]


EACH = ["self_attention", "mlp"] * DEPTH


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FORMS])
def test_a_stream_of_any_form_is_cached_as_by_hand(name: str) -> None:
    facts = check(Model(FORMS[name]))
    assert kinds_of(facts) == EACH
    assert {branch.role for branch in facts.branches} == {Role.MAIN}
    assert len(facts.ends) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "both scaled"])
def test_a_stream_that_its_start_is_mixed_into_is_cached_as_by_hand(name: str) -> None:
    assert kinds_of(check(MixedWithStart(FORMS[name]))) == EACH


@pytest.mark.slow
def test_streams_that_are_mixed_are_cached_as_by_hand() -> None:
    facts = check(TwoCopies())
    assert {branch.role for branch in facts.branches} == {Role.MAIN}
    assert len(facts.ends) == 1, "the model reads only the sum of both"


@pytest.mark.slow
def test_what_joins_the_stream_late_is_no_branch() -> None:
    assert kinds_of(check(Preconditioned())) == EACH


def test_values_from_the_middle_of_a_stream_are_restored_in_skip_steps() -> None:
    model = Model(taps=(0, 1))
    facts = check(model)
    assert kinds_of(facts) == EACH
    assert [str(port) for port in facts.ends] == ["stream_end_1", "stream_end_3", "stream_end"]
    report = duca_compile.explain(model, *model.calls()[0])
    skipped = next(step for step in report.schedule("duca", STEPS).steps if step.kind is StepKind.SKIP)
    assert skipped.flops < 0.15 * report.flops, "embedding and heads"
    with pytest.raises(PolicyError, match=r"also read the stream behind .*test_streams.py:\d+; use another policy"):
        last_blocks(facts)


@pytest.mark.slow
def test_an_artifact_restores_them_too(tmp_path: Path) -> None:
    model = Model(taps=(1,)).eval()
    optimized = duca_compile.optimize(model, DuCa(INTERVAL), "eager", STEPS)
    (x, t), *_ = model.calls()
    duca_compile.save(optimized, tmp_path / "artifact", {"x": x, "t": t})
    artifact = duca_compile.load(tmp_path / "artifact")
    for call in model.calls()[:INTERVAL]:
        with torch.no_grad():
            expected = optimized(*call)
        found = artifact(*(each.numpy() for each in call))
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(torch.from_numpy(one), other, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_returned_branch_is_computed_in_skip_steps() -> None:
    """From the restored stream, so that a skip step reads nothing that its schedule drops."""
    assert kinds_of(check(Returned())) == ["self_attention", "mlp", "mlp", "self_attention", "mlp"]


@pytest.mark.slow
def test_a_convolution_in_front_of_the_blocks_is_part_of_the_embedding() -> None:
    model = Convolved()
    facts = check(model)
    assert kinds_of(facts) == EACH
    (name,) = facts.embeddings
    assert "test_streams.py" in name
    assert f"the convolution of {name} is computed in every step" in str(duca_compile.explain(model, *model.calls()[0]))


@torch.no_grad()
def test_two_latents_are_both_cached() -> None:
    model = Pair()
    facts = check(model)
    assert len(facts.branches) == 4 * DEPTH
    assert len(facts.ends) == 2
    report = duca_compile.explain(model, *model.calls()[0])
    for policy in (FORA(INTERVAL), DuCa(INTERVAL), TaylorSeer(INTERVAL, lite=True)):
        steps = report.schedule(policy, STEPS).steps
        assert min(step.flops for step in steps) < 0.15 * report.flops, "embeddings and heads"
