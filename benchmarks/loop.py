"""Time the variants and the whole denoising loop of a DiT with random weights, on a CPU.

    python benchmarks/loop.py --out benchmarks/results/loop.json

Everything that is compared is measured interleaved in one process. The weights are random, so nothing is said here
about images: this measures time alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import duca_compile
from duca_compile import DuCa, OptimizedModel, Policy, Uncached, published
from duca_compile.policies import Step, StepKind
from duca_compile.runtime.dispatcher import Program

BATCH, CHANNELS, SIZE, CLASSES = 2, 4, 32, 10
MODEL = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 12,
    "sample_size": SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": CLASSES,
    "norm_eps": 1e-6,
}
GUIDANCE = 4.0
KINDS = (StepKind.FULL, StepKind.PARTIAL, StepKind.REUSE, StepKind.SKIP)
TARGETS = {StepKind.REUSE: 0.05, StepKind.SKIP: 0.01}  # of a full step
TARGET_EFFICIENCY = 0.9

Model = Callable[..., Any]


@dataclass(frozen=True)
class Spread:
    """Seconds of repeated runs."""

    median: float
    q1: float
    q3: float
    fastest: float
    runs: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Spread:
        q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        return Spread(statistics.median(seconds), q1, q3, min(seconds), len(seconds))

    def milliseconds(self) -> str:
        return f"{1e3 * self.median:.2f} ({1e3 * self.q1:.2f} to {1e3 * self.q3:.2f})"

    def whole_seconds(self) -> str:
        return f"{self.median:.2f} ({self.q1:.2f} to {self.q3:.2f})"


@dataclass(frozen=True)
class EachKind(DuCa):
    """Full, partial, reuse and skip in turn, so that all four are timed under the same load."""

    def steps(self, total: int | None) -> Iterator[Step]:
        for kind in cycle(KINDS):
            yield Step(kind, interval=len(KINDS), ratio=self.fresh_ratio)


class InnerTime:
    """Wraps every compiled variant of an optimized model and adds up the time spent inside them."""

    def __init__(self, model: OptimizedModel) -> None:
        self.seconds = 0.0
        for compiled in model._compiled.values():
            for program in compiled.dispatcher._programs.values():
                self._wrap(program)

    def _wrap(self, program: Program) -> None:
        program.run = self._timed(program.run)

    def _timed(self, run: Model) -> Model:
        def timed(*tensors: Tensor) -> Any:
            started = time.perf_counter()
            results = run(*tensors)
            self.seconds += time.perf_counter() - started
            return results

        return timed


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(**MODEL).eval().requires_grad_(False)


def labels() -> Tensor:
    return torch.tensor([1] * (BATCH // 2) + [CLASSES] * (BATCH // 2))


@dataclass(frozen=True)
class Timing:
    """Wall-clock and CPU seconds of one run; CPU time leaves out waiting for a core that another process has."""

    wall: float
    cpu: float


def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    call(*args, **kwargs)
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def medians_of_pairs(bases: list[float], owns: list[float]) -> float:
    """The median of base over own in each round: what both shared of the machine's load cancels."""
    return statistics.median(base / own for base, own in zip(bases, owns, strict=True))


@torch.no_grad()
def time_variants(plain: dict[str, Model], optimized: OptimizedModel, rounds: int, seed: int) -> dict[str, Any]:
    """One call of each plain model and of each variant per round; the first round compiles and is not counted."""
    generator = torch.Generator().manual_seed(seed)
    timings: dict[str, list[Timing]] = defaultdict(list)
    outside: dict[str, list[float]] = defaultdict(list)
    inner: InnerTime | None = None
    classes = labels()

    def arguments(step: int) -> dict[str, Tensor]:
        latent = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=generator)
        return {"hidden_states": latent, "timestep": torch.full((BATCH,), 999 - step), "class_labels": classes}

    for index in range(rounds + 1):
        found: dict[str, Timing] = {}
        for name, model in plain.items():
            found[name] = timed(model, **arguments(0))
        for kind in KINDS:
            call = arguments(len(KINDS) * index + KINDS.index(kind))
            before = inner.seconds if inner else 0.0
            found[kind.value] = timed(optimized, **call)
            if inner:
                assert inner.seconds > before, "the timed programs did not run"
                outside[kind.value].append(found[kind.value].wall - (inner.seconds - before))
            assert optimized.history[-1].kind is kind
        if index == 0:
            inner = InnerTime(optimized)
            continue
        for name, value in found.items():
            timings[name].append(value)
    wall = {name: [t.wall for t in each] for name, each in timings.items()}
    cpu = {name: [t.cpu for t in each] for name, each in timings.items()}
    full, full_cpu = (statistics.median(each[StepKind.FULL.value]) for each in (wall, cpu))
    flops = {e.kind.value: e.flops for e in optimized.history}
    return {
        name: {
            "seconds": asdict(Spread.of(values)),
            "cpu_seconds": asdict(Spread.of(cpu[name])),
            "of_full": statistics.median(values) / full,
            "of_full_by_cpu_time": statistics.median(cpu[name]) / full_cpu,
            "host_seconds_outside_the_graph": asdict(Spread.of(outside[name])) if name in outside else None,
            "flops": flops.get(name),
            "flops_of_full": flops[name] / flops["full"] if name in flops else None,
        }
        for name, values in wall.items()
    }


@torch.no_grad()
def denoise(model: Model, steps: int, seed: int) -> Tensor:
    """DDIM with classifier-free guidance; both halves share a batch."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    classes = labels()
    latent = torch.randn(BATCH // 2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        output = model(torch.cat([latent, latent]), timestep=timestep.expand(BATCH), class_labels=classes).sample
        conditional, unconditional = output.chunk(2)
        latent = scheduler.step(unconditional + GUIDANCE * (conditional - unconditional), timestep, latent).prev_sample
    return latent


def time_loops(models: dict[str, Model], steps: int, rounds: int, seed: int) -> dict[str, Any]:
    """The whole loop with each model in turn, ``rounds`` times; a first round warms up."""
    wall: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    first: dict[str, float] = {}
    for index in range(rounds + 1):
        for name, model in models.items():
            timing = timed(denoise, model, steps, seed)
            if not index:
                first[name] = timing.wall
            else:
                wall[name].append(timing.wall)
                cpu[name].append(timing.cpu)
    uncached = models["duca_compile, uncached"]
    assert isinstance(uncached, OptimizedModel)
    all_flops = sum(e.flops for e in uncached.history)
    found: dict[str, Any] = {}
    for name, model in models.items():
        row: dict[str, Any] = {
            "seconds": asdict(Spread.of(wall[name])),
            "cpu_seconds": asdict(Spread.of(cpu[name])),
            "first_seconds": first[name],  # with what had to be captured and compiled still
            "speedup": medians_of_pairs(wall["torch.compile"], wall[name]),
            "speedup_by_cpu_time": medians_of_pairs(cpu["torch.compile"], cpu[name]),
        }
        if isinstance(model, OptimizedModel):
            flops = sum(e.flops for e in model.history)
            kinds = [e.kind.value for e in model.history]
            ideal = all_flops / flops
            row |= {
                "policy": repr(model.policy),
                "calls": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
                "flops": flops,
                "flop_ideal": ideal,
                "efficiency": row["speedup"] / ideal,
                "efficiency_by_cpu_time": row["speedup_by_cpu_time"] / ideal,
                "cache_bytes": model.cache_bytes,
            }
        found[name] = row
    return found


def surroundings(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "vector_extensions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in flags],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the package that is measured, with "+changes" where its files differ from it."""
    package = Path(duca_compile.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def variants_table(rows: dict[str, Any]) -> Table:
    result = Table(
        "one call",
        "time, ms: median (IQR)",
        "of full",
        "by CPU time",
        "FLOPs of full",
        "host, ms",
        "target",
        title="Variants",
    )
    for name, row in rows.items():
        host, share = row["host_seconds_outside_the_graph"], row["flops_of_full"]
        target = TARGETS.get(StepKind(name)) if name in StepKind._value2member_map_ else None
        result.add_row(
            name,
            Spread(**row["seconds"]).milliseconds(),
            f"{row['of_full']:.4f}",
            f"{row['of_full_by_cpu_time']:.4f}",
            "" if share is None else f"{share:.4f}",
            "" if host is None else f"{1e3 * host['median']:.2f}",
            "" if target is None else _verdict(row["of_full"] <= target, f"at most {target}"),
        )
    return result


def loops_table(rows: dict[str, Any], steps: int) -> Table:
    columns = ("time, s: median (IQR)", "speed-up", "FLOP-ideal", "efficiency", "by CPU time", "target", "calls")
    result = Table("loop", *columns, title=f"DDIM-{steps}, speed-up over torch.compile")
    for name, row in rows.items():
        cells = [""] * 5
        if "flop_ideal" in row:
            efficiency, ideal = row["efficiency"], row["flop_ideal"]
            worse = min(efficiency, row["efficiency_by_cpu_time"])  # neither luck with the load nor waiting counts
            verdict = _verdict(worse >= TARGET_EFFICIENCY, f"at least {TARGET_EFFICIENCY}")
            calls = ", ".join(f"{n} {kind}" for kind, n in row["calls"].items())
            by_cpu = f"{row['efficiency_by_cpu_time']:.2f}"
            cells = [f"{ideal:.2f}x", f"{efficiency:.2f}", by_cpu, verdict if ideal > 1 else "", calls]
        result.add_row(name, Spread(**row["seconds"]).whole_seconds(), f"{row['speedup']:.2f}x", *cells)
    return result


def _verdict(met: bool, target: str) -> str:
    return f"[green]{target}: met[/]" if met else f"[red]{target}: missed[/]"


def policies(steps: int) -> dict[str, Policy]:
    return {
        "duca_compile, uncached": Uncached(),
        f"duca_compile, {DuCa().name}": DuCa(),
        "duca_compile, published DuCa-DiT (N=3)": published("duca", "dit", interval=3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--calls", type=int, default=25, help="timed calls of each variant")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each loop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the latents")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=160)
    found: dict[str, Any] = {
        "what": __doc__.splitlines()[0],
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "surroundings": surroundings(args.threads),
        "model": {"class": "DiTTransformer2DModel", **MODEL, "tokens": (SIZE // 2) ** 2, "batch": BATCH},
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "load_average_at_start": os.getloadavg(),
    }

    model = build(args.seed)
    plain: dict[str, Model] = {"eager": model, "torch.compile": torch.compile(model, fullgraph=True)}
    each = duca_compile.optimize(model, EachKind(), backend=args.backend)
    found["variants"] = time_variants(plain, each, args.calls, args.seed)
    console.print(variants_table(found["variants"]))

    optimized = {
        name: duca_compile.optimize(model, policy, backend=args.backend, num_inference_steps=args.steps)
        for name, policy in policies(args.steps).items()
    }
    found["loops"] = time_loops({**plain, **optimized}, args.steps, args.rounds, args.seed)
    console.print(loops_table(found["loops"], args.steps))
    found["load_average_at_end"] = os.getloadavg()
    console.print(
        f"{found['surroundings']['cpu']}, {args.threads} thread(s); load average "
        f"{found['load_average_at_start'][0]:.2f} at the start, {found['load_average_at_end'][0]:.2f} at the end"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
