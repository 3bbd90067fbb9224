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
import emoji
import torch
from clips_data import BACKGROUNDS, COLOURS, MOTIONS, ROUND, SHAPES, sentence
from duca_compile_models.text import Encoder, store
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(PIPELINES))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the training")
    args = parser.parse_args()
    publish(args.name, args.out)


if __name__ == "__main__":
    main()
