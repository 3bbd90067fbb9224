"""Pipelines of diffusers for the two models: only reading the prompt, and counting frames, differ."""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from torch import Tensor

from duca_compile_models.pixels import PixelImages, PixelVideos
from duca_compile_models.text import Prompts


class EmojiPipeline(FluxPipeline):  # type: ignore[misc]
    """FluxPipeline for the emoji model, with prompts read by MiniLM instead of CLIP and T5.

    Guidance by the null prompt is FluxPipeline's own: ``negative_prompt="", true_cfg_scale=3.0``.
    """

    prompts: Prompts

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of the prompts and of their tokens, and the tokens' positions, which are all zero."""
        if prompt_embeds is None:
            assert prompt is not None
            features, pooled = self.prompts([prompt] if isinstance(prompt, str) else prompt)
            prompt_embeds = features.repeat_interleave(num_images_per_prompt, 0)
            pooled_prompt_embeds = pooled.repeat_interleave(num_images_per_prompt, 0)
        assert pooled_prompt_embeds is not None
        place = {"device": device or self._execution_device, "dtype": self.transformer.dtype}
        positions = torch.zeros(prompt_embeds.shape[1], 3, **place)
        return prompt_embeds.to(**place), pooled_prompt_embeds.to(**place), positions


class ClipsPipeline(WanPipeline):  # type: ignore[misc]
    """WanPipeline for the video model, with prompts read by MiniLM instead of T5.

    Use guidance by the null prompt at ``guidance_scale=3.0``.
    """

    prompts: Prompts

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str],
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 16,
        device: Any = None,
        dtype: Any = None,
    ) -> Tensor:
        features, _ = self.prompts([prompt] if isinstance(prompt, str) else prompt)
        features = features.repeat_interleave(num_videos_per_prompt, 0)
        return features.to(device or self._execution_device, dtype or self.transformer.dtype)

    def __call__(self, *args: Any, height: int = 32, width: int = 32, num_frames: int = 12, **options: Any) -> Any:
        """Calls WanPipeline, which, where each frame has its own latent, makes one frame more than it is asked for."""
        return super().__call__(*args, height=height, width=width, num_frames=num_frames - 1, **options)


def load(name: str, device: str = "cpu") -> Any:
    """Loads a trained model in its pipeline, with float32 weights.

    Args:
        name: "emoji", text to image, an ``EmojiPipeline``, or "clips", text to video, a ``ClipsPipeline``.
        device: where the models are put.

    Raises:
        ValueError: there is no model of this name.
    """
    with resources.as_file(resources.files("duca_compile_models")) as package:
        if name == "emoji":
            return _emoji(package / name).to(device)
        if name == "clips":
            return _clips(package / name).to(device)
    raise ValueError(f"name={name!r} is unknown; choose 'emoji' or 'clips'")


def _filled(kind: Any, folder: Path) -> Any:
    model = kind.from_config(json.loads((folder / "config.json").read_text()))
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model.requires_grad_(False).eval()


def _emoji(folder: Path) -> EmojiPipeline:
    about = json.loads((folder / "pipeline.json").read_text())
    pipeline = EmojiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**about["scheduler"]),
        vae=PixelImages(**about["vae"]),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=_filled(FluxTransformer2DModel, folder),
    )
    pipeline.default_sample_size = about["size"]
    pipeline.prompts = Prompts(folder / "prompts.safetensors")
    return pipeline


def _is_due(record: logging.LogRecord) -> bool:
    """Whether a message of WanPipeline is not the one about frames that are no multiple of one."""
    return "has to be divisible by 1." not in record.getMessage()


def _clips(folder: Path) -> ClipsPipeline:
    about = json.loads((folder / "pipeline.json").read_text())
    logging.getLogger(WanPipeline.__module__).addFilter(_is_due)
    pipeline = ClipsPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**about["scheduler"]),
        vae=PixelVideos(**about["vae"]),
        text_encoder=None,
        tokenizer=None,
        transformer=_filled(WanTransformer3DModel, folder),
    )
    pipeline.prompts = Prompts(folder / "prompts.safetensors")
    return pipeline
