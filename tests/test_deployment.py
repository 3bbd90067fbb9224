"""From a trained model to a served one: the round trip without torch, memory, policies, models, and the examples."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import importlib.util
import io
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import duca_compile
from duca_compile import (
    FORA,
    DuCa,
    EasyCache,
    FreqCa,
    HiCache,
    MagCache,
    Policy,
    SeaCache,
    Selection,
    Spectrum,
    TaylorSeer,
    ToCa,
    published,
)
from duca_compile.app.demo import DemoModel
from duca_compile.artifact.manifest import read_manifest
from tests.artifacts import BLOCKED, ROOT, distance, export, loop, optimized, tiny_dit, without_torch
from tests.zoo import ZOO

pytestmark = pytest.mark.slow
DDIM_STEPS = 20
PSNR = 60  # dB, of images in [-1, 1]; what is seen is above 120


def module(name: str) -> ModuleType:
    """An example, by the name of its file."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.square(one - other).mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)


@pytest.fixture(scope="module")
def demo() -> DemoModel:
    return DemoModel.load()


@pytest.fixture(scope="module")
def folder(demo: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with DuCa at its defaults."""
    path = tmp_path_factory.mktemp("demo") / "artifact"
    model = duca_compile.optimize(demo.transformer, "duca", "eager", DDIM_STEPS)
    labels = torch.arange(2)
    arguments = {"hidden_states": demo.noise(0)[:2], "timestep": torch.full_like(labels, 999), "class_labels": labels}
    duca_compile.save(model, path, arguments)
    return path


ROUND_TRIP = """
import importlib.util
import numpy as np
spec = importlib.util.spec_from_file_location("serve", "examples/serve.py")
serve = importlib.util.module_from_spec(spec)
sys.modules["serve"] = serve
spec.loader.exec_module(serve)
sampler = serve.Sampler(serve.duca_compile.load(sys.argv[1], threads=1))
np.save(sys.argv[2], sampler.generate(list(range(10)), list(range(10))))
"""


def test_a_process_without_torch_makes_the_same_images(demo: DemoModel, folder: Path, tmp_path: Path) -> None:
    without_torch(ROUND_TRIP, folder, tmp_path / "images.npy")
    shape = (1, 28, 28)
    noise = np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in range(10)])
    model = duca_compile.optimize(demo.transformer, "duca", "eager", DDIM_STEPS)
    images = demo.sample(model, DDIM_STEPS, torch.from_numpy(noise), lambda seconds: None)
    assert {executed.kind.value for executed in model.history} == {"full", "partial", "skip"}
    assert images.std() > 0.3  # they show something
    assert psnr(np.load(tmp_path / "images.npy"), images[:, 0].numpy()) > PSNR


def test_the_embedded_models_artifact_takes_little_more_room_than_its_weights(folder: Path) -> None:
    found = read_manifest(folder)
    assert found.weights.file.bytes <= 1.05 * found.source.weight_bytes
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1.05 * found.source.weight_bytes


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    return module("serve")


@pytest.fixture
def server(serve: ModuleType, folder: Path) -> Iterator[tuple[str, Any]]:
    import uvicorn

    batcher = serve.Batcher(serve.Sampler(duca_compile.load(folder, threads=1)), limit=3, window=0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(serve.create_app(batcher), port=port, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        limit = time.monotonic() + 30
        while not running.started and time.monotonic() < limit:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", batcher
    finally:
        running.should_exit = True
        thread.join(30)


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:
        content: bytes = response.read()
    return content


def test_parallel_clients_get_what_single_runs_give(serve: ModuleType, folder: Path, server: tuple[str, Any]) -> None:
    url, batcher = server
    asked = [(label, seed) for label, seed in zip((3, 9, 1, 9, 0), (0, 1, 2, 3, 4), strict=True)]
    urls = [f"{url}/generate?label={label}&seed={seed}&format=npy" for label, seed in asked]
    with concurrent.futures.ThreadPoolExecutor(len(urls)) as clients:
        together = [np.load(io.BytesIO(content)) for content in clients.map(fetch, urls)]
    assert sorted(batcher.sizes) == [2, 3]  # five requests at once, at most three of them in a batch
    sampler = serve.Sampler(duca_compile.load(folder, threads=1))
    for (label, seed), image in zip(asked, together, strict=True):
        alone = sampler.generate([label], [seed])[0]
        assert np.linalg.norm(image - alone) < 1e-4 * np.linalg.norm(alone)
    assert json.loads(fetch(f"{url}/classes"))[9] == "ankle boot"
    assert fetch(f"{url}/generate?label=9").startswith(b"\x89PNG")
    with pytest.raises(urllib.error.HTTPError, match="422"):
        fetch(f"{url}/generate?label=10")


def test_an_artifact_takes_the_place_of_a_pipelines_transformer(demo: DemoModel, folder: Path) -> None:
    example = module("pipeline_with_artifact")
    pipe = example.DemoPipeline(demo.transformer, example.DDIMScheduler(**demo.scheduler), demo.null_class)
    pipe.set_progress_bar_config(disable=True)

    def images(transformer: Any) -> np.ndarray:
        pipe.transformer = transformer
        found: np.ndarray = pipe([9, 3], DDIM_STEPS, 2.0, torch.Generator().manual_seed(0)).images
        return found * 2 - 1

    artifact = duca_compile.load(folder, threads=1)
    optimized_model = duca_compile.optimize(demo.transformer, "duca", "eager", DDIM_STEPS)
    assert psnr(images(artifact), images(optimized_model)) > PSNR
    assert psnr(images(artifact), images(optimized_model)) > PSNR  # a second request
    assert [e.kind for e in artifact.history] == [e.kind for e in optimized_model.history]


POLICIES = [
    DuCa(interval=4, fresh_ratio=0.3, selection=Selection("v_norm", staleness=0.25, patch_bonus=0.4)),
    published("duca", "dit", interval=3, latched=False),  # attention scores, and full steps that change their mind
    ToCa(),
    TaylorSeer(interval=4, max_order=2),
    TaylorSeer(interval=4, max_order=1, lite=True),
    FORA(3),
    Spectrum(first_full_steps=3, share=0.5),
    HiCache(interval=4),
    FreqCa(interval=4, transform="fft", cutoff=0.4),
    FreqCa(interval=4),
    MagCache((1.0, *[1.03] * (DDIM_STEPS - 1)), threshold=0.2),
    SeaCache(),
    EasyCache(),
    duca_compile.Uncached(),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_policy_runs_as_it_does_in_torch(policy: Policy, tmp_path: Path) -> None:
    model = optimized(policy)
    export(model, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    for rows in (2, 3):
        assert distance(loop(model, rows), loop(artifact, rows, arrays=True)) < 1e-4
        assert [e.kind for e in artifact.history] == [e.kind for e in model.history]
        assert artifact.cache_bytes == model.cache_bytes


def test_attention_stays_whole_from_opset_23_on(tmp_path: Path) -> None:
    model = optimized(FORA(3))
    found = export(model, tmp_path / "artifact", opset=23)
    assert found.graphs["full"].operators["Attention"] == 2
    assert distance(loop(model, 2), loop(duca_compile.load(tmp_path / "artifact", threads=1), 2)) < 1e-4


def test_a_fixed_batch_is_all_that_is_taken(tmp_path: Path) -> None:
    model = optimized(FORA(3))
    found = export(model, tmp_path / "artifact", dynamic_batch=False)
    assert all(spec.shape[0] == 2 for spec in found.inputs)
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    assert distance(loop(model, 2), loop(artifact, 2)) < 1e-4
    with pytest.raises(duca_compile.UsageError, match=r"\(2, 2, 8, 8\)"):
        loop(artifact, 3)


@pytest.mark.parametrize("name", ["PixArt", "FLUX"])
def test_models_with_prompts_and_joint_attention(name: str, tmp_path: Path) -> None:
    """Cross-attention; text and image joined, with rotary embeddings."""
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(2)
    fast = duca_compile.optimize(model.eval(), DuCa(interval=4, fresh_ratio=0.3, text_factor=1.0), "eager", 6)
    found = duca_compile.save(fast, tmp_path / "artifact", arguments)
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    timestep = next(e.path[0] for e in found.signature.arguments if e.input == found.signature.timestep)
    with torch.no_grad():
        for step in range(6):
            call = arguments | {timestep: arguments[timestep] * (1 - step / 10)}
            (expected,), (output,) = tree_leaves(fast(**call)), tree_leaves(artifact(**call))
            assert (expected - output).norm() < 1e-4 * expected.norm()
    assert "".join(executed.kind.letter for executed in artifact.history) == "FPSPFP"


MEMORY = """
import json, sys
import numpy as np, onnxruntime, duca_compile

def pss():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024

zero = np.zeros(1, np.int64)
duca_compile.load(sys.argv[3], threads=1)(np.zeros((1, 1, 28, 28), np.float32), zero, zero)
before = pss()  # with what the runtime itself takes
artifact = duca_compile.load(sys.argv[1], threads=1, share_weights=sys.argv[2] == "shared", verify=False)
for t in (999, 949, 899, 849):
    artifact(np.zeros((1, 2, 8, 8), np.float32), np.full(1, t), np.zeros(1, np.int64))
kinds = sorted({e.kind.value for e in artifact.history})
print(json.dumps([pss() - before, artifact.manifest.weights.file.bytes, kinds]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of shared memory")
def test_shared_weights_are_in_memory_once(folder: Path, tmp_path: Path) -> None:
    """Three variants over one file: at most 1.1 times the pool, by proportional set size."""
    model = optimized(DuCa(interval=4, fresh_ratio=0.5), tiny_dit(layers=2, width=1024))
    export(model, tmp_path / "artifact")
    taken, pool, kinds = json.loads(without_torch(MEMORY, tmp_path / "artifact", "shared", folder))
    assert kinds == ["full", "partial", "skip"]
    assert pool > 100 * 2**20
    assert taken <= 1.1 * pool
    copied, _, _ = json.loads(without_torch(MEMORY, tmp_path / "artifact", "copied", folder))
    assert copied > 1.2 * pool  # so the option does something


def test_an_environment_without_torch_runs_an_artifact(folder: Path, tmp_path: Path) -> None:
    """A virtual environment with this package's runtime needs alone, made from the installed packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for package in ("numpy", "msgspec", "onnxruntime", "flatbuffers", "protobuf", "packaging"):
        for file in importlib.metadata.files(package) or ():
            top = site / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(file.locate().parents[len(file.parts) - 2] if file.parts[1:] else file.locate())
    code = (
        "import sys, numpy as np, duca_compile; a = duca_compile.load(sys.argv[1], threads=1);"
        "[a(np.zeros((2, 1, 28, 28), np.float32), np.full(2, t), np.arange(2)) for t in (999, 949, 899)];"
        "print([e.kind.value for e in a.history], 'torch' in sys.modules)"
    )
    command = [tmp_path / "venv" / "bin" / "python", "-c", code, folder]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['full', 'partial', 'skip'] False"


def test_blocking_blocks() -> None:
    """The processes of these tests cannot import torch."""
    done = subprocess.run([sys.executable, "-c", BLOCKED + "import torch"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr
