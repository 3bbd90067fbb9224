"""Artifacts for tests: a tiny DiT, its denoising loop, and processes that have no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

import duca_compile
from duca_compile import OptimizedModel, Policy
from duca_compile.artifact.manifest import Manifest

STEPS = 20
ROOT = Path(__file__).parents[1]
# Run before anything else, it makes every import of these fail.
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'onnx', 'onnxscript']));"


def tiny_dit(layers: int = 2, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=2,
        out_channels=2,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    return model.eval().requires_grad_(False)


def example(rows: int) -> dict[str, Tensor]:
    """The arguments of one call."""
    latent = torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": latent, "timestep": torch.full((rows,), 999), "class_labels": torch.arange(rows) % 10}


def optimized(policy: Policy, model: nn.Module | None = None, steps: int = STEPS) -> OptimizedModel:
    return duca_compile.optimize(tiny_dit() if model is None else model, policy, "eager", steps)


def export(model: OptimizedModel, path: Path, **options: Any) -> Manifest:
    return duca_compile.save(model, path, example(2), **options)


def loop(model: Callable[..., Any], rows: int, arrays: bool = False, seed: int = 1, steps: int = STEPS) -> list[Tensor]:
    """The model's outputs over a whole DDIM loop; with ``arrays`` it is given numpy's arrays."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    latent = torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    outputs = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            call = {"hidden_states": latent, "timestep": t.expand(rows), "class_labels": torch.arange(rows) % 10}
            given = {name: tensor.numpy() for name, tensor in call.items()} if arrays else call
            output = model(**given).sample
            assert isinstance(output, np.ndarray if arrays else Tensor)
            outputs.append(torch.as_tensor(output))
            latent = scheduler.step(outputs[-1], t, latent).prev_sample
    return outputs


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative difference of a step: norm of the difference over norm of the output."""
    return max(float((a - b).norm() / a.norm()) for a, b in zip(one, other, strict=True))


def without_torch(code: str, *arguments: str | Path) -> str:
    """What a process prints that runs ``code`` and cannot import torch, diffusers or the exporter."""
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
