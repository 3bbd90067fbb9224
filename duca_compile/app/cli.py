"""The command line. Running an artifact needs no torch, so torch is imported only by the commands that need it."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from duca_compile.artifact.engines import BACKENDS as ARTIFACT_BACKENDS
from duca_compile.artifact.inspection import describe
from duca_compile.artifact.loader import load
from duca_compile.artifact.manifest import read_manifest
from duca_compile.artifact.model import Artifact
from duca_compile.core.files import check_writable
from duca_compile.core.tables import FigureTable
from duca_compile.errors import DucaError, UsageError, first_line, missing_package
from duca_compile.policies import StepKind
from duca_compile.policies.named import POLICIES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from duca_compile.app import demo as demonstration
    from duca_compile.explanation import Explanation

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
SEARCHES = ("errors", "path", "loops")  # how full steps are placed
LOOP_SEED = 1_000_000  # of the noise to learn from; the demo is unlikely to start from the same
Steps = Annotated[int, typer.Option(min=1, help="Number of denoising steps.")]
POLICY_NAMES = f"{', '.join(POLICIES)} or calibrated; or the path of a tuned or calibrated policy."
PolicyOption = Annotated[str, typer.Option(help=POLICY_NAMES)]
Interval = Annotated[int | None, typer.Option(min=1, help="Number of steps from one full step to the next.")]
Target = Annotated[
    str | None,
    typer.Argument(
        help="package.module:function that returns (model, kwargs of one call). Default: the embedded model."
    ),
]
LoopTarget = Annotated[
    str | None,
    typer.Argument(help="package.module:function that returns (model, sample). Default: the embedded model."),
]
LoopSteps = Annotated[int, typer.Option(min=2, help="Number of denoising steps of a loop of the embedded model.")]
Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")]
Device = Annotated[str, typer.Option(help="Device of the model: cpu, cuda, cuda:1, ...")]


@app.callback()
def main() -> None:
    """A compiler for the denoising loop of Diffusion Transformers."""


@app.command()
def demo(
    steps: Steps = 50,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"{POLICY_NAMES} May be repeated. Default: duca and, at 50 steps, calibrated."),
    ] = None,
    interval: Interval = None,
    backend: Annotated[str, typer.Option(help="inductor or eager.")] = "inductor",
    out: Annotated[Path, typer.Option(help="Path of the picture.")] = Path("demo.png"),
    device: Device = "cpu",
) -> None:
    """Generate images with the embedded model, with and without caching; write a picture and print the timings."""
    from duca_compile.app import demo as demonstration

    try:
        chosen = demonstration.make_policies(policy, interval, steps)
        check_writable(out, "choose another --out")
        model = demonstration.DemoModel.load(_device(device))
        with _progress() as progress:

            def watch(name: str, total: int) -> Callable[[], None]:
                return partial(progress.advance, progress.add_task(name, total=total))

            runs = demonstration.compare(model, chosen, backend, steps, seed, watch)
        demonstration.draw(runs, model.class_names, out)
    except DucaError as error:
        _fail(error)
    _print_runs(runs, model, backend, seed)
    console.print(f"picture: {out}", soft_wrap=True)


@app.command()
def explain(
    target: Target = None,
    steps: Steps = 50,
    policy: PolicyOption = "duca",
    interval: Interval = None,
    device: Device = "cpu",
) -> None:
    """Show what the compiler finds in a model, and the schedule of a policy."""
    from duca_compile.app.demo import make_policy
    from duca_compile.explanation import explain as explain_model

    try:
        chosen = make_policy(policy, interval)
        model, arguments = _embedded(device) if target is None else _load_target(target)
        report = explain_model(model, **arguments)
        console.print(report)
        console.print(report.schedule(chosen, steps))
    except DucaError as error:
        _fail(error)


@app.command()
def passes(
    target: Target = None,
    steps: Steps = 50,
    policy: PolicyOption = "duca",
    interval: Interval = None,
    step: Annotated[
        str | None,
        typer.Option(
            help="Kind (full, partial, ...) or number of the step, or probe. Default: the first step that is not full."
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--pass", help="Show only this pass. May be repeated.")] = None,
    stat: Annotated[bool, typer.Option("--stat", help="Show a table of nodes and FLOPs instead of diffs.")] = False,
    context: Annotated[int, typer.Option(min=0, help="Number of unchanged lines around each change.")] = 3,
    device: Device = "cpu",
) -> None:
    """Show what each pass does to the graph of a step, as a diff with a line for each node."""
    from duca_compile.app.demo import make_policy
    from duca_compile.app.pass_diff import pass_report
    from duca_compile.explanation import explain as explain_model

    try:
        chosen = make_policy(policy, interval)
        model, arguments = _embedded(device) if target is None else _load_target(target)
        report = pass_report(explain_model(model, **arguments), chosen, steps, step, context)
        report = report.only(only) if only else report
    except DucaError as error:
        _fail(error)
    if stat:
        console.print(report.stat())
    else:
        console.print(report, soft_wrap=True)


@app.command("train-predictor")
def train(
    target: LoopTarget = None,
    out: Annotated[Path, typer.Option(help="Path of the predictor; ends in .safetensors.")] = Path(
        "predictor.safetensors"
    ),
    loops: Annotated[int, typer.Option(min=1, help="Number of denoising loops to train on.")] = 50,
    updates: Annotated[int, typer.Option(min=1, help="Number of gradient steps for each loop.")] = 20,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Initial learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of steps.")] = 0,
    steps: LoopSteps = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint, if there is one.")] = False,
    device: Device = "cpu",
) -> None:
    """Train the predictor of DisCa on the model's own denoising loops; sample(drop_in, number) runs one loop."""
    from duca_compile.methods.training import TrainingSettings, train_predictor

    try:
        settings = TrainingSettings(loops, updates, learning_rate=learning_rate, seed=seed)
        model, sample = _embedded_loops(device, steps) if target is None else _load_target(target)
        predictor = train_predictor(model, sample, out, settings, resume=resume)
    except DucaError as error:
        _fail(error)
    errors = [f"{loss**0.5:.4f}" for loss in predictor.config.losses]
    console.print(f"relative error of the model's output: {errors[0]} in the first loop, {errors[-1]} in the last")
    console.print(f"predictor: {out}", soft_wrap=True)


@app.command()
def calibrate(
    target: LoopTarget = None,
    full_steps: Annotated[int, typer.Option(min=1, help="Number of steps that are computed in full.")] = 10,
    max_order: Annotated[int, typer.Option(min=1, max=4, help="Highest order of difference used.")] = 2,
    loops: Annotated[int, typer.Option(min=1, help="Number of denoising loops to measure.")] = 1,
    search: Annotated[
        str, typer.Option(help="How full steps are placed: errors (fitted), path (the shortest) or loops (run).")
    ] = "errors",
    iterations: Annotated[int, typer.Option(min=0, help="Loops that the annealing of --search loops tries.")] = 200,
    steps: LoopSteps = 50,
    out: Annotated[Path, typer.Option(help="Path of the policy.")] = Path("calibrated.json"),
    device: Device = "cpu",
) -> None:
    """Measure a model's own denoising loop: which steps to compute in full, and how to forecast the other ones."""
    from duca_compile.methods.calibration import calibrate as calibrated

    try:
        if search not in SEARCHES:
            raise UsageError(f"search={search!r} is unknown; choose one of {SEARCHES}")
        model, sample = _embedded_loops(device, steps) if target is None else _load_target(target)
        with console.status("measuring"):
            measured = calibrated(model, sample, loops=loops)
            if search == "path":
                policy = measured.policy_by_path(full_steps)
            elif search == "loops":
                policy = measured.policy_by_loops(full_steps, max_order, iterations=iterations)
            else:
                policy = measured.policy(full_steps, max_order)
        policy.save(out)
    except DucaError as error:
        _fail(error)
    console.print(f"full steps: {', '.join(map(str, policy.full_steps))} of {len(policy.measured)}")
    console.print(f"relative error of the forecasts: {policy.error:.4f}")
    console.print(f"policy: {out}", soft_wrap=True)


@app.command()
def tune(
    target: Annotated[
        str | None,
        typer.Argument(
            help="package.module:function that returns (pipe, calls) or (model, sample). Default: the embedded model."
        ),
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Wish: how many times as fast as uncached.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Wish: the most seconds of a call.")] = None,
    min_psnr: Annotated[float | None, typer.Option(help="Wish: the least PSNR to uncached results, in dB.")] = None,
    max_cache_bytes: Annotated[int | None, typer.Option(help="Wish: the most bytes that caches hold.")] = None,
    calls: Annotated[int, typer.Option(help="Number of calls: sample(drop_in, 0), sample(drop_in, 1), ...")] = 2,
    steps: LoopSteps = 50,
    backend: Annotated[str, typer.Option(help="inductor, openvino or eager.")] = "inductor",
    minutes: Annotated[float, typer.Option(min=0.0, help="How long settings may be tried.")] = 10.0,
    out: Annotated[
        Path, typer.Option(help="Folder of tuned.json, report.html and the trials so far, from which it goes on.")
    ] = Path("tuning"),
) -> None:
    """Find the policy that meets a wish, by trying settings of all methods here; exits with 1 if none does."""
    from duca_compile.methods.tuning.tuner import PAGE, POLICY_FILE
    from duca_compile.methods.tuning.tuner import tune as tuned_for

    try:
        made, other = _embedded_loops("cpu", steps) if target is None else _load_target(target)
        tuned = tuned_for(
            made,
            *((range(calls), other) if callable(other) else (other,)),
            backend=backend,
            minutes=minutes,
            folder=out,
            speedup=speedup,
            max_seconds=max_seconds,
            min_psnr=min_psnr,
            max_cache_bytes=max_cache_bytes,
        )
    except DucaError as error:
        _fail(error)
    console.print(tuned)
    console.print(f"policy: {out / POLICY_FILE}; report: {out / PAGE}", soft_wrap=True)
    if not tuned.met:
        raise typer.Exit(1)


def _embedded_loops(device: str, steps: int) -> tuple[nn.Module, Callable[[nn.Module, int], Any]]:
    from duca_compile.app import demo as demonstration

    model = demonstration.DemoModel.load(_device(device))

    def sample(drop_in: nn.Module, number: int) -> Tensor:
        return model.sample(drop_in, steps, model.noise(LOOP_SEED + number), lambda seconds: None)

    return model.transformer, sample


@app.command()
def flops(
    target: Annotated[
        str | None,
        typer.Argument(
            help="package.module:function that returns (model, kwargs of one call). Default: DiT-XL/2 at 256x256."
        ),
    ] = None,
    steps: Steps = 50,
    interval: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of steps from one full step to the next. May be repeated. Default: 3 to 7."),
    ] = None,
) -> None:
    """Count FLOPs of a DiT with the papers' settings: as the papers count them, and all products of the graph."""
    from duca_compile.app.paper_flops import explain_dit_xl, loop_flops, published_policies
    from duca_compile.policies import Uncached

    try:
        report = explain_dit_xl() if target is None else _explain_target(target)
        policies = [Uncached(), *published_policies(tuple(interval or range(3, 8)))]
        rows = [loop_flops(report, policy, steps) for policy in policies]
    except DucaError as error:
        _fail(error)
    names = ("policy", "papers' TFLOPs", "papers' speed-up", "counted TFLOPs", "counted speed-up")
    table = FigureTable(*names, wrapped={"policy"})
    for row in rows:
        papers, counted = f"{row.papers / 1e12:.2f}", f"{row.counted / 1e12:.2f}"
        table.add_row(row.policy, papers, f"{row.papers_speedup:.2f}x", counted, f"{row.counted_speedup:.2f}x")
    console.print(f"{report.model}: {steps} steps, {report.branches[0].rows} batch rows")
    console.print(table)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    target: Target = None,
    steps: Steps = 50,
    policy: PolicyOption = "duca",
    interval: Interval = None,
    format: Annotated[str, typer.Option(help="onnx; or aoti, which is machine code for this machine.")] = "onnx",
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = 20,
    fixed_batch: Annotated[
        bool | None,
        typer.Option(
            "--fixed-batch/--any-batch",
            help="Accept only the batch size of the example; or refuse a model that allows no other. Default: "
            "any batch size where the model allows it.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Run each graph once, and compare it with the model.", show_default=True)
    ] = True,
    check_with: Annotated[
        str | None, typer.Option(help="Engine of that check: onnxruntime, openvino; or aoti for that format.")
    ] = None,
) -> None:
    """Export a model and a policy as an artifact, which runs without the model and, in onnx format, without torch."""
    from duca_compile.api import optimize
    from duca_compile.app.demo import make_policy
    from duca_compile.export.artifact import save

    try:
        chosen = make_policy(policy, interval)
        model, arguments = _embedded("cpu") if target is None else _load_target(target)
        with console.status("exporting"):
            optimized = optimize(model, chosen, "eager", steps)
            manifest = save(
                optimized,
                out,
                arguments,
                format=format,
                opset=opset,
                dynamic_batch=None if fixed_batch is None else not fixed_batch,
                check=check and (check_with or True),
            )
    except DucaError as error:
        _fail(error)
    console.print(describe(manifest))


@app.command()
def inspect(artifact: Folder) -> None:
    """Show what an artifact holds: the model, its inputs, the schedule and the graphs."""
    try:
        console.print(describe(read_manifest(artifact)))
    except DucaError as error:
        _fail(error)


@app.command()
def run(
    artifact: Folder,
    npz: Annotated[
        Path, typer.Option(help="Arguments by name. An additional first axis holds one entry for each step.")
    ],
    out: Annotated[Path, typer.Option(help="Path of the outputs, one entry for each step.")] = Path("outputs.npz"),
    backend: Annotated[str, typer.Option(help=" or ".join(ARTIFACT_BACKENDS) + ".")] = "onnxruntime",
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Execution provider of ONNX Runtime. May be repeated, in order of preference."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads of one operator.")] = None,
) -> None:
    """Run an artifact on arrays from an .npz file, step by step."""
    try:
        loaded = load(artifact, backend, providers=provider, threads=threads)
        calls = _calls(loaded, npz)
        started = time.perf_counter()
        results = [_outputs(loaded(**call)) for call in calls]
        seconds = time.perf_counter() - started
        stacked: dict[str, Any] = {name: np.stack([result[name] for result in results]) for name in results[0]}
        np.savez(out, **stacked)
    except (DucaError, OSError) as error:
        _fail(error)
    kinds = "".join(executed.kind.letter for executed in loaded.history)
    console.print(f"{len(calls)} calls in {seconds:.3f} s, steps {kinds}; outputs: {out}")


@app.command()
def build(
    artifact: Folder,
    target: Annotated[
        list[str] | None,
        typer.Option(help="GPU architecture, such as sm89. May be repeated. Default: this machine's GPU."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Precision of products: bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[
        tuple[int, int, int], typer.Option(help="Smallest, usual and largest batch size, if it is dynamic.")
    ] = (1, 2, 8),
    library: Annotated[
        str | None, typer.Option(help="tensorrt_rtx or tensorrt. Default: whichever is installed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the engines. Default: the artifact's folder.")] = None,
) -> None:
    """Build the TensorRT engines of an artifact; engines that exist already are kept."""
    try:
        with missing_package("export"):
            from duca_compile.export.tensorrt import build as build_engines
        with _progress() as progress:
            built = build_engines(
                artifact, target or (), precision=precision, batch=batch, library=library, folder=out, progress=progress
            )
    except DucaError as error:
        _fail(error)
    table = FigureTable("graph", "engine", "weights from the pool", "file", wrapped={"weights from the pool"})
    for name, engine in built.engines.items():
        weights = sum(weight.bytes for weight in engine.weights)
        table.add_row(name, _mebibytes(engine.bytes), _mebibytes(weights), engine.file)
    shared = sum(weight.bytes for weight in built.weights.values())
    table.add_row("all", _mebibytes(sum(e.bytes for e in built.engines.values())), f"{_mebibytes(shared)}, each once")
    console.print(table)
    console.print(
        f"{built.options.library} {built.version}, {', '.join(built.options.targets) or 'this GPU'}, {precision}"
    )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _calls(artifact: Artifact, path: Path) -> list[dict[str, np.ndarray]]:
    """The calls in a file: one for each entry along the first axis of arrays with one axis more than the input."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except ValueError as error:
        raise UsageError(f"{path} is not an .npz file of arrays: {error}") from error
    ranks = {spec.name: len(spec.shape) for spec in artifact.manifest.inputs}
    names = {".".join(map(str, each.path)): each.input for each in artifact.manifest.signature.arguments}
    stepped = {name for name, array in arrays.items() if array.ndim == ranks.get(names.get(name, ""), array.ndim) + 1}
    lengths = {len(arrays[name]) for name in stepped}
    if len(lengths) > 1 or 0 in lengths:
        raise UsageError(f"{path}: {', '.join(sorted(stepped))} must have the same number of steps, at least one")
    return [
        {name: array[step] if name in stepped else array for name, array in arrays.items()}
        for step in range(lengths.pop() if lengths else 1)
    ]


def _outputs(result: Any) -> dict[str, np.ndarray]:
    """The arrays of a result, by name, or by position if they have no names."""
    if isinstance(result, np.ndarray):
        return {"output": result}
    if isinstance(result, dict):
        return result
    names = getattr(result, "_fields", None) or [f"output_{i}" for i in range(len(result))]
    return dict(zip(names, result, strict=True))


def _embedded(device: str) -> tuple[nn.Module, dict[str, Any]]:
    import torch

    from duca_compile.app import demo as demonstration

    model = demonstration.DemoModel.load(_device(device))
    latent = model.noise(seed=0)
    labels = torch.arange(len(latent), device=latent.device)
    arguments = {"hidden_states": latent, "timestep": torch.full_like(labels, 999), "class_labels": labels}
    return model.transformer, arguments


def _explain_target(target: str) -> Explanation:
    from duca_compile.explanation import explain as explain_model

    model, arguments = _load_target(target)
    return explain_model(model, **arguments)


def _load_target(target: str) -> tuple[nn.Module, Any]:
    sys.path.insert(0, os.getcwd())
    try:
        model, other = resolve_name(target)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot load {target!r}: {error}; write it as package.module:function") from error
    except TypeError as error:
        raise UsageError(f"{target!r} must take no arguments and return two values: {error}") from error
    return model, other


def _device(name: str) -> str:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {first_line(error)}. Use --device cpu.") from error
    return name


def _fail(error: Exception) -> NoReturn:
    Console(stderr=True).print(Text("error: ", style="bold red"), Text(str(error)), sep="", soft_wrap=True)
    raise typer.Exit(2) from error


def _progress() -> Progress:
    name = TextColumn("{task.description}", table_column=Column(overflow="fold"))
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _print_runs(runs: list[demonstration.Run], model: demonstration.DemoModel, backend: str, seed: int) -> None:
    import torch

    reference = runs[0]
    table = FigureTable("run", "wall time", "speed-up", "ideal", "PSNR", "caches", "compile", wrapped={"run"})
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
    kinds = [kind for kind in StepKind if any(kind in run.step_seconds for run in runs)]
    times = FigureTable("run", *(kind.value for kind in kinds), wrapped={"run"})
    for run in runs:
        cells = [f"{run.step_seconds[k] * 1e3:.2f} ms" if k in run.step_seconds else "-" for k in kinds]
        times.add_row(run.name, *cells)
    console.print("median time of a step, by kind:")
    console.print(times)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    console.print(
        f"{len(model.class_names)} classes with guidance {model.guidance_scale:g}, {backend}, seed {seed}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads on {platform.machine()}{load}. "
        "ideal: speed-up by FLOPs; PSNR: to the uncached images from the same noise; compile: once for each shape."
    )
