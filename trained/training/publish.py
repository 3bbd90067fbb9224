"""Writes the newest averaged weights of a training into the package, with all that its pipeline reads.

python trained/training/publish.py emoji --out runs/emoji
python trained/training/publish.py clips --out runs/clips
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import clips
import duca_compile_models
import emoji
import numpy as np
import torch
from clips_data import BACKGROUNDS, COLOURS, MOTIONS, ROUND, SHAPES, sentence
from duca_compile_models.text import Encoder, store
from PIL import Image
from preview import EMOJI
from trainer import export

PACKAGE = Path(__file__).parents[1] / "duca_compile_models"
SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0}
PIPELINES: dict[str, dict[str, Any]] = {
    "emoji": {
        "scheduler": SCHEDULER,
        "size": emoji.SIDE,
        "vae": {"scaling_factor": emoji.SCALE, "shift_factor": emoji.SHIFT},
    },
    "clips": {"scheduler": SCHEDULER, "vae": {"latents_std": [1 / clips.SCALE] * 3}},
}


def clips_prompts() -> tuple[str, ...]:
    """Each shape with each motion that shows, in colours and on backgrounds that take turns."""
    pairs = [(s, m) for s in SHAPES for m in MOTIONS if not (m.startswith("turning") and s in ROUND)]
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    return tuple(
        sentence(shape, motion, colours[i * 3 % len(colours)], backgrounds[i % len(backgrounds)])
        for i, (shape, motion) in enumerate(pairs)
    )


def publish(name: str, out: Path) -> None:
    """Writes weights, config, pipeline settings, stored prompts and the record of the training.

    Raises:
        ValueError: the model has not grown to its final depth yet.
    """
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    module, task = {"emoji": (emoji, emoji.EmojiTask), "clips": (clips, clips.ClipsTask)}[name]
    stage = module.STAGES[checkpoint["stage"]]
    if not stage.grown:
        raise ValueError(f"stage {checkpoint['stage']} trains a shallow model; publish at a later one")
    folder = PACKAGE / name
    folder.mkdir(exist_ok=True)
    export(folder, task(None).build(True), checkpoint["average"])
    (folder / "pipeline.json").write_text(json.dumps(PIPELINES[name], indent=2) + "\n")
    store(["", *(EMOJI if name == "emoji" else clips_prompts())], Encoder.load(), folder / "prompts.safetensors")
    record = {"stage": checkpoint["stage"], "samples_in_stage": checkpoint["seen"], "log": checkpoint["log"]}
    (folder / "training.json").write_text(json.dumps(record) + "\n")
    samples(name).save(folder / "samples.png")


def samples(name: str) -> Image.Image:
    """The picture in the model's card: 28 steps with guidance at scale 3, from the first seed.

    Emoji are in the order of the stored prompts, six in a row; clips are every sixth prompt, with all frames.
    """
    pipeline = duca_compile_models.load(name)
    prompts = [prompt for prompt in pipeline.prompts.stored if prompt]
    options = {"num_inference_steps": 28, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    if name == "emoji":
        images = pipeline(prompts, negative_prompt=[""] * len(prompts), true_cfg_scale=3.0, **options).images
        tiles = images.reshape(-1, 6, *images.shape[1:])
    else:
        tiles = np.asarray(pipeline(prompts[::6], guidance_scale=3.0, **options).frames)
    rows, columns, height, width, _ = tiles.shape
    picture = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype("uint8"))
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(PIPELINES))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the training")
    args = parser.parse_args()
    publish(args.name, args.out)


if __name__ == "__main__":
    main()
