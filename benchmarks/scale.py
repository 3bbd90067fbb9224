"""Time and memory of capturing, analysing and rewriting a model of real size: all but compiling.

    python benchmarks/scale.py --out benchmarks/results/scale.json

A DiT-XL/2 of diffusers with random weights, and a FLUX of 57 narrow blocks, whose graph has the most nodes. Each is
measured in a process of its own, where what is loaded at first use (torch.export's modules) is loaded in the measured
time. Memory is the process's resident set at its highest, which the kernel keeps, over what it was before the model
was built.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import host
import torch
from diffusers import DiTTransformer2DModel
from measure import KINDS, surroundings
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, DuCa, OptimizedModel, Policy
from duca_compile.compiler.compiled import Compiled
from duca_compile.core.variants import VariantSpec
from duca_compile.frontend.binder import Call
from duca_compile.runtime.planning import plan_step

SECONDS, SHARE = 20.0, 1.3  # what is aimed at: of wall-clock time, and of memory over that of the parameters
POLICIES = (DuCa(interval=5), FORA(interval=5))  # between them all four kinds of step
STAGES = {  # what is timed -> the function, by module and name
    "first call": ("frontend.side_effects", "warm"),
    "torch.export": ("frontend.capture", "_exported"),
    "lowering": ("frontend.capture", "_lower"),
    "cleaning": ("compiler.analyze", "prepare"),
    "analyses": ("compiler.analyze", "analyze"),
    "prologue": ("compiler.analyze", "make_prologue"),
    "verification": ("compiler.analyze", "verified"),
    "looks at the model": ("compiler.captures", "take"),
}
Arguments = dict[str, Tensor]


@dataclass
class Stage:
    """Seconds of all runs of a stage, and the highest memory of the process in it."""

    wall: float = 0.0
    cpu: float = 0.0
    peak_bytes: int = 0


@dataclass
class Meter:
    """Times stages, and keeps the process's highest memory over all of its life."""

    stages: dict[str, Stage] = field(default_factory=dict)
    peak_bytes: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.mark()
        stage = self.stages.setdefault(name, Stage())
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            stage.wall += time.perf_counter() - wall
            stage.cpu += time.process_time() - cpu
            stage.peak_bytes = max(stage.peak_bytes, self.mark())

    def mark(self) -> int:
        """The highest memory since the last mark."""
        highest = memory("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel starts anew from what is held now
        self.peak_bytes = max(self.peak_bytes, highest)
        return highest

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return run


def memory(name: str) -> int:
    """``VmRSS`` is what the process holds, ``VmHWM`` the most that it held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def build_dit(layers: int, heads: int, head_dim: int, size: int, batch: int) -> tuple[nn.Module, Arguments]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_eps=1e-6,
    )
    return model.eval().requires_grad_(False), {
        "hidden_states": torch.randn(batch, 4, size, size),
        "timestep": torch.full((batch,), 981),
        "class_labels": torch.arange(batch),
    }


def build_flux() -> tuple[nn.Module, Arguments]:
    model, arguments = host.build(0)
    return model, arguments | {"hidden_states": torch.randn(1, host.SIDE**2, 4), "timestep": torch.full((1,), 0.9)}


def measure(build: Callable[..., tuple[nn.Module, Arguments]], *sizes: int) -> dict[str, Any]:
    """Builds a model and measures what optimizing it takes, up to what a backend would compile."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"load_average_at_start": os.getloadavg()}
    before = memory("VmRSS")
    model, arguments = build(*sizes)
    held = memory("VmRSS")
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    optimized = duca_compile.optimize(model, POLICIES[0], backend="eager")
    call = optimized._bind((), arguments)
    meter = Meter()
    meter.mark()  # not what building the model took
    meter.peak_bytes = 0
    wall, cpu = time.perf_counter(), time.process_time()
    with watched(meter):
        compiled = captured(optimized, call)
        for name, spec in specs(compiled).items():
            with meter.stage(f"variant: {name}"):
                compiled._variants.build(spec)
    meter.mark()
    total = Stage(time.perf_counter() - wall, time.process_time() - cpu, meter.peak_bytes)
    return found | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_bytes": parameters,
        "nodes": len(compiled.captured.graph.nodes),
        "branches": len(compiled.facts.branches),
        "bytes_before_the_model": before,
        "bytes_with_the_model": held,
        "stages": {name: asdict(stage) for name, stage in meter.stages.items()},
        "total": asdict(total),
        "memory_over_parameters": (total.peak_bytes - before) / parameters,
        "load_average_at_end": os.getloadavg(),
    }


@contextmanager
def watched(meter: Meter) -> Iterator[None]:
    """While open, the functions of ``STAGES`` are timed."""
    with ExitStack() as patches:
        for stage, (module, name) in STAGES.items():
            place = f"duca_compile.{module}.{name}"
            function = getattr(import_module(f"duca_compile.{module}"), name)
            patches.enter_context(patch(place, meter.watched(stage, function)))
        yield


def captured(optimized: OptimizedModel, call: Call) -> Compiled:
    """What the first call of an optimized model does before it runs a step."""
    with torch.no_grad():
        return optimized._compiled.find(call)


def specs(compiled: Compiled) -> dict[str, VariantSpec]:
    """The variants that the policies need, by kind of step."""
    found: dict[str, VariantSpec] = {}
    for policy in POLICIES:
        found |= _specs(compiled, policy)
    assert found.keys() == {kind.value for kind in KINDS}
    return found


def _specs(compiled: Compiled, policy: Policy) -> dict[str, VariantSpec]:
    steps = policy.steps(50)
    return {step.kind.value: plan_step(compiled.facts, policy, step)[0] for step in steps}


def in_own_process(*arguments: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def stages_table(name: str, found: dict[str, Any]) -> Table:
    size = f"{found['parameters'] / 1e6:.1f} M parameters, {found['branches']} branches, {found['nodes']} nodes"
    result = Table("stage", "wall, s", "CPU, s", "highest memory beyond the model's, MiB", title=f"{name}: {size}")
    base = found["bytes_before_the_model"] + found["parameter_bytes"]
    for stage, each in (found["stages"] | {"all": found["total"]}).items():
        beyond = f"{(each['peak_bytes'] - base) / 2**20:.0f}"
        result.add_row(stage, f"{each['wall']:.2f}", f"{each['cpu']:.2f}", beyond)
    return result


def verdicts(found: dict[str, Any]) -> list[str]:
    wall, cpu, share = found["total"]["wall"], found["total"]["cpu"], found["memory_over_parameters"]
    return [
        _verdict(wall < SECONDS, f"{wall:.1f} s ({cpu:.1f} s of CPU time), under {SECONDS:.0f} s"),
        _verdict(share < SHARE, f"{share:.3f} times the parameters' memory, under {SHARE}"),
    ]


def _verdict(met: bool, target: str) -> str:
    return f"[green]{target}: met[/]" if met else f"[red]{target}: missed[/]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=72)
    parser.add_argument("--size", type=int, default=32, help="of the latent; a token is 2 by 2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--no-flux", action="store_true", help="leave the FLUX of many narrow blocks out")
    args = parser.parse_args()
    sizes = (args.layers, args.heads, args.head_dim, args.size, args.batch)
    found: dict[str, Any] = {
        "what": __doc__.splitlines()[0],
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "surroundings": surroundings(1),
        "policies": [repr(policy) for policy in POLICIES],
        "dit": in_own_process(build_dit, *sizes),
    }
    if not args.no_flux:
        found["flux"] = in_own_process(build_flux)
    console = Console(width=120)
    for name in ("dit", "flux"):
        if name in found:
            console.print(stages_table(name, found[name]))
    console.print("dit:", *verdicts(found["dit"]), sep="\n  ")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
