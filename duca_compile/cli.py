"""The command line: ``duca-compile demo`` and ``duca-compile explain``."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from duca_compile import demo as demonstration
from duca_compile.backends import BACKENDS
from duca_compile.errors import DucaError, UsageError, first_line
from duca_compile.explanation import explain as explain_model
from duca_compile.policies import StepKind

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Steps = Annotated[int, typer.Option(min=1, help="Denoising steps of the loop.")]
PolicyOption = Annotated[str, typer.Option(help="duca, fora or taylorseer.")]
Interval = Annotated[int | None, typer.Option(min=1, help="Steps from one full step to the next.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]


@app.callback()
def main() -> None:
    """A compiler for the denoising loop of Diffusion Transformers."""


@app.command()
def demo(
    steps: Steps = 50,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    policy: PolicyOption = "duca",
    interval: Interval = None,
    backend: Annotated[str, typer.Option(help=" or ".join(BACKENDS) + ".")] = "inductor",
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    device: Device = "cpu",
) -> None:
    """Generate every class of the embedded model with and without caching; write a picture, print the numbers."""
    try:
        chosen = demonstration.make_policy(policy, interval)
        demonstration.check_writable(out)
        model = demonstration.DemoModel.load(_device(device))
        with _progress() as progress:

            def watch(name: str, total: int) -> Callable[[], None]:
                return partial(progress.advance, progress.add_task(name, total=total))

            runs = demonstration.compare(model, chosen, backend, steps, seed, watch)
        demonstration.draw(runs, model.class_names, out)
    except DucaError as error:
        _fail(error)
    _print_runs(runs, model, backend, seed)
    console.print(f"picture: {out}")


@app.command()
def explain(
    target: Annotated[
        str | None,
        typer.Argument(help="package.module:function returning (model, kwargs of one call); else the embedded model."),
    ] = None,
    steps: Steps = 50,
    policy: PolicyOption = "duca",
    interval: Interval = None,
    device: Device = "cpu",
) -> None:
    """Show what the compiler finds in a model, and the schedule that a policy would run."""
    try:
        chosen = demonstration.make_policy(policy, interval)
        model, arguments = _embedded(device) if target is None else _load_target(target)
        found = explain_model(model, **arguments)
        console.print(found)
        console.print(found.schedule(chosen, steps))
    except DucaError as error:
        _fail(error)


def _embedded(device: str) -> tuple[nn.Module, dict[str, Any]]:
    model = demonstration.DemoModel.load(_device(device))
    latent = model.noise(seed=0)
    labels = torch.arange(len(latent), device=latent.device)
    arguments = {"hidden_states": latent, "timestep": torch.full_like(labels, 999), "class_labels": labels}
    return model.transformer, arguments


def _load_target(target: str) -> tuple[nn.Module, dict[str, Any]]:
    sys.path.insert(0, os.getcwd())
    try:
        model, arguments = resolve_name(target)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot load {target!r}: {error}; name it as package.module:function") from error
    except TypeError as error:
        raise UsageError(f"{target!r} must take no arguments and return (model, kwargs): {error}") from error
    return model, arguments


def _device(name: str) -> str:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {first_line(error)}. Use --device cpu.") from error
    return name


def _fail(error: DucaError) -> None:
    Console(stderr=True).print(Text("error: ", style="bold red"), Text(str(error)), sep="", soft_wrap=True)
    raise typer.Exit(2) from error


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _print_runs(runs: list[demonstration.Run], model: demonstration.DemoModel, backend: str, seed: int) -> None:
    reference = runs[0]
    table = Table(Column(no_wrap=True), "wall time", "speed-up", "ideal", "PSNR", "caches", "compile")
    for run in runs:
        psnr = run.psnr(reference)
        table.add_row(
            run.name,
            f"{run.seconds:.2f} s",
            f"{reference.seconds / run.seconds:.2f}x",
            f"{reference.flops / run.flops:.2f}x",
            "-" if math.isinf(psnr) else f"{psnr:.1f} dB",
            f"{run.cache_bytes / 2**20:.1f} MiB" if run.cache_bytes else "-",
            f"{run.compile_seconds:.1f} s",
        )
    console.print(table)
    times = Table(Column("time of a step (median)", no_wrap=True), *(kind.value for kind in StepKind))
    for run in runs:
        cells = [f"{run.step_seconds[k] * 1e3:.2f} ms" if k in run.step_seconds else "-" for k in StepKind]
        times.add_row(run.name, *cells)
    console.print(times)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    console.print(
        f"{len(model.class_names)} classes with guidance {model.guidance_scale:g}, {backend}, seed {seed}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads on {platform.machine()}{load}. "
        "ideal: by FLOPs; PSNR: to the uncached images of the same noise; compile: once for each shape."
    )
