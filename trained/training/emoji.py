"""Trains the text-to-image model, a small FLUX that draws emoji from their names, on a CPU.

    python trained/training/emoji.py --data data --out runs/emoji

``--data`` is where the Debian packages of emoji_data.py were unpacked. A run that was stopped resumes from its last
checkpoint when it is started again with the same --out; without a checkpoint, --start continues from the exported
weights of an earlier run in the last stage.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from duca_compile_models.text import WIDTH
from emoji_data import Emoji
from trainer import NULL_SHARE, Batch, Stage, Task, begin, parser, repeat_blocks, train

SIDE = 32  # pixels
SHIFT, SCALE = 0.45, 1.7  # bring the pixels to about zero mean and unit variance: latent = (pixel - shift) * scale
REPEATS = 3  # of each single block, when the model grows
STAGES = [
    Stage(grown=False, side=16, samples=24_000, batch=32),
    Stage(grown=True, side=16, samples=24_000, batch=32, muon_lr=3e-3, adam_lr=1.5e-3),
    Stage(grown=True, side=32, samples=80_000, batch=32, muon_lr=2e-3, adam_lr=1e-3, decay=True),
]


def ids(side: int) -> Tensor:
    """Positions of the tokens of an image, float32 (tokens, 3), on the grid of the final size."""
    tokens = side // 2
    step = SIDE / side
    place = torch.arange(tokens) * step + (step - 1) / 2
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)


class EmojiTask(Task):
    """Text to image with FluxTransformer2DModel on packed pixels, as FluxPipeline packs latents."""

    def __init__(self, data: Emoji) -> None:
        self.data = data

    def build(self, grown: bool) -> FluxTransformer2DModel:
        return FluxTransformer2DModel(
            in_channels=12,
            num_layers=2,
            num_single_layers=2 * REPEATS if grown else 2,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 14, 14),
        )

    def grow(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return repeat_blocks(state, {"single_transformer_blocks": REPEATS}, ("proj_out",))

    def batch(self, size: int, side: int) -> Batch:
        pixels, prompt = self.data.draw(size, side)
        prompt[torch.rand(size) < NULL_SHARE] = 0
        packed = torch.nn.functional.pixel_unshuffle((pixels - SHIFT) * SCALE, 2).flatten(2).transpose(1, 2)
        return Batch(packed, self.data.features[prompt].float(), self.data.pooled[prompt].float())

    def velocity(self, model: nn.Module, noisy: Tensor, time: Tensor, batch: Batch) -> Tensor:
        side = 2 * math.isqrt(noisy.shape[1])
        output: Tensor = model(
            hidden_states=noisy,
            timestep=time,
            pooled_projections=batch.pooled,
            encoder_hidden_states=batch.features,
            txt_ids=torch.zeros(batch.features.shape[1], 3),
            img_ids=ids(side),
            return_dict=False,
        )[0]
        return output


def main() -> None:
    options = parser(__doc__, Path("runs/emoji"))
    options.add_argument("--data", type=Path, default=Path("data"), help="where the Debian packages were unpacked")
    args = options.parse_args()
    begin(args)
    train(EmojiTask(Emoji(args.out / "data.npz", args.data)), STAGES, args)


if __name__ == "__main__":
    main()
