"""Trains the embedded demo model, a class-conditional DiT on Fashion-MNIST, on a CPU in about two hours.

    apt-get install dataset-fashion-mnist        # or --data DIR with the four idx files
    python examples/train_demo.py --out runs/demo

There are two stages. The first trains with 4x4 patches (49 tokens), which is cheap; its blocks then continue with 2x2
patches (196 tokens). A run that was stopped resumes from its last checkpoint when it is started again with the same
--out.
"""

import argparse
import gzip
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

CLASS_NAMES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLASSES = len(CLASS_NAMES)  # also the index of the null class of classifier-free guidance
SIZE = 28
GUIDANCE = 2.0  # recommended scale
SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,  # clipping the image but not its noise would make dark areas drift brighter
    "set_alpha_to_one": True,
}


@dataclass(frozen=True)
class Stage:
    patch: int
    images: int
    batch: int
    muon_lr: float
    adam_lr: float
    decay: bool  # linear decay of the learning rate to zero over the last 60 % of the stage


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images, float32 (n, 1, 28, 28) in [-1, 1], and labels, int64 (n,), of ``split`` "train" or "t10k"."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, SIZE, SIZE)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(pixels / np.float32(127.5) - 1), torch.from_numpy(labels.astype(np.int64))


def build(patch: int, width: int = 96, heads: int = 3, depth: int = 12) -> DiTTransformer2DModel:
    """The DiT with adaLN-Zero, in eval mode: in train mode, each diffusers block would drop labels on its own."""
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=1,
        out_channels=1,
        num_layers=depth,
        sample_size=SIZE,
        patch_size=patch,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    ).eval()
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if patch > 2:
        fine = build(2).pos_embed.pos_embed  # averaged from the fine grid, so that they stay valid after the refinement
        side, ratio = SIZE // 2, patch // 2
        grid = fine.reshape(side // ratio, ratio, side // ratio, ratio, width).mean((1, 3))
        model.pos_embed.pos_embed.copy_(grid.reshape(1, -1, width))
    return model


def refine(coarse: dict[str, Tensor], model: DiTTransformer2DModel) -> None:
    """Loads the weights of a patch-4 model into a patch-2 one, with patch embedding and head pooled."""
    state = dict(coarse)
    embed = state["pos_embed.proj.weight"]
    state["pos_embed.proj.weight"] = nn.functional.avg_pool2d(embed, 2) * 2
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        state[name] = state[name].reshape(2, 2, 2, 2, -1).mean((0, 2)).reshape(4, -1).squeeze(-1)
    model.load_state_dict(state)


def optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the attention and MLP matrices, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and (".attn1." in name or ".ff." in name)
        (matrices if is_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=stage.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=stage.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_factor(stage: Stage, seen: int) -> float:
    warmup = min(1.0, (seen + stage.batch) / (stage.batch * 100))
    return warmup * (min(1.0, (1 - seen / stage.images) / 0.6) if stage.decay else 1.0)


class Trainer:
    """The state of one run: model, running average, optimizers, and the images that each stage has seen."""

    def __init__(self, out: Path, data: Path, stages: list[Stage], compile_model: bool) -> None:
        self.out, self.stages, self.compile_model = out, stages, compile_model
        self.images, self.labels = load_split(data, "train")
        alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.log: list[tuple[int, int, float]] = []  # stage, images seen, loss
        out.mkdir(parents=True, exist_ok=True)
        self._enter(0)
        if (out / "last.pt").exists():
            self._resume()

    def _enter(self, index: int) -> None:
        previous = dict(self.model.state_dict()) if index else None
        self.stage, self.seen = index, 0
        self.model = build(self.stages[index].patch)
        if previous is not None:
            refine(previous, self.model)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizers = optimizers(self.model, self.stages[index])
        self.forward = torch.compile(self.model) if self.compile_model else self.model

    def _resume(self) -> None:
        saved = torch.load(self.out / "last.pt", weights_only=True)
        for index in range(1, saved["stage"] + 1):
            self._enter(index)
        self.seen, self.log = saved["seen"], saved["log"]
        torch.manual_seed(torch.initial_seed() + self.seen)  # so that batches do not repeat those of the first part
        self.model.load_state_dict(saved["model"])
        self.average = saved["average"]
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def save(self) -> None:
        """Writes the resumable checkpoint and the averaged weights, each file atomically."""
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

    def train_step(self) -> float:
        stage = self.stages[self.stage]
        pick = torch.randint(0, len(self.labels), (stage.batch,))
        clean, labels = self.images[pick], self.labels[pick].clone()
        labels[torch.rand(stage.batch) < 0.1] = CLASSES
        strata = (torch.arange(stage.batch) + torch.rand(stage.batch)) / stage.batch
        timestep = (strata * len(self.signal)).long()
        signal, sigma = (v[timestep].view(-1, 1, 1, 1) for v in (self.signal, self.noise))
        noise = torch.randn_like(clean)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.forward(signal * clean + sigma * noise, timestep, labels).sample
        loss = (output.float() - (signal * noise - sigma * clean)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = lr_factor(stage, self.seen)
        for optimizer, base in zip(self.optimizers, (stage.muon_lr, stage.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.seen += stage.batch
        self._average(min(0.9995, 1 - 10 / (self.seen / stage.batch + 10)))
        return float(loss.item())

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        state = self.model.state_dict()
        names = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in names], [state[k] for k in names], 1 - decay)

    def run(self, minutes: float, save_every: float) -> None:
        deadline, saved = time.monotonic() + 60 * minutes, time.monotonic()
        columns = (TextColumn("stage {task.fields[stage]}  loss {task.fields[loss]:.4f}"), BarColumn())
        with Progress(*columns, MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            while True:
                stage = self.stages[self.stage]
                bar = progress.add_task("", total=stage.images, completed=self.seen, stage=self.stage, loss=math.nan)
                smooth = math.nan
                while self.seen < stage.images and time.monotonic() < deadline:
                    loss = self.train_step()
                    smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
                    progress.update(bar, completed=self.seen, loss=smooth)
                    if time.monotonic() - saved > 60 * save_every:
                        saved = time.monotonic()
                        self.log.append((self.stage, self.seen, smooth))
                        print(f"stage {self.stage} seen {self.seen} loss {smooth:.4f}", flush=True)
                        self.save()
                self.save()
                if self.seen < stage.images or self.stage + 1 == len(self.stages):
                    return
                self._enter(self.stage + 1)


def export(folder: Path, model: DiTTransformer2DModel, weights: dict[str, Tensor]) -> None:
    """Writes the files that the package contains: fp16 weights, configs of model and scheduler, and class names."""
    half = {k: v.half().contiguous() for k, v in weights.items()}
    save_file(half, folder / "model.safetensors.tmp")
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    model.save_config(folder)
    demo = {"class_names": CLASS_NAMES, "null_class": CLASSES, "guidance_scale": GUIDANCE}
    for name, content in (("scheduler.json", SCHEDULER), ("demo.json", demo)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this many minutes; start again to continue"
    )
    parser.add_argument("--coarse-images", type=int, default=205_000)
    parser.add_argument("--fine-images", type=int, default=135_000)
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stages = [
        Stage(patch=4, images=args.coarse_images, batch=64, muon_lr=2e-3, adam_lr=1e-3, decay=False),
        Stage(patch=2, images=args.fine_images, batch=48, muon_lr=1.5e-3, adam_lr=7e-4, decay=True),
    ]
    Trainer(args.out, args.data, stages, not args.no_compile).run(args.minutes, args.save_every)


if __name__ == "__main__":
    main()
