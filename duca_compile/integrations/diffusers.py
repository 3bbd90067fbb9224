"""Diffusers pipelines: which components are transformers, and what the scheduler knows of the loop."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duca_compile.errors import UsageError
from duca_compile.runtime.clock import same_time

_PIPELINES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


def is_pipeline(thing: object) -> bool:
    """Whether ``thing`` is a diffusers pipeline. Does not import diffusers."""
    modules = ((sys.modules.get(module), name) for module, name in _PIPELINES.items())
    return any(module is not None and isinstance(thing, getattr(module, name)) for module, name in modules)


def transformers(pipe: Any) -> dict[str, nn.Module]:
    """The components that run in the denoising loop: the modules whose name starts with ``transformer``.

    Raises:
        UsageError: there are none; the message lists the components.
    """
    components = pipe.components
    modules = {n: c for n, c in components.items() if n.startswith("transformer") and isinstance(c, nn.Module)}
    if not modules:
        listed = ", ".join(f"{n} ({type(c).__name__})" for n, c in components.items() if c is not None)
        raise UsageError(f"{type(pipe).__name__} has no transformer to optimize; its components are {listed}")
    return modules


def set_component(pipe: Any, name: str, module: nn.Module) -> None:
    """Sets a component without updating the pipeline's config, which keeps the class of the original."""
    object.__setattr__(pipe, name, module)


class PipelineSchedule:
    """What the scheduler of a pipeline knows of the current run of its loop.

    Each call of a pipeline creates a new tensor of timesteps in the scheduler, whose identity stands for the run. The
    current step is the scheduler's step index, if it has one, since the timestep that the model gets may be rounded.
    The scheduler is looked up each time, so it may be replaced. The pipeline is referenced weakly, so that its other
    components can be freed.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._scheduler: Any = None
        self._run: Tensor | None = None  # the run that _steps is for
        self._steps: list[int] = []  # the step of each timestep of the run
        self._look_up()

    def _look_up(self) -> Any:
        pipe = self._pipe()
        if pipe is not None:
            self._scheduler = getattr(pipe, "scheduler", None)
        return self._scheduler

    def name(self) -> str:
        """The class of the scheduler."""
        return type(self._look_up()).__name__

    def run(self) -> Tensor | None:
        timesteps = getattr(self._look_up(), "timesteps", None)
        return timesteps if isinstance(timesteps, Tensor) else None

    def timesteps(self, first: Tensor) -> list[float]:
        """The timestep of each step, from the one that the pipeline starts with: image-to-image starts in the middle.

        Equal neighbours are evaluations of one step; Heun's method has two. If the scheduler has sigmas and counts its
        steps, they must be equal, too, since timesteps may be rounded.
        """
        run = self._run = self._scheduler.timesteps
        values = list(map(float, run.flatten().tolist()))
        start = self._start(values, first)
        levels = self._levels(values)
        self._steps, times = [0] * start, []
        for i in range(start, len(values)):
            if i == start or not all(map(same_time, levels[i - 1], levels[i], levels[start])):
                times.append(values[i])
            self._steps.append(len(times) - 1)
        return times

    def as_called(self, times: Sequence[float], timestep: Tensor, first: float) -> tuple[float, ...]:
        """The timesteps as the model is called with them: unchanged, or divided by the 1000 training timesteps."""
        values = torch.tensor(times, dtype=torch.float64).to(timestep.dtype)
        for scaled in (values, values / 1000, torch.tensor(times) / 1000):
            listed = tuple(map(float, scaled.tolist()))
            if listed[0] == first:
                return tuple(dict.fromkeys(listed))
        return ()

    def _levels(self, values: list[float]) -> list[tuple[float, ...]]:
        """What distinguishes evaluations: the timestep of each and, if it is known, its sigma."""
        sigmas = getattr(self._scheduler, "sigmas", None)
        if not _counts(self._scheduler) or not isinstance(sigmas, Tensor) or not 0 <= len(sigmas) - len(values) <= 3:
            return [(value,) for value in values]
        return list(zip(values, sigmas.tolist(), strict=False))

    def step(self) -> int | None:
        """The step by the scheduler's step index, which is None before its first step."""
        scheduler = self._scheduler
        if not _counts(scheduler):
            return None
        index = _step_index(scheduler)
        if index is None or scheduler.timesteps is not self._run:
            return 0
        return self._steps[index] if 0 <= index < len(self._steps) else None

    def _start(self, values: list[float], first: Tensor) -> int:
        """The index that the pipeline starts at: from the scheduler, else by ``first``, else by the number of steps."""
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        value = first.flatten()[0].item()
        config = getattr(self._scheduler, "config", None)
        scale = getattr(config, "num_train_timesteps", 1)  # some models get fractions of it
        indices = [values.index(time) for time in (value, value * scale) if time in values]
        if indices:
            return min(indices)
        count = getattr(self._pipe(), "num_timesteps", None)
        return len(values) - count if isinstance(count, int) and 0 < count <= len(values) else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineSchedule:
        """The schedule of the copied pipeline, if the pipeline is being copied; else of the same one."""
        pipe = self._pipe()
        return self if pipe is None else PipelineSchedule(memo.get(id(pipe), pipe))


def _counts(scheduler: Any) -> bool:
    """Whether a scheduler counts its steps."""
    return hasattr(scheduler, "step_index") or hasattr(scheduler, "_step_index")


def _step_index(scheduler: Any) -> int | None:
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "_step_index", None)
    return None if index is None else int(index)
