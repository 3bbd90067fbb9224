"""FLOPs against formulas written by hand: two per multiply-add, elementwise work none."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from models import BATCH, TEXT, TOKENS, WIDTH
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tracing import COMPUTE, PARTIAL, REUSE, Runner, module, raw

from duca_compile.analysis.cost import node_flops

B, N, C, D, H, M = 2, 6, 8, 5, 2, 7  # batch, tokens, width, another width, heads, keys

CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...], int]] = {
    "linear": (lambda x, w: F.linear(x, w, w[:, 0]), (B, N, C), (D, C), 2 * B * N * C * D),
    "matmul": (torch.matmul, (N, C), (C, D), 2 * N * C * D),
    "batched matmul": (torch.matmul, (B, N, C), (B, C, D), 2 * B * N * C * D),
    "bmm": (torch.bmm, (B, N, C), (B, C, D), 2 * B * N * C * D),
    "addmm": (lambda x, w: torch.addmm(w[0], x, w), (N, C), (C, D), 2 * N * C * D),
    "einsum": (lambda x, w: torch.einsum("bnc,cd->bnd", x, w), (B, N, C), (C, D), 2 * B * N * C * D),
    "attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k), (B, H, N, C), (B, H, M, C),
                  4 * B * H * N * M * C),
    "masked attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=q[..., :1].expand(B, H, N, M)),
                         (B, H, N, C), (B, H, M, C), 4 * B * H * N * M * C),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1), (B, C, 4, 4), (D, C, 3, 3), 2 * B * D * C * 9 * 16),
    "depthwise conv2d": (lambda x, w: F.conv2d(x, w, padding=1, groups=C), (B, C, 4, 4), (C, 1, 3, 3),
                         2 * B * C * 9 * 16),
    "strided conv2d": (lambda x, w: F.conv2d(x, w, stride=2), (B, C, 4, 4), (D, C, 2, 2), 2 * B * D * C * 4 * 4),
    "elementwise": (lambda x, w: F.gelu(x) * w + F.layer_norm(x, (C,)).softmax(-1), (B, N, C), (C,), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_flops_of_one_operator(name: str) -> None:
    function, first, second, expected = CASES[name]
    model = module(lambda self, x, w: function(x, w))
    flops, _ = node_flops(raw(model, x=torch.randn(first), w=torch.randn(second)).graph)
    assert sum(flops.values()) == expected


@pytest.fixture(scope="module")
def run() -> Runner:
    return Runner(models.build(models.CrossBlock, depth=2), **models.example())


def test_flops_of_branches_and_variants(run: Runner) -> None:
    keys = 7
    linear = 2 * BATCH * TOKENS * WIDTH * WIDTH
    attention = 4 * linear + 4 * BATCH * TOKENS * TOKENS * WIDTH
    cross = 2 * linear + 4 * BATCH * TOKENS * keys * WIDTH  # keys and values of the text are no part of the branch
    mlp = 4 * linear
    assert [b.flops for b in run.facts.branches] == [attention, cross, mlp] * 2

    embedding = 2 * BATCH * (TOKENS * models.CHANNELS * WIDTH + WIDTH * WIDTH)  # latent, timestep
    modulation = 2 * BATCH * WIDTH * 6 * WIDTH
    head = 2 * BATCH * (WIDTH * WIDTH + TOKENS * WIDTH * models.CHANNELS)
    full = embedding + head + 2 * (modulation + attention + cross + mlp)
    assert run.variant(COMPUTE).flops({}) == full
    assert run.variant(REUSE).flops({}) == embedding + head + 2 * modulation
    skip = embedding - 2 * BATCH * TOKENS * models.CHANNELS * WIDTH + head  # nor the latent is embedded
    assert run.variant(REUSE, skip=True).flops({}) == skip
    text = 2 * BATCH * keys * (TEXT * WIDTH + 4 * WIDTH * WIDTH)
    assert sum(run.facts.flops.values()) == full + text, "what the text costs is hoisted out of the step"


def test_flops_of_a_partial_step_are_linear_in_its_tokens(run: Runner) -> None:
    spec = [REUSE, PARTIAL, PARTIAL, REUSE, REUSE, PARTIAL]
    variant = run.variant(*spec)
    base = run.variant(REUSE).flops({})
    assert variant.flops({1: 0, 2: 0, 5: 0}) == base
    cross, mlp = run.facts.branches[1].flops, run.facts.branches[2].flops
    for counts in ({1: TOKENS, 2: TOKENS, 5: TOKENS}, {1: 1, 2: 5, 5: 3}, {1: 4, 2: 0, 5: 8}):
        expected = base + cross * counts[1] / TOKENS + mlp * (counts[2] + counts[5]) / TOKENS
        assert variant.flops(counts) == pytest.approx(expected, rel=1e-12)


def test_equal_shapes_are_counted_once_and_charged_to_each_node() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)

    flops, _ = node_flops(raw(module(forward, a=nn.Linear(C, D), b=nn.Linear(C, D)), x=torch.randn(N, C)).graph)
    assert [f for f in flops.values() if f] == [2 * N * C * D] * 2
