"""Tiny random Diffusion Transformers and what each architecture has, written down by hand from its source.

Nothing here asks duca_compile: the numbers are the truth that the tests hold it to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests import own_models

ROWS, TEXT = 2, 7
Case = tuple[nn.Module, dict[str, Any]]
Build = Callable[[int], Case]
Streams = Callable[[int], dict[str, int]]


@dataclass(frozen=True)
class Entry:
    """A model and its residual branches, where a branch is one add ``x + gate * f(x)`` whose sum somebody reads.

    ``streams`` gives their number by role for a depth (the number of blocks of each kind):

    - ``main``: the stream that carries the latent to the output, in single-stream blocks the text with it;
    - ``text``: runs beside main and depends on the latent: the tokens of both attend to each other;
    - ``refiner``: blocks on the latent before main;
    - ``encoder``: blocks on the text alone, or on text and timestep: their values do not depend on the latent.
    """

    name: str
    build: Build
    streams: Streams
    timestep: str = "timestep"
    latent: str = "hidden_states"
    obstacle: str = ""  # the line of diffusers that breaks torch.export, and why


def noise(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape)


def times(value: float) -> Tensor:
    return torch.full((ROWS,), value)


def everything(*shape: int) -> Tensor:
    return torch.ones(ROWS, *shape, dtype=torch.bool)


def grid_ids(height: int, width: int, axes: int = 3) -> Tensor:
    """Positions (0, row, column) of image tokens, the axes after those zero."""
    places = torch.arange(height * width)
    columns = [torch.zeros(height * width), places // width, places % width]
    return torch.stack([*columns, *[torch.zeros(height * width)] * (axes - 3)], dim=1)


def dit(depth: int = 4) -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return model, {
        "hidden_states": noise(4, 8, 8),
        "timestep": torch.full((ROWS,), 900),
        "class_labels": torch.arange(ROWS),
    }


def pixart(depth: int = 4) -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
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


def stable_diffusion_3(depth: int = 4, dual: int = 0) -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=depth,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm" if dual else None,
    )
    return model, {
        "hidden_states": noise(4, 16, 16),
        "encoder_hidden_states": noise(TEXT, 32),
        "pooled_projections": noise(16),
        "timestep": times(900.0),
    }


def stable_diffusion_3_dual(depth: int = 4) -> Case:
    return stable_diffusion_3(depth, dual=depth // 2)


def flux(depth: int = 4, channels: int = 4) -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=depth,
        num_single_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return model, {
        "hidden_states": noise(16, channels),
        "encoder_hidden_states": noise(TEXT, 32),
        "pooled_projections": noise(32),
        "timestep": times(0.9),
        "guidance": times(3.5),
        "img_ids": grid_ids(4, 4),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux2(depth: int = 4) -> Case:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=depth,
        num_single_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
    )
    words = torch.arange(TEXT)[:, None]
    return model, {
        "hidden_states": noise(16, 4),
        "encoder_hidden_states": noise(TEXT, 32),
        "timestep": times(0.9),
        "guidance": times(3.5),
        "img_ids": grid_ids(4, 4, axes=4).expand(ROWS, -1, -1),
        "txt_ids": torch.cat([torch.zeros(TEXT, 3), words], dim=1).expand(ROWS, -1, -1),
    }


def auraflow(depth: int = 4) -> Case:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=depth,
        num_single_dit_layers=depth,
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


def hunyuan_dit(depth: int = 4) -> Case:
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=depth,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=TEXT,
        text_len_t5=5,
    )
    angles = torch.rand(16, 16)
    return model, {
        "hidden_states": noise(4, 8, 8),
        "timestep": times(900.0),
        "encoder_hidden_states": noise(TEXT, 16),
        "text_embedding_mask": everything(TEXT),
        "encoder_hidden_states_t5": noise(5, 16),
        "text_embedding_mask_t5": everything(5),
        "image_meta_size": torch.full((ROWS, 6), 8.0),
        "style": torch.zeros(ROWS, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def latte(depth: int = 4) -> Case:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    )
    return model, {
        "hidden_states": noise(4, 3, 8, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
    }


def cogvideox(depth: int = 4, frames: int = 2) -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=depth,
        sample_width=8,
        sample_height=8,
        sample_frames=5,  # two in a latent
        patch_size=2,
        max_text_seq_length=TEXT,
    )
    return model, {
        "hidden_states": noise(frames, 4, 8, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": torch.full((ROWS,), 900),
    }


def cogvideox_longer(depth: int = 4) -> Case:
    """Of another length than its configuration says, as its pipeline allows: positions are made in the forward."""
    return cogvideox(depth, frames=3)


def hunyuan_video(depth: int = 4) -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=depth,
        num_single_layers=depth,
        num_refiner_layers=depth,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": noise(4, 2, 8, 8),
        "timestep": times(900.0),
        "encoder_hidden_states": noise(TEXT, 16),
        "encoder_attention_mask": everything(TEXT),
        "pooled_projections": noise(8),
        "guidance": times(6000.0),
    }


def hunyuan_video_15(depth: int = 4) -> Case:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=depth,
        num_refiner_layers=depth,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": noise(4, 2, 4, 4),
        "timestep": times(900.0),
        "encoder_hidden_states": noise(TEXT, 16),
        "encoder_attention_mask": everything(TEXT),
        "encoder_hidden_states_2": noise(3, 8),
        "encoder_attention_mask_2": everything(3),
        "image_embeds": noise(4, 12),
    }


def wan(depth: int = 4) -> Case:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=depth,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": noise(4, 2, 8, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
    }


def ltx_video(depth: int = 4) -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=depth,
        caption_channels=16,
    )
    return model, {
        "hidden_states": noise(32, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
        "encoder_attention_mask": everything(TEXT),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def mochi(depth: int = 4) -> Case:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=depth,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    return model, {
        "hidden_states": noise(4, 2, 8, 8),
        "encoder_hidden_states": noise(TEXT, 16),
        "timestep": times(900.0),
        "encoder_attention_mask": everything(TEXT),
    }


def sana(depth: int = 4) -> Case:
    model = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
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


def qwen_image(depth: int = 4) -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=depth,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": noise(16, 16),
        "encoder_hidden_states": noise(TEXT, 16),
        "encoder_hidden_states_mask": everything(TEXT).long(),
        "timestep": times(0.9),
        "img_shapes": [[(1, 4, 4)]] * ROWS,
    }


def z_image(depth: int = 4) -> Case:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=depth,
        n_refiner_layers=depth,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    return model, {
        "x": list(noise(4, 1, 8, 16)),  # 32 tokens: a multiple of 32, so nothing is padded
        "t": times(0.1),
        "cap_feats": list(noise(TEXT, 16)),
    }


def lumina2(depth: int = 4) -> Case:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=depth,
        num_refiner_layers=depth,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 32, 32),
        cap_feat_dim=16,
    )
    return model, {
        "hidden_states": noise(4, 8, 8),
        "timestep": times(0.1),
        "encoder_hidden_states": noise(TEXT, 16),
        "encoder_attention_mask": everything(TEXT),
    }


def hidream(depth: int = 4) -> Case:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
        num_single_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[12, 8],
        text_emb_dim=16,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[index % 2 for index in range(2 * depth)],
    )
    return model, {
        "hidden_states": noise(4, 8, 8),
        "timesteps": times(900.0),
        "encoder_hidden_states_t5": noise(TEXT, 12),
        "encoder_hidden_states_llama3": torch.randn(2, ROWS, TEXT, 8),
        "pooled_embeds": noise(16),
    }


def omnigen(depth: int = 4) -> Case:
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        num_layers=depth,
        pad_token_id=0,
        vocab_size=50,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=8,
        time_step_dim=16,
    )
    prompt, image = TEXT, 16
    total = prompt + 1 + image  # the timestep is a token of its own
    mask = torch.ones(total, total).tril()
    mask[prompt + 1 :] = 1  # the prompt is causal, the image sees everything
    return model, {
        "hidden_states": noise(4, 8, 8),
        "timestep": times(0.1),
        "input_ids": torch.arange(1, ROWS * prompt + 1).reshape(ROWS, prompt),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.expand(ROWS, -1, -1),
        "position_ids": torch.arange(total).expand(ROWS, -1),
    }


def plain_dit(depth: int = 4, attention: type[own_models.Attention] = own_models.Attention) -> Case:
    model = own_models.DiT(depth, attention=attention)
    return model, {"x": noise(4, 8, 8), "t": times(900.0), "y": torch.arange(ROWS)}


def plain_dit_by_hand(depth: int = 4) -> Case:
    return plain_dit(depth, own_models.HandAttention)


def u_vit(depth: int = 4) -> Case:
    return own_models.UViT(depth), {"x": noise(4, 8, 8), "timesteps": times(900.0), "y": torch.arange(ROWS)}


def audio_dit(depth: int = 4) -> Case:
    return own_models.AudioDiT(depth), {
        "x": noise(4, 48),
        "t": times(0.9),
        "cross_attn_cond": noise(TEXT, 16),
        "global_embed": noise(8),
    }


def audio_dit_prepended(depth: int = 4) -> Case:
    model, arguments = audio_dit(depth)
    return model, {**arguments, "prepend_cond": noise(3, 8)}


ENTRIES = [
    # attention + MLP
    Entry("DiT", dit, lambda n: {"main": 2 * n}),
    # self-attention + cross-attention + MLP
    Entry("PixArt", pixart, lambda n: {"main": 3 * n}),
    # image attention + MLP, text attention + MLP; the last block has no text branches (context_pre_only)
    Entry("SD3", stable_diffusion_3, lambda n: {"main": 2 * n, "text": 2 * (n - 1)}),
    # the same and a second image self-attention in the first half of the blocks
    Entry("SD3 dual", stable_diffusion_3_dual, lambda n: {"main": 2 * n + n // 2, "text": 2 * (n - 1)}),
    # double: image attention + MLP, text attention + MLP, all read by the singles; single: both in one add
    Entry("FLUX", flux, lambda n: {"main": 2 * n + n, "text": 2 * n}),
    # as FLUX
    Entry("Flux2", flux2, lambda n: {"main": 2 * n + n, "text": 2 * n}),
    # x + gate * mlp(norm(x + gate * attention)): the inner sum feeds the MLP alone, so each block is one add to each
    # stream; joint: image and text; single: both at once
    Entry("AuraFlow", auraflow, lambda n: {"main": n + n, "text": n}),
    # self-attention + cross-attention + MLP; the long skip is a concat and a linear layer, not an add
    Entry("HunyuanDiT", hunyuan_dit, lambda n: {"main": 3 * n}),
    # spatial: self-attention + cross-attention + MLP; temporal: self-attention + MLP
    Entry("Latte", latte, lambda n: {"main": 3 * n + 2 * n}),
    # image and text attention, image and text MLP, added apart; nobody reads the last text MLP. The last text
    # attention is read by the MLP that both share, without effect on the output: it is token-wise and its text is cut
    Entry("CogVideoX", cogvideox, lambda n: {"main": 2 * n, "text": 2 * n - 1}),
    Entry(
        "CogVideoX longer",
        cogvideox_longer,
        lambda n: {"main": 2 * n, "text": 2 * n - 1},
        obstacle="embeddings.py:516 joint_pos_embedding.data[...].copy_(): .data escapes the trace as a fake constant",
    ),
    # as FLUX; token refiner (of text and timestep): attention + MLP
    Entry("HunyuanVideo", hunyuan_video, lambda n: {"main": 2 * n + n, "text": 2 * n, "encoder": 2 * n}),
    # double blocks alone, nobody reads the text branches of the last; token refiner: attention + MLP
    Entry(
        "HunyuanVideo-1.5",
        hunyuan_video_15,
        lambda n: {"main": 2 * n, "text": 2 * (n - 1), "encoder": 2 * n},
        obstacle="transformer_hunyuan_video15.py:702 if is_t2v: branches on a tensor, all(image_embeds == 0)",
    ),
    # self-attention + cross-attention + MLP
    Entry("Wan", wan, lambda n: {"main": 3 * n}),
    # self-attention + cross-attention + MLP
    Entry("LTX-Video", ltx_video, lambda n: {"main": 3 * n}),
    # image attention + MLP, text attention + MLP; the last block has no text branches (context_pre_only); the attention
    # goes row by row over the unpadded text (attention_processor.py:1068 nonzero), so its trace has unknown sizes
    Entry("Mochi", mochi, lambda n: {"main": 2 * n, "text": 2 * (n - 1)}),
    # linear self-attention + cross-attention + convolutional MLP
    Entry("Sana", sana, lambda n: {"main": 3 * n}),
    # image attention + MLP, text attention + MLP; nobody reads the text branches of the last block
    Entry("QwenImage", qwen_image, lambda n: {"main": 2 * n, "text": 2 * (n - 1)}),
    # attention + MLP in every block: main on both, noise refiner on the image, context refiner on the text
    Entry("Z-Image", z_image, lambda n: {"main": 2 * n, "refiner": 2 * n, "encoder": 2 * n}, timestep="t", latent="x"),
    # as Z-Image
    Entry(
        "Lumina2",
        lumina2,
        lambda n: {"main": 2 * n, "refiner": 2 * n, "encoder": 2 * n},
        obstacle="transformer_lumina2.py:519 len(set(seq_lengths)): lengths of the mask, symbolic, are unhashable",
    ),
    # double: image attention + experts, text attention + MLP, all read by the singles; single: attention + experts
    Entry(
        "HiDream",
        hidream,
        lambda n: {"main": 2 * n + 2 * n, "text": 2 * n},
        timestep="timesteps",
        obstacle="transformer_hidream_image.py:389 .numpy(): the number of tokens of each expert leaves torch",
    ),
    # one stream of prompt, timestep and image: attention + MLP
    Entry(
        "OmniGen",
        omnigen,
        lambda n: {"main": 2 * n},
        obstacle="transformer_omnigen.py:155 if seq_len > ...: branches on a tensor, the largest position",
    ),
    # the rest is in own_models.py: attention + MLP
    Entry("plain DiT", plain_dit, lambda n: {"main": 2 * n}, timestep="t", latent="x"),
    Entry("plain DiT by hand", plain_dit_by_hand, lambda n: {"main": 2 * n}, timestep="t", latent="x"),
    # attention + MLP in n // 2 early, one middle and n // 2 late blocks; the long skip is a concat and a linear layer
    Entry("U-ViT", u_vit, lambda n: {"main": 2 * (2 * (n // 2) + 1)}, timestep="timesteps", latent="x"),
    # self-attention + cross-attention + MLP
    Entry("audio DiT", audio_dit, lambda n: {"main": 3 * n}, timestep="t", latent="x"),
    Entry("audio DiT prepended", audio_dit_prepended, lambda n: {"main": 3 * n}, timestep="t", latent="x"),
]
ZOO = {entry.name: entry for entry in ENTRIES}
