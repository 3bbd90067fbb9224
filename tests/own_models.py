"""Diffusion Transformers that no library has, each written as its own authors might write it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def waves(positions: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """Cosines and sines of positions, with ``width`` features."""
    rates = torch.exp(-math.log(period) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def perceptron(inputs: int, hidden: int, outputs: int, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), act(), nn.Linear(hidden, outputs))


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """Square images of tokens (batch, tokens, patch * patch * channels)."""
    side = math.isqrt(x.shape[1])
    x = x.reshape(x.shape[0], side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], -1, side * patch, side * patch)


class Attention(nn.Module):
    """Self-attention by the fused operator."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class HandAttention(Attention):
    """The same function written out, as before that operator existed."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """adaLN-Zero, not initialised to zero: an untrained block has to do something here."""

    def __init__(self, width: int, heads: int, attention: type[Attention]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = attention(width, heads)
        self.mlp = perceptron(width, 4 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """The original: images by class label; predicts noise and sigma."""

    def __init__(
        self,
        depth: int = 4,
        width: int = 32,
        heads: int = 2,
        side: int = 8,
        patch: int = 2,
        channels: int = 4,
        classes: int = 10,
        attention: type[Attention] = Attention,
    ) -> None:
        super().__init__()
        self.patch, grid = patch, side // patch
        self.embed_patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.embed_time = perceptron(256, width, width, nn.SiLU)
        self.embed_label = nn.Embedding(classes + 1, width)  # the last is "no label", for guidance
        rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        places = [waves(axis.flatten(), width // 2) for axis in (rows, columns)]
        self.register_buffer("positions", torch.cat(places, dim=-1)[None])
        self.blocks = nn.ModuleList(DiTBlock(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, patch * patch * 2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.embed_patches(x).flatten(2).transpose(1, 2) + self.positions
        c = self.embed_time(waves(t, 256)) + self.embed_label(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return unpatchify(self.head(modulate(self.norm(x), shift, scale)), self.patch)


class UViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = perceptron(width, 4 * width, width)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Time, label and patches are tokens of one sequence; each late block also reads its early mirror image."""

    def __init__(
        self,
        depth: int = 4,
        width: int = 32,
        heads: int = 2,
        side: int = 8,
        patch: int = 2,
        channels: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patch, self.width, tokens = patch, width, (side // patch) ** 2
        self.embed_patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.embed_time = perceptron(width, 4 * width, width, nn.SiLU)
        self.embed_label = nn.Embedding(classes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 2 + tokens, width))
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads) for _ in range(depth // 2))
        self.mid_block = UViTBlock(width, heads)
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, skip=True) for _ in range(depth // 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, patch * patch * channels)
        self.final = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        patches = self.embed_patches(x).flatten(2).transpose(1, 2)
        time = self.embed_time(waves(timesteps, self.width)).unsqueeze(1)
        x = torch.cat([time, self.embed_label(y).unsqueeze(1), patches], dim=1) + self.positions
        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.head(self.norm(x))[:, 2:]
        return self.final(unpatchify(x, self.patch))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions on the first features of each head; the rest stays as it is."""
    x, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    x = x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([x, rest], dim=-1)


class AudioAttention(nn.Module):
    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(context or width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, context: Tensor | None = None, angles: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        q, k = self.norm_q(q), self.norm_k(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * functional.silu(gate))


class AudioBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, bias=False) for _ in range(3))
        self.attention, self.cross = AudioAttention(width, heads), AudioAttention(width, heads, context)
        self.mlp = GatedMLP(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, prompt: Tensor, angles: Tensor) -> Tensor:
        parts = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        scale1, shift1, gate1, scale2, shift2, gate2 = parts
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1, angles=angles) * torch.sigmoid(1 - gate1)
        x = x + self.cross(self.norm2(x), prompt)
        return x + self.mlp(self.norm3(x) * (1 + scale2) + shift2) * torch.sigmoid(1 - gate2)


class AudioDiT(nn.Module):
    """One-dimensional latents by a prompt, a global condition and tokens that may precede the sequence."""

    def __init__(
        self,
        depth: int = 4,
        width: int = 32,
        heads: int = 2,
        patch: int = 2,
        channels: int = 4,
        prompt: int = 16,
        summary: int = 8,
        prepended: int = 8,
    ) -> None:
        super().__init__()
        self.rotary = width // heads // 2
        self.embed_patches = nn.Conv1d(channels, width, kernel_size=patch, stride=patch)
        self.frequencies = nn.Parameter(torch.randn(16))
        self.embed_time = perceptron(32, width, width, nn.SiLU)
        self.embed_global = perceptron(summary, width, width, nn.SiLU)
        self.embed_prompt = perceptron(prompt, width, width, nn.SiLU)
        self.embed_prepended = perceptron(prepended, width, width, nn.SiLU)
        self.blocks = nn.ModuleList(AudioBlock(width, heads, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.ConvTranspose1d(width, channels, kernel_size=patch, stride=patch)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cross_attn_cond: Tensor,
        global_embed: Tensor | None = None,
        prepend_cond: Tensor | None = None,
    ) -> Tensor:
        phases = 2 * math.pi * t[:, None] * self.frequencies
        condition = self.embed_time(torch.cat([phases.cos(), phases.sin()], dim=-1))
        if global_embed is not None:
            condition = condition + self.embed_global(global_embed)
        prompt = self.embed_prompt(cross_attn_cond)
        x = self.embed_patches(x).transpose(1, 2)
        length = x.shape[1]
        if prepend_cond is not None:
            x = torch.cat([self.embed_prepended(prepend_cond), x], dim=1)
        rates = 10_000.0 ** -(torch.arange(0, self.rotary, 2, device=x.device) / self.rotary)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device), rates).repeat(1, 2)
        for block in self.blocks:
            x = block(x, condition, prompt, angles)
        return self.head(self.norm(x[:, -length:]).transpose(1, 2))
