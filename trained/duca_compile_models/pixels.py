"""Autoencoders that keep pixels as they are, for pipelines that end with the decoder of one."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class _Pixels(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Its one parameter is never used: pipelines read the dtype and device of a model from its parameters."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()), requires_grad=False)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The latents as they are, clamped to [-1, 1]."""
        return (latents.clamp(-1, 1),)


class PixelImages(_Pixels):
    """Stands in for AutoencoderKL in FluxPipeline, which scales the latents itself."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, scaling_factor: float = 1.0, shift_factor: float = 0.0, block_out_channels: tuple[int, ...] = (1,)
    ) -> None:
        """Pixels are ``latent / scaling_factor + shift_factor``; one block means that nothing is downsampled."""
        super().__init__()


class PixelVideos(_Pixels):
    """Stands in for AutoencoderKLWan in WanPipeline, which scales the latents itself."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latents_mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        latents_std: tuple[float, ...] = (1.0, 1.0, 1.0),
        z_dim: int = 3,
        scale_factor_temporal: int = 1,
        scale_factor_spatial: int = 1,
    ) -> None:
        """Pixels are ``latent * latents_std + latents_mean``."""
        super().__init__()
