"""Artifacts of machine code: run without a compiler in a new process, and from C++, over one set of live weights."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import duca_compile
from duca_compile import ArtifactError, DuCa, Linear, UsageError
from duca_compile.artifact.manifest import read_manifest
from duca_compile.artifact.model import Artifact
from duca_compile.export import aoti, tensorrt
from tests.test_inductor import close
from tests.test_optimize import LABELS, build, latent, loop

EXAMPLE = Path(__file__).parents[1] / "examples" / "aoti_cpp"
STEPS = 12
# Token counts that differ from step to step: 1, 2, 3 of 16 tokens.
POLICY = DuCa(interval=4, fresh_ratio=0.5, selection="random", step_factor=Linear(0.0, 1.0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(depth=1)


@pytest.fixture(scope="module")
def artifact(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "artifact"
    example = {"hidden_states": latent(0), "timestep": torch.full((4,), 990), "class_labels": LABELS}
    duca_compile.save(duca_compile.optimize(model, POLICY, "eager", STEPS), path, example, format="aoti")
    return path


RUN = """
import subprocess, sys
import torch
from safetensors.torch import load_file, save_file

import torch._inductor, torch._inductor.compile_fx, torch._inductor.cpp_builder

def refuse(*args, **kwargs):
    raise AssertionError("something was compiled")

torch._inductor.compile_fx.compile_fx = torch._inductor.compile_fx.compile_fx_aot = refuse
torch._inductor.aot_compile = torch._inductor.cpp_builder.CppBuilder.build = torch.compile = refuse
subprocess.Popen = subprocess.run = subprocess.check_output = refuse

import duca_compile

artifact = duca_compile.load(sys.argv[1], backend="aoti")
inputs = load_file(sys.argv[2])
outputs = [artifact(**{name: each[step] for name, each in inputs.items()}).sample for step in range(int(sys.argv[4]))]
assert "diffusers" not in sys.modules
save_file({"output_0": torch.stack(outputs)}, sys.argv[3])
print("".join(each.kind.letter for each in artifact.history))
"""


def inputs_file(path: Path) -> Path:
    """What ``loop`` calls a model with, step by step."""
    steps = range(STEPS)
    times = torch.stack([torch.full((4,), 990 - 10 * i) for i in steps])
    save_file(
        {
            "hidden_states": torch.stack([latent(i) for i in steps]),
            "timestep": times,
            "class_labels": LABELS.expand(STEPS, 4).contiguous(),
        },
        path,
    )
    return path


@pytest.mark.slow
@torch.no_grad()
def test_a_new_process_runs_it_and_compiles_nothing(model: nn.Module, artifact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, artifact, inputs_file(tmp_path / "in"), tmp_path / "out", str(STEPS)]
    environment = {**os.environ, "PATH": "", "CXX": "/none", "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "FPSPFPSPFPSP"
    expected = loop(duca_compile.optimize(model, POLICY, "eager", STEPS), STEPS)
    assert close(list(load_file(tmp_path / "out")["output_0"]), expected)


@pytest.mark.slow
@torch.no_grad()
def test_it_runs_from_cpp(artifact: Path, tmp_path: Path) -> None:
    """The example is compiled, and compared with the same graphs run from Python on the same tokens."""
    program = tmp_path / "run"
    subprocess.run(["bash", EXAMPLE / "build.sh", program], env={**os.environ, "PYTHON": sys.executable}, check=True)
    given = inputs_file(tmp_path / "in")
    done = subprocess.run([program, artifact, given, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{STEPS} steps\n"
    found = load_file(tmp_path / "out")["output_0"]
    loaded = duca_compile.load(artifact, backend="aoti")
    assert close(list(found), by_hand(loaded, load_file(given)))
    broken = subprocess.run([program, artifact, given.with_name("none"), "out"], capture_output=True, text=True)
    assert broken.returncode == 1
    assert f"error: cannot read {given.with_name('none')}" in broken.stderr


def by_hand(loaded: Artifact, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The schedule with evenly spaced tokens, graph by graph."""
    found, outputs = loaded.manifest, []
    state: dict[str, Tensor] = {}

    def run(name: str, prefix: str = "") -> None:
        graph = found.graphs[name]
        results = loaded._functions[name](*[state[spec.name] for spec in graph.inputs])
        for spec, result in zip(graph.outputs, results, strict=True):
            state[spec.name if spec.name.startswith(("output_", "score_")) else prefix + spec.name] = result

    for step, place in enumerate(found.schedule.steps):
        plan = found.schedule.plans[place]
        state.update({name: each[step] for name, each in inputs.items()})
        if step == 0:
            run(found.prologue)
        variant = found.variants[plan.variant]
        if variant.rows is not None:
            run(variant.rows)
        for branch in found.branches:
            if count := plan.counts.get(str(branch.index)):
                places = torch.tensor([i * branch.tokens // count for i in range(count)])
                state[f"tokens_{branch.index}"] = places.expand(4, -1).contiguous()
        run(variant.graph, "cache_")
        outputs.append(state["output_0"])
    return outputs


@pytest.mark.slow
@torch.no_grad()
def test_all_graphs_read_one_set_of_live_weights(model: nn.Module, artifact: Path) -> None:
    loaded = duca_compile.load(artifact, backend="aoti")
    weights = loaded._engine.weights
    stored = load_file(artifact / aoti.WEIGHTS)
    assert all(torch.equal(weight, model.state_dict().get(name, weight)) for name, weight in stored.items())
    with zipfile.ZipFile(artifact / aoti.PACKAGE) as package:
        code = b"".join(package.read(name) for name in package.namelist())
    for weight in weights.values():
        content = weight.numpy().tobytes()
        assert len(content) < 256 or not weight.any() or content not in code, "the package has weights too"
    before = loop(loaded, 4)
    changed = build(depth=1)
    for name, parameter in changed.named_parameters():
        if name in weights:
            parameter.mul_(1.5)
            weights[name].mul_(1.5)
    loaded.reset()
    after = loop(loaded, 4)
    assert not close(after, before)
    assert close(after, loop(duca_compile.optimize(changed, POLICY, "eager", STEPS), 4))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_it_takes_other_batches(model: nn.Module, artifact: Path, rows: int) -> None:
    loaded, eager = duca_compile.load(artifact, backend="aoti"), duca_compile.optimize(model, POLICY, "eager", STEPS)
    for step in range(4):
        given = latent(step)[:rows]
        time, labels = torch.full((rows,), 900 - step), LABELS[:rows]
        expected = eager(given, timestep=time, class_labels=labels).sample
        assert close([loaded(given, timestep=time, class_labels=labels).sample], [expected])
        found = loaded.session()
        with found:
            arrays = loaded(given.numpy(), timestep=time.numpy(), class_labels=labels.numpy()).sample
        assert isinstance(arrays, np.ndarray)


@pytest.mark.slow
def test_the_wrong_backend_and_a_foreign_package_are_named(artifact: Path, tmp_path: Path) -> None:
    for backend in ("onnxruntime", "openvino", "tensorrt"):
        with pytest.raises(UsageError, match=f"backend='{backend}' cannot run an artifact of format 'aoti'"):
            duca_compile.load(artifact, backend=backend)
    with pytest.raises(UsageError, match="threads are ONNX Runtime's and OpenVINO's"):
        duca_compile.load(artifact, backend="aoti", threads=1)
    with pytest.raises(UsageError, match="engines are built of ONNX graphs"):
        tensorrt.build(artifact, ["sm89"])
    found = read_manifest(artifact)
    assert found.opset is None
    assert {graph.file.path for graph in found.graphs.values()} == {aoti.PACKAGE}
    copy = tmp_path / "artifact"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / aoti.PACKAGE).write_bytes(b"\0" * (copy / aoti.PACKAGE).stat().st_size)
    with pytest.raises(ArtifactError, match="is no package of AOTInductor"):
        duca_compile.load(copy, backend="aoti", verify=False)
