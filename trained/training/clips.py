"""Trains the video model, a small Wan that draws moving shapes from a sentence, on a CPU.

    python trained/training/clips.py --out runs/clips

A run that was stopped resumes from its last checkpoint when it is started again with the same --out; without a
checkpoint, --start continues from the exported weights of an earlier run in the last stage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from clips_data import prompts, render, sentence
from duca_compile_models.text import WIDTH, Encoder
from trainer import NULL_SHARE, Batch, Stage, Task, begin, parser, repeat_blocks, train

SIDE = 32  # pixels
SCALE = 1.4  # brings the pixels to about unit variance: latent = pixel * scale
REPEATS = 2  # of each block, when the model grows
PATCH = (2, 4, 4)
STAGES = [
    Stage(grown=False, side=16, samples=24_000, batch=32),
    Stage(grown=True, side=16, samples=24_000, batch=32, muon_lr=3e-3, adam_lr=1.5e-3),
    Stage(grown=True, side=32, samples=60_000, batch=16, muon_lr=2e-3, adam_lr=1e-3, decay=True),
]


def scale_positions(rope: Any, side: int) -> None:
    """Makes the model see the tokens of a ``side`` x ``side`` clip at their places on the grid of the final size."""
    step = SIDE / side
    place = torch.arange(rope.max_seq_len) * step + (step - 1) / 2
    for dim, at in ((rope.h_dim, rope.t_dim), (rope.w_dim, rope.t_dim + rope.h_dim)):
        cos, sin = get_1d_rotary_pos_embed(dim, place, use_real=True, repeat_interleave_real=True)
        rope.freqs_cos[:, at : at + dim] = cos
        rope.freqs_sin[:, at : at + dim] = sin


class ClipsTask(Task):
    """Text to video with WanTransformer3DModel on pixels; ``features`` is float16 (prompts, tokens, width)."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.kinds = prompts()

    def build(self, grown: bool) -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=PATCH,
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            text_dim=WIDTH,
            freq_dim=128,
            ffn_dim=512,
            num_layers=4 * REPEATS if grown else 4,
            rope_max_seq_len=64,
        )

    def grow(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return repeat_blocks(state, {"blocks": REPEATS}, ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"))

    def batch(self, size: int, side: int) -> Batch:
        pick = torch.randint(0, len(self.kinds), (size,))
        clips = render([self.kinds[number] for number in pick.tolist()], side) * SCALE
        pick = torch.where(torch.rand(size) < NULL_SHARE, 0, pick + 1)
        return Batch(clips, self.features[pick].float(), torch.empty(size, 0))

    def velocity(self, model: nn.Module, noisy: Tensor, time: Tensor, batch: Batch) -> Tensor:
        scale_positions(model.rope, noisy.shape[-1])
        output: Tensor = model(noisy, 1000 * time, batch.features, return_dict=False)[0]
        return output


def encoded(cache: Path) -> Tensor:
    """The features of the null prompt and of all others, kept in a file, float16 (1 + prompts, tokens, width)."""
    if not cache.exists():
        encoder = Encoder.load()
        sentences = ["", *(sentence(*kind) for kind in prompts())]
        parts = [encoder(sentences[start : start + 128])[0].half() for start in range(0, len(sentences), 128)]
        torch.save(torch.cat(parts), cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").rename(cache)
    features: Tensor = torch.load(cache, weights_only=True)
    return features


def main() -> None:
    args = parser(__doc__, Path("runs/clips")).parse_args()
    begin(args)
    train(ClipsTask(encoded(args.out / "prompts.pt")), STAGES, args)


if __name__ == "__main__":
    main()
