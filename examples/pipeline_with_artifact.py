"""Runs a diffusers pipeline with an artifact in place of its transformer.

    duca-compile export demo-artifact --steps 20
    python examples/pipeline_with_artifact.py demo-artifact --out boots.png

The pipeline is a small one around the embedded model, which works on pixels and has no autoencoder. The same line works
for your own pipeline: ``pipe.transformer = duca_compile.load(folder)``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput

import duca_compile
from duca_compile.app.demo import DemoModel


class DemoPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional generation with classifier-free guidance; images are (batch, height, width, 1) in [0, 1]."""

    def __init__(self, transformer: Any, scheduler: DDIMScheduler, null_class: int) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(null_class=null_class)

    @torch.no_grad()
    def __call__(
        self, class_labels: list[int], num_inference_steps: int, guidance_scale: float, generator: torch.Generator
    ) -> ImagePipelineOutput:
        config = self.transformer.config
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        latent = torch.randn(shape, generator=generator, dtype=self.transformer.dtype)
        labels = torch.tensor([*class_labels, *[self.config.null_class] * len(class_labels)])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            both = torch.cat([latent, latent])
            output = self.transformer(both, timestep=t.expand(len(both)), class_labels=labels).sample
            conditional, unconditional = output.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
            latent = self.scheduler.step(guided, t, latent).prev_sample
        return ImagePipelineOutput(images=(latent.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a diffusers pipeline whose transformer is an artifact.")
    parser.add_argument("artifact", type=Path, help="the folder that `duca-compile export` wrote")
    parser.add_argument("--out", type=Path, default=Path("pipeline.png"))
    arguments = parser.parse_args()
    demo = DemoModel.load()
    pipe = DemoPipeline(demo.transformer, DDIMScheduler(**demo.scheduler), demo.null_class)
    pipe.transformer = artifact = duca_compile.load(arguments.artifact)
    steps = artifact.manifest.schedule.num_inference_steps
    images = pipe([9] * 4, steps, demo.guidance_scale, torch.Generator().manual_seed(0)).images
    pipe.numpy_to_pil(images.reshape(1, -1, images.shape[2], 1))[0].save(arguments.out)
    print(f"steps: {''.join(executed.kind.letter for executed in artifact.history)}; picture: {arguments.out}")


if __name__ == "__main__":
    main()
