"""What capturing takes: work that grows with the depth and not with its square, and memory for the weights once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from duca_compile.analysis import analyze
from duca_compile.core.ir import Facts
from duca_compile.core.ports import Port, PortKind
from duca_compile.core.variants import Action, PartialVariant
from duca_compile.frontend.binder import Binder
from duca_compile.frontend.capture import capture
from duca_compile.passes.pipeline import build_variant, prepare
from tests.zoo import ZOO

SHALLOW, DEEP = 4, 12
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZES = (12, 5, 64, 64, 1)  # blocks, heads, width of a head, latent's side, batch: 115 MB of weights and 1024 tokens
MEASURE = f"""
import json, scale
scale.measure(scale.build_dit, 1, 1, 16, 8, 1)  # torch.export's own modules are loaded here
print(json.dumps(scale.measure(scale.build_dit, *{SIZES})))
"""


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions are called, built-in ones too: unlike seconds, the same under any load."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def work(name: str, depth: int) -> tuple[int, int]:
    """The calls that analysing a model of the zoo takes, and those that building a variant of it does."""
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(depth)
    captured = prepare(capture(model.eval(), Binder(model)((), arguments)))
    found: list[Facts] = []
    analysing = calls_of(lambda: found.append(analyze(captured)))
    branches = found[0].branches
    spec = PartialVariant(tuple(Port(PortKind.TOKENS, b.index) if b.pointwise else Action.REUSE for b in branches))
    return analysing, calls_of(lambda: build_variant(captured, found[0], spec))


@pytest.mark.parametrize("name", ["DiT", "FLUX", "HunyuanDiT", "U-ViT"])
def test_work_grows_no_faster_than_the_depth(name: str) -> None:
    """What is done once per model leaves room: ratios are 1.8 to 2.8. A whole walk for each add gives 3.6 to 7.6."""
    for shallow, deep in zip(work(name, SHALLOW), work(name, DEEP), strict=True):
        assert deep <= shallow * DEEP / SHALLOW


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak memory without Linux's clear_refs")
def test_capturing_holds_the_weights_once_and_a_steps_activations() -> None:
    """In a process of its own: all that optimizing adds to it, the model included, at its highest.

    A step's activations are what the model's own first call adds while it runs. Holding every block's caches, as two
    whole evaluations would, takes half of the weights more.
    """
    found = json.loads(run("-c", MEASURE).splitlines()[-1])
    activations = found["stages"]["first call"]["peak_bytes"] - found["bytes_with_the_model"]
    highest = found["total"]["peak_bytes"] - found["bytes_before_the_model"]
    assert highest <= 1.3 * found["parameter_bytes"] + activations


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak memory without Linux's clear_refs")
def test_the_benchmark_runs_on_a_tiny_model(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--heads", "2", "--head-dim", "16", "--size", "8", "--no-flux"]
    text = run(str(BENCHMARKS / "scale.py"), *sizes, "--out", str(tmp_path / "scale.json"))
    found = json.loads((tmp_path / "scale.json").read_text())["dit"]
    assert found["branches"] == 4
    stages = {"first call", "torch.export", "analyses", "verification", "variant: full", "variant: reuse"}
    assert stages <= found["stages"].keys()
    assert sum(each["wall"] for each in found["stages"].values()) <= found["total"]["wall"]
    assert "under 20 s: met" in text
    assert "times the parameters' memory, under 1.3: missed" in text  # there is next to nothing of these
