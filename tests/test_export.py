"""Artifacts: what is written, what is refused, and that they run as the optimized model does, without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import duca_compile
from duca_compile import FORA, ArtifactError, BackendError, DuCa, ExportError, Linear, OptimizedModel, UsageError
from duca_compile.app.cli import app
from duca_compile.artifact.manifest import Manifest, Size, read_manifest
from duca_compile.artifact.model import Artifact
from tests.artifacts import STEPS, distance, example, export, loop, optimized, tiny_dit, without_torch

# Both the share of tokens and their number in each block vary, and leading blocks have other counts than later ones.
POLICY = DuCa(interval=4, fresh_ratio=0.4, step_factor=Linear(0.5, 1.0), block_factor=Linear(0.5, 0.5))
TOLERANCE = 1e-4  # relative, of each of 20 steps; what is seen is below 1e-5


@pytest.fixture(scope="module")
def model() -> OptimizedModel:
    return optimized(POLICY)


@pytest.fixture(scope="module")
def folder(model: OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "artifact"
    export(model, path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return duca_compile.load(folder, threads=1)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("arrays", [False, True], ids=["tensors", "arrays"])
def test_a_whole_loop_agrees_with_the_optimized_model(
    model: OptimizedModel, artifact: Artifact, rows: int, arrays: bool
) -> None:
    expected = loop(model, rows)
    assert distance(expected, loop(artifact, rows, arrays)) < TOLERANCE
    assert [(e.step, e.pass_index, e.kind) for e in artifact.history] == [
        (e.step, e.pass_index, e.kind) for e in model.history
    ]
    assert [e.flops for e in artifact.history] == pytest.approx([e.flops for e in model.history], rel=1e-12)
    assert artifact.cache_bytes == model.cache_bytes > 0


def test_the_schedule_needs_what_the_test_above_is_to_show(folder: Path) -> None:
    """All three kinds of step, token counts that differ between branches and between steps, and no fixed batch."""
    found = read_manifest(folder)
    assert set(found.variants) == {"full", "partial", "skip"}
    counts = {tuple(plan.counts.values()) for plan in found.schedule.plans if plan.counts}
    assert len(counts) > 2
    assert any(len(set(each)) > 1 for each in counts)
    assert len(found.schedule.steps) == STEPS
    assert {spec.shape[0] for spec in found.inputs} == {Size("batch")}


def test_three_variants_take_the_room_of_one_models_weights(folder: Path) -> None:
    """The pool is at most 1.05 times the model's weights, and what is equal is in it once."""
    found = read_manifest(folder)
    assert found.weights.file.bytes <= 1.05 * found.source.weight_bytes
    assert found.source.weight_bytes == sum(p.numel() * p.element_size() for p in tiny_dit().parameters())
    places = sorted((chunk.start, chunk.start + chunk.bytes) for chunk in found.weights.chunks)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert len({chunk.sha256 for chunk in found.weights.chunks}) == len(found.weights.chunks)
    external = {
        tuple(sorted((entry.key, entry.value) for entry in tensor.external_data))
        for graph in found.graphs.values()
        for tensor in onnx.load(folder / graph.file.path, load_external_data=False).graph.initializer
        if tensor.external_data
    }
    assert {dict(entries)["location"] for entries in external} == {found.weights.file.path}
    assert {int(dict(entries)["offset"]) for entries in external} == {chunk.start for chunk in found.weights.chunks}


def test_large_weights_are_aligned(tmp_path: Path) -> None:
    from duca_compile.export.onnx import ALIGNED_FROM, ALIGNMENT, PoolWriter

    writer = PoolWriter(tmp_path)
    small, large = bytes(100), bytes(ALIGNED_FROM)
    chunks = [writer.add(data) for data in (small, b"1" + small, large + b"1", large, small)]
    pool = writer.close()
    assert [chunk.start for chunk in chunks] == [0, 128, ALIGNMENT, 2 * ALIGNMENT + ALIGNED_FROM, 0]
    assert pool.file.bytes == (tmp_path / pool.file.path).stat().st_size == chunks[3].start + chunks[3].bytes


def test_every_graph_is_valid_and_has_no_paths_of_this_machine(folder: Path) -> None:
    for graph in read_manifest(folder).graphs.values():
        path = folder / graph.file.path
        onnx.checker.check_model(path, full_check=True)
        assert str(Path.cwd()).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


def test_a_manifest_survives_being_written(folder: Path) -> None:
    found = read_manifest(folder)
    assert Manifest.loads(found.dumps()) == found


def test_a_process_without_torch_gives_the_same_bits(artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    calls = {name: tensor.numpy() for name, tensor in example(3).items()}
    times = np.arange(999, 0, -50)[:6]
    artifact.reset()
    expected = [artifact(**calls | {"timestep": np.full(3, time)}).sample for time in times]
    np.savez(tmp_path / "in.npz", **{**calls, "timestep": np.repeat(times[:, None], 3, 1)})
    code = "from duca_compile.app.cli import app; app()"
    shown = without_torch(
        code, "run", folder, "--npz", tmp_path / "in.npz", "--out", tmp_path / "out.npz", "--threads", "1"
    )
    kinds = "".join(executed.kind.letter for executed in artifact.history)
    assert set(kinds) == {"F", "P", "S"}
    assert "6 calls" in shown
    assert kinds in shown
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["sample"], np.stack(expected))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, duca_compile; assert not {'torch', 'onnxruntime'} & {*sys.modules}; print(duca_compile.DuCa())"
    assert "DuCa" in without_torch("del sys.modules['torch'];" + code)


def test_public_names_are_those_of_the_stub() -> None:
    stub = Path(duca_compile.__file__).with_suffix(".pyi").read_text()
    listed = set(json.loads(stub[stub.index("__all__ = ") + 10 :].replace(",\n]", "]")))
    assert listed == set(duca_compile.__all__)
    assert all(hasattr(duca_compile, name) for name in listed)
    assert duca_compile.explain.__name__ == "explain"  # not a module of that name


def test_threads_and_sessions_do_not_disturb_each_other(artifact: Artifact) -> None:
    """Requests of different batch sizes in threads, each with a session, give the bits of each alone."""
    alone = {rows: loop(artifact.session(), rows, seed=rows) for rows in (1, 2, 3, 4)}
    found: dict[int, list[torch.Tensor]] = {}

    def work(rows: int) -> None:
        found[rows] = loop(artifact.session(), rows, seed=rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows, expected in alone.items():
        assert all(map(torch.equal, expected, found[rows]))


def test_requests_after_one_another_are_independent(artifact: Artifact) -> None:
    alone = loop(artifact.session(), 2, seed=7)
    with artifact.session() as session:
        loop(artifact, 2, seed=8)
        assert all(map(torch.equal, alone, loop(artifact, 2, seed=7)))
    assert session.cache_bytes == 0


def test_passes_have_caches_of_their_own(model: OptimizedModel, artifact: Artifact) -> None:
    def guided(run: Callable[..., Any]) -> list[torch.Tensor]:
        outputs = []
        for t in range(999, 0, -100):
            for name, labels in (("cond", [1, 2]), ("uncond", [3, 3])):
                with run.cache_context(name):  # type: ignore[attr-defined]
                    call = example(2) | {"timestep": torch.full((2,), t), "class_labels": torch.tensor(labels)}
                    outputs.append(run(**call).sample)
        return outputs

    model.reset()
    artifact.reset()
    assert distance(guided(model), guided(artifact)) < TOLERANCE
    assert [(e.pass_name, e.kind) for e in artifact.history] == [(e.pass_name, e.kind) for e in model.history]


def test_results_are_the_callers_own(artifact: Artifact) -> None:
    """Writing to a result, or to an argument after the call, changes no later step."""
    session = artifact.session()
    expected = [artifact(**example(2) | {"timestep": torch.full((2,), t)}).sample.clone() for t in (999, 899, 799)]
    call = {name: tensor.numpy().copy() for name, tensor in example(2).items()}
    for t, wanted in zip((999, 899, 799), expected, strict=True):
        given = {name: array.copy() for name, array in call.items()} | {"timestep": np.full(2, t)}
        output = session(**given).sample
        assert np.array_equal(output, wanted.numpy())
        output.fill(np.nan)
        given["hidden_states"].fill(np.nan)


def test_changed_labels_are_noticed_though_the_array_is_the_same(artifact: Artifact) -> None:
    call = {name: tensor.numpy().copy() for name, tensor in example(2).items()}
    session = artifact.session()
    session(**call)
    call["class_labels"][:] = (8, 9)
    call["timestep"] = np.full(2, 899)
    changed = session(**call).sample
    other = artifact.session()
    other(**{name: tensor.numpy() for name, tensor in example(2).items()})
    labels = np.array([8, 9])
    assert np.array_equal(changed, other(**call | {"class_labels": labels}).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 2, 8, 9)}, r"hidden_states must be float32 of shape \(batch, 2, 8, 8\)"),
        ({"hidden_states": torch.zeros(2, 2, 8, 8, dtype=torch.float64)}, "not float64"),
        ({"class_labels": torch.zeros(3, dtype=torch.int64)}, r"\(2,\) for a batch of 2, not int64 of shape \(3,\)"),
        ({"return_dict": False}, "return_dict=False: the artifact was exported with True"),
        ({"guidance": 1.0}, "unknown argument 'guidance'"),
        ({"timestep": 0.5}, "timestep must be of type int64"),
    ],
)
def test_calls_of_another_kind_are_refused(artifact: Artifact, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        artifact(**example(2) | change)


class Scaled(nn.Module):
    """A model that is told numbers for each image by its place in the batch, as OmniGen is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_dit(layers=1)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, sizes: dict[int, Any]) -> Tensor:
        result: Tensor = self.inner(hidden_states, timestep=timestep, class_labels=class_labels).sample
        return result * sizes[0][1]


@pytest.mark.slow
def test_numbers_may_be_keys_of_what_is_no_tensor(tmp_path: Path) -> None:
    model = optimized(FORA(3), Scaled().eval())
    call = example(2) | {"sizes": {0: [1, 0.5]}}
    duca_compile.save(model, tmp_path / "artifact", call)
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    assert torch.allclose(artifact(**call), model(**call), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match=r"sizes\.0\.1=2: the artifact was exported with 0\.5"):
        artifact(**call | {"sizes": {0: [1, 2]}})
    with pytest.raises(ExportError, match="takes tensors in lists, tuples and dictionaries with names"):
        duca_compile.save(model, tmp_path / "other", call | {"sizes": {0: [1, torch.tensor(0.5)]}})


def test_a_missing_argument_is_named(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="the argument class_labels is missing"):
        artifact(hidden_states=torch.zeros(2, 2, 8, 8), timestep=999)


def test_a_number_serves_as_the_timestep(artifact: Artifact) -> None:
    call = example(2)
    expected = artifact.session()(**call).sample
    assert torch.equal(artifact.session()(**call | {"timestep": 999}).sample, expected)
    assert torch.equal(artifact.session()(call["hidden_states"], 999, call["class_labels"]).sample, expected)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def path_of_full(path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["graphs"]["full"]["file"]["path"] = path

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "is of schema 2, and this version of duca_compile knows 1"),
        (lambda c: c.pop("schema"), "has no schema number"),
        (lambda c: c.update(colour="red"), "colour is unknown in schema 1"),
        (lambda c: c["policy"].pop("name"), "policy.name is missing"),
        (lambda c: c["inputs"][0].update(dtype=3), r"inputs\[0\].dtype must be str, not 3"),
        (lambda c: c["inputs"][0].update(shape=["batch*2"]), "must be a size such as"),
        (
            lambda c: c["inputs"][0].update(shape=["0*batch"]),
            r"inputs\[0\]\.shape\[0\] must be a size .*, not '0\*batch'",
        ),
        (lambda c: c["inputs"][0].update(shape=[-1]), r"inputs\[0\]\.shape\[0\] must be int >= 0, not -1"),
        (lambda c: c["inputs"][0].update(shape=[2**30] * 2), r"inputs\[0\]\.shape: .* is too large for a tensor"),
        (lambda c: c["inputs"][0].update(dtype="load"), r"inputs\[0\]\.dtype: 'load' is no type of tensors"),
        (lambda c: c["inputs"].append(c["inputs"][0]), "inputs: two have the same name"),
        (
            lambda c: c["graphs"]["full"]["operators"].update(Add=-1),
            "graphs.full.operators.Add must be int >= 0, not -1",
        ),
        (lambda c: c["graphs"].update({"../x": c["graphs"]["full"]}), "'../x' cannot be the name of a graph"),
        (lambda c: c["schedule"]["plans"][0]["step"].update(interval=0), r"plans\[0\]\.step\.interval: 0 is no number"),
        (lambda c: c["signature"].update(result={"output": 9}), "has 1 outputs of the model, and signature.result 10"),
        (lambda c: c["branches"][0].update(tokens=0), r"branches\[0\]\.tokens must be int >= 1, not 0"),
        (lambda c: c["schedule"]["steps"].append(99), "a place that is not among the plans"),
        (lambda c: c["schedule"]["plans"][0]["step"].update(kind="leap"), "must be one of .*'reuse'.*, not 'leap'"),
        (lambda c: c["policy"]["selection"].update(patch=0), "patch=0 is invalid"),
        (lambda c: c["variants"]["full"].update(graph="none"), "there is no graph 'none'"),
        (lambda c: c["weights"]["chunks"][0].update(start=10**12), "is out of range"),
        (path_of_full("../full.onnx"), "is not in the folder"),
        (path_of_full("/etc/passwd"), "is not in the folder"),
        (path_of_full("absent.onnx"), "absent.onnx is missing"),
    ],
)
def test_a_wrong_manifest_is_refused(copy: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(ArtifactError, match=message):
        duca_compile.load(copy)


def test_a_damaged_folder_is_refused(copy: Path) -> None:
    pool, graph = copy / "weights.bin", copy / "full.onnx"
    content, model = bytearray(pool.read_bytes()), graph.read_bytes()
    content[1000] ^= 1
    pool.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights\.bin was changed"):
        duca_compile.load(copy)
    pool.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"weights\.bin is truncated"):
        duca_compile.load(copy, verify=False)
    pool.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.bin is missing"):
        duca_compile.load(copy)
    graph.write_bytes(model)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json is not JSON"):
        duca_compile.load(copy)
    with pytest.raises(ArtifactError, match="is no artifact"):
        duca_compile.load(copy.parent)


def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "full.onnx", tmp_path / "elsewhere.onnx")
    os.symlink(tmp_path / "elsewhere.onnx", copy / "full.onnx")
    with pytest.raises(ArtifactError, match="is not in the folder"):
        duca_compile.load(copy)


def test_a_provider_that_cannot_be_used_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    with pytest.raises(UsageError, match=r"\['NoSuchProvider'\] are not in this onnxruntime"):
        duca_compile.load(folder, providers=["NoSuchProvider"])
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime may well run on CUDA")
    # The GPU package lists its providers whether their libraries are there or not, and then falls back.
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(BackendError, match=r"cannot use \['CUDAExecutionProvider'\] here"):
        duca_compile.load(folder, providers=available)


def test_an_unknown_backend_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="backend='tensorflow' is unknown"):
        duca_compile.load(folder, "tensorflow")


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    model: OptimizedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="there is something at"):
        export(model, folder)
    with pytest.raises(UsageError, match=r"expected a model from duca_compile\.optimize"):
        duca_compile.save(tiny_dit(), tmp_path / "a", example(2))
    with pytest.raises(UsageError, match="opset=3 is invalid"):
        export(model, tmp_path / "a", opset=3)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ExportError, match="graph 'prologue' has no ONNX form: no such operator"):
        export(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


class ReadsLength(nn.Module):
    """Cuts its labels to the length of a mask, which it reads in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_dit(layers=1)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, mask: Tensor) -> Tensor:
        length = int(mask.sum())
        return self.inner(hidden_states, timestep, class_labels[:, :length].sum(1)).sample


def test_values_that_forward_reads_are_fixed_and_checked(tmp_path: Path) -> None:
    model = duca_compile.optimize(ReadsLength().eval(), "none", "eager", 2)
    call = example(2) | {
        "class_labels": torch.tensor([[1, 2, 3], [0, 1, 4]]),
        "mask": torch.tensor([True, True, False]),
    }
    with pytest.raises(ExportError, match=r"reads 'mask' in Python at .*test_export\.py:\d+, .* dynamic_batch out"):
        duca_compile.save(model, tmp_path / "a", call, dynamic_batch=True)
    with pytest.warns(RuntimeWarning, match="takes the batch size of the example only: ReadsLength.forward reads"):
        found = duca_compile.save(model, tmp_path / "a", call)
    assert [*found.signature.fixed] == ["mask"]
    artifact = duca_compile.load(tmp_path / "a", threads=1)
    for given in (call, {name: tensor.numpy() for name, tensor in call.items()}):
        with torch.no_grad():
            assert torch.allclose(torch.as_tensor(artifact(**given)), model(**call), atol=1e-6)
    with pytest.raises(UsageError, match="mask has other values than at export"):
        artifact(**call | {"mask": torch.tensor([True, False, False])})
    with pytest.raises(UsageError, match=r"which is .* for a batch of 2"):
        artifact(**call | {"hidden_states": torch.zeros(3, 2, 8, 8)})
    with pytest.raises(ArtifactError, match="fixed: there is no argument 'nothing'"):
        Manifest.loads(found.dumps().replace('"mask": "', '"nothing": "'))


def test_a_manifest_without_fixed_values_is_as_it_was(folder: Path) -> None:
    assert "fixed" not in json.loads((folder / "manifest.json").read_text())["signature"]


def test_the_command_line_exports_and_inspects(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert all(word in shown.output for word in ("DiTTransformer2DModel", "DuCa (N=4)", "partial", "20 steps"))
    failed = CliRunner().invoke(app, ["export", str(folder)])
    assert failed.exit_code == 2
    missing = CliRunner().invoke(app, ["inspect", str(folder.parent)])
    assert missing.exit_code == 2


def test_a_run_of_the_command_line_needs_arrays_of_one_length(folder: Path, tmp_path: Path) -> None:
    arrays = {name: np.stack([tensor.numpy()] * 2) for name, tensor in example(2).items()}
    np.savez(tmp_path / "in.npz", **arrays | {"timestep": np.full((3, 2), 999)})
    failed = CliRunner().invoke(app, ["run", str(folder), "--npz", str(tmp_path / "in.npz")])
    assert failed.exit_code == 2


def test_manifests_are_plain_data(folder: Path) -> None:
    """No pickle anywhere: a manifest is JSON, and its classes hold nothing but values."""
    found = read_manifest(folder)
    assert json.loads((folder / "manifest.json").read_text())["schema"] == found.schema == 1
    assert dataclasses.asdict(found)["policy"]["name"] == POLICY.name
    assert {path.suffix for path in folder.iterdir()} == {".json", ".bin", ".onnx"}
