"""Compares the OpenVINO backend with Inductor and eager: time of each kind of step on one thread.

    python benchmarks/backends.py --out benchmarks/results/backends.json

The models are those of workloads.py. The backends take turns within each round, so that load affects all of them
equally. Each round has full, partial, reuse and skip steps in turn; the first round, which compiles, is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from measure import EachKind, Spread, of_pairs, surroundings, version, write
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS, Workload, quick

import duca_compile

BACKENDS = ("inductor", "openvino", "eager")
KINDS = ("full", "partial", "reuse", "skip")


@torch.no_grad()
def time_steps(workload: Workload, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step for each backend and kind, and Inductor's time over it."""
    model = workload.build(seed=0)
    arguments, noise = workload.arguments(seed=0), workload.noise(seed=0)
    models = {name: duca_compile.optimize(model, EachKind(), name, workload.steps, strict=True) for name in BACKENDS}
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in models}
    for turn in range(rounds + 1):
        for name, each in models.items():
            each.reset()
            found: list[float] = []

            def timed(*args: Any, each: Any = each, found: list[float] = found, **kwargs: Any) -> Any:
                started = time.perf_counter()
                output = each(*args, **kwargs)
                found.append(time.perf_counter() - started)
                return output

            workload.denoise(timed, arguments, noise, calls=len(KINDS))
            if turn:
                for executed, seconds in zip(each.history, found, strict=True):
                    times[name][executed.kind.value].append(seconds)
    return {
        name: {
            kind: {
                "seconds": vars(Spread.of(own[kind])),
                "of_inductor": vars(of_pairs(own[kind], times["inductor"][kind])),
            }
            for kind in KINDS
        }
        for name, own in times.items()
    }


def show(name: str, found: dict[str, Any]) -> None:
    table = Table(f"{name}: ms, and the share of Inductor's time", *KINDS)
    for backend, own in found.items():
        cells = [f"{1e3 * own[k]['seconds']['median']:.2f} ({own[k]['of_inductor']['median']:.2f})" for k in KINDS]
        table.add_row(backend, *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the OpenVINO backend.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", default="DiT-S/2", choices=[*WORKLOADS, *quick()])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = time_steps((WORKLOADS | quick())[options.model], options.rounds)
    show(options.model, found)
    if options.out is not None:
        about = surroundings(1) | {"openvino": version("openvino")}
        write({"surroundings": about, "model": options.model, "steps": found}, options.out)


if __name__ == "__main__":
    main()
