"""Small Diffusion Transformers written for the tests, one per structure that the analyses must tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH, TOKENS, WIDTH, HEADS, CHANNELS, TEXT = 2, 16, 24, 3, 4, 5


def embed(timestep: Tensor, width: int) -> Tensor:
    """The sinusoidal timestep embedding."""
    rates = torch.exp(-math.log(100.0) * torch.arange(width // 2) / (width // 2))
    angles = timestep.float()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding by multiplication and addition alone."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * angles.cos() + turned * angles.sin()


class Attention(nn.Module):
    def __init__(self, context_width: int = WIDTH, rotary: bool = False) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(context_width, WIDTH), nn.Linear(context_width, WIDTH)
        self.rotary = rotary

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context

        def heads(t: Tensor) -> Tensor:
            return t.view(t.shape[0], t.shape[1], HEADS, -1).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(context)), heads(self.v(context))
        if self.rotary:
            angles = torch.arange(x.shape[1])[:, None] / torch.arange(1, q.shape[-1] + 1)
            q, k = rotate(q, angles), rotate(k, angles)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class ConvMLP(nn.Module):
    """Mixes tokens: a depthwise 3x3 convolution over the grid between the two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        grid = self.up(x).transpose(1, 2).reshape(x.shape[0], WIDTH, side, side)
        return self.down(functional.gelu(self.conv(grid)).flatten(2).transpose(1, 2))


class Block(nn.Module):
    """adaLN-Zero: attention and MLP, each between a modulated norm and a gate."""

    def __init__(self, *, rotary: bool = False, conv: bool = False) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = Attention(rotary=rotary)
        self.mlp = ConvMLP() if conv else mlp()

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        parts = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class UngatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), mlp()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x) + condition[:, None])


class CrossBlock(Block):
    """Self-attention, then ungated cross-attention to the text, then the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = Attention()

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        parts = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a)
        x = x + self.cross(x, text)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class FusedBlock(UngatedBlock):
    """Attention and MLP side by side in one residual branch."""

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        y = self.norm(x) + condition[:, None]
        return x + (self.attention(y) + self.mlp(y))


class ParallelBlock(UngatedBlock):
    """Attention and MLP of the same input, each added to the stream on its own."""

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        y = self.norm(x) + condition[:, None]
        return x + self.attention(y) + self.mlp(y)


class ScaledBlock(Block):
    """``x + x * scale`` is modulation and no branch: nothing in it is worth a cache."""

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        x = x + x * condition[:, None]
        return super().forward(x, condition, text)


class NestedBlock(Block):
    """The MLP holds a residual of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), _Residual(self.inner), nn.Linear(WIDTH, WIDTH))


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.inner(x))


class DiT(nn.Module):
    """Tokens in, tokens out: embedding, blocks, modulated head. The text is projected inside: it is loop-invariant."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 2, long_skip: str = "") -> None:
        super().__init__()
        self.embed_x, self.embed_t = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.embed_text = nn.Linear(TEXT, WIDTH)
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head_modulation, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.long_skip = long_skip

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        condition = functional.silu(self.embed_t(embed(timestep, WIDTH)))
        text = functional.gelu(self.embed_text(text))
        x = start = self.embed_x(x) + self.position
        for index, block in enumerate(self.blocks):
            x = block(x, condition, text)
            if self.long_skip == "middle" and index == 0:
                x = x + start
            if index == 0:
                early = x
        if self.long_skip == "end":
            x = x + start
        if self.long_skip == "late":
            x = torch.cat([x[..., : WIDTH // 2], early[..., WIDTH // 2 :]], dim=-1)
        return self.head(x * (1 + self.head_modulation(condition)[:, None]))


def build(block: Callable[[], nn.Module] = Block, depth: int = 2, long_skip: str = "") -> nn.Module:
    torch.manual_seed(0)
    return DiT(block, depth, long_skip).eval().requires_grad_(False)


def example(seed: int = 0, timestep: float = 7.0) -> dict[str, Tensor]:
    """The arguments of one call."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(BATCH, TOKENS, CHANNELS, generator=generator)
    text = torch.randn(BATCH, 7, TEXT, generator=torch.Generator().manual_seed(99))
    return {"x": latent, "timestep": torch.full((BATCH,), timestep), "text": text}
