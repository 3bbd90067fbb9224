"""Compares forecasts on the embedded model: how close their images come, for the full steps that they need.

    python examples/compare_forecasts.py --steps 20

Prints a row for each setting of TaylorSeer, of TaylorSeer with relational estimation, and of RFC: the steps, how many
were full, and the PSNR of the images to the uncached ones. Plain loops with as many steps are the baseline.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import duca_compile
from duca_compile import RFC, Policy, TaylorSeer, Uncached
from duca_compile.app.demo import DemoModel
from duca_compile.policies import StepKind


def policies() -> Iterator[Policy]:
    for interval in (3, 5):
        for order in (1, 2):
            yield TaylorSeer(interval, order)
            yield TaylorSeer(interval, order, relational=True)
    for threshold in (0.1, 0.2, 0.5):
        for order in (1, 2):
            yield RFC(threshold, order)


def sampled(demo: DemoModel, policy: Policy, steps: int, seed: int) -> tuple[Tensor, str]:
    """The images, and the letter of each step that ran."""
    model = duca_compile.optimize(demo.transformer, policy, "eager", steps)
    images = demo.sample(model, steps, demo.noise(seed), lambda seconds: None)
    return images, "".join(executed.kind.letter for executed in model.history)


def psnr(images: Tensor, reference: Tensor) -> float:
    return 10 * math.log10(4 / float((images - reference).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    demo = DemoModel.load()
    reference, _ = sampled(demo, Uncached(), chosen.steps, chosen.seed)
    table = Table("policy", "steps", "full", "PSNR", "PSNR of as many plain steps")
    plain: dict[int, float] = {}
    for policy in track(list(policies()), console=Console(stderr=True), transient=True):
        images, letters = sampled(demo, policy, chosen.steps, chosen.seed)
        full = letters.count(StepKind.FULL.letter)
        if full not in plain:
            plain[full] = psnr(sampled(demo, Uncached(), full, chosen.seed)[0], reference)
        table.add_row(policy.name, letters, str(full), f"{psnr(images, reference):.1f} dB", f"{plain[full]:.1f} dB")
    Console(width=140).print(table)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
