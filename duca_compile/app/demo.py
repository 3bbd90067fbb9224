"""The embedded model's denoising loop with and without caching: pictures, schedule and numbers side by side."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duca_compile.api import optimize
from duca_compile.core.files import atomic_write
from duca_compile.drop_in import OptimizedModel
from duca_compile.errors import UsageError
from duca_compile.policies import (
    FORA,
    RFC,
    Calibrated,
    DuCa,
    Policy,
    ResidualGate,
    SpeCa,
    StepKind,
    TaylorSeer,
    ToCa,
    Uncached,
)

COLORS = {
    StepKind.FULL: "#c0392b",
    StepKind.PARTIAL: "#f1c40f",
    StepKind.REUSE: "#5dade2",
    StepKind.SKIP: "#58b368",
    StepKind.FORECAST: "#9b59b6",
    StepKind.PREDICT: "#2c3e50",
}
CALIBRATED, CALIBRATED_STEPS = "calibrated", 50
PASSES = 3  # of each loop: one that compiles, and two for the clock

# Called with a run's name and its number of steps when it starts; what it returns is called after each step.
Watch = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class DemoModel:
    """The embedded Fashion-MNIST DiT with what its loop needs; weights in float32."""

    transformer: Any  # a diffusers DiTTransformer2DModel
    scheduler: dict[str, Any]  # keyword arguments of diffusers.DDIMScheduler
    class_names: tuple[str, ...]
    null_class: int
    guidance_scale: float

    @staticmethod
    def load(device: str = "cpu") -> DemoModel:
        from diffusers import DiTTransformer2DModel
        from safetensors.torch import load_file

        with resources.as_file(resources.files("duca_compile") / "app" / "data" / "demo") as folder:
            info = json.loads((folder / "demo.json").read_text())
            transformer = DiTTransformer2DModel.from_config(json.loads((folder / "config.json").read_text()))
            transformer.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
            scheduler = json.loads((folder / "scheduler.json").read_text())
        transformer.requires_grad_(False).eval().to(device)
        names = tuple(info["class_names"])
        return DemoModel(transformer, scheduler, names, info["null_class"], info["guidance_scale"])

    def noise(self, seed: int) -> Tensor:
        """One starting latent for each class, (classes, channels, height, width), the same on every device."""
        config = self.transformer.config
        shape = (len(self.class_names), config.in_channels, config.sample_size, config.sample_size)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.transformer.device)

    def sample(self, transformer: nn.Module, steps: int, noise: Tensor, on_step: Callable[[float], None]) -> Tensor:
        """DDIM with classifier-free guidance, both halves in one batch; one image for each class, in [-1, 1].

        ``on_step`` is called after each step with the seconds that the model took.
        """
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(**self.scheduler)
        scheduler.set_timesteps(steps)
        labels = torch.arange(len(self.class_names), device=noise.device)
        labels = torch.cat([labels, torch.full_like(labels, self.null_class)])
        latent = noise
        with torch.no_grad():
            for t in scheduler.timesteps:
                timestep = t.expand(len(labels)).to(noise.device)
                both = torch.cat([latent, latent])
                started = time.perf_counter()
                output = transformer(both, timestep=timestep, class_labels=labels).sample
                _finish(noise.device)
                seconds = time.perf_counter() - started
                conditional, unconditional = output.chunk(2)
                guided = unconditional + self.guidance_scale * (conditional - unconditional)
                latent = scheduler.step(guided, t, latent).prev_sample
                on_step(seconds)
        return latent.clamp(-1, 1)


@dataclass(frozen=True)
class Run:
    """One way of running the loop, as it was measured; ``seconds`` is the best pass, without compilation."""

    name: str
    images: Tensor
    kinds: tuple[StepKind, ...]
    seconds: float
    compile_seconds: float
    flops: float
    cache_bytes: int
    step_seconds: dict[StepKind, float]  # median time of the model in a step of each kind

    def psnr(self, reference: Run) -> float:
        """Peak signal-to-noise ratio to the reference's images in dB; the peak is the pixel range of 2."""
        error = (self.images - reference.images).square().mean().item()
        return math.inf if error == 0 else 10 * math.log10(4 / error)


def make_policy(name: str, interval: int | None) -> Policy:
    """The policy called ``name``, or of the file ``calibrate`` wrote; not all have an interval.

    "calibrated" is that of the embedded model, for ``CALIBRATED_STEPS`` steps.
    """
    if name == CALIBRATED or name.endswith(".json"):
        if interval is not None:
            raise UsageError(f"policy={name!r} has no interval: its full steps are listed; leave --interval out")
        with resources.as_file(resources.files("duca_compile") / "app" / "data" / "demo" / "calibrated.json") as own:
            return Calibrated.load(own if name == CALIBRATED else name)
    fixed: dict[str, Callable[..., Policy]] = {"duca": DuCa, "fora": FORA, "taylorseer": TaylorSeer, "toca": ToCa}
    adaptive: dict[str, Callable[..., Policy]] = {"gate": ResidualGate, "rfc": RFC, "speca": SpeCa}
    if name in adaptive:
        if interval is not None:
            raise UsageError(f"policy={name!r} has no interval: it decides while it runs; leave --interval out")
        return adaptive[name]()
    if name not in fixed:
        raise UsageError(f"policy={name!r} is unknown; choose one of {sorted({CALIBRATED, *fixed, *adaptive})}")
    return fixed[name]() if interval is None else fixed[name](interval=interval)


def make_policies(names: Sequence[str] | None, interval: int | None, steps: int) -> list[Policy]:
    """Those called ``names``; without any, what shows most at this number of steps."""
    if names:
        return [make_policy(name, interval) for name in names]
    own = [make_policy(CALIBRATED, None)] if steps == CALIBRATED_STEPS else []
    return [make_policy("duca", interval), *own]


class Loop:
    """One way of running the denoising loop: each pass starts from the same noise, and the first one compiles."""

    def __init__(self, demo: DemoModel, model: OptimizedModel, name: str, steps: int, seed: int) -> None:
        self.name, self.steps = name, steps
        self._demo, self._model, self._noise = demo, model, demo.noise(seed)
        self._passes: list[float] = []
        self._times: dict[StepKind, list[float]] = defaultdict(list)

    def run(self, on_step: Callable[[], None] = lambda: None) -> None:
        times: list[float] = []

        def timed(seconds: float) -> None:
            times.append(seconds)
            on_step()

        self._model.reset()
        started = time.perf_counter()
        self._images = self._demo.sample(self._model, self.steps, self._noise, timed)
        self._passes.append(time.perf_counter() - started)
        self._executed = self._model.history
        self._cache_bytes = self._model.cache_bytes
        if len(self._passes) > 1:
            for executed, seconds in zip(self._executed, times, strict=True):
                self._times[executed.kind].append(seconds)

    @property
    def full_steps(self) -> int:
        return sum(executed.kind is StepKind.FULL for executed in self._executed)

    def result(self) -> Run:
        """What was measured by the passes after the first; of their times, the best."""
        seconds = min(self._passes[1:])
        return Run(
            name=self.name,
            images=self._images,
            kinds=tuple(executed.kind for executed in self._executed),
            seconds=seconds,
            compile_seconds=max(0.0, self._passes[0] - seconds),
            flops=sum(executed.flops for executed in self._executed),
            cache_bytes=self._cache_bytes,
            step_seconds={kind: statistics.median(times) for kind, times in self._times.items()},
        )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    demo: DemoModel,
    policies: Sequence[Policy],
    backend: str,
    steps: int,
    seed: int,
    watch: Watch = lambda name, total: lambda: None,
) -> list[Run]:
    """The loop uncached, with each policy, and with as many plain steps as the first policy runs in full.

    The last is the honest competitor: the same number of full evaluations without any cache. After the pass that
    compiles, all take turns, so that a busy machine slows them alike.
    """
    plain = optimize(demo.transformer, Uncached(), backend)
    turns: dict[Loop, Callable[[], None]] = {}

    def compile_pass(model: OptimizedModel, name: str, steps: int) -> Loop:
        loop = Loop(demo, model, f"{name}, {steps} steps", steps, seed)
        turns[loop] = watch(loop.name, PASSES * steps)
        loop.run(turns[loop])
        return loop

    compile_pass(plain, "uncached", steps)
    cached = [(policy.name, optimize(demo.transformer, policy, backend, steps)) for policy in policies]
    full = [compile_pass(model, name, steps).full_steps for name, model in cached]
    compile_pass(plain, "uncached", full[0])
    for _ in range(PASSES - 1):
        for loop, on_step in turns.items():
            loop.run(on_step)
    return [loop.result() for loop in turns]


def check_writable(path: Path) -> None:
    """Raises UsageError now if a file at ``path`` could not be written when the work is done."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file, such as {path / 'demo.png'}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def draw(runs: list[Run], class_names: tuple[str, ...], path: Path) -> None:
    """A PNG with one row of pictures for each run and its schedule as a coloured timeline; whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = len(class_names)
    figure = Figure(figsize=(1.15 * columns + 0.4, 1.75 * len(runs) + 0.7), dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 * len(runs), columns, height_ratios=[6, 1] * len(runs), hspace=0.35, wspace=0.05)
    for row, run in enumerate(runs):
        for column in range(columns):
            axes = figure.add_subplot(grid[2 * row, column])
            axes.imshow(run.images[column, 0].cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(class_names[column], fontsize=8)
        line = figure.add_subplot(grid[2 * row + 1, :])
        line.bar(range(len(run.kinds)), 1, width=1.0, color=[COLORS[k] for k in run.kinds], edgecolor="white")
        line.set_xlim(-0.5, max(len(r.kinds) for r in runs) - 0.5)
        line.set_axis_off()
        line.set_title(
            f"{run.name}: {run.seconds:.2f} s, {_decibels(run.psnr(runs[0]))}", fontsize=8, loc="left", pad=2
        )
    used = [kind for kind in StepKind if any(kind in run.kinds for run in runs)]
    handles = [Patch(color=COLORS[kind], label=kind.value) for kind in used]
    figure.legend(handles=handles, loc="lower center", ncol=len(used), fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _decibels(value: float) -> str:
    return "the reference" if math.isinf(value) else f"{value:.1f} dB to it"
