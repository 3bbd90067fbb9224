"""TensorRT: graphs in half precision, engines really built ahead of time without a GPU, and how they would be run.

No test here runs an engine but those marked ``gpu``, which nobody has run yet.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DiTTransformer2DModel
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

import duca_compile
from duca_compile import ArtifactError, BackendError, DuCa, ExportError, UsageError
from duca_compile.app.cli import app
from duca_compile.app.demo import DemoModel
from duca_compile.artifact import lowered, tensorrt_build
from duca_compile.artifact.engines.onnx import tensorrt as runtime
from duca_compile.artifact.lowered import PRECISIONS, lower
from duca_compile.artifact.manifest import Size, read_manifest
from duca_compile.export import tensorrt
from tests.support import sampled
from tests.zoo import ZOO

WIDTH, STEPS, ROWS = 512, 8, 2
TARGETS = ("sm89", "sm120")
POLICY = DuCa(interval=3, fresh_ratio=0.25)


def save(model: Any, path: Path, policy: DuCa = POLICY, **example: Any) -> Path:
    duca_compile.save(duca_compile.optimize(model.eval(), policy, "eager", STEPS), path, example)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One wide block: what its weights are is much more than what its graphs are."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=WIDTH // 8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    )
    example = {"hidden_states": torch.randn(ROWS, 4, 8, 8), "timestep": torch.full((ROWS,), 9)}
    return save(
        model, tmp_path_factory.mktemp("tensorrt") / "artifact", **example, class_labels=torch.zeros(ROWS).long()
    )


@pytest.fixture(scope="module")
def built(artifact: Path) -> tensorrt_build.Build:
    return tensorrt.build(artifact, TARGETS, batch=(1, ROWS, 4))


def feeds(artifact: Path, name: str, rows: int = ROWS, tokens: int = 3) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for spec in read_manifest(artifact).graphs[name].inputs:
        shape = [s.at(rows if s.name == "batch" else tokens) if isinstance(s, Size) else s for s in spec.shape]
        random = rng.standard_normal(shape) if spec.dtype == "float32" else rng.integers(0, 9, shape)
        found[spec.name] = random.astype(spec.dtype)
    return found


def pooled(artifact: Path, weights: tuple[lowered.Weight, ...]) -> dict[str, np.ndarray]:
    pool = np.memmap(artifact / "weights.bin", mode="r")
    return {each.name: each.array(pool).astype(PRECISIONS[each.dtype].numpy()) for each in weights}


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("float32", 0, 1e-6), ("float16", 1e-5, 2e-3), ("bfloat16", 1e-4, 2e-2)]
)
def test_a_lowered_graph_is_the_artifact_s_up_to_its_precision(
    artifact: Path, precision: str, least: float, most: float
) -> None:
    """Run by ONNX's own reference, since ONNX Runtime undoes half precision on a CPU. ``least``: it was really used."""
    for name in ("full", "partial", "rows-full"):
        path, given = artifact / f"{name}.onnx", feeds(artifact, name)
        expected = ort.InferenceSession(path).run(None, given)
        found = lower(path, precision)
        model = onnx.load_from_string(found.serialized())
        onnx.checker.check_model(model, full_check=True)
        assert [each.name for each in model.graph.output] == [
            s.name for s in read_manifest(artifact).graphs[name].outputs
        ]
        results = ReferenceEvaluator(model).run(None, given | pooled(artifact, found.weights))
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(results, expected, strict=True)]
        assert least <= max(errors) <= most


def test_only_products_are_in_half_precision(artifact: Path) -> None:
    half = PRECISIONS["bfloat16"]
    for name in read_manifest(artifact).graphs:
        for node in lower(artifact / f"{name}.onnx", "bfloat16").model.graph:
            dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
            if node.op_type in ("MatMul", "Gemm"):
                assert dtypes == {half}
            elif node.op_type != "Cast":
                assert half not in dtypes


def test_variants_take_the_same_weights_by_the_same_names(built: tensorrt_build.Build) -> None:
    taken = {name: {weight.name for weight in engine.weights} for name, engine in built.engines.items()}
    assert len(taken["partial"]) == 3  # two of the MLP, and the last layer's
    assert taken["partial"] < taken["full"]
    assert len({(weight.start, weight.shape) for weight in built.weights.values()}) == len(built.weights)


def test_engines_hold_no_weights(artifact: Path, built: tensorrt_build.Build) -> None:
    pool = read_manifest(artifact).weights.file.bytes
    taken = sum(weight.bytes for weight in built.weights.values())
    assert taken > 0.9 * pool
    assert sum(engine.bytes for engine in built.engines.values()) < 0.25 * pool


def test_a_second_build_finds_the_engines_and_other_inputs_do_not(
    artifact: Path, built: tensorrt_build.Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def recorded(self: Any, name: str, *_: Any) -> bytes:
        names.append(name)
        return b"plan"

    monkeypatch.setattr(tensorrt._Builder, "_built", recorded)
    assert tensorrt.build(artifact, TARGETS, batch=(1, ROWS, 4)) == built
    assert names == []
    every = list(read_manifest(artifact).graphs)
    for folder, targets, options in (
        ("precision", TARGETS, {"precision": "float16", "batch": (1, ROWS, 4)}),
        ("target", ("sm89",), {"batch": (1, ROWS, 4)}),
        ("batch", TARGETS, {"batch": (1, ROWS, 5)}),
    ):
        names.clear()
        other = artifact.with_name(folder)
        shutil.copytree(artifact / tensorrt_build.FOLDER, other)
        tensorrt.build(artifact, targets, folder=other, **options)
        assert names == every


def test_a_node_that_tensorrt_lacks_is_named_with_its_module(artifact: Path, tmp_path: Path) -> None:
    trt, _ = tensorrt_build.find_library("tensorrt_rtx")
    found = lower(artifact / "partial.onnx", "bfloat16")
    (gelu,) = (node for node in found.model.graph if node.op_type == "Gelu")
    tensorrt.check(trt, trt.Builder(tensorrt._log(trt)), "partial", found.serialized(), found.model)
    gelu.op_type = "Det"  # of ONNX, and not of TensorRT
    gelu.attributes.clear()
    with pytest.raises(
        ExportError, match=r"TensorRT does not support Det of transformer_blocks\.0\.ff\.net\.0 in graph 'partial'"
    ):
        tensorrt.check(trt, trt.Builder(tensorrt._log(trt)), "partial", found.serialized(), found.model)


def test_a_weight_too_large_for_float16_is_named(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "artifact"
    shutil.copytree(artifact, other, ignore=shutil.ignore_patterns(tensorrt_build.FOLDER))
    weight = lower(other / "partial.onnx", "float16").weights[0]
    pool = np.memmap(other / "weights.bin", mode="r+")
    pool[weight.start : weight.start + 4].view(np.float32)[0] = 1e5
    with pytest.raises(ExportError, match="is too large for float16"):
        lower(other / "partial.onnx", "float16")
    assert lower(other / "partial.onnx", "bfloat16").weights


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ("sm90",)}, UsageError, "target 'sm90' is unknown to tensorrt_rtx; choose from .*'sm89'"),
        ({"precision": "int8"}, UsageError, "precision='int8' is unknown"),
        ({"batch": (2, 1, 4)}, UsageError, r"batch=\(2, 1, 4\) must be"),
        ({"library": "tensorflow"}, UsageError, "library='tensorflow' is unknown"),
        ({"library": "tensorrt"}, BackendError, "tensorrt is not installed"),
    ],
)
def test_mistakes_are_named(artifact: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tensorrt.build(artifact, **options)


def test_the_command_builds_and_shows_the_bytes(artifact: Path, built: tensorrt_build.Build) -> None:
    options = [word for target in TARGETS for word in ("--target", target)]
    result = CliRunner().invoke(app, ["build", str(artifact), *options, "--batch", "1", str(ROWS), "4"])
    assert result.exit_code == 0, result.output
    assert f"{sum(engine.bytes for engine in built.engines.values()) / 2**20:.1f} MiB" in result.output
    wrong = CliRunner().invoke(app, ["build", str(artifact), "--target", "sm90"])
    assert wrong.exit_code == 2
    assert "target 'sm90' is unknown" in wrong.stderr


class Library:
    """Stands in for TensorRT's runtime: reads and writes memory at the addresses, and computes with ONNX Runtime."""

    ERROR = Logger = None

    def __init__(self, artifact: Path, build: tensorrt_build.Build) -> None:
        folder = artifact / tensorrt_build.FOLDER
        self._graphs = {(folder / e.file).read_bytes(): artifact / f"{name}.onnx" for name, e in build.engines.items()}
        self.Logger = self
        self.contexts = 0

    def __call__(self, *_: Any) -> Library:
        return self

    Runtime = __call__

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        session = ort.InferenceSession(lower(self._graphs[plan], "float32").serialized())

        class Engine:
            @staticmethod
            def create_execution_context() -> Context:
                self.contexts += 1
                return Context(session)

        return Engine


class Context:
    def __init__(self, session: ort.InferenceSession) -> None:
        self._session, self._shapes, self._addresses = session, dict[str, Any](), dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return not name.startswith("hidden_states") or shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        given = {}
        for each in self._session.get_inputs():
            dtype = np.dtype({"tensor(float)": np.float32, "tensor(int64)": np.int64}[each.type])
            shape = self._shapes[each.name]
            size = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_char * size).from_address(self._addresses[each.name])
            given[each.name] = np.frombuffer(memory, dtype).reshape(shape).copy()
        names = [each.name for each in self._session.get_outputs()]
        for name, result in zip(names, self._session.run(names, given), strict=True):
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(result).ctypes.data, result.nbytes)
        return True


def sequence(call: Callable[..., Any], as_torch: bool = False) -> list[np.ndarray]:
    """The outputs of a request of ``STEPS`` steps."""
    rng, outputs = np.random.default_rng(1), []
    for step in range(STEPS):
        arrays = {
            "hidden_states": rng.standard_normal((ROWS, 4, 8, 8)).astype(np.float32),
            "timestep": np.full(ROWS, 900 - 100 * step),
            "class_labels": np.arange(ROWS),
        }
        given = {name: torch.from_numpy(array) for name, array in arrays.items()} if as_torch else arrays
        outputs.append(call(**given).sample)
    return outputs


@pytest.fixture
def stand_in(artifact: Path, built: tensorrt_build.Build, monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library(artifact, built)
    float32 = tensorrt_build.Build(
        built.version,
        built.options,
        {
            name: tensorrt_build.BuiltEngine(
                e.file, e.graph, e.key, e.bytes, e.sha256, lower(artifact / f"{name}.onnx", "float32").weights
            )
            for name, e in built.engines.items()
        },
    )
    monkeypatch.setattr(runtime, "read_build", lambda folder: (float32, library))
    monkeypatch.setattr(runtime, "DEVICE", "cpu")
    monkeypatch.setattr(runtime, "_stream", lambda: 1)
    return library


@pytest.mark.parametrize("as_torch", [False, True])
def test_the_runtime_hands_engines_what_they_take(artifact: Path, stand_in: Library, as_torch: bool) -> None:
    """All but TensorRT itself: the steps, shapes, addresses, weights and outputs, against the ONNX Runtime backend."""
    loaded = duca_compile.load(artifact, backend="tensorrt")
    expected = sequence(duca_compile.load(artifact))
    found = sequence(loaded, as_torch)
    assert "".join(each.kind.letter for each in loaded.history) == "FPSFPSFP"
    assert all(isinstance(output, torch.Tensor if as_torch else np.ndarray) for output in found)
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b)
    assert stand_in.contexts == len(read_manifest(artifact).graphs)
    with pytest.raises(
        UsageError, match=r"hidden_states of shape \(5, 4, 8, 8\) is outside of what the engine of full\.onnx"
    ):
        loaded(np.zeros((5, 4, 8, 8), np.float32), timestep=np.full(5, 5), class_labels=np.zeros(5, int))


def test_engines_of_another_artifact_or_version_are_refused(
    artifact: Path, built: tensorrt_build.Build, stand_in: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "artifact"
    shutil.copytree(artifact, other)
    record = other / tensorrt_build.FOLDER / tensorrt_build.RECORD
    assert tensorrt_build.read_build(record.parent)[0] == built
    record.write_text(replace(built, version="1.0").dumps())
    with pytest.raises(BackendError, match=r"were built by tensorrt_rtx 1\.0, and .* is installed"):
        tensorrt_build.read_build(record.parent)
    record.unlink()
    with pytest.raises(ArtifactError, match="build them: duca-compile build"):
        tensorrt_build.read_build(record.parent)
    engines = {name: replace(e, graph="0" * 64) for name, e in built.engines.items()}
    changed = tensorrt_build.Build(built.version, built.options, engines)
    monkeypatch.setattr(runtime, "read_build", lambda folder: (changed, stand_in))
    with pytest.raises(ArtifactError, match="are not of this artifact's graph 'prologue'"):
        duca_compile.load(artifact, backend="tensorrt")


@pytest.mark.slow
def test_without_sharing_every_engine_holds_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model for both targets; what sharing saves is at least the weights in half precision."""
    demo = DemoModel.load()
    labels = torch.arange(10)
    artifact = save(
        demo.transformer, tmp_path / "demo", hidden_states=demo.noise(0), timestep=labels * 0 + 999, class_labels=labels
    )
    shared = tensorrt.build(artifact, TARGETS, folder=tmp_path / "shared", batch=(2, 20, 20))
    monkeypatch.setattr(lowered, "_is_shared", lambda *_: False)
    apart = tensorrt.build(artifact, TARGETS, folder=tmp_path / "apart", batch=(2, 20, 20))
    assert not apart.weights
    held = {name: sum(weight.bytes for weight in engine.weights) // 2 for name, engine in shared.engines.items()}
    assert sum(held.values()) > 6_000_000
    saved = {name: apart.engines[name].bytes - engine.bytes for name, engine in shared.engines.items()}
    for name in ("full", "partial", "rows-full"):
        assert saved[name] > 0.9 * held[name]


SAMPLED = {"PixArt": "bfloat16", "SD3": "float16", "FLUX": "float32", "Wan": "bfloat16"}
COMBINED = [
    sampled(name, precision, slow=precision == chosen)
    for name, chosen in SAMPLED.items()
    for precision in ("bfloat16", "float16", "float32")
]


@pytest.mark.parametrize(("name", "precision"), COMBINED)
def test_every_variant_of_other_models_builds(name: str, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(1 if name != "SD3" else 2)
    artifact = save(model, tmp_path / "artifact", **arguments)
    found = tensorrt.build(artifact, TARGETS, precision=precision, folder=tmp_path / "engines")
    assert {"full", "partial", "skip"} <= found.engines.keys()
    assert all((tmp_path / "engines" / e.file).stat().st_size == e.bytes > 0 for e in found.engines.values())


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_engines_run_on_a_gpu(artifact: Path, tmp_path: Path, precision: str, most: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    tensorrt.build(artifact, precision=precision, batch=(1, ROWS, 4), folder=artifact / tensorrt_build.FOLDER)
    loaded = duca_compile.load(artifact, backend="tensorrt")
    for a, b in zip(sequence(loaded), sequence(duca_compile.load(artifact)), strict=True):
        assert np.linalg.norm(a - b) <= most * np.linalg.norm(b)


@pytest.mark.gpu
def test_onnx_runtime_runs_an_artifact_with_its_tensorrt_provider(artifact: Path) -> None:
    if "TensorrtExecutionProvider" not in ort.get_available_providers() or not torch.cuda.is_available():
        pytest.skip("needs onnxruntime-gpu and an NVIDIA GPU")
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    loaded = duca_compile.load(artifact, providers=providers)
    for a, b in zip(sequence(loaded), sequence(duca_compile.load(artifact)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)
