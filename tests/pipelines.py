"""Real diffusers pipelines around tiny transformers with random weights; prompts are given as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from duca_compile import OptimizedModel
from tests import zoo

STEPS, TEXT, BLOCKS = 8, 7, 2
PassKey = tuple[str | None, int]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipe


def tiny_vae(**settings: Any) -> nn.Module:
    """Keeps the size of the image, so that an image is a latent."""
    return diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, **settings)


def dit() -> DiffusionPipeline:
    transformer, _ = zoo.dit(BLOCKS)
    return diffusers.DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=diffusers.DDIMScheduler())


def pixart() -> DiffusionPipeline:
    transformer, _ = zoo.pixart(BLOCKS)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": None}
    return diffusers.PixArtAlphaPipeline(tokenizer=None, text_encoder=None, **parts)


def stable_diffusion_3(pipeline: type = diffusers.StableDiffusion3Pipeline) -> DiffusionPipeline:
    transformer, _ = zoo.stable_diffusion_3(BLOCKS)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    without = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    vae = tiny_vae(shift_factor=0.06)
    return pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **dict.fromkeys(without))


def flux(pipeline: type = diffusers.FluxPipeline) -> DiffusionPipeline:
    transformer, _ = zoo.flux(BLOCKS, channels=16)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    without = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    vae = tiny_vae(shift_factor=0.06)
    return pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **dict.fromkeys(without))


def wan(experts: int = 1) -> DiffusionPipeline:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=zoo.wan(BLOCKS)[0],
        transformer_2=zoo.wan(BLOCKS)[0] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )


def cogvideox() -> DiffusionPipeline:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=BLOCKS,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.CogVideoXDDIMScheduler(), "vae": None}
    return diffusers.CogVideoXPipeline(tokenizer=None, text_encoder=None, **parts)


def ltx() -> DiffusionPipeline:
    transformer, _ = zoo.ltx_video(BLOCKS)
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": None}
    return diffusers.LTXPipeline(tokenizer=None, text_encoder=None, **parts)


def qwen_image() -> DiffusionPipeline:
    transformer, _ = zoo.qwen_image(BLOCKS)
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": None}
    return diffusers.QwenImagePipeline(tokenizer=None, text_encoder=None, **parts)


def guided(width: int, mask: str = "", pooled: int = 0) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one, with masks or pooled ones where the pipeline has them."""
    given: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds"] = noise(TEXT, width, seed=seed)
        if mask:
            given[f"{prefix}{mask}"] = torch.ones(1, TEXT, dtype=torch.int64)
        if pooled:
            given[f"{prefix}pooled_prompt_embeds"] = noise(pooled, seed=seed + 10)
    return given


@dataclass(frozen=True)
class Case:
    """A pipeline, the arguments of its calls, and the passes of each of its steps."""

    build: Callable[[], DiffusionPipeline]
    arguments: dict[str, Any]
    passes: tuple[PassKey, ...] = ((None, 0),)


SMALL = {"height": 64, "width": 64, "output_type": "latent"}
NAMED: tuple[PassKey, ...] = (("cond", 0), ("uncond", 0))
CASES = {
    "DiT": Case(dit, {"class_labels": [1], "guidance_scale": 4.0, "output_type": "pt"}),
    "PixArt-alpha": Case(
        pixart,
        SMALL | guided(16, "prompt_attention_mask") | {"negative_prompt": None, "use_resolution_binning": False},
    ),
    "SD3": Case(stable_diffusion_3, {"output_type": "latent", "height": 16, "width": 16} | guided(32, pooled=16)),
    "FLUX": Case(
        flux,
        {"output_type": "latent", "height": 8, "width": 8, "true_cfg_scale": 3.0} | guided(32, pooled=32),
        NAMED,
    ),
    "Wan": Case(wan, SMALL | guided(16) | {"num_frames": 5}, NAMED),
    "CogVideoX": Case(cogvideox, SMALL | guided(32) | {"num_frames": 5}, (("cond_uncond", 0),)),
    "LTX-Video": Case(
        ltx,
        {"height": 128, "width": 128, "num_frames": 9, "output_type": "latent"} | guided(16, "prompt_attention_mask"),
        (("cond_uncond", 0),),
    ),
    "QwenImage": Case(qwen_image, SMALL | guided(16, "prompt_embeds_mask") | {"true_cfg_scale": 3.0}, NAMED),
}


def make(name: str) -> DiffusionPipeline:
    torch.manual_seed(0)
    return quiet(CASES[name].build())


def run(pipe: DiffusionPipeline, name: str, steps: int = STEPS, seed: int = 0, **more: Any) -> Tensor:
    """What one call of the pipeline returns: latents, or the picture of DiT."""
    generator = torch.Generator().manual_seed(seed)
    given = CASES[name].arguments | more
    made = pipe(**given, num_inference_steps=steps, generator=generator, return_dict=False)[0]
    result = torch.as_tensor(made)  # older diffusers return DiT's picture as an array
    assert torch.isfinite(result).all()
    return result


def patterns(optimized: OptimizedModel) -> dict[PassKey, str]:
    """The kinds of the steps of each pass, by first letter; a missed step is a dot."""
    steps = 1 + max(executed.step for executed in optimized.history)
    found: dict[PassKey, list[str]] = {}
    for executed in optimized.history:
        kinds = found.setdefault((executed.pass_name, executed.pass_index), ["."] * steps)
        assert kinds[executed.step] == ".", "two calls of one pass at one step"
        kinds[executed.step] = executed.kind.value[0]
    return {key: "".join(kinds) for key, kinds in found.items()}
