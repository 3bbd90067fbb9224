"""The demo: the embedded model's denoising loop with and without caching, compared in images, schedule and time."""

from __future__ import annotations

import inspect
import json
import math
import statistics
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
from duca_compile.core.colors import COLORS
from duca_compile.core.files import atomic_write
from duca_compile.drop_in import OptimizedModel
from duca_compile.errors import UsageError
from duca_compile.policies import Auto, Policy, StepKind, Uncached
from duca_compile.policies.files import load_policy
from duca_compile.policies.named import POLICIES

CALIBRATED, CALIBRATED_STEPS = "calibrated", 50
RUNS = 3  # of each loop: one that compiles, and two that are timed

# Called with the name and the number of steps of a run; returns a function that is called after each step.
Watch = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class DemoModel:
    """The embedded Fashion-MNIST DiT and what its loop needs.

    Attributes:
        transformer: a diffusers DiTTransformer2DModel with float32 weights.
        scheduler: keyword arguments of diffusers.DDIMScheduler.
        class_names: names of the classes.
        null_class: the label of the unconditional half of guidance.
        guidance_scale: scale of classifier-free guidance.
    """

    transformer: Any
    scheduler: dict[str, Any]
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
        """One initial latent for each class, float32 (classes, channels, height, width); the same on every device."""
        config = self.transformer.config
        shape = (len(self.class_names), config.in_channels, config.sample_size, config.sample_size)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.transformer.device)

    def sample(self, transformer: nn.Module, steps: int, noise: Tensor, on_step: Callable[[float], None]) -> Tensor:
        """Runs DDIM with classifier-free guidance, both halves in one batch.

        Args:
            transformer: the model, or a drop-in for it.
            steps: the number of steps.
            noise: the initial latent, (classes, channels, height, width).
            on_step: called after each step with the seconds that the model took.

        Returns:
            One image for each class, (classes, channels, height, width) in [-1, 1].
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
    """The measurements of one way to run the loop.

    Attributes:
        name: of the run.
        images: (classes, channels, height, width) in [-1, 1].
        kinds: the kind of each step.
        seconds: wall time of the fastest run, without compilation.
        compile_seconds: how much longer the first run took.
        flops: FLOPs of the loop.
        cache_bytes: the most bytes that caches held.
        step_seconds: median time of the model in a step of each kind.
    """

    name: str
    images: Tensor
    kinds: tuple[StepKind, ...]
    seconds: float
    compile_seconds: float
    flops: float
    cache_bytes: int
    step_seconds: dict[StepKind, float]

    def psnr(self, reference: Run) -> float:
        """Peak signal-to-noise ratio to the reference's images, in dB; the peak is the pixel range, 2."""
        error = (self.images - reference.images).square().mean().item()
        return math.inf if error == 0 else 10 * math.log10(4 / error)


def make_policy(name: str, interval: int | None) -> Policy:
    """The policy with this name.

    Args:
        name: of a policy, or the path of a JSON file that ``tune`` or ``calibrate`` wrote. "calibrated" is that of the
            embedded model, for ``CALIBRATED_STEPS`` steps.
        interval: number of steps from one full step to the next; None for the policy's default.

    Raises:
        UsageError: the name is unknown, or the policy has no interval.
    """
    if name == CALIBRATED or name.endswith(".json"):
        if interval is not None:
            raise UsageError(f"policy={name!r} has no interval: the file says all; leave --interval out")
        with resources.as_file(
            resources.files("duca_compile") / "app" / "data" / "demo" / "calibrated.json"
        ) as embedded:
            return load_policy(embedded if name == CALIBRATED else name)
    if name not in POLICIES:
        raise UsageError(f"policy={name!r} is unknown; choose one of {sorted({CALIBRATED, *POLICIES})}")
    make: Callable[..., Policy] = POLICIES[name]
    if interval is None:
        return make()
    if "interval" not in inspect.signature(make).parameters:
        raise UsageError(f"policy={name!r} has no interval: leave --interval out")
    return make(interval=interval)


def make_policies(names: Sequence[str] | None, interval: int | None, steps: int) -> list[Policy]:
    """The policies with these names; without names, those that show most at this number of steps."""
    if names:
        return [make_policy(name, interval) for name in names]
    calibrated = [make_policy(CALIBRATED, None)] if steps == CALIBRATED_STEPS else []
    return [make_policy("duca", interval), *calibrated]


class Loop:
    """One way to run the denoising loop. Each run starts from the same noise, and the first one compiles."""

    def __init__(self, demo: DemoModel, model: OptimizedModel, name: str, steps: int, seed: int) -> None:
        self.name, self.steps = name, steps
        self._demo, self._model, self._noise = demo, model, demo.noise(seed)
        self._runs: list[float] = []  # wall time of each run
        self._times: dict[StepKind, list[float]] = defaultdict(list)

    def run(self, on_step: Callable[[], None] = lambda: None) -> None:
        times: list[float] = []

        def timed(seconds: float) -> None:
            times.append(seconds)
            on_step()

        self._model.reset()
        started = time.perf_counter()
        self._images = self._demo.sample(self._model, self.steps, self._noise, timed)
        self._runs.append(time.perf_counter() - started)
        self._executed = self._model.history
        self._cache_bytes = self._model.cache_bytes
        if len(self._runs) > 1:
            for executed, seconds in zip(self._executed, times, strict=True):
                self._times[executed.kind].append(seconds)

    @property
    def full_steps(self) -> int:
        return sum(executed.kind is StepKind.FULL for executed in self._executed)

    def result(self) -> Run:
        """The measurements of the runs after the first; the fastest of their times."""
        seconds = min(self._runs[1:])
        return Run(
            name=self.name,
            images=self._images,
            kinds=tuple(executed.kind for executed in self._executed),
            seconds=seconds,
            compile_seconds=max(0.0, self._runs[0] - seconds),
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
    """Runs the loop uncached, with each policy, and uncached with as many steps as the first policy runs in full.

    The last is the fair baseline: the same number of full evaluations, without caches. After the run that compiles, all
    take turns, so that load on the machine affects them equally.

    Args:
        demo: the embedded model.
        policies: the policies to compare.
        backend: name of the backend.
        steps: the number of steps.
        seed: seed of the initial noise.
        watch: shows progress.

    Returns:
        The measurements, uncached first.
    """
    plain = optimize(demo.transformer, Uncached(), backend)
    turns: dict[Loop, Callable[[], None]] = {}

    def compiled(model: OptimizedModel, name: str, steps: int) -> Loop:
        loop = Loop(demo, model, f"{name}, {steps} steps", steps, seed)
        first = 2 if isinstance(model.policy, Auto) else 1  # it learns from its first loop, and forecasts in the second
        turns[loop] = watch(loop.name, (RUNS + first - 1) * steps)
        for _ in range(first):
            loop.run(turns[loop])
        return loop

    compiled(plain, "uncached", steps)
    cached = [(policy.name, optimize(demo.transformer, policy, backend, steps)) for policy in policies]
    full = [compiled(model, name, steps).full_steps for name, model in cached]
    compiled(plain, "uncached", full[0])
    for _ in range(RUNS - 1):
        for loop, on_step in turns.items():
            loop.run(on_step)
    return [loop.result() for loop in turns]


def draw(runs: list[Run], class_names: tuple[str, ...], path: Path) -> None:
    """Writes a PNG, atomically, with a row of images and a coloured timeline of the schedule for each run."""
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
