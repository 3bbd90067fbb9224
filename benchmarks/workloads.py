"""The models that are timed: diffusers' classes with random weights, sized so that a step takes a core under a second.

Each has its own scheduler and number of steps. Where a model is run with classifier-free guidance, both halves are in
one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from torch import Generator, Tensor, nn

GUIDANCE = 4.0

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A model, the arguments of its calls, and its denoising loop."""

    name: str
    model_class: str  # of diffusers
    config: Mapping[str, Any]
    latent: tuple[int, ...]  # the shape of one sample
    tokens: int  # of the image
    text: int = 0  # tokens of the prompt
    scheduler: str = "DDIMScheduler"
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 50
    guided: bool = True
    time_scale: float = 1.0  # the model's timestep over the scheduler's

    @property
    def rows(self) -> int:
        return 2 if self.guided else 1

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return getattr(diffusers, self.model_class)(**self.config).eval().requires_grad_(False)

    def arguments(self, seed: int) -> Arguments:
        """The arguments of every call except the latent and the timestep."""
        return _ARGUMENTS[self.model_class](self, torch.Generator().manual_seed(seed))

    def noise(self, seed: int) -> Tensor:
        return torch.randn(1, *self.latent, generator=torch.Generator().manual_seed(seed))

    def shape(self) -> str:
        """Depth, width and tokens, for a table."""
        config = self.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        single = f" + {config['num_single_layers']} single" if "num_single_layers" in config else ""
        text = f" + {self.text} text" if self.text else ""
        return f"{config['num_layers']}{single} blocks, width {width}, {self.tokens}{text} tokens, batch {self.rows}"

    @torch.no_grad()
    def denoise(
        self, model: Callable[..., Any], arguments: Arguments, noise: Tensor, calls: int | None = None
    ) -> Tensor:
        """The loop, or its first ``calls`` steps."""
        scheduler = getattr(diffusers, self.scheduler)(**self.scheduler_options)
        scheduler.set_timesteps(self.steps)
        latent = noise
        for timestep in scheduler.timesteps[:calls]:
            inputs, times = torch.cat([latent] * self.rows), timestep.expand(self.rows)
            if self.time_scale != 1:
                times = times * self.time_scale
            output = model(hidden_states=inputs, timestep=times, **arguments).sample
            if self.guided:
                output = output[:, : latent.shape[1]]  # drops the variance, if the model predicts it
                conditional, unconditional = output.chunk(2)
                output = unconditional + GUIDANCE * (conditional - unconditional)
            latent = scheduler.step(output, timestep, latent).prev_sample
        return latent


def _dit_arguments(workload: Workload, generator: Generator) -> Arguments:
    return {"class_labels": torch.tensor([207, workload.config["num_embeds_ada_norm"]])}


def _pixart_arguments(workload: Workload, generator: Generator) -> Arguments:
    shape = (workload.rows, workload.text, workload.config["caption_channels"])
    return {
        "encoder_hidden_states": torch.randn(shape, generator=generator),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3_arguments(workload: Workload, generator: Generator) -> Arguments:
    config, rows = workload.config, workload.rows
    return {
        "encoder_hidden_states": torch.randn(rows, workload.text, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(rows, config["pooled_projection_dim"], generator=generator),
    }


def _flux_arguments(workload: Workload, generator: Generator) -> Arguments:
    side = int(workload.tokens**0.5)
    places = torch.arange(workload.tokens)
    return _sd3_arguments(workload, generator) | {
        "guidance": torch.full((workload.rows,), 3.5),
        "img_ids": torch.stack([torch.zeros(workload.tokens), places // side, places % side], dim=1),
        "txt_ids": torch.zeros(workload.text, 3),
    }


_ARGUMENTS: dict[str, Callable[[Workload, Generator], Arguments]] = {
    "DiTTransformer2DModel": _dit_arguments,
    "PixArtTransformer2DModel": _pixart_arguments,
    "SD3Transformer2DModel": _sd3_arguments,
    "FluxTransformer2DModel": _flux_arguments,
}


def dit(name: str, layers: int, heads: int, head_dim: int, side: int = 32) -> Workload:
    return Workload(
        name,
        "DiTTransformer2DModel",
        {
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": layers,
            "sample_size": side,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_eps": 1e-6,
        },
        latent=(4, side, side),
        tokens=(side // 2) ** 2,
    )


def pixart(name: str, layers: int, heads: int, head_dim: int, side: int = 32, text: int = 120) -> Workload:
    return Workload(
        name,
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": layers,
            "sample_size": side,
            "patch_size": 2,
            "cross_attention_dim": heads * head_dim,
            "caption_channels": 4096,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        latent=(4, side, side),
        tokens=(side // 2) ** 2,
        text=text,
        scheduler="DPMSolverMultistepScheduler",
        steps=20,
    )


def sd3(name: str, layers: int, heads: int, head_dim: int, side: int = 32, text: int = 154) -> Workload:
    return Workload(
        name,
        "SD3Transformer2DModel",
        {
            "sample_size": side,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": layers,
            "attention_head_dim": head_dim,
            "num_attention_heads": heads,
            "caption_projection_dim": heads * head_dim,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 96,
        },
        latent=(16, side, side),
        tokens=(side // 2) ** 2,
        text=text,
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_options={"shift": 3.0},
        steps=28,
    )


def flux(name: str, double: int, single: int, heads: int, head_dim: int, side: int = 16, text: int = 128) -> Workload:
    return Workload(
        name,
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": double,
            "num_single_layers": single,
            "attention_head_dim": head_dim,
            "num_attention_heads": heads,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
            "guidance_embeds": True,
        },
        latent=(side * side, 64),
        tokens=side * side,
        text=text,
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_options={"shift": 3.0},
        steps=28,
        guided=False,
        time_scale=1e-3,
    )


WORKLOADS = {
    each.name: each
    for each in (
        dit("DiT-S/2", 12, 6, 64),
        dit("DiT-B/2", 12, 12, 64),
        pixart("PixArt", 14, 8, 72),
        sd3("SD3", 12, 6, 64),
        flux("FLUX", 5, 10, 4, 128),
    )
}


DEPTHS = {each.name: each for each in (dit("DiT, 12 blocks", 12, 6, 64), dit("DiT, 28 blocks", 28, 6, 64))}


def quick() -> dict[str, Workload]:
    """Tiny workloads, to try everything out."""
    found = (dit("tiny DiT", 3, 2, 16, side=8), flux("tiny FLUX", 2, 2, 2, 32, side=4, text=7))
    return {each.name: replace(each, steps=12) for each in found}
