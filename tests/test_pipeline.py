"""An optimized transformer inside a real diffusers pipeline."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import duca_compile
from duca_compile import DuCa, Uncached


@pytest.fixture
def pipe() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_eps=1e-6,
    )
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    built = DiTPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=DDIMScheduler())
    built.set_progress_bar_config(disable=True)
    return built


def images(pipe: DiTPipeline, guidance: float = 4.0) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 2], guidance_scale=guidance, num_inference_steps=8, generator=generator, output_type="np").images


def test_the_transformer_of_a_pipeline_is_replaced_and_put_back(pipe: DiTPipeline) -> None:
    expected = images(pipe)
    optimized = duca_compile.optimize(pipe.transformer, Uncached(), "eager")
    pipe.transformer = optimized
    assert np.array_equal(images(pipe), expected)
    pipe.transformer = optimized.source
    assert np.array_equal(images(pipe), expected)


def test_each_call_of_a_pipeline_is_a_request(pipe: DiTPipeline) -> None:
    expected = images(pipe)
    optimized = duca_compile.optimize(pipe.transformer, DuCa(interval=3), "eager")
    pipe.transformer = optimized
    first = images(pipe)
    assert "".join(e.kind.value[0] for e in optimized.history) == "fpsfpsfp"
    assert not np.array_equal(first, expected)
    without_guidance = images(pipe, guidance=1.0)  # half the batch: captured anew
    assert np.isfinite(without_guidance).all()
    assert np.array_equal(images(pipe), first)
