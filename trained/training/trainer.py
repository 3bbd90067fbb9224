"""What both trainings share: stages, a running average of the weights, Muon, and checkpoints to resume from."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NULL_SHARE = 0.1  # of the prompts that are replaced by the null prompt


@dataclass(frozen=True)
class Stage:
    """One part of a training.

    Attributes:
        grown: whether the model has its final depth.
        side: height and width of the data, in pixels.
        samples: how many samples the stage sees.
        batch: samples in a step.
        muon_lr: learning rate of the block matrices.
        adam_lr: learning rate of everything else.
        decay: whether the rates fall to zero over the last half of the stage.
    """

    grown: bool
    side: int
    samples: int
    batch: int
    muon_lr: float = 4e-3
    adam_lr: float = 2e-3
    decay: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples and their prompts.

    Attributes:
        clean: the samples as latents of about unit variance, float32 (batch, ...).
        features: tokens of their prompts, float32 (batch, tokens, width).
        pooled: means of their prompts, float32 (batch, width).
    """

    clean: Tensor
    features: Tensor
    pooled: Tensor


class Task(ABC):
    """What is to be learnt: the model, its depths, its data and how it is called."""

    @abstractmethod
    def build(self, grown: bool) -> nn.Module:
        """A new model, shallow or of its final depth."""

    @abstractmethod
    def grow(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of the deep model that starts out close to the shallow one with this state."""

    @abstractmethod
    def batch(self, size: int, side: int) -> Batch:
        """Draws samples of ``side`` x ``side`` pixels from torch's generator."""

    @abstractmethod
    def velocity(self, model: nn.Module, noisy: Tensor, time: Tensor, batch: Batch) -> Tensor:
        """The prediction of the model for ``noisy`` at ``time``, float32 (batch,) from 0, clean, to 1, noise."""


def repeat_blocks(state: dict[str, Tensor], stacks: dict[str, int], outputs: Iterable[str]) -> dict[str, Tensor]:
    """Repeats each block of some stacks in place, and divides what it adds to the residual stream by the repeats.

    Args:
        state: of the shallow model.
        stacks: the repeats of each stack, by the name of its module list.
        outputs: names, within a block, of the modules that write to the residual stream.
    """
    grown: dict[str, Tensor] = {}
    endings = tuple(f".{output}.{kind}" for output in outputs for kind in ("weight", "bias"))
    for name, value in state.items():
        stack, _, rest = name.partition(".")
        repeats = stacks.get(stack, 1)
        if repeats == 1:
            grown[name] = value.clone()
            continue
        number, _, inner = rest.partition(".")
        scale = 1 / repeats if f".{inner}".endswith(endings) else 1.0
        for copy in range(repeats):
            grown[f"{stack}.{int(number) * repeats + copy}.{inner}"] = value * scale
    return grown


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, in float32: bfloat16, as in torch.optim.Muon, is slow on most CPUs."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(state["momentum"], group["momentum"]))
                size = 0.2 * max(parameter.shape) ** 0.5  # root mean square of an AdamW update
                parameter.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix closest to this one, roughly, by five Newton-Schulz iterations."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and MLP, AdamW for the rest: embeddings, modulation, biases and the head."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "blocks." in name and "norm" not in name
        (matrices if is_matrix else rest).append(parameter)
    return [Muon(matrices, stage.muon_lr), torch.optim.AdamW(rest, stage.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]


class Trainer:
    """The state of one run: model, running average, optimizers, and how many samples each stage has seen."""

    def __init__(
        self, task: Task, out: Path, stages: list[Stage], start: Path | None = None, bf16: bool = False
    ) -> None:
        """Resumes from ``out`` if there is a checkpoint; else starts, from the exported weights ``start`` if given."""
        self.task, self.out, self.stages, self.bf16 = task, out, stages, bf16
        self.log: list[tuple[int, int, float]] = []  # stage, samples seen, loss
        out.mkdir(parents=True, exist_ok=True)
        self._enter(0, task.build(stages[0].grown))
        if (out / "last.pt").exists():
            self._resume(torch.load(out / "last.pt", weights_only=True))
        elif start is not None:
            self._warm(start)

    def advance(self) -> None:
        """Goes on to the next stage, whether or not this one has seen all its samples."""
        self._next()
        self.save()

    def _enter(self, index: int, model: nn.Module) -> None:
        self.stage, self.seen, self.model = index, 0, model
        self.average = {k: v.clone() for k, v in model.state_dict().items()}
        self.optimizers = optimizers(model, self.stages[index])

    def _next(self) -> None:
        old, new = self.stages[self.stage : self.stage + 2]
        if old.grown == new.grown:  # the same model: the optimizers keep what they know
            self.stage, self.seen = self.stage + 1, 0
            return
        average = self.task.grow(self.average)
        state = self.task.grow(self.model.state_dict())
        model = self.task.build(new.grown)
        model.load_state_dict(state)
        self._enter(self.stage + 1, model)
        self.average = average

    def _warm(self, start: Path) -> None:
        self._enter(len(self.stages) - 1, self.task.build(True))
        self.model.load_state_dict({k: v.float() for k, v in load_file(start).items()})
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}

    def _resume(self, saved: dict[str, Any]) -> None:
        self._enter(saved["stage"], self.task.build(self.stages[saved["stage"]].grown))
        self.seen, self.log = saved["seen"], saved["log"]
        torch.manual_seed(torch.initial_seed() + self.stage + self.seen)  # other batches than in the first part
        self.model.load_state_dict(saved["model"])
        self.average = saved["average"]
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def save(self) -> None:
        """Writes the checkpoint and the averaged weights, each file atomically."""
        state = {
            "stage": self.stage,
            "seen": self.seen,
            "log": self.log,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(state, self.out / "last.pt.tmp")
        os.replace(self.out / "last.pt.tmp", self.out / "last.pt")
        export(self.out, self.model, self.average)

    def step(self) -> float:
        """One step of rectified flow: the loss is the error of the velocity from the clean sample to the noise."""
        stage = self.stages[self.stage]
        batch = self.task.batch(stage.batch, stage.side)
        strata = (torch.randperm(stage.batch) + torch.rand(stage.batch)) / stage.batch
        time = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)).sigmoid()  # logit-normal
        noise = torch.randn_like(batch.clean)
        share = time.view(-1, *[1] * (noise.ndim - 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self.task.velocity(self.model, torch.lerp(batch.clean, noise, share), time, batch)
        loss = (output.float() - (noise - batch.clean)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = lr_factor(stage, self.seen)
        for optimizer, rate in zip(self.optimizers, (stage.muon_lr, stage.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.seen += stage.batch
        self._average(min(0.999, 1 - 10 / (self.seen / stage.batch + 10)) if self.stage == 0 else 0.998)
        return float(loss.item())

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        state = self.model.state_dict()
        torch._foreach_lerp_([self.average[k] for k in state], list(state.values()), 1 - decay)

    def run(self, minutes: float = math.inf, save_every: float = 3.0) -> None:
        """Trains until all stages are done, or until the time is over; saves every ``save_every`` minutes."""
        deadline, saved = time.monotonic() + 60 * minutes, time.monotonic()
        smooth = math.nan
        while True:
            while self.seen < self.stages[self.stage].samples and time.monotonic() < deadline:
                loss = self.step()
                smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
                if time.monotonic() - saved > 60 * save_every:
                    saved = time.monotonic()
                    self.log.append((self.stage, self.seen, smooth))
                    print(
                        f"{time.strftime('%H:%M:%S')} stage {self.stage} seen {self.seen} loss {smooth:.4f}", flush=True
                    )
                    self.save()
            self.save()
            if self.seen < self.stages[self.stage].samples or self.stage + 1 == len(self.stages):
                return
            self._next()


def lr_factor(stage: Stage, seen: int) -> float:
    """The share of the stage's learning rates after ``seen`` samples: warm-up, then constant or falling to zero."""
    warmup = min(1.0, (seen + stage.batch) / (stage.batch * 30))
    return warmup * (min(1.0, 2 * (1 - seen / stage.samples)) if stage.decay else 1.0)


def export(folder: Path, model: Any, weights: dict[str, Tensor]) -> None:
    """Writes what the package contains of a model: its weights as float16 and its config."""
    half = {k: v.half().contiguous() for k, v in weights.items()}
    save_file(half, folder / "model.safetensors.tmp")
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def parser(description: str | None, out: Path) -> argparse.ArgumentParser:
    """The options that both trainings have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=out, help="folder of the checkpoint and of prepared data")
    options.add_argument("--start", type=Path, help="exported weights to continue from, if there is no checkpoint")
    options.add_argument("--advance", action="store_true", help="go on to the next stage now")
    options.add_argument("--scale", type=float, default=1.0, help="share of each stage's samples that is trained")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--bf16", action="store_true", help="autocast to bfloat16: faster on CPUs with AVX512_BF16")
    options.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; start again to continue")
    options.add_argument("--save-every", type=float, default=3.0, help="minutes between checkpoints")
    options.add_argument("--seed", type=int, default=0)
    return options


def begin(args: argparse.Namespace) -> None:
    """Prepares torch and the folder for these options."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)


def train(task: Task, stages: list[Stage], args: argparse.Namespace) -> None:
    """Trains with the options of ``parser``."""
    stages = [replace(stage, samples=round(args.scale * stage.samples)) for stage in stages]
    trainer = Trainer(task, args.out, stages, args.start, args.bf16)
    if args.advance:
        trainer.advance()
    trainer.run(args.minutes, args.save_every)
