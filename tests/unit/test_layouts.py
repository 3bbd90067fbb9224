"""Streams whose tokens lie anywhere: which dimensions they are, and recomputing some of them, against the whole graph.

The reference runs the captured graph as it is, and replaces each branch's output: by its cache, or by fresh values
where a token is chosen. Which entries these are is said by hand for each layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812
from tracing import COMPUTE, PARTIAL, REUSE, Runner, caches, distinct_indices

import duca_compile
from duca_compile import DuCa
from duca_compile.core.fx_utils import to_module
from duca_compile.core.variants import Action

B, T, H, W, C = 2, 8, 3, 4, 16  # batch, frames or tokens of a sequence, height, width, channels
HEADS = 2


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def waves(t: Tensor) -> Tensor:
    angles = t[..., None] * torch.exp(torch.linspace(0, -3, C // 2))
    return torch.cat([angles.sin(), angles.cos()], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over dimension 1 of (rows, tokens, channels)."""
    q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Self-attention and an MLP with a gated unit; ``rows`` and ``back`` are from the stream to (rows, tokens, C)."""

    def __init__(self, rows: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rows, self.back = rows, back
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(2 * C, C)

    def attention(self, x: Tensor) -> Tensor:
        return self.back(attend(*self.qkv(self.rows(x)).chunk(3, -1)), x)

    def mlp(self, x: Tensor) -> Tensor:
        one, other = self.up(x).chunk(2, -1)
        return self.down(F.silu(one) * other)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.out(self.attention(norm(x) + c))
        return x + (1 + c) * self.mlp(norm(x) * (1 + c))


class Model(nn.Module):
    """``condition`` brings the embedded timestep to the stream's dimensions."""

    def __init__(
        self,
        blocks: list[nn.Module],
        enter: Callable[[Tensor], Tensor] = lambda x: x,
        condition: Callable[[Tensor], Tensor] = lambda c: c,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.condition = enter, condition
        self.first, self.last, self.time = nn.Linear(4, C), nn.Linear(C, 4), nn.Linear(C, C)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.condition(self.time(waves(t)))
        x = self.enter(self.first(x))
        for block in self.blocks:
            x = block(x, c)
        return self.last(x)


class Form(NamedTuple):
    model: Callable[[], nn.Module]
    latent: tuple[int, ...]
    times: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]  # of the stream: 0 is the batch, others are of the tokens
    sizes: tuple[int, ...]
    mask: Callable[[Tensor], Tensor]  # from (rows, tokens) to the stream's dimensions
    kinds: tuple[str, ...] = ("self_attention", "mlp") * 2


def blocks(rows: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> list[nn.Module]:
    return [Block(rows, back), Block(rows, back)]


def sequence_first() -> nn.Module:
    made = blocks(lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1))
    return Model(made, lambda x: x.transpose(0, 1), lambda c: c[None])


class MultiheadBlock(Block):
    """As nn.Transformer has it: (tokens, batch, channels), and a cross-attention."""

    def __init__(self, weights: bool) -> None:
        super().__init__(lambda x: x, lambda y, x: y)
        self.weights = weights
        self.own, self.cross = nn.MultiheadAttention(C, HEADS), nn.MultiheadAttention(C, HEADS)
        self.text = nn.Parameter(torch.randn(5, B, C))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = norm(x) + c
        x = x + self.own(y, y, y, need_weights=self.weights)[0]
        x = x + self.cross(norm(x), self.text, self.text, need_weights=self.weights)[0]
        return x + self.mlp(norm(x) * (1 + c))


def multihead(weights: bool) -> Callable[[], nn.Module]:
    return lambda: Model(
        [MultiheadBlock(weights), MultiheadBlock(weights)], lambda x: x.transpose(0, 1), lambda c: c[None]
    )


class Head(nn.Module):
    """An MLP on rows, as in MAR's head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(norm(x) * (1 + c))))


def grid_rows(x: Tensor) -> Tensor:
    return x.flatten(1, -2)


def grid_back(y: Tensor, x: Tensor) -> Tensor:
    return y.reshape(x.shape)


class Window(Block):
    """Attention within windows, shifted, and an MLP that takes rows as (batch x height, width, channels)."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, lambda y, x: y)

    def attention(self, x: Tensor) -> Tensor:
        x = x.roll((1, 1), (1, 2))
        windows = x.unflatten(2, (2, W // 2)).unflatten(1, (1, H)).permute(0, 1, 3, 2, 4, 5)
        y = attend(*self.qkv(windows.flatten(0, 2).flatten(1, 2)).chunk(3, -1))
        y = y.view(B, 1, 2, H, W // 2, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return y.roll((-1, -1), (1, 2))

    def mlp(self, x: Tensor) -> Tensor:
        table = torch.linspace(0, 1, W)[None, :, None] + torch.linspace(0, 3, H)[:, None, None]
        return super().mlp(((x + table) * torch.linspace(1, 2, W)[:, None]).flatten(0, 1)).unflatten(0, (B, H))


def temporal_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1, 4).flatten(0, 2)


def temporal_back(y: Tensor, x: Tensor) -> Tensor:
    return y.unflatten(0, (B, H, W)).permute(0, 3, 1, 2, 4)


def video() -> list[nn.Module]:
    spatial = Block(lambda x: x.flatten(2, 3).flatten(0, 1), lambda y, x: y.reshape(x.shape))
    return [spatial, Block(temporal_rows, temporal_back)]


FORMS: dict[str, Form] = {
    "(tokens, batch, channels)": Form(
        sequence_first, (B, T, 4), (B,), ((1,), (0,), ()), (B, T), lambda m: m.T),
    "(tokens, batch, channels), a batch of one": Form(
        sequence_first, (1, T, 4), (1,), ((1,), (0,), ()), (1, T), lambda m: m.T),
    "(tokens, batch, channels), as many of both": Form(
        sequence_first, (T, T, 4), (T,), ((1,), (0,), ()), (T, T), lambda m: m.T),
    "nn.MultiheadAttention": Form(
        multihead(False), (B, T, 4), (B,), ((1,), (0,), ()), (B, T), lambda m: m.T,
        ("self_attention", "cross_attention", "mlp") * 2),
    "nn.MultiheadAttention with weights": Form(
        multihead(True), (B, T, 4), (B,), ((1,), (0,), ()), (B, T), lambda m: m.T,
        ("self_attention", "cross_attention", "mlp") * 2),
    "(rows, channels)": Form(
        lambda: Model([Head(), Head()]), (T, 4), (T,), ((1,), ()), (1, T), lambda m: m[0], ("mlp", "mlp")),
    "(tokens, channels)": Form(
        lambda: Model(blocks(lambda x: x[None], lambda y, x: y[0])), (T, 4), (1,), ((1,), ()), (1, T), lambda m: m[0]),
    "(batch x tokens, channels)": Form(
        lambda: Model(blocks(lambda x: x.unflatten(0, (B, T)), lambda y, x: y.flatten(0, 1)),
                      lambda x: x.flatten(0, 1), lambda c: c.repeat_interleave(T, 0)),
        (B, T, 4), (B,), ((0, 1), ()), (B, T), lambda m: m.flatten()),
    "(batch, height, width, channels)": Form(
        lambda: Model(blocks(grid_rows, grid_back), condition=lambda c: c[:, None, None]),
        (B, H, W, 4), (B,), ((0,), (1,), (2,), ()), (B, H, W), lambda m: m.unflatten(1, (H, W))),
    "(height, width, channels)": Form(
        lambda: Model(blocks(lambda x: x.flatten(0, 1)[None], grid_back)),
        (H, W, 4), (1,), ((1,), (2,), ()), (1, H, W), lambda m: m[0].unflatten(0, (H, W))),
    "windows": Form(
        lambda: Model([Window(), Window()], condition=lambda c: c[:, None, None]),
        (B, H, W, 4), (B,), ((0,), (1,), (2,), ()), (B, H, W), lambda m: m.unflatten(1, (H, W))),
    "(batch, frames, height, width, channels)": Form(
        lambda: Model(video(), condition=lambda c: c[:, None, None, None]),
        (B, T, H, W, 4), (B,), ((0,), (1,), (2,), (3,), ()), (B, T, H, W), lambda m: m.unflatten(1, (T, H, W))),
    "a timestep for each frame": Form(
        lambda: Model(video(), condition=lambda c: c[:, :, None, None]),
        (B, T, H, W, 4), (B, T), ((0,), (1,), (2,), (3,), ()), (B, T, H, W), lambda m: m.unflatten(1, (T, H, W))),
    "(batch, frames, tokens, channels), one frame": Form(
        lambda: Model(blocks(grid_rows, grid_back), condition=lambda c: c[:, None, None]),
        (B, 1, T, 4), (B,), ((0,), (1,), (2,), ()), (B, 1, T), lambda m: m.unflatten(1, (1, T))),
}  # fmt: skip


class Reference(fx.Interpreter):
    """The captured graph with the output of each branch replaced."""

    def __init__(self, run: Runner, replaced: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(to_module(run.captured, run.captured.graph))
        self._replaced = replaced

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self._replaced.get(n.name, lambda value: value)(value)


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest) -> tuple[Form, Runner]:
    form = FORMS[request.param]
    return form, Runner(form.model().eval(), **call(form, 0))


def call(form: Form, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(form.latent, generator=generator),
        "t": torch.rand(form.times, generator=generator) * 9,
    }


def test_rows_and_tokens_are_found(case: tuple[Form, Runner]) -> None:
    form, run = case
    assert {(b.layout.dims, b.layout.sizes) for b in run.facts.branches} == {(form.dims, form.sizes)}
    assert [b.kind for b in run.facts.branches] == [*form.kinds]
    assert [b.pointwise for b in run.facts.branches] == [kind != "self_attention" for kind in form.kinds]


@pytest.mark.parametrize("shared", [False, True])
def test_chosen_tokens_are_fresh_and_all_others_cached(case: tuple[Form, Runner], shared: bool) -> None:
    form, run = case
    cached = caches(run.run(run.variant(COMPUTE), call(form, 0)))
    branches = run.facts.branches
    actions = [PARTIAL if b.pointwise else REUSE for b in branches]
    first = actions.index(PARTIAL)
    chosen_with = tuple(first if action is PARTIAL else place for place, action in enumerate(actions))
    variant = run.variant(*actions, chosen_with=chosen_with if shared else ())
    rows, tokens = branches[0].rows, branches[0].tokens
    index = {
        i: distinct_indices(rows, tokens, 3, seed=first if shared else i) for i, a in enumerate(actions) if a is PARTIAL
    }
    given = {f"tokens_{port.of}": index[int(port.of)] for port in variant.dynamic_inputs}
    assert len(given) == (1 if shared else actions.count(PARTIAL))

    def replaced(place: int, action: Action) -> Callable[[Tensor], Tensor]:
        old = cached[f"cache_branch_{place}"].clone()
        if action is REUSE:
            return lambda value: old
        mask = torch.zeros(rows, tokens, dtype=torch.bool)
        mask[torch.arange(rows)[:, None], index[place]] = True
        return lambda value: torch.where(form.mask(mask)[..., None], value, old)

    reference = Reference(run, {b.core: replaced(b.index, a) for b, a in zip(branches, actions, strict=True)})
    (expected,) = reference.run(*call(form, 1).values())
    old = {name: value.clone() for name, value in cached.items()}
    found = run.run(variant, call(form, 1), **cached, **given)
    torch.testing.assert_close(found["output_0"], expected, rtol=0, atol=2e-5)
    assert not torch.allclose(expected, run.model(**call(form, 1)), rtol=0, atol=1e-3), "the caches matter"
    for place in index:
        changed = (found[f"branch_{place}"] != old[f"cache_branch_{place}"]).any(-1)
        mask = torch.zeros(rows, tokens, dtype=torch.bool)
        mask[torch.arange(rows)[:, None], index[place]] = True
        assert torch.equal(changed, form.mask(mask))


STEPS = 4
POLICY = DuCa(interval=3, fresh_ratio=0.5)  # full, partial, skip, full


def steps(form: Form) -> list[dict[str, Tensor]]:
    """The calls of a loop: the timestep falls, and the latent moves."""
    first = call(form, 0)
    moved = (first["x"] + 0.1 * call(form, step + 1)["x"] for step in range(STEPS))
    return [{"x": x, "t": torch.full(form.times, 9.0 - step)} for step, x in enumerate(moved)]


@torch.no_grad()
def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


IN_CI = {"(tokens, batch, channels)", "(rows, channels)", "(batch, height, width, channels)"}
RUN = [pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.exhaustive) for name in FORMS]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the artifact takes the batch size")
@pytest.mark.parametrize("name", RUN)
def test_an_artifact_gives_the_values_of_the_eager_steps(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    eager = duca_compile.optimize(form.model().eval(), POLICY, "eager", STEPS)
    expected = [eager(**each) for each in steps(form)]
    assert "".join(done.kind.letter for done in eager.history) == "FPSF"
    duca_compile.save(eager, tmp_path / "artifact", steps(form)[0])
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    check_close([artifact(**each) for each in steps(form)], expected)
    assert [done.kind for done in artifact.history] == [done.kind for done in eager.history]


@torch.no_grad()
@pytest.mark.parametrize("name", RUN)
def test_compiled_steps_give_the_values_of_the_eager_ones(name: str) -> None:
    form = FORMS[name]
    eager, compiled = (
        duca_compile.optimize(form.model().eval(), POLICY, each, STEPS) for each in ("eager", "inductor")
    )
    check_close([compiled(**each) for each in steps(form)], [eager(**each) for each in steps(form)])
