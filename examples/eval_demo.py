"""Measures a class-conditional Fashion-MNIST model on a CPU: class accuracy, Fréchet distance and a sample grid.

    python examples/eval_demo.py --model duca_compile/app/data/demo --out runs/eval

The judge is a small CNN, trained here on the real training images only. The Fréchet distance to the held-out (t10k)
images is computed from the 64 features before its last layer. Its floor is the same distance for as many real training
images as were generated, drawn at random with equal classes (the mean of several draws).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_demo import CLASS_NAMES, CLASSES, GUIDANCE, SIZE, load_split

JUDGE_SEED = 1
FLOOR_DRAWS = 10


@dataclass(frozen=True)
class Metrics:
    samples_per_class: int
    steps: int
    guidance_scale: float
    seed: int
    judge_seed: int
    judge_accuracy: float  # of the CNN on the real held-out images
    judge_class_accuracy: dict[str, float]
    accuracy: float  # share of generated images that the CNN assigns to their class
    class_accuracy: dict[str, float]
    frechet: float  # generated to held-out images
    frechet_floor: float  # as many real training images to held-out images


class Judge(nn.Module):
    """A small CNN; ``features`` are the inputs of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (1, 24, 48, 64), []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 9, 64), nn.ReLU())
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_judge(images: Tensor, labels: Tensor, epochs: int = 6, batch: int = 128) -> Judge:
    torch.manual_seed(JUDGE_SEED)
    judge = Judge()
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in track(range(steps), "training the judge"):
        if step % (len(labels) // batch) == 0:
            order = torch.randperm(len(labels))
        pick = order[step % (len(labels) // batch) * batch :][:batch]
        nn.functional.cross_entropy(judge(images[pick]), labels[pick]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


def load_judge(cache: Path, data: Path) -> Judge:
    """The judge stored in ``cache``; it is trained and stored first if it does not exist."""
    if not cache.exists():
        save_file(train_judge(*load_split(data, "train")).state_dict(), cache)
    judge = Judge().eval()
    judge.load_state_dict(load_file(cache))
    return judge


@torch.no_grad()
def judge_images(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features, float64 (n, 64), and predicted classes, (n,)."""
    features = torch.cat([judge.features(part) for part in images.split(500)])
    return features.double(), judge.head(features).argmax(1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_floor(train: Tensor, labels: Tensor, held_out: Tensor, per_class: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == index).nonzero().squeeze(1) for index in range(CLASSES)]
    draws = []
    for _ in range(FLOOR_DRAWS):
        picks = [ids[torch.randperm(len(ids), generator=generator)[:per_class]] for ids in members]
        draws.append(frechet(train[torch.cat(picks)], held_out))
    return float(np.mean(draws))


def load_model(folder: Path) -> tuple[DiTTransformer2DModel, DDIMScheduler]:
    """The model, with float32 weights, and its scheduler."""
    model = DiTTransformer2DModel.from_config(json.loads((folder / "config.json").read_text())).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))  # copies fp16 weights into float32 parameters
    return model, DDIMScheduler(**json.loads((folder / "scheduler.json").read_text()))


@torch.no_grad()
def sample(
    model: DiTTransformer2DModel, scheduler: DDIMScheduler, classes: Tensor, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Runs DDIM with classifier-free guidance, both halves in one batch. Returns images in [-1, 1]."""
    scheduler.set_timesteps(steps)
    labels, images = torch.cat([classes, torch.full_like(classes, CLASSES)]), noise
    for timestep in scheduler.timesteps:
        output = model(torch.cat([images, images]), timestep.expand(len(labels)), labels).sample
        conditional, unconditional = output.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        images = scheduler.step(guided, timestep, images).prev_sample
    return images.clamp(-1, 1)


def draw_grid(images: Tensor, path: Path, columns: int) -> None:
    """Draws a labelled row for each class, from images (classes, n, 1, size, size)."""
    figure = Figure(figsize=(0.8 * columns + 1.6, 0.8 * CLASSES), layout="constrained")
    for axis, name, row in zip(figure.subplots(CLASSES), CLASS_NAMES, images[:, :columns, 0], strict=True):
        padded = nn.functional.pad(row, (2, 2, 2, 2), value=-1)
        axis.imshow(torch.cat(list(padded), dim=1).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=13)
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100, bbox_inches="tight")


def table(metrics: Metrics) -> Table:
    result = Table("class", "generated, named right", "real held-out, named right")
    for name in CLASS_NAMES:
        result.add_row(name, f"{metrics.class_accuracy[name]:.1%}", f"{metrics.judge_class_accuracy[name]:.1%}")
    result.add_section()
    result.add_row("all", f"{metrics.accuracy:.1%}", f"{metrics.judge_accuracy:.1%}")
    result.add_row("Fréchet distance to held-out", f"{metrics.frechet:.2f}", f"{metrics.frechet_floor:.2f} (floor)")
    return result


def by_class(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    right = (predicted == labels).double()
    return {name: round(right[labels == index].mean().item(), 4) for index, name in enumerate(CLASS_NAMES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("duca_compile/app/data/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/eval"))
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--columns", type=int, default=10, help="samples per class in the grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise and of the draws for the floor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()

    judge = load_judge(args.out / "judge.safetensors", args.data)
    train_images, train_labels = load_split(args.data, "train")
    held_images, held_labels = load_split(args.data, "t10k")
    held_features, held_predicted = judge_images(judge, held_images)
    train_features, _ = judge_images(judge, train_images)

    model, scheduler = load_model(args.model)
    classes = torch.arange(CLASSES).repeat_interleave(args.per_class)
    noise = torch.randn(len(classes), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(args.seed))
    start = time.monotonic()
    parts = track(list(zip(classes.split(20), noise.split(20), strict=True)), "sampling")
    images = torch.cat([sample(model, scheduler, *part, args.steps, args.guidance) for part in parts])
    console.print(f"{len(images)} images in {time.monotonic() - start:.0f} s")
    features, predicted = judge_images(judge, images)

    metrics = Metrics(
        samples_per_class=args.per_class,
        steps=args.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        judge_seed=JUDGE_SEED,
        judge_accuracy=(held_predicted == held_labels).double().mean().item(),
        judge_class_accuracy=by_class(held_predicted, held_labels),
        accuracy=(predicted == classes).double().mean().item(),
        class_accuracy=by_class(predicted, classes),
        frechet=round(frechet(features, held_features), 3),
        frechet_floor=round(frechet_floor(train_features, train_labels, held_features, args.per_class, args.seed), 3),
    )
    console.print(table(metrics))
    (args.out / "metrics.json").write_text(json.dumps(asdict(metrics), indent=2) + "\n")
    draw_grid(images.unflatten(0, (CLASSES, args.per_class)), args.out / "samples.png", args.columns)


if __name__ == "__main__":
    main()
