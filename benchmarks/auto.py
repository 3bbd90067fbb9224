"""What ``Auto`` learns on the model in the package, and how close the next requests are to the uncached ones.

For each number of steps and error, the first request has other noise than the next ones. Of these, one has the same
classes, one has others, and one has other classes and half as much guidance again.
``python benchmarks/auto.py --steps 10 20 50`` prints the table of docs/methods/auto.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import duca_compile
from duca_compile import Auto
from duca_compile.app.demo import DemoModel
from duca_compile.policies.auto import DEFAULT_ERROR

LEARNT, OTHERS = (0, 1, 2, 3), (5, 6, 7, 9)  # classes
PEAK = 2.0  # pixels are in [-1, 1]
SEED = 100  # of the noise of the first request


def sample(
    demo: DemoModel, model: Callable[..., Any], steps: int, seed: int, classes: tuple[int, ...], more: float
) -> Tensor:
    """One loop; ``more`` multiplies the guidance scale."""
    scheduler = DDIMScheduler(**demo.scheduler)
    scheduler.set_timesteps(steps)
    latent = demo.noise(seed)[: len(classes)]
    labels = torch.tensor([*classes, *[demo.null_class] * len(classes)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model(torch.cat([latent] * 2), timestep=t.expand(len(labels)), class_labels=labels).sample
            conditional, plain = output.chunk(2)
            guided = plain + more * demo.guidance_scale * (conditional - plain)
            latent = scheduler.step(guided, t, latent).prev_sample
    return latent.clamp(-1, 1)


def psnr(one: Tensor, other: Tensor) -> float:
    return 10 * math.log10(PEAK**2 / float((one - other).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--error", type=float, nargs="+", default=[DEFAULT_ERROR])
    options = parser.parse_args()
    demo = DemoModel.load(torch.device("cpu"))
    plain = demo.transformer
    print("| error | steps | full | learnt | request | PSNR | fewer plain steps |\n|---|---|---|---|---|---|---|")
    for steps in options.steps:
        for error in options.error:
            fast = duca_compile.optimize(plain, Auto(error), "eager", steps)
            sample(demo, fast, steps, SEED, LEARNT, 1.0)
            (learnt,) = fast.learnt().known
            for seed, (name, classes, more) in enumerate(
                [("other noise", LEARNT, 1.0), ("other classes", OTHERS, 1.0), ("more guidance", OTHERS, 1.5)]
            ):
                found = sample(demo, fast, steps, seed, classes, more)
                full = sum(each.kind.letter == "F" for each in fast.history)
                wanted = sample(demo, plain, steps, seed, classes, more)
                fewer = sample(demo, plain, full, seed, classes, more)
                cells = f"{error:g} | {steps} | {full} | {learnt.error:.3f} | {name}"
                print(f"| {cells} | {psnr(found, wanted):.1f} dB | {psnr(fewer, wanted):.1f} dB |", flush=True)


if __name__ == "__main__":
    main()
