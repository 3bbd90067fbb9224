"""What ``Auto`` learns on the model in the package, and how close the next requests are to the uncached ones.

For each number of steps and error, the first request has other noise than the next ones. Of these, one has the same
classes, one has others, and one has other classes and half as much guidance again.
``python benchmarks/auto.py`` prints the table of docs/methods/auto.md. ``--model emoji`` takes the emoji model of
duca-compile-models, where other prompts are in the place of other classes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import duca_compile
from duca_compile import Auto
from duca_compile.app.demo import DemoModel
from duca_compile.policies import StepKind

SEED = 100  # of the noise of the first request


class Package:
    """The model in the package, with guidance in one batch."""

    peak = 2.0  # pixels are in [-1, 1]

    def __init__(self) -> None:
        self._demo = DemoModel.load(torch.device("cpu"))
        self._model = self._demo.transformer

    def optimize(self, error: float | None, steps: int) -> Any:
        """Takes the model as it is, or with ``Auto``, from now on; returns what knows its history."""
        plain = self._demo.transformer
        self._model = plain if error is None else duca_compile.optimize(plain, Auto(error), "eager", steps)
        return self._model

    def draw(self, steps: int, seed: int, others: bool, more: float) -> Tensor:
        demo, classes = self._demo, (5, 6, 7, 9) if others else (0, 1, 2, 3)
        scheduler = DDIMScheduler(**demo.scheduler)
        scheduler.set_timesteps(steps)
        latent = demo.noise(seed)[: len(classes)]
        labels = torch.tensor([*classes, *[demo.null_class] * len(classes)])
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = self._model(torch.cat([latent] * 2), timestep=t.expand(len(labels)), class_labels=labels)
                conditional, plain = output.sample.chunk(2)
                guided = plain + more * demo.guidance_scale * (conditional - plain)
                latent = scheduler.step(guided, t, latent).prev_sample
        return latent.clamp(-1, 1)


class Emoji:
    """The emoji model, with guidance in two calls."""

    peak = 1.0

    def __init__(self) -> None:
        from duca_compile_models import load

        self._pipe = load("emoji")
        self._pipe.set_progress_bar_config(disable=True)
        self._prompts = [prompt for prompt in self._pipe.prompts.stored if prompt]
        self._plain = self._pipe.transformer

    def optimize(self, error: float | None, steps: int) -> Any:
        del steps
        if self._pipe.transformer is not self._plain:
            duca_compile.restore(self._pipe)
        if error is not None:
            duca_compile.optimize(self._pipe, Auto(error), "eager")
        return self._pipe.transformer

    def draw(self, steps: int, seed: int, others: bool, more: float) -> Tensor:
        prompts = self._prompts[3:5] if others else self._prompts[:2]
        options = {"negative_prompt": "", "true_cfg_scale": 3.0 * more, "output_type": "pt"}
        noise = torch.Generator().manual_seed(seed)
        images: Tensor = self._pipe(prompts, num_inference_steps=steps, generator=noise, **options).images
        return images


REQUESTS = ((False, 1.0), (True, 1.0), (True, 1.5))  # whether prompts are others, and times the guidance scale


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("package", "emoji"), default="package")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--error", type=float, nargs="+", default=[0.09, 0.12, 0.16])
    options = parser.parse_args()
    model = Package() if options.model == "package" else Emoji()

    def psnr(ones: Sequence[Tensor], others: Sequence[Tensor]) -> str:
        errors = [float((one - other).square().mean()) for one, other in zip(ones, others, strict=True)]
        return ", ".join(f"{10 * math.log10(model.peak**2 / error):.1f}" for error in errors) + " dB"

    print("| steps | error | learnt | full steps | PSNR | fewer plain steps |\n|---|---|---|---|---|---|")
    for steps in options.steps:
        model.optimize(None, steps)
        wanted = [model.draw(steps, seed, others, more) for seed, (others, more) in enumerate(REQUESTS)]
        for error in options.error:
            fast = model.optimize(error, steps)
            model.draw(steps, SEED, False, 1.0)
            (learnt,) = fast.learnt().known
            found, full = [], []
            for seed, (others, more) in enumerate(REQUESTS):
                found.append(model.draw(steps, seed, others, more))
                full.append(len({each.step for each in fast.history if each.kind is StepKind.FULL}))
            model.optimize(None, steps)
            fewer = [model.draw(full[seed], seed, others, more) for seed, (others, more) in enumerate(REQUESTS)]
            counts = ", ".join(map(str, full if len({*full}) > 1 else full[:1]))
            cells = f"{steps} | {error:g} | {learnt.error:.3f} | {counts}"
            print(f"| {cells} | {psnr(found, wanted)} | {psnr(fewer, wanted)} |", flush=True)


if __name__ == "__main__":
    main()
