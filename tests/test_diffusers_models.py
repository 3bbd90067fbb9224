"""Transformers of diffusers, tiny and with random weights: found without a word about any of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import duca_compile
from duca_compile import DuCa
from duca_compile.policies import StepKind

BLOCKS, ROWS, TEXT = 4, 2, 7
Case = tuple[nn.Module, dict[str, Any]]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape)


def times(value: float) -> torch.Tensor:
    return torch.full((ROWS,), value)


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=BLOCKS,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=16,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": noise(4, 8, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def stable_diffusion_3(dual: tuple[int, ...] = ()) -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=dual,
    )
    return model, {
        "hidden_states": noise(4, 16, 16),
        "encoder_hidden_states": noise(TEXT, 32),
        "pooled_projections": noise(16),
        "timestep": times(900.0),
    }


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=BLOCKS,
        num_single_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    places = torch.arange(16)
    return model, {
        "hidden_states": noise(16, 4),
        "encoder_hidden_states": noise(TEXT, 32),
        "pooled_projections": noise(32),
        "timestep": times(0.9),
        "guidance": times(3.5),
        "img_ids": torch.stack([torch.zeros(16), places // 4, places % 4], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def auraflow() -> Case:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return model, {
        "hidden_states": noise(4, 16, 16),
        "encoder_hidden_states": noise(TEXT, 32),
        "timestep": times(0.9),
    }


def wan() -> Case:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=BLOCKS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": noise(4, 2, 8, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
    }


def ltx_video() -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=BLOCKS,
        caption_channels=16,
    )
    return model, {
        "hidden_states": noise(32, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
        "encoder_attention_mask": torch.ones(ROWS, TEXT, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def sana() -> Case:
    model = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=8,
        num_attention_heads=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )
    return model, {
        "hidden_states": noise(4, 8, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
    }


def qwen_image() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": noise(16, 16),
        "encoder_hidden_states": noise(TEXT, 16),
        "encoder_hidden_states_mask": torch.ones(ROWS, TEXT, dtype=torch.int64),
        "timestep": times(0.9),
        "img_shapes": [[(1, 4, 4)]] * ROWS,
    }


@dataclass(frozen=True)
class Expected:
    """What the architecture has: branches by kind, and whether partial steps recompute tokens of its MLPs."""

    build: Callable[[], Case]
    kinds: dict[str, int]
    partial: bool = True


SELF, CROSS, MLP, BOTH = "self_attention", "cross_attention", "mlp", "attention+mlp"
MODELS = {
    "PixArt": Expected(pixart, {SELF: BLOCKS, CROSS: BLOCKS, MLP: BLOCKS}),
    # The text stream ends in the joint attentions: with those cached nothing reads it.
    "SD3": Expected(stable_diffusion_3, {SELF: BLOCKS, MLP: BLOCKS}),
    "SD3, dual attention": Expected(lambda: stable_diffusion_3((0, 1)), {SELF: BLOCKS + 2, MLP: BLOCKS}),
    # Image and text in each double block, both at once in each single block.
    "FLUX": Expected(flux, {SELF: 2 * BLOCKS, MLP: 2 * BLOCKS, BOTH: BLOCKS}),
    # Its MLP reads the stream with the attention added, so each block is one branch.
    "AuraFlow": Expected(auraflow, {BOTH: 2 * 2 + 2}, partial=False),
    "Wan": Expected(wan, {SELF: BLOCKS, CROSS: BLOCKS, MLP: BLOCKS}),
    "LTX-Video": Expected(ltx_video, {SELF: BLOCKS, CROSS: BLOCKS, MLP: BLOCKS}),
    # Linear attention without an attention operator, and a convolutional MLP: both mix tokens.
    "Sana": Expected(sana, {"mixing": 2 * BLOCKS, CROSS: BLOCKS}, partial=False),
    "QwenImage": Expected(qwen_image, {SELF: BLOCKS, MLP: BLOCKS}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_is_captured_understood_and_run(name: str) -> None:
    torch.manual_seed(0)
    expected = MODELS[name]
    model, arguments = expected.build()
    model.eval()
    optimized = duca_compile.optimize(model, DuCa(interval=3, fresh_ratio=0.5), "eager")
    assert torch.equal(optimized(**arguments)[0], model(**arguments)[0])
    found = duca_compile.explain(optimized, **arguments)
    assert Counter(branch.kind for branch in found.branches) == expected.kinds
    assert (found.facts.latent, found.facts.timestep) == ("hidden_states", "timestep")
    planned = {step.kind: step for step in found.schedule(num_inference_steps=3).steps}
    assert planned[StepKind.SKIP].flops <= 0.1 * found.flops
    assert (planned[StepKind.PARTIAL].fresh_share == 0.5) == expected.partial
    for step in range(1, 6):
        arguments["timestep"] = arguments["timestep"] * (1 - 0.1 * step)
        assert torch.isfinite(optimized(**arguments)[0]).all()
    assert "".join(e.kind.value[0] for e in optimized.history) == "fpsfps"
