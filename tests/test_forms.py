"""The forms in which models come: what their methods call, and what their operators read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import duca_compile
from duca_compile import DuCa, UsageError
from tests import models

STEPS = 6
WIDTH = models.WIDTH


def waves(t: Tensor) -> Tensor:
    angles = t[:, None] * torch.exp(torch.linspace(0, -9, WIDTH // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Block(nn.Module):
    """Gated attention and MLP; ``norm`` normalizes in front of both."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.gates = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        one, two = self.gates(c)[:, None].chunk(2, dim=-1)
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + one * self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + two * self.mlp(self.norm(x))


def plain_norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


class Model(nn.Module):
    def __init__(
        self, condition: Callable[[Tensor], Tensor] | None = None, norm: Callable[[Tensor], Tensor] = plain_norm
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.condition = condition
        self.enter, self.leave = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.time, self.more = nn.Linear(WIDTH, WIDTH), nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(self.decode(self.enter(x), t))

    def decode(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(waves(t))
        if self.condition is not None:
            c = c + self.more(self.condition(x))
        for block in self.blocks:
            x = block(x, c)
        return x


class Guided(Model):
    def forward_with_cfg(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        one, other = self.forward(torch.cat([x, -x]), torch.cat([t, t])).chunk(2)
        return other + scale * (one - other)

    def by_another(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        return self.forward_with_cfg(x, t, scale) * 2

    def by_call(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        return self(x, t) * scale

    @torch.no_grad()
    def decorated(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        return self.forward(x, t=t) * scale

    def size(self) -> int:
        return sum(each.numel() for each in self.blocks.parameters())


class Inherited(Guided):
    def forward_with_cfg(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        return super().forward_with_cfg(x, t, scale) - 1


def loop(call: Callable[..., Tensor], *rest: object, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return [
            call(torch.randn(2, 16, width, generator=generator), torch.full((2,), 900.0 - 100 * step), *rest)
            for step in range(STEPS)
        ]


def letters(model: duca_compile.OptimizedModel) -> str:
    return "".join(each.kind.letter for each in model.history)


# Of each, only the shape, the type and the device of ``x`` are read.
CONDITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "new_zeros": lambda x: x.new_zeros(len(x), 4),
    "new_ones": lambda x: x.new_ones(len(x), 4),
    "new_full": lambda x: x.new_full((len(x), 4), 0.5),
    "zeros_like": lambda x: torch.zeros_like(x[:, 0, :4]),
    "ones_like": lambda x: torch.ones_like(x[:, 0, :4]),
    "full_like": lambda x: torch.full_like(x[:, 0, :4], 0.25),
    "empty_like and fill_": lambda x: torch.empty_like(x[:, 0, :4]).fill_(0.25),
    "new_empty and zero_": lambda x: x.new_empty(len(x), 4).zero_(),
    "expand_as": lambda x: torch.linspace(0, 1, 4).expand_as(x[:, 0, :4]),
    "view_as": lambda x: torch.linspace(0, 1, 4 * len(x)).view_as(x[:, 0, :4]),
    "reshape_as": lambda x: torch.linspace(0, 1, 4 * len(x)).reshape_as(x[:, 0, :4]),
    "type_as": lambda x: torch.ones(len(x), 4, dtype=torch.float64).type_as(x),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(torch.linspace(0, 1, 4), x[:, 0, :4])[0],
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_reads_only_a_shape_does_not_depend_on_the_latent(name: str) -> None:
    model = Model(CONDITIONS[name]).eval()
    report = duca_compile.explain(model, torch.randn(2, 16, 8), torch.ones(2))
    assert [branch.gated for branch in report.branches] == [True] * 6
    optimized = duca_compile.optimize(model, "fora", "eager", STEPS)
    found, expected = loop(optimized), loop(model)
    full = [step for step, letter in enumerate(letters(optimized)) if letter == "F"]
    assert 1 < len(full) < STEPS
    assert all(torch.equal(found[step], expected[step]) for step in full)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda x: functional.normalize(x, dim=-1),
    "expand_as": lambda x: x / x.norm(dim=-1, keepdim=True).expand_as(x),
    "broadcast_tensors": lambda x: torch.mul(*torch.broadcast_tensors(x, x.square().mean(-1, keepdim=True).rsqrt())),
    "ones_like": lambda x: torch.ones_like(x) * x,
}


@pytest.mark.parametrize("name", NORMS)
def test_what_lends_its_shape_does_not_mix_tokens(name: str) -> None:
    report = duca_compile.explain(Model(norm=NORMS[name]).eval(), torch.randn(2, 16, 8), torch.ones(2))
    assert [branch.kind for branch in report.branches] == ["self_attention", "mlp"] * 3


@pytest.mark.parametrize("cls", [Guided, Inherited])
@pytest.mark.parametrize("method", ["forward_with_cfg", "by_another", "by_call", "decorated"])
def test_methods_that_call_forward_run_cached(method: str, cls: type[Guided]) -> None:
    model = cls().eval()
    expected = loop(getattr(copy.deepcopy(model), method), 3.0)
    optimized = duca_compile.optimize(model, DuCa(interval=3), "eager", STEPS)
    found = loop(getattr(optimized, method), 3.0)
    assert letters(optimized) == "FPSFPS"
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [x == "F" for x in "FPSFPS"]


def test_another_method_than_forward_may_be_the_step(tmp_path: Path) -> None:
    model = Model().eval()
    expected = loop(model.decode, width=WIDTH)
    optimized = duca_compile.optimize(model, "duca", "eager", STEPS, method="decode")
    found = loop(optimized.decode, width=WIDTH)
    assert letters(optimized) == "FPSPSF"
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[-1], expected[-1])
    loop(optimized)  # the source's own forward calls it
    assert letters(optimized) == "FPSPSF"
    assert duca_compile.restore(optimized) is model
    assert copy.deepcopy(optimized).method == copy.copy(optimized).method == "decode"
    assert isinstance(optimized, Model)
    assert len(duca_compile.explain(optimized, torch.randn(2, 16, WIDTH), torch.ones(2)).branches) == 6
    duca_compile.save(optimized, tmp_path / "artifact", {"x": torch.randn(2, 16, WIDTH), "t": torch.ones(2)})
    loaded = loop(
        lambda x, t: torch.from_numpy(duca_compile.load(tmp_path / "artifact")(x.numpy(), t.numpy())), width=WIDTH
    )
    assert torch.allclose(loaded[0], expected[0], atol=1e-5)


def test_a_method_that_runs_blocks_without_forward_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    optimized = duca_compile.optimize(Guided().eval(), "duca", "eager", STEPS)
    assert optimized.size() > 0
    assert not caplog.records
    loop(optimized.decode, width=WIDTH)
    loop(optimized.decode, width=WIDTH)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "Guided.decode runs without caches" in said
    assert "method='decode'" in said


def test_a_method_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"method='sample': Model has no method of that name"):
        duca_compile.optimize(Model().eval(), "duca", method="sample")


class Convolved(Model):
    """Nothing but convolutions in its branches, so partial steps compute all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))

    def decode(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.time(waves(t))[:, None]
        for mix in self.mix:
            x = x + mix(x.transpose(1, 2)).transpose(1, 2)
        return x


def test_partial_steps_that_save_nothing_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    optimized = duca_compile.optimize(Convolved().eval(), DuCa(interval=3), "eager", STEPS)
    loop(optimized)
    assert letters(optimized).count("P") > 1
    said = [text for record in caplog.records if "next to nothing" in (text := record.getMessage())]
    assert len(said) == 1
    assert "a partial step has 100% of a full step's FLOPs" in said[0]
    assert "FORA" in said[0]
    report = duca_compile.explain(optimized, torch.randn(2, 16, 8), torch.ones(2)).schedule()
    assert " ".join(said[0].split()) in " ".join(str(report).split())


def test_partial_steps_that_save_much_are_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    optimized = duca_compile.optimize(Model().eval(), DuCa(interval=3, fresh_ratio=0.5), "eager", STEPS)
    loop(optimized)
    assert "P" in letters(optimized)
    assert "next to nothing" not in caplog.text
    report = duca_compile.explain(optimized, torch.randn(2, 16, 8), torch.ones(2)).schedule()
    assert "next to nothing" not in str(report)
