"""Outputs and step types of the authors' released code, step by step, on a 28-block DiT."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from duca_compile import Policy, Uncached, published
from tests.support import Shared

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

import dit28  # noqa: E402 - lies beside this file

POLICIES: dict[str, Policy] = {
    "uncached": Uncached(),
    "fora_n3": published("fora", "dit", interval=3),
    "duca_attention_n3": published("duca", "dit", interval=3, fresh_ratio=0.05, selection="attention", latched=True),
    "duca_vnorm_n4": published("duca", "dit", interval=4, fresh_ratio=0.05, selection="v_norm", latched=True),
    "duca_vnorm_n3_released": published("duca", "dit", interval=3, fresh_ratio=0.05, selection="v_norm", latched=False),
    "toca_n4": published("toca", "dit", interval=4, fresh_ratio=0.07, selection="attention"),
    "speca_released": published(
        "speca",
        "dit",
        max_order=4,
        base_threshold=0.1,
        decay_rate=0.01,
        min_taylor_steps=2,
        max_taylor_steps=5,
        compat="released",
    ),
    "taylorseer_n4_o2": published("taylorseer", "dit", interval=4, max_order=2),
}
# The files label a cached step by the code path that ran it; FORA was recorded as ToCa with no fresh tokens.
KINDS = {"full": "full", "ToCa": "partial", "aggressive": "skip", "Taylor": "forecast"}


@pytest.fixture(scope="module")
def model() -> Shared:
    return Shared(dit28.build())


@pytest.mark.parametrize("name", POLICIES)
def test_every_step_agrees_with_the_released_code(model: Shared, name: str) -> None:
    golden = np.load(FOLDER / f"{name}.npz")
    steps = json.loads(str(golden["config"]))["steps"]
    optimized = model.optimized(POLICIES[name], steps)
    labels = torch.from_numpy(golden["y"]).long()
    for step in range(steps):
        latent = torch.from_numpy(golden["x"][step])
        timestep = torch.full((2,), int(golden["t"][step]))
        output = optimized(torch.cat([latent, latent]), timestep=timestep, class_labels=labels).sample[:, :4].numpy()
        expected = golden["out"][step]
        error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"step {step}: relative error {error:.1e}"
    kinds = [executed.kind.value for executed in optimized.history]
    reused = {"partial": "reuse"} if name == "fora_n3" else {}
    assert kinds == [reused.get(KINDS[t], KINDS[t]) for t in map(str, golden["types"])]
