"""How far each policy takes the embedded model from its uncached images, beside simply running fewer steps.

    python benchmarks/quality.py --out benchmarks/results/quality.json

PSNR is to the uncached images of the same noise and the full number of steps, over the pixel range; it says how much
changed, not whether the picture is good. The plain rows run the uncached loop with fewer steps. Nothing is timed here:
the speed-up is the ratio of FLOPs, and loop.py says how much of that is reached.
"""

from __future__ import annotations

import argparse
import json
import platform
from math import log10
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import duca_compile
from duca_compile import FORA, DuCa, Policy, Uncached
from duca_compile.demo import DemoModel


def policies() -> list[Policy]:
    chosen: list[Policy] = []
    for interval in (3, 5):
        chosen.append(FORA(interval))
        for selection in ("random", "v_norm", "attention"):
            chosen.append(DuCa(interval, fresh_ratio=0.1, selection=selection))
        chosen.append(DuCa(interval, fresh_ratio=0.1, selection="random", first="skip"))
        chosen.append(DuCa(interval, fresh_ratio=0.4, selection="random"))
    return chosen


def label(policy: Policy) -> str:
    if not isinstance(policy, DuCa) or policy.selection is None:
        return policy.name
    selection = policy.selection
    kind = selection if isinstance(selection, str) else selection.kind
    return f"{policy.name} {kind}, ratio {policy.fresh_ratio:g}, {policy.first} first"


def rows(demo: DemoModel, steps: int, seeds: list[int], progress: Progress) -> list[dict[str, Any]]:
    plain = duca_compile.optimize(demo.transformer, Uncached(), "eager")

    def run(policy: Policy, count: int, name: str) -> tuple[list[Tensor], float]:
        cached = not isinstance(policy, Uncached)
        model = duca_compile.optimize(demo.transformer, policy, "eager", steps) if cached else plain
        task = progress.add_task(f"{steps} steps: {name}", total=len(seeds))
        images, flops = [], 0.0
        for seed in seeds:
            model.reset()
            images.append(demo.sample(model, count, demo.noise(seed), lambda seconds: None))
            flops += sum(executed.flops for executed in model.history)
            progress.advance(task)
        return images, flops

    reference, flops = run(Uncached(), steps, "uncached")
    found: list[dict[str, Any]] = []

    def add(name: str, images: list[Tensor], own_flops: float) -> None:
        error = sum((a - b).square().mean().item() for a, b in zip(images, reference, strict=True)) / len(images)
        found.append({"steps": steps, "run": name, "flop_ideal": flops / own_flops, "psnr": 10 * log10(4 / error)})

    for policy in policies():
        add(label(policy), *run(policy, steps, label(policy)))
    for interval in (3, 4, 5):
        count = -(-steps // interval)
        add(f"plain, {count} steps", *run(Uncached(), count, f"plain, {count} steps"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--seeds", type=int, default=4, help="runs of one image for each class")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    demo = DemoModel.load()
    console = Console()
    with Progress(console=console) as progress:
        found = [row for steps in args.steps for row in rows(demo, steps, list(range(args.seeds)), progress)]
    table = Table("steps", "run", "FLOP-ideal", "PSNR")
    for row in found:
        cells = (f"{row['flop_ideal']:.2f}x", f"{row['psnr']:.1f} dB")
        table.add_row(str(row["steps"]), row["run"], *cells)
    console.print(table)
    if args.out is not None:
        surroundings = {"torch": torch.__version__, "machine": platform.machine(), "threads": args.threads}
        result = {"seeds": args.seeds, "classes": len(demo.class_names), "surroundings": surroundings, "rows": found}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
