"""Operators of other libraries: what their values show, what partial steps make of them, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_layouts import HEADS, Reference, attend, norm, waves
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import flop_registry, register_flop_formula
from tracing import COMPUTE, PARTIAL, REUSE, Runner, caches, distinct_indices

import duca_compile

B, N, S, C = 2, 8, 5, 16  # batch, tokens, tokens of the text, channels
D = C // HEADS
T = Tensor

operator = torch.library.custom_op


def sdpa(q: T, k: T, v: T) -> T:
    """Attention of (batch, tokens, heads, channels)."""
    q, k, v = (p.transpose(1, 2) for p in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@operator("duca_tests::attention", mutates_args=())
def attention(q: T, k: T, v: T) -> T:
    return sdpa(q, k, v)


@operator("duca_tests::heads_first", mutates_args=())
def heads_first(q: T, k: T, v: T, mask: T | None = None) -> T:
    return F.scaled_dot_product_attention(q, k, v, mask)


@operator("duca_tests::with_sums", mutates_args=())
def with_sums(q: T, k: T, v: T) -> tuple[T, T]:
    logits = q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2)
    return sdpa(q, k, v), logits.logsumexp(-1)


@operator("duca_tests::into", mutates_args=("out",))
def into(out: T, q: T, k: T, v: T) -> None:
    out.copy_(sdpa(q, k, v))


@operator("duca_tests::packed", mutates_args=())
def packed(qkv: T) -> T:
    return sdpa(*qkv.unbind(2))


@operator("duca_tests::by_length", mutates_args=())
def by_length(q: T, k: T, v: T, ends_q: T, ends_k: T) -> T:
    """Attention within sequences that follow each other in (rows, heads, channels)."""
    out, a, b = torch.empty_like(q), 0, 0
    for end_q, end_k in zip(ends_q.tolist(), ends_k.tolist(), strict=True):
        out[a:end_q] = sdpa(q[None, a:end_q], k[None, b:end_k], v[None, b:end_k])[0]
        a, b = end_q, end_k
    return out


@operator("duca_tests::windowed", mutates_args=())
def windowed(q: T, k: T, v: T) -> T:
    parts = [p.unflatten(1, (2, -1)).flatten(0, 1) for p in (q, k, v)]
    return sdpa(*parts).unflatten(0, (-1, 2)).flatten(1, 2)


@operator("duca_tests::scan", mutates_args=())
def scan(x: T, decay: T) -> T:
    state, found = torch.zeros_like(x[:, 0]), []
    for step in range(x.shape[1]):
        state = state * decay[:, step].sigmoid() + x[:, step]
        found.append(state)
    return torch.stack(found, 1)


@operator("duca_tests::blur", mutates_args=())
def blur(x: T) -> T:
    return (x + x.roll(1, 1) + x.roll(-1, 1)) / 3


@operator("duca_tests::gated", mutates_args=())
def gated(x: T, gate: T) -> T:
    return F.silu(gate) * x


@operator("duca_tests::turned", mutates_args=())
def turned(x: T, table: T) -> T:
    return x * table.cos() + x.flip(-1) * table.sin()


@operator("duca_tests::numbered", mutates_args=())
def numbered(x: T) -> T:
    """Pointwise, but by where a token is."""
    return x * torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]


@operator("duca_tests::perceptron", mutates_args=())
def perceptron(x: T, up: T, down: T) -> T:
    return F.linear(F.gelu(F.linear(x, up)), down)


for each in (attention, heads_first, by_length, windowed):
    each.register_fake(lambda q, *rest: torch.empty_like(q))
for one in (scan, blur, gated, turned, numbered, perceptron):
    one.register_fake(lambda x, *rest: torch.empty_like(x))
with_sums.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])))
into.register_fake(lambda out, q, k, v: None)
packed.register_fake(lambda qkv: qkv.new_empty(qkv.shape[0], qkv.shape[1], *qkv.shape[3:]))


class Parts(nn.Module):
    """``function`` in a residual branch of its own, after one with a plain attention and before one with an MLP."""

    def __init__(self, function: Callable[[Parts, T, T], T]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last, self.time = nn.Linear(4, C), nn.Linear(C, 4), nn.Linear(C, C)
        self.qkv, self.kv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.table = nn.Parameter(torch.randn(B, N, C))

    def forward(self, x: T, t: T, text: T) -> T:
        x = self.first(x) + self.time(waves(t))[:, None]
        x = x + attend(*self.qkv(norm(x)).chunk(3, -1))
        x = x + self.out(self.function(self, norm(x), text))
        return self.last(x + self.down(F.gelu(self.up(norm(x)))))

    def own(self, x: T) -> list[T]:
        """Queries, keys and values of the stream."""
        return [p.unflatten(-1, (HEADS, -1)) for p in self.qkv(x).chunk(3, -1)]

    def cross(self, x: T, text: T) -> list[T]:
        """Queries of the stream, keys and values of the text."""
        return [p.unflatten(-1, (HEADS, -1)) for p in (self.up(x)[..., :C], *self.kv(text).chunk(2, -1))]


def into_new(q: T, k: T, v: T) -> T:
    out = torch.empty_like(q)
    into(out, q, k, v)
    return out


def swapped(q: T, k: T, v: T, mask: T | None = None) -> T:
    return heads_first(*(p.transpose(1, 2) for p in (q, k, v)), mask).transpose(1, 2)


def flat(q: T, k: T, v: T) -> T:
    ends = [torch.arange(p.shape[1], (B + 1) * p.shape[1], p.shape[1])[:B] for p in (q, k)]
    return by_length(*(p.flatten(0, 1) for p in (q, k, v)), *ends).unflatten(0, (B, -1))


class Form(NamedTuple):
    function: Callable[[Parts, T, T], T]
    kind: str
    pointwise: bool


FORMS: dict[str, Form] = {
    "self-attention": Form(lambda m, x, y: attention(*m.own(x)).flatten(2), "self_attention", False),
    "cross-attention": Form(lambda m, x, y: attention(*m.cross(x, y)).flatten(2), "cross_attention", True),
    "self-attention, heads first": Form(lambda m, x, y: swapped(*m.own(x)).flatten(2), "self_attention", False),
    "cross-attention, heads first": Form(lambda m, x, y: swapped(*m.cross(x, y)).flatten(2), "cross_attention", True),
    "a mask by query": Form(
        lambda m, x, y: swapped(*m.cross(x, y), m.table[:, None, :, :S] > 0).flatten(2), "cross_attention", True),
    "self-attention with sums": Form(lambda m, x, y: with_sums(*m.own(x))[0].flatten(2), "self_attention", False),
    "cross-attention with sums": Form(
        lambda m, x, y: with_sums(*m.cross(x, y))[0].flatten(2), "cross_attention", True),
    "both results of a cross-attention": Form(
        lambda m, x, y: (lambda o, s: (o * s.transpose(1, 2)[..., None]).flatten(2))(*with_sums(*m.cross(x, y))),
        "cross_attention", True),
    "self-attention into memory": Form(lambda m, x, y: into_new(*m.own(x)).flatten(2), "self_attention", False),
    "cross-attention into memory": Form(lambda m, x, y: into_new(*m.cross(x, y)).flatten(2), "cross_attention", True),
    "packed": Form(lambda m, x, y: packed(torch.stack(m.own(x), 2)).flatten(2), "self_attention", False),
    "by length": Form(lambda m, x, y: flat(*m.own(x)).flatten(2), "self_attention", False),
    "cross-attention by length": Form(lambda m, x, y: flat(*m.cross(x, y)).flatten(2), "cross_attention", False),
    "windows": Form(lambda m, x, y: windowed(*m.own(x)).flatten(2), "self_attention", False),
    "scan": Form(lambda m, x, y: scan(x, m.out(x)), "mixing", False),
    "convolution": Form(lambda m, x, y: blur(x), "mixing", False),
    "pointwise": Form(lambda m, x, y: gated(x, m.out(x)), "mlp", True),
    "a table by token": Form(lambda m, x, y: turned(x, m.table), "mlp", True),
}  # fmt: skip


def call(seed: int) -> dict[str, T]:
    generator = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(shape, generator=generator) for shape in ((B, N, 4), (B, S, C)))
    return {"x": x, "t": torch.rand(B, generator=generator) * 9, "text": call(0)["text"] if seed else text}


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest) -> tuple[Form, Runner]:
    form = FORMS[request.param]
    return form, Runner(Parts(form.function).eval(), **call(0))


def test_the_values_tell_what_it_does(case: tuple[Form, Runner]) -> None:
    form, run = case
    assert [b.kind for b in run.facts.branches] == ["self_attention", form.kind, "mlp"]
    assert [b.pointwise for b in run.facts.branches] == [False, form.pointwise, True]
    assert bool(run.facts.notes) == (form.kind == "mixing")
    assert all("duca_tests::" in note and "test_operators.py" in note for note in run.facts.notes)


def test_full_is_the_model_and_partial_is_fresh_where_chosen(case: tuple[Form, Runner]) -> None:
    _, run = case
    full = run.run(run.variant(COMPUTE), call(0))
    assert torch.equal(full["output_0"], run.model(**call(0)))
    branches, cached = run.facts.branches, caches(full)
    actions = [PARTIAL if b.pointwise else COMPUTE if b.kind == "mixing" else REUSE for b in branches]
    index = {i: distinct_indices(B, N, 3, seed=i) for i, action in enumerate(actions) if action is PARTIAL}

    def replaced(place: int) -> Callable[[T], T]:
        old = cached[f"cache_branch_{place}"].clone()
        mask = torch.zeros(B, N, 1, dtype=torch.bool)
        if place in index:
            mask[torch.arange(B)[:, None], index[place]] = True
        return lambda value: torch.where(mask, value, old)

    reference = Reference(run, {b.core: replaced(i) for i, b in enumerate(branches) if actions[i] is not COMPUTE})
    (expected,) = reference.run(*call(1).values())
    given = {f"tokens_{i}": tokens for i, tokens in index.items()}
    found = run.run(run.variant(*actions), call(1), **cached, **given)
    torch.testing.assert_close(found["output_0"], expected, rtol=0, atol=2e-5)


def explained(function: Callable[[Parts, T, T], T]) -> duca_compile.Explanation:
    return duca_compile.explain(Parts(function).eval(), **call(0))


def test_an_operator_that_counts_tokens_is_no_pointwise_one() -> None:
    found = explained(lambda m, x, y: numbered(x))
    assert [b.kind for b in found.branches] == ["self_attention", "mixing", "mlp"]
    assert "gave different values" in found.not_understood[0]


@pytest.fixture
def formula() -> Iterator[Callable[[Callable[..., int]], None]]:
    packet: Any = torch.ops.duca_tests.attention
    yield lambda function: register_flop_formula(packet)(function) and None
    flop_registry.pop(packet, None)


def attends(m: Parts, x: T, y: T) -> T:
    result: T = attention(*m.own(x)).flatten(2)
    return result


def test_the_formula_of_its_author_counts_it(formula: Callable[[Callable[..., int]], None]) -> None:
    unknown = explained(attends)
    (note,) = unknown.facts.uncounted
    assert "duca_tests::attention" in note
    assert "register_flop_formula(torch.ops.duca_tests.attention)" in note
    assert "1 calls" in note
    assert "test_operators.py" in note
    assert note.split(":")[0] in " ".join(str(unknown).split())
    formula(lambda q, k, v, out_shape=None: 4 * q[0] * q[1] * k[1] * q[2] * q[3])
    known = explained(attends)
    assert not known.facts.uncounted
    assert known.flops - unknown.flops == 4 * B * N * N * C
    assert known.branches[1].flops - unknown.branches[1].flops == 4 * B * N * N * C


def test_a_formula_that_fails_is_told(formula: Callable[[Callable[..., int]], None]) -> None:
    formula(lambda q, out_shape=None: 1)
    (note,) = explained(attends).facts.uncounted
    assert "its formula fails" in note


def test_an_operator_of_unknown_cost_may_be_all_that_a_branch_does() -> None:
    class Fused(Parts):
        def forward(self, x: T, t: T, text: T) -> T:
            x = self.first(x) + self.time(waves(t))[:, None]
            for _ in range(2):
                x = x + perceptron(norm(x), self.up.weight, self.down.weight)
            return self.last(x)

    found = duca_compile.explain(Fused(lambda m, x, y: x).eval(), **call(0))
    assert [b.kind for b in found.branches] == ["mlp", "mlp"]
    assert "duca_tests::perceptron" in found.facts.uncounted[0]
