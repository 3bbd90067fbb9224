"""Write benchmarks/README.md from the results of the benchmarks, so that each figure in it is from a file.

python benchmarks/report.py benchmarks/results > benchmarks/README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PLAIN = {"eager": "model, eager", "torch.compile": "model, torch.compile"}
LIMITS = {"reuse": 0.05, "skip": 0.01}  # of a full step
EFFICIENCY = 0.9
HOST = 0.2e-3  # seconds
CAPTURE_SECONDS, CAPTURE_MEMORY = 20.0, 1.3  # the latter over the memory of the parameters

INTRODUCTION = """# Benchmarks

`quality.py` measures how far each policy takes the embedded model from its uncached images.
`loop.py` times the variants of a larger model and its whole denoising loop. Its weights are random, so it says nothing
of images. It needs a C++ compiler and takes about seven minutes on one free core. `host.py` times what is around the
compiled graphs, on a tiny model of many blocks, in two minutes. `scale.py` measures what comes before compiling, on a
model of real size; it takes a minute, and 4 GB of memory.

```
OMP_NUM_THREADS=1 .venv/bin/python benchmarks/loop.py --rounds 3 --out benchmarks/results/loop.json
OMP_NUM_THREADS=1 .venv/bin/python benchmarks/host.py --out benchmarks/results/host.json
OMP_NUM_THREADS=1 .venv/bin/python benchmarks/scale.py --out benchmarks/results/scale.json
.venv/bin/python benchmarks/quality.py --seeds 2 --out benchmarks/results/quality.json
.venv/bin/python benchmarks/report.py benchmarks/results > benchmarks/README.md
```

The last command writes this file. All figures below are from [results](results).
"""

METHOD = """
Everything is interleaved in one process: each round has one call of each variant, or one loop of each kind. A first
round, which compiles, is not counted. Times are wall-clock medians with the interquartile range. CPU time was taken
too: it leaves out waiting for a core that another process has. Where the two differ, CPU time is the one to read."""


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def spread(seconds: dict[str, Any], scale: float = 1.0) -> str:
    return f"{scale * seconds['median']:.2f} ({scale * seconds['q1']:.2f} to {scale * seconds['q3']:.2f})"


def verdict(met: bool, target: str) -> str:
    return f"{target}: {'met' if met else 'missed'}"


def setting(found: dict[str, Any]) -> list[str]:
    where, model = found["surroundings"], found["model"]
    width = model["num_attention_heads"] * model["attention_head_dim"]
    size = f"{model['num_layers']} blocks, width {width}, {model['tokens']} tokens, batch {model['batch']}"
    before, after = found["load_average_at_start"][0], found["load_average_at_end"][0]
    software = f"Python {where['python']}, torch {where['torch']}, diffusers {where['diffusers']}"
    machine = f"{where['cpu']}, {where['cores']} cores, {', '.join(where['vector_extensions'])}"
    return [
        "## What was measured\n",
        row("", ""),
        "|---|---|",
        row("model", f"diffusers `{model['class']}`: {size} (both halves of guidance), float32"),
        row("loop", f"diffusers `DDIMScheduler`, {found['arguments']['steps']} steps"),
        row("seed", f"{found['arguments']['seed']}, of weights and latents"),
        row("machine", f"{machine}; {where['threads']} thread used"),
        row("software", f"{software}, duca_compile at {where['commit']}"),
        row("load average", f"{before:.1f} at the start, {after:.1f} at the end, with other processes on the machine"),
        METHOD,
    ]


def calls(variants: dict[str, Any]) -> list[str]:
    lines = [
        "\n## One call\n",
        f"Medians of {variants['full']['seconds']['runs']} calls. *Host* is the wall-clock time of a call outside",
        "of the compiled variant: telling the step, planning, choosing tokens, handing caches over.\n",
        row("call", "time, ms (IQR)", "of full", "by CPU time", "FLOPs of full", "host, ms", "target"),
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in variants.items():
        host, flops, limit = each["host_seconds_outside_the_graph"], each["flops_of_full"], LIMITS.get(name)
        share, by_cpu = each["of_full"], each["of_full_by_cpu_time"]
        cells = [PLAIN.get(name, name), spread(each["seconds"], 1e3), f"{share:.4f}", f"{by_cpu:.4f}"]
        cells.append("" if flops is None else f"{flops:.4f}")
        cells.append("" if host is None else f"{1e3 * host['median']:.2f}")
        cells.append("" if limit is None else verdict(max(share, by_cpu) <= limit, f"at most {limit}"))
        lines.append(row(*cells))
    return lines


def loops(found: dict[str, Any]) -> list[str]:
    lines = [
        "\n## The whole loop\n",
        f"Medians of {found['eager']['seconds']['runs']} loops. Speed-up is over `torch.compile` of the plain model,",
        "as the median of the ratios within each round. The ideal is the ratio of FLOPs; efficiency is speed-up over",
        "ideal.",
        f"The target is an efficiency of at least {EFFICIENCY}, by both clocks.\n",
        row("loop", "time, s (IQR)", "CPU time, s", "speed-up", "by CPU time", "ideal", "efficiency", "by CPU time"),
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, each in found.items():
        cells = [PLAIN.get(name, name), spread(each["seconds"]), f"{each['cpu_seconds']['median']:.2f}"]
        cells += [f"{each['speedup']:.2f}x", f"{each['speedup_by_cpu_time']:.2f}x"]
        if "flop_ideal" not in each:
            lines.append(row(*cells, "", "", ""))
            continue
        wall, cpu, ideal = each["efficiency"], each["efficiency_by_cpu_time"], each["flop_ideal"]
        lines.append(row(*cells, f"{ideal:.2f}x", f"{wall:.2f}", f"{cpu:.2f}"))
        kinds = ", ".join(f"{count} {kind}" for kind, count in each["calls"].items())
        target = f"; {verdict(min(wall, cpu) >= EFFICIENCY, 'target')}" if ideal > 1 else ""
        policy = f" (`{each['policy']}`)" if "policy" in each else ""
        notes.append(f"- {name}{policy}: {kinds}; caches {each['cache_bytes'] / 2**20:.2f} MiB{target}.")
    if any(
        each.get("efficiency", 0) > max(1.02, each.get("efficiency_by_cpu_time", 0) + 0.02) for each in found.values()
    ):
        notes.append("\nWall-clock efficiencies above 1 are not real: the plain loops waited longer for a core.")
    return [*lines, "", *notes]


def host(found: dict[str, Any]) -> list[str]:
    model, before, after = found["model"], found["load_average_at_start"][0], found["load_average_at_end"][0]
    blocks = model["double"] + model["single"]
    lines = [
        "\n## The host's work per step\n",
        f"A FLUX of {blocks} blocks ({model['double']} double, {model['single']} single), so small that its graphs",
        "take next to no time, under `host.py`: one call of each kind in turn, so that each finds the processor's",
        f"caches as the one before left them. Load {before:.1f} at the start, {after:.1f} at the end. *Outside*",
        "is what is left of a call when the compiled graph's own time is taken off.\n",
        row("step", "call, ms (IQR)", "outside, ms (IQR)", "target"),
        "|---|---|---|---|",
    ]
    for kind, each in found["variants"].items():
        outside = each["host_seconds_outside_the_graph"]
        met = "" if kind == "full" else verdict(outside["median"] <= HOST, f"at most {1e3 * HOST:.1f} ms")
        lines.append(row(kind, spread(each["seconds"], 1e3), spread(outside, 1e3), met))
    return [
        *lines,
        "",
        "A partial step also chooses tokens, and hands over one index tensor for each branch that it recomputes.",
    ]


def scale(found: dict[str, Any]) -> list[str]:
    sizes, dit, flux = found["arguments"], found["dit"], found["flux"]
    width, tokens = sizes["heads"] * sizes["head_dim"], (sizes["size"] // 2) ** 2
    before, after = dit["load_average_at_start"][0], flux["load_average_at_end"][0]
    base = dit["bytes_before_the_model"] + dit["parameter_bytes"]
    weights = f"{dit['parameters'] / 1e6:.0f} M"
    lines = [
        "\n## Capturing a model of real size\n",
        "What precedes compiling, under `scale.py`: the first call captures the model, analyses the graph, checks what",
        "the analysis says of tokens, and rewrites the graph to the variants of `DuCa(interval=5)` and FORA's reuse",
        f"step. The DiT is diffusers' `DiTTransformer2DModel`, of {weights} parameters in float32 ({sizes['layers']}",
        f"blocks, width {width}, {tokens} tokens, batch {sizes['batch']}, random weights), {dit['nodes']} nodes; the",
        f"FLUX is that of `host.py`, of {flux['nodes']} nodes. Each has a process of its own, and one thread. Load",
        f"{before:.1f} at the start, {after:.1f} at the end. *Memory* is the process's highest in that stage, over",
        "what it was before the model was built, less the parameters: all that is held besides them, torch.export's",
        "own modules included.\n",
        row("stage", "DiT, s", "CPU time, s", "memory, MiB", "FLUX, s", "CPU time, s"),
        "|---|---|---|---|---|---|",
    ]
    columns = [each["stages"] | {"all": each["total"]} for each in (dit, flux)]
    for name, own in columns[0].items():
        other = columns[1][name]
        cells = [f"{own['wall']:.2f}", f"{own['cpu']:.2f}", f"{(own['peak_bytes'] - base) / 2**20:.0f}"]
        lines.append(row(name, *cells, f"{other['wall']:.2f}", f"{other['cpu']:.2f}"))
    seconds, share = dit["total"]["wall"], dit["memory_over_parameters"]
    model = sum(dit["stages"][name]["cpu"] for name in ("first call", "verification")) / dit["total"]["cpu"]
    return [
        *lines,
        "",
        f"- Time: {seconds:.1f} s, {dit['total']['cpu']:.1f} s by CPU time;",
        f"  {verdict(seconds < CAPTURE_SECONDS, f'under {CAPTURE_SECONDS:.0f} s')}.",
        f"- Memory, parameters included: {share:.3f} times theirs;",
        f"  {verdict(share < CAPTURE_MEMORY, f'under {CAPTURE_MEMORY}')}.",
        f"- {model:.0%} of the DiT's CPU time is the model's own products: once in the first call, which makes tables",
        "  that a trace must not make, and once in the verification, with a quarter of the tokens again. The FLUX's",
        "  time is torch.export's.",
    ]


def losses(found: dict[str, Any]) -> list[str]:
    partial, reuse = found["variants"]["partial"], found["variants"]["reuse"]
    uncached = found["loops"]["duca_compile, uncached"]
    first = [each["first_seconds"] for each in found["loops"].values() if "first_seconds" in each]
    return [
        "\n## What loses\n",
        f"- Uncached, there is little to gain: {uncached['speedup_by_cpu_time']:.2f}x of `torch.compile`, by CPU time.",
        f"- A partial step takes {partial['of_full']:.3f} of a full one where its FLOPs are",
        f"  {partial['flops_of_full']:.3f}; a reuse step {reuse['of_full']:.3f} where they are",
        f"  {reuse['flops_of_full']:.3f}. Norms, gates, gathers and scatters are not FLOPs, and products of few",
        "  rows read every weight all the same.",
        *(f"- The first loop also compiles, and takes up to {seconds:.0f} s." for seconds in sorted(first)[-1:]),
    ]


def quality(found: dict[str, Any]) -> list[str]:
    images = found["seeds"] * found["classes"]
    cells = [(str(r["steps"]), r["run"], f"{r['flop_ideal']:.2f}x", f"{r['psnr']:.1f} dB") for r in found["rows"]]
    return [
        "\n## Quality on the embedded model\n",
        f"{images} images ({found['seeds']} seeds of each class), DDIM, eager, torch {found['surroundings']['torch']}.",
        "PSNR is to the uncached images of the same noise and all steps; it says how much changed, not how good it is.",
        "*plain* is the uncached loop with fewer steps. *Ideal* is the ratio of FLOPs.\n",
        row("steps", "run", "ideal", "PSNR"),
        "|---|---|---|---|",
        *(row(*each) for each in cells),
        "",
        "Read each policy beside the plain rows of about its speed: what it gains over them is what caching is worth",
        "on this model. It is small, and its 28x28 images of one garment are settled early.",
    ]


def main() -> None:
    folder = Path(sys.argv[1])
    found = json.loads((folder / "loop.json").read_text())
    parts = [*setting(found), *calls(found["variants"]), *loops(found["loops"]), *losses(found)]
    parts += host(json.loads((folder / "host.json").read_text()))
    parts += scale(json.loads((folder / "scale.json").read_text()))
    parts += quality(json.loads((folder / "quality.json").read_text()))
    print(INTRODUCTION, *parts, sep="\n")


if __name__ == "__main__":
    main()
