"""Diffusers pipelines: which components are transformers, and what the scheduler says of the loop."""

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
    """Whether ``thing`` is a pipeline of diffusers. Does not import diffusers: without it there is none."""
    modules = ((sys.modules.get(module), name) for module, name in _PIPELINES.items())
    return any(module is not None and isinstance(thing, getattr(module, name)) for module, name in modules)


def transformers(pipe: Any) -> dict[str, nn.Module]:
    """The components that run in the denoising loop: the modules whose name starts with ``transformer``.

    Raises:
        UsageError: there is none; lists what there is.
    """
    components = pipe.components
    found = {n: c for n, c in components.items() if n.startswith("transformer") and isinstance(c, nn.Module)}
    if not found:
        listed = ", ".join(f"{n} ({type(c).__name__})" for n, c in components.items() if c is not None)
        raise UsageError(f"{type(pipe).__name__} has no transformer to optimize; its components are {listed}")
    return found


def set_component(pipe: Any, name: str, module: nn.Module) -> None:
    """Sets a component without a word to the pipeline's config, which goes on naming the original's class."""
    object.__setattr__(pipe, name, module)


class PipelineSchedule:
    """What a pipeline's scheduler says of the run that is on.

    Each call of a pipeline makes the scheduler's timesteps anew, so the tensor's identity is that of the run. Where the
    run is, the scheduler's step index says, if it has one: the timestep that the model is given may be rounded. The
    scheduler is looked up each time, so that it may be swapped; the pipeline is held weakly, so that its other
    components do not outlive it.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._scheduler: Any = None
        self._run: Tensor | None = None  # the one that is known
        self._steps: list[int] = []  # the step of each of its timesteps
        self._look_up()

    def _look_up(self) -> Any:
        pipe = self._pipe()
        if pipe is not None:
            self._scheduler = getattr(pipe, "scheduler", None)
        return self._scheduler

    def run(self) -> Tensor | None:
        timesteps = getattr(self._look_up(), "timesteps", None)
        return timesteps if isinstance(timesteps, Tensor) else None

    def timesteps(self, first: Tensor) -> list[float]:
        """The steps' timesteps, from where the pipeline starts in them: image to image starts in the middle.

        Neighbours that are equal are evaluations of one step, as Heun's method has two; of the scheduler's sigmas, too,
        where it has them and counts its steps, since timesteps may be rounded.
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
        """The schedule's timesteps as the model is given them: as they are, or as a part of the training's thousand."""
        values = torch.tensor(times, dtype=torch.float64).to(timestep.dtype)
        for each in (values, values / 1000, torch.tensor(times) / 1000):
            listed = tuple(map(float, each.tolist()))
            if listed[0] == first:
                return tuple(dict.fromkeys(listed))
        return ()

    def _levels(self, values: list[float]) -> list[tuple[float, ...]]:
        sigmas = getattr(self._scheduler, "sigmas", None)
        if not _counts(self._scheduler) or not isinstance(sigmas, Tensor) or not 0 <= len(sigmas) - len(values) <= 3:
            return [(value,) for value in values]
        return list(zip(values, sigmas.tolist(), strict=False))

    def step(self) -> int | None:
        """By the scheduler's step index, which there is none of before its first step."""
        scheduler = self._scheduler
        if not _counts(scheduler):
            return None
        index = _step_index(scheduler)
        if index is None or scheduler.timesteps is not self._run:
            return 0
        return self._steps[index] if 0 <= index < len(self._steps) else None

    def _start(self, values: list[float], first: Tensor) -> int:
        """As the pipeline told its scheduler; else where ``first`` is; else by the number of steps it announced."""
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        value = first.flatten()[0].item()
        config = getattr(self._scheduler, "config", None)
        scale = getattr(config, "num_train_timesteps", 1)  # some models take fractions of it
        places = [values.index(each) for each in (value, value * scale) if each in values]
        if places:
            return min(places)
        count = getattr(self._pipe(), "num_timesteps", None)
        return len(values) - count if isinstance(count, int) and 0 < count <= len(values) else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineSchedule:
        """Of the copy of the pipeline, where that is being copied; else of the same."""
        pipe = self._pipe()
        return self if pipe is None else PipelineSchedule(memo.get(id(pipe), pipe))


def _counts(scheduler: Any) -> bool:
    """Whether it counts its steps."""
    return hasattr(scheduler, "step_index") or hasattr(scheduler, "_step_index")


def _step_index(scheduler: Any) -> int | None:
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "_step_index", None)
    return None if index is None else int(index)
