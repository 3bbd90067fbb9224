"""Compares an artifact in ONNX Runtime with the Inductor backend: time of a loop on one thread, and memory.

    python benchmarks/artifact.py --out benchmarks/results/artifact.json

The embedded model runs DuCa with its default parameters over 50 steps of DDIM, for all classes, with both halves of
guidance in one batch. Loops take turns, so that load affects them equally; the first loop of each is not counted.
Memory is the proportional set size that loading and running an artifact adds to a process of its own, in which another
artifact has run before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from measure import Spread, of_pairs, surroundings, version, write
from rich.console import Console
from rich.table import Table

import duca_compile
from duca_compile.app.demo import DemoModel

STEPS, WIDTH = 50, 1024
MEMORY = """
import json, sys
import numpy as np
import duca_compile

def run(path, share):
    artifact = duca_compile.load(path, threads=1, share_weights=share, verify=False)
    shape = artifact.manifest.inputs[[s.name for s in artifact.manifest.inputs].index("hidden_states")].at(1)
    for t in (999, 979, 959, 939):
        artifact(np.zeros(shape, np.float32), np.full(1, t), np.zeros(1, np.int64))
    return artifact

def pss():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024

small = run(sys.argv[1], True)
before = pss()
large = run(sys.argv[2], sys.argv[3] == "shared")
print(json.dumps({"added": pss() - before, "pool": large.manifest.weights.file.bytes}))
"""


def export_demo(demo: DemoModel, path: Path) -> None:
    model = duca_compile.optimize(demo.transformer, "duca", "eager", STEPS)
    labels = torch.arange(2)
    arguments = {"hidden_states": demo.noise(0)[:2], "timestep": torch.full_like(labels, 999), "class_labels": labels}
    duca_compile.save(model, path, arguments)


def export_wide(path: Path) -> None:
    """A model of two wide blocks, with enough weights for copies of them to show."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=WIDTH // 16,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    fast = duca_compile.optimize(model.eval(), "duca", "eager", STEPS)
    labels = torch.arange(2)
    latent = torch.zeros(2, 2, 8, 8)
    duca_compile.save(fast, path, {"hidden_states": latent, "timestep": labels + 999, "class_labels": labels})


def time_loops(demo: DemoModel, folder: Path, rounds: int) -> dict[str, Any]:
    """For each way of running, the model's seconds in each loop, and the median milliseconds of each kind of step."""
    ways: dict[str, Any] = {
        "inductor": duca_compile.optimize(demo.transformer, "duca", "inductor", STEPS, strict=True),
        "onnxruntime": duca_compile.load(folder, threads=1),
        "onnxruntime, copied weights": duca_compile.load(folder, threads=1, share_weights=False),
    }
    loops: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ways}
    for turn in range(rounds + 1):
        for name, model in ways.items():
            times: list[float] = []
            model.reset()
            demo.sample(model, STEPS, demo.noise(0), times.append)
            if turn:
                loops[name].append(sum(times))
                for executed, seconds in zip(model.history, times, strict=True):
                    kinds[name][executed.kind.value].append(1e3 * seconds)
    return {
        name: {
            "seconds": vars(Spread.of(loops[name])),
            "ratio_to_inductor": vars(of_pairs(loops[name], loops["inductor"])),
            "step_milliseconds": {kind: statistics.median(times) for kind, times in kinds[name].items()},
        }
        for name in ways
    }


def measure_memory(small: Path, large: Path) -> dict[str, Any]:
    found = {}
    for way in ("copied", "shared"):
        command = [sys.executable, "-c", MEMORY, str(small), str(large), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout)
    return found


def show(found: dict[str, Any]) -> None:
    table = Table("way", "loop, s", "ratio to Inductor", "full, ms", "partial, ms", "skip, ms")
    for name, own in found["loops"].items():
        steps = own["step_milliseconds"]
        ratio = own["ratio_to_inductor"]
        cells = [f"{own['seconds']['median']:.3f}", f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"]
        table.add_row(name, *cells, *(f"{steps[kind]:.2f}" for kind in ("full", "partial", "skip")))
    console = Console()
    console.print(table)
    for way, own in found["memory"].items():
        console.print(
            f"weights {way}: {own['added'] / own['pool']:.2f} times the pool of {own['pool'] / 2**20:.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times an artifact against the Inductor backend.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    demo = DemoModel.load()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "demo", Path(folder) / "wide"
        export_demo(demo, small)
        export_wide(large)
        found = {
            "surroundings": surroundings(1) | {"onnxruntime": version("onnxruntime")},
            "loops": time_loops(demo, small, arguments.rounds),
            "memory": measure_memory(small, large),
        }
    show(found)
    if arguments.out is not None:
        write(found, arguments.out)


if __name__ == "__main__":
    main()
