"""One rule per operator: what is pointwise along the tokens is recomputed token by token, to the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tracing import COMPUTE, PARTIAL, Runner, distinct_indices, module

B, N, C = 3, 6, 8  # a batch of 3 tells qkv.unbind() and the batch apart only by their place
INF = float("inf")
ONES = torch.ones(C, C)

# Each is a function of the stream x (B, N, C) and a value off the stream, `other`, to (B, N, C).
POINTWISE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "elementwise": (lambda x, o: (x.sin() * 2 - x).tanh().clamp(-0.5, 0.5), (1,)),
    "view there and back": (lambda x, o: x.view(B, N, 2, 4).square().view(B, N, C), (1,)),
    "reshape with a leading 1": (lambda x, o: x.reshape(B, 1, N, C).relu().reshape(B, N, C), (1,)),
    "transpose there and back": (lambda x, o: x.transpose(1, 2).exp().transpose(-1, -2), (1,)),
    "heads and back": (lambda x, o: x.view(B, N, 2, 4).transpose(1, 2).neg().transpose(1, 2).reshape(B, N, C), (1,)),
    "permute there and back": (
        lambda x, o: x.view(B, N, 2, 4).permute(0, 2, 3, 1).abs().permute(0, 3, 1, 2).flatten(2), (1,)),
    "unflatten": (lambda x, o: x.unflatten(-1, (4, 2)).abs().flatten(-2), (1,)),
    "unsqueeze and squeeze": (lambda x, o: x.unsqueeze(1).sigmoid().squeeze(1), (1,)),
    "chunk along channels": (lambda x, o: (lambda a, b: F.linear(F.silu(a) * b, ONES[:, : C // 2]))(*x.chunk(2, -1)),
                             (1,)),
    "split along channels": (lambda x, o: (lambda a, b: F.linear(a * b[..., :2], ONES[:, :2]))(*x.split([2, 6], -1)),
                             (1,)),
    "select a channel": (lambda x, o: x * x.select(-1, 3).unsqueeze(-1), (1,)),
    "unbind heads": (lambda x, o: (lambda a, b: F.linear(a - b, ONES[:, :4]))(*x.view(B, N, 2, 4).unbind(2)), (1,)),
    "slice channels": (lambda x, o: x * x[..., 2:3], (1,)),
    "a slice without channels": (lambda x, o: torch.cat([x * 2, x[..., C:].neg()], -1), (1,)),
    "a slice without tokens": (lambda x, o: torch.cat([x[:, :N] * 2, x[:, N:] + 1], 1), (1,)),
    "layer norm": (lambda x, o: F.layer_norm(x, (C,)), (1,)),
    "rms norm": (lambda x, o: F.rms_norm(x, (C,)), (1,)),
    "softmax over channels": (lambda x, o: x.softmax(-1), (1,)),
    "mean over channels": (lambda x, o: x - x.mean(-1, keepdim=True), (1,)),
    "mean without keepdim": (lambda x, o: x - x.mean(2).unsqueeze(2), (1,)),
    "variance over channels": (lambda x, o: x / (1 + x.var(-1, unbiased=False, keepdim=True)), (1,)),
    "norm over channels": (lambda x, o: x / (1 + torch.linalg.vector_norm(x, 1, -1, keepdim=True)), (1,)),
    "a matrix product": (lambda x, o: x @ o, (C, C)),
    "a matrix product per row": (lambda x, o: x @ o, (B, C, C)),
    "one value per token": (lambda x, o: x * o, (N, 1)),
    "one value per row and token": (lambda x, o: torch.where(o > 0, x, o), (B, N, 1)),
    "one value per row": (lambda x, o: x + o, (B, 1, C)),
    "one value per channel": (lambda x, o: torch.lerp(x, o, 0.25), (C,)),
    "one per token, at two ranks": (lambda x, o: ((x * o).view(B, N, 2, 4).transpose(1, 2) * o)
                                    .transpose(1, 2).reshape(B, N, C), (N, 1)),
    "one per token, by a view of heads": (lambda x, o: (x.view(B, N, 2, 4) + o).view(B, N, C), (N, 1, 1)),
    "queries of an attention": (lambda x, o: F.scaled_dot_product_attention(x[:, None], o, o)[:, 0], (B, 1, 5, C)),
    "flattened with the batch": (lambda x, o: x.flatten(0, 1).relu().view(B, N, C), (1,)),
    "a product, flattened": (lambda x, o: (torch.mm(x.view(-1, C), o) * o[0]).view(B, N, C), (C, C)),
    "heads, flattened": (lambda x, o: x.flatten(0, 1).view(B * N, 2, 4).softmax(-1).flatten(1).view(B, N, C), (1,)),
    "type_as of the stream": (lambda x, o: (x.double() * 2).type_as(x), (1,)),
    "type_as": (lambda x, o: x.double().type_as(o), (2, N, C)),
    "between others, and cut out again": (lambda x, o: torch.cat([o, x, o[:, :2]], 1).tanh()[:, 4 : 4 + N], (B, 4, C)),
    "before others, and split off": (lambda x, o: torch.cat([x, o], 1).exp().split([N, 4], 1)[0], (B, 4, C)),
    "cut twice": (lambda x, o: torch.cat([o, x], 1)[:, 1:].exp()[:, 3 : 3 + N], (B, 4, C)),
    "one value for each of more tokens": (
        lambda x, o: (torch.cat([o[:, :4], x], 1) * o)[:, -N:].exp(), (B, 4 + N, C)),
    "concatenated channels": (lambda x, o: F.linear(torch.cat([x, o, -x], -1), torch.ones(C, 3 * C)), (B, N, C)),
    "rotary embedding by halves": (
        lambda x, o: x * o.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * o.sin(), (N, C)),
    "rotary embedding by pairs": (lambda x, o: (lambda p: torch.stack([-p[..., 1], p[..., 0]], -1).flatten(2) * o)(
        x.unflatten(-1, (4, 2))), (N, C)),
    "rotary embedding by complex numbers": (
        lambda x, o: torch.view_as_real(
            torch.view_as_complex(x.view(B, N, 4, 2)) * torch.view_as_complex(o)).flatten(2), (N, 4, 2)),
    "stacked with others": (lambda x, o: torch.stack([x, o], 2).sum(2), (B, N, C)),
    "expanded to heads": (lambda x, o: x[:, :, None].expand(-1, -1, 3, -1).mean(2), (1,)),
    "channels reversed": (lambda x, o: x.flip(-1), (1,)),
    "one value per token, flattened": (lambda x, o: (x.flatten(0, 1) * o).view(B, N, C), (B * N, 1)),
    "batch moved": (lambda x, o: (x.transpose(0, 1) * o).exp().transpose(0, 1), (N, 1, 1)),
    "heads in front": (
        lambda x, o: (x.view(B, N, 2, 4).permute(2, 0, 1, 3) * o).permute(1, 2, 0, 3).flatten(2), (N, 1)),
    "heads merged with the batch": (
        lambda x, o: torch.bmm(x.view(B, N, 2, 4).transpose(1, 2).flatten(0, 1), o)
        .view(B, 2, N, 4).transpose(1, 2).flatten(2), (2 * B, 4, 4)),
    "one value per row, added to a product": (lambda x, o: torch.baddbmm(o[:, :1], x, o), (B, C, C)),
}  # fmt: skip

MIXING: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], str]] = {
    "self-attention": (lambda x, o: F.scaled_dot_product_attention(x, x, x), (1,), "keys and values"),
    "attention on other keys": (lambda x, o: F.scaled_dot_product_attention(o, x, x), (B, N, C), "keys and values"),
    "causal cross-attention": (lambda x, o: F.scaled_dot_product_attention(x, o, o, is_causal=True), (B, N, C), "mask"),
    "mask by query": (lambda x, o: F.scaled_dot_product_attention(x, o, o, attn_mask=o @ o.transpose(1, 2)), (B, N, C),
                      "mask"),
    "softmax over tokens": (lambda x, o: x.softmax(1), (1,), "along the tokens"),
    "mean over tokens": (lambda x, o: x - x.mean(1, keepdim=True), (1,), "over the tokens"),
    "mean over everything": (lambda x, o: x - x.mean(), (1,), "every dimension"),
    "variance over tokens": (lambda x, o: x / x.var(1, unbiased=True, keepdim=True), (1,), "over the tokens"),
    "2-norm over tokens": (lambda x, o: x / torch.linalg.vector_norm(x, 2, 1, keepdim=True), (1,), "over the tokens"),
    "max norm over tokens": (lambda x, o: x / torch.linalg.vector_norm(x, INF, 1, keepdim=True), (1,), "over the"),
    "layer norm over tokens": (lambda x, o: F.layer_norm(x, (N, C)), (1,), "normalizes over the tokens"),
    "chunk of tokens": (lambda x, o: torch.cat(x.chunk(2, 1), 1), (1,), "some of the tokens"),
    "slice of tokens": (lambda x, o: x * x[:, :1], (1,), "some of the tokens"),
    "one token": (lambda x, o: x * x.select(1, 0).unsqueeze(1), (1,), "along the tokens"),
    "reshape that merges tokens": (lambda x, o: x.reshape(B, N // 2, 2 * C).relu().reshape(B, N, C), (1,), "merges"),
    "reshape into a grid": (lambda x, o: x.reshape(B, 2, N // 2, C).relu().reshape(B, N, C), (1,), "merges"),
    "flattened, and told apart otherwise": (lambda x, o: x.flatten(0, 1).view(N, B, C).view(B, N, C), (1,), "merges"),
    "convolution": (lambda x, o: F.conv1d(x.transpose(1, 2), o, padding=1).transpose(1, 2), (C, C, 3), "no rule"),
    "product over tokens": (lambda x, o: (x.transpose(1, 2) @ o).transpose(1, 2), (N, N), "sums over the tokens"),
    "product of the stream with itself": (lambda x, o: x @ (x.transpose(1, 2) @ x), (1,), "depends on the stream"),
    "a weight per token": (lambda x, o: (x.unsqueeze(2) @ o).squeeze(2), (B, N, C, C), "differ by token"),
    "tokens against tokens": (lambda x, o: x * x.view(B, N, 2, 4).transpose(1, 2).sum(-1).view(B, 2 * N)[:, :1, None],
                              (1,), "parts of several tokens"),
    "joined with themselves": (lambda x, o: torch.cat([x, x * 2], 1)[:, :N], (1,), "depend on them"),
    "a cut beside the tokens": (lambda x, o: torch.cat([o, x], 1)[:, :N], (B, 4, C), "some of the tokens"),
    "joined and not cut": (lambda x, o: x * torch.cat([o, x], 1).mean(1, keepdim=True), (B, 4, C), "over the tokens"),
    "tokens reversed": (lambda x, o: x.flip(1), (1,), "reorders"),
    "sort": (lambda x, o: x.sort(1).values, (1,), "no rule"),
    "roll": (lambda x, o: x.roll(1, 1), (1,), "no rule"),
    "batch as channels": (lambda x, o: (x.transpose(0, 2) @ o).transpose(0, 2), (B, B), "sums over the tokens"),
    "rows against rows": (lambda x, o: x * x[:1], (1,), "some of the rows"),
    "one value per token, for heads merged with the batch": (
        lambda x, o: (x.view(B, N, 2, 4).transpose(1, 2).flatten(0, 1) * o).view(B, 2, N, 4).transpose(1, 2).flatten(2),
        (1, N, 1), "differ by token"),
}  # fmt: skip


def runner(body: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], batch: int = B) -> Runner:
    """A model whose only residual branch is a linear after ``body``; ``other`` is a parameter."""
    torch.manual_seed(1)

    def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(x)
        time = timestep.sin()[:, None, None]
        return x + time * self.last(body(x, self.other))

    first, last = nn.Linear(C, C), nn.Linear(C, C)
    model = module(forward, first=first, last=last, other=nn.Parameter(torch.randn(shape)))
    return Runner(model, x=torch.randn(batch, N, C), timestep=torch.full((batch,), 0.5))


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_bodies_are_recomputed_to_the_same_numbers(name: str) -> None:
    run = runner(*POINTWISE[name])
    (branch,) = run.facts.branches
    assert branch.mixing_reason is None
    call = {"x": torch.randn(B, N, C), "timestep": torch.full((B,), 0.5)}
    expected = run.run(run.variant(COMPUTE), call)["branch_0"]
    index, cache = distinct_indices(B, N, 2), torch.randn(B, N, C)
    updated = run.run(run.variant(PARTIAL), call, tokens_0=index, cache_branch_0=cache)["branch_0"]
    rows = torch.arange(B)[:, None]
    torch.testing.assert_close(updated[rows, index], expected[rows, index], rtol=0, atol=2e-6)
    kept = torch.ones(B, N, dtype=torch.bool)
    kept[rows, index] = False
    assert torch.equal(updated[kept], cache[kept])


@pytest.mark.parametrize("name", MIXING)
def test_bodies_that_mix_tokens_say_why(name: str) -> None:
    body, shape, why = MIXING[name]
    (branch,) = runner(body, shape).facts.branches
    assert branch.token_places is None
    assert why in (branch.mixing_reason or "")
    assert "test_tokens.py:" in (branch.mixing_reason or ""), "the reason names the source line"


def test_a_stream_that_is_an_image_has_no_token_axis() -> None:
    def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        return x + timestep.sin()[:, None, None, None] * self.conv(x)

    model = module(forward, conv=nn.Conv2d(4, 4, 1))
    (branch,) = Runner(model, x=torch.randn(2, 4, 4, 4), timestep=torch.ones(2)).facts.branches
    assert branch.kind == "mixing"
    assert "conv2d: no rule" in (branch.mixing_reason or "")
