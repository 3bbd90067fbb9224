"""Draws samples of a training that is under way, from the averaged weights of its last checkpoint.

python trained/training/preview.py emoji --out runs/emoji
python trained/training/preview.py clips --out runs/clips
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import clips
import emoji
import numpy as np
import torch
from clips_data import FRAMES, prompts, sentence
from PIL import Image
from torch import Tensor
from trainer import Batch, Task

EMOJI = (
    "red heart",
    "blue heart",
    "green circle",
    "yellow star",
    "orange square",
    "purple circle",
    "red apple",
    "green apple",
    "banana",
    "blue whale",
    "grinning face",
    "blue grinning face",
    "dog face",
    "panda",
    "rose",
    "sunflower",
    "evergreen tree",
    "pizza",
    "hamburger",
    "red balloon",
    "soccer ball",
    "house",
    "automobile",
    "umbrella",
)


@torch.no_grad()
def sample(task: Task, saved: dict[str, Tensor], grown: bool, noise: Tensor, asked: Batch, null: Batch) -> Tensor:
    """Twenty steps of Euler with guidance by the null prompt, at scale 3."""
    model = task.build(grown).eval()
    model.load_state_dict(saved)
    times = torch.linspace(1, 0, 21)
    for now, after in itertools.pairwise(times):
        time = now.expand(len(noise))
        free = task.velocity(model, noise, time, null)
        noise = noise + (after - now) * (free + 3.0 * (task.velocity(model, noise, time, asked) - free))
    return noise


def emoji_grid(folder: Path, saved: dict[str, Tensor], grown: bool, side: int) -> np.ndarray:
    """One picture for each of the prompts, uint8 (rows, columns, 3)."""
    data = emoji.Emoji(folder / "data.npz", folder)
    rows = torch.tensor([data.prompts.index(prompt) for prompt in EMOJI if prompt in data.prompts])
    for prompt in EMOJI:
        if prompt not in data.prompts:
            print(f"no prompt {prompt!r}")
    noise = torch.randn(len(rows), (side // 2) ** 2, 12)
    asked = Batch(noise, data.features[rows].float(), data.pooled[rows].float())
    none = rows * 0
    null = replace(asked, features=data.features[none].float(), pooled=data.pooled[none].float())
    packed = sample(emoji.EmojiTask(data), saved, grown, noise, asked, null)
    images = packed.transpose(1, 2).reshape(len(rows), 12, side // 2, side // 2)
    pixels = torch.nn.functional.pixel_shuffle(images, 2) / emoji.SCALE + emoji.SHIFT
    columns = 6
    pixels = torch.cat([pixels, torch.ones(-len(rows) % columns, 3, side, side)])
    return to_bytes(pixels.reshape(-1, columns, 3, side, side).permute(0, 3, 1, 4, 2).reshape(-1, columns * side, 3))


def clips_grid(folder: Path, saved: dict[str, Tensor], grown: bool, side: int) -> np.ndarray:
    """A row of frames for each of ten prompts, uint8 (rows, columns, 3)."""
    features = clips.encoded(folder / "prompts.pt")
    kinds = prompts()
    rows = torch.linspace(0, len(kinds) - 1, 10).long() + torch.arange(10) % 7
    rows = rows.clamp(max=len(kinds) - 1)
    print(*(sentence(*kinds[row]) for row in rows.tolist()), sep="\n")
    noise = torch.randn(len(rows), 3, FRAMES, side, side)
    asked = Batch(noise, features[rows + 1].float(), noise)
    null = replace(asked, features=features[rows * 0].float())
    pixels = sample(clips.ClipsTask(features), saved, grown, noise, asked, null) / clips.SCALE
    return to_bytes(pixels.permute(0, 3, 2, 4, 1).reshape(len(rows) * side, FRAMES * side, 3))


def to_bytes(pixels: Tensor) -> np.ndarray:
    array: np.ndarray = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("emoji", "clips"))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the training")
    parser.add_argument("--side", type=int, help="pixels; by default, those of the current stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    checkpoint = torch.load(args.out / "last.pt", weights_only=True)
    module, grid = {"emoji": (emoji, emoji_grid), "clips": (clips, clips_grid)}[args.task]
    stage = module.STAGES[checkpoint["stage"]]
    side = args.side or stage.side
    picture = Image.fromarray(grid(args.out, checkpoint["average"], stage.grown, side))
    scale = 64 // side
    picture.resize((picture.width * scale, picture.height * scale), 0).save(args.out / "preview.png")
    print(f"stage {checkpoint['stage']}, {checkpoint['seen']} samples, losses {checkpoint['log'][-3:]}")


if __name__ == "__main__":
    main()
