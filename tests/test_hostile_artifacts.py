"""Whatever the files of an artifact hold, reading them ends in an artifact or in an ArtifactError."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import duca_compile
from duca_compile import ArtifactError, BackendError, DuCa, ResidualGate
from duca_compile.artifact import tensorrt_build
from duca_compile.artifact.decoding import MAX_DEPTH
from duca_compile.artifact.engines.aoti import aoti
from duca_compile.artifact.engines.base import map_pool
from duca_compile.artifact.inspection import describe
from duca_compile.artifact.loader import check_files
from duca_compile.artifact.manifest import Graph, Manifest, read_manifest
from duca_compile.artifact.model import Artifact
from duca_compile.artifact.onnx_files import check_onnx
from tests.artifacts import example, export, optimized

GATE = ResidualGate(0.4, "first_block", accumulate=False, cached="forecast", decide_per="row")
SIZES = ("0*batch", "batch", "-1*batch", "batch+99999999999", "2*batch+1", "9" * 5000 + "*batch", "tokens_77")
NAMES = ("", "..", "../x", "/etc/passwd", "a\x00b", "a" * 5000, "full", "prologue", "hidden_states", "cache_stream_end")
NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"))
SCALARS = st.one_of(
    st.sampled_from((*SIZES, *NAMES, *NUMBERS, None, True, False)), st.integers(), st.floats(), st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
THOROUGH = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
QUICK = settings(THOROUGH, max_examples=50)


class NoEngine:
    """Runs nothing: making an artifact only plans."""

    def function(self, name: str, graph: Graph) -> Any:
        return lambda *values: [None] * len(graph.outputs)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        raise AssertionError("nothing runs")


@pytest.fixture(scope="module", params=[DuCa(interval=4, fresh_ratio=0.4), GATE], ids=["DuCa", "gate"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "artifact"
    export(optimized(request.param, steps=12), path)
    return path


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each part of a JSON value as its container and its key there."""
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(part, dict | list):
            yield from places(part)


def changed(content: Any, data: st.DataObject) -> None:
    """Replaces, removes, repeats or moves a part."""
    every = list(places(content))
    container, key = data.draw(st.sampled_from(every))
    change = data.draw(st.sampled_from(("replace", "replace", "remove", "repeat", "copy")))
    if change == "replace":
        container[key] = data.draw(VALUES)
    elif change == "remove":
        del container[key]
    elif change == "repeat" and isinstance(container, list):
        container.insert(key, container[key])
    else:
        other, place = data.draw(st.sampled_from(every))
        container[key] = json.loads(json.dumps(other[place]))


def load(folder: Path, text: str) -> None:
    """All that ``duca_compile.load`` does, but for the engine; and the plans of a call of two rows."""
    manifest = Manifest.loads(text)
    check_files(folder, manifest, verify=False)
    Artifact(manifest, NoEngine())._dispatcher(2)
    shown(manifest)


def shown(manifest: Manifest) -> str:
    """What ``duca-compile inspect`` prints."""
    console = Console(file=StringIO(), width=100)
    console.print(describe(manifest))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """The message of the only error that the call may raise; empty where it raises none."""
    try:
        call(*arguments)
    except ArtifactError as error:
        return str(error)
    return ""


def refuses_or_loads(folder: Path, data: st.DataObject) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        changed(content, data)
    assert len(refusal(load, folder, json.dumps(content))) < 1000, "a message that nobody reads"


@QUICK
@given(data=st.data())
def test_a_changed_manifest_is_refused_or_loads(folder: Path, data: st.DataObject) -> None:
    refuses_or_loads(folder, data)


@pytest.mark.slow
@THOROUGH
@given(data=st.data())
def test_thousands_of_changed_manifests_are_refused_or_load(folder: Path, data: st.DataObject) -> None:
    refuses_or_loads(folder, data)


@pytest.mark.slow
@THOROUGH
@given(data=st.data())
def test_a_manifest_with_other_characters_is_refused_or_loads(folder: Path, data: st.DataObject) -> None:
    text = (folder / "manifest.json").read_text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    put = data.draw(st.text('{}[]",:-+*.0123456789eabtruN \n', max_size=6))
    refusal(load, folder, text[:start] + put + text[end:])


ENGINE = {
    "file": "full.engine",
    "graph": "0" * 64,
    "key": "1" * 64,
    "bytes": 4,
    "sha256": "2" * 64,
    "weights": [
        {"name": "weight_64_4_4", "start": 64, "bytes": 64, "shape": [4, 4], "stored": "float32", "dtype": "bfloat16"}
    ],
}
RECORD = {
    "version": "1.7",
    "options": {"targets": ["sm89"], "precision": "bfloat16", "batch": [1, 2, 8], "library": "tensorrt_rtx"},
    "engines": {"full": ENGINE},
}


class Library:
    __version__ = "1.7"


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "full.engine").write_bytes(b"plan")
    (tmp_path.parent / "outside.engine").write_bytes(b"plan")
    (tmp_path / "link.engine").symlink_to(tmp_path.parent / "outside.engine")
    monkeypatch.setattr(tensorrt_build, "find_library", lambda name: (Library, name))
    return tmp_path


def read_record(folder: Path, content: Any) -> tensorrt_build.Build:
    signed = {"sha256": tensorrt_build._hash(content), **content}
    (folder / tensorrt_build.RECORD).write_text(json.dumps(signed))
    return tensorrt_build.read_build(folder)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../outside.engine"}, r"engines\.json names '\.\./outside\.engine', which is not in the folder"),
        ({"file": "link.engine"}, "names 'link.engine', which is not in the folder"),
        ({"file": "absent.engine"}, r"engines\.full\.file: 'absent\.engine' is not a file of 4 bytes there"),
        ({"bytes": 5}, "is not a file of 5 bytes there"),
        ({"bytes": -4}, r"engines\.full\.bytes must be int >= 0, not -4"),
        ({"weights": [ENGINE["weights"][0] | {"bytes": 60}]}, r"weights\[0\]\.bytes: 60 are not those of float32"),
        ({"weights": [ENGINE["weights"][0] | {"stored": "load"}]}, r"weights\[0\]\.stored: .* not load"),
        ({"colour": "red"}, r"engines\.full\.colour is unknown"),
    ],
)
def test_a_wrong_record_of_engines_is_refused(engines: Path, change: dict[str, Any], message: str) -> None:
    assert read_record(engines, RECORD).engines["full"].weights[0].shape == (4, 4)
    with pytest.raises(ArtifactError, match=f"is no record of engines .*{message}.*; build them: duca-compile build"):
        read_record(engines, RECORD | {"engines": {"full": ENGINE | change}})


def test_a_damaged_record_of_engines_is_refused(engines: Path) -> None:
    """Weights from another place in the pool are as valid as the right ones."""
    read_record(engines, RECORD)
    path = engines / tensorrt_build.RECORD
    path.write_text(path.read_text().replace('"start": 64', '"start": 0'))
    with pytest.raises(ArtifactError, match="its sha256 is not that of its content"):
        tensorrt_build.read_build(engines)


def test_contradicting_records_of_engines_are_refused(engines: Path) -> None:
    other = ENGINE | {"weights": [ENGINE["weights"][0] | {"start": 0}]}
    with pytest.raises(ArtifactError, match="'weight_64_4_4' differs from that of another engine"):
        read_record(engines, RECORD | {"engines": {"full": ENGINE, "skip": other}})
    with pytest.raises(ArtifactError, match=r"options\.batch: \(8, 2, 1\) are not the smallest"):
        read_record(engines, RECORD | {"options": RECORD["options"] | {"batch": [8, 2, 1]}})


@pytest.mark.slow
@settings(THOROUGH, max_examples=1000)
@given(data=st.data())
def test_changed_records_of_engines_are_refused_or_read(engines: Path, data: st.DataObject) -> None:
    content = json.loads(json.dumps(RECORD))
    changed(content, data)
    with suppress(BackendError):  # built by another version of the library
        refusal(read_record, engines, content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "schema": 1}', "more than one field named 'schema'"),
        ('{"schema": NaN}', "NaN is not a JSON number"),
        ('{"schema": 1e999}', "1e999 is too large"),
        ("[" * 100_000, f"nested more than {MAX_DEPTH} levels"),
        ('{"schema":' + "[" * 80 + "]" * 80 + "}", f"nested more than {MAX_DEPTH} levels"),
    ],
)
def test_text_that_is_no_plain_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"^manifest.json.*{message}"):
        Manifest.loads(text)


def test_files_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    """A folder, and a link to itself."""
    found = read_manifest(folder)
    for name in {found.weights.file.path, *(graph.file.path for graph in found.graphs.values())}:
        (tmp_path / name).symlink_to(name)
    with pytest.raises(ArtifactError, match=r"which is not in the folder|cannot be read"):
        check_files(tmp_path, found)
    (tmp_path / found.weights.file.path).unlink()
    (tmp_path / found.weights.file.path).mkdir()
    with pytest.raises(ArtifactError, match="is not a regular file"):
        check_files(tmp_path, found)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), sparse])
def test_a_manifest_without_an_end_is_refused(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "manifest.json")
    with pytest.raises(ArtifactError, match=r"not a regular file|not in the folder|more than \d+ bytes"):
        read_manifest(tmp_path)


def test_names_do_not_command_the_terminal(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["source"]["model"] = content["versions"]["torch"] = "\x1b[2J\ud800[/bold]"
    assert "\\x1b[2J\\ud800[/bold]" in shown(Manifest.loads(json.dumps(content)))
    assert "\x1b" not in shown(Manifest.loads(json.dumps(content)))
    content["\x1b[2J"] = 1
    with pytest.raises(ArtifactError, match=r"^manifest\.json: \\x1b\[2J is unknown"):
        Manifest.loads(json.dumps(content))


@pytest.mark.parametrize("names", [["fi", "\ufb01"], ["\U0001d422\U0001d41f"]])
def test_look_alikes_are_no_names_of_fields(folder: Path, names: list[str]) -> None:
    """Python reads each of them as the plain letters: a name twice, or a keyword."""
    content = json.loads((folder / "manifest.json").read_text())
    items = [{"output": 0}] * len(names)
    content["signature"]["result"] = {"type": "Output", "names": names, "items": items}
    with pytest.raises(ArtifactError, match=r"signature\.result\.names: .* cannot be a name there"):
        Manifest.loads(json.dumps(content))


# ---- ONNX files, whose hashes in the manifest are of no help: whoever changes a file can change its hash

PLACE = {"location": "weights.bin", "offset": "0", "length": "4"}


def of_tensor(tensor: onnx.TensorProto) -> Iterator[Callable[[onnx.ModelProto], None]]:
    """Ways to put a tensor into a model."""
    constant = onnx.helper.make_node("Constant", [], ["hidden"], value=tensor)
    inner = onnx.helper.make_graph([constant], "inner", [], [])
    branch = onnx.helper.make_node("If", ["condition"], ["chosen"], then_branch=inner, else_branch=inner)
    function = onnx.helper.make_function("own", "F", [], ["hidden"], [constant], [])
    sparse = onnx.SparseTensorProto(values=tensor)
    yield lambda model: model.graph.initializer.append(tensor)
    yield lambda model: model.graph.node.append(constant)
    yield lambda model: model.graph.node.append(branch)
    yield lambda model: model.functions.append(function)
    yield lambda model: model.graph.sparse_initializer.append(sparse)
    yield lambda model: model.training_info.add(initialization=inner)


def external(place: dict[str, str]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="data", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def with_graph(folder: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the artifact in which the graph of full steps is changed."""
    shutil.copytree(folder, target)
    model = onnx.load(target / "full.onnx", load_external_data=False)
    change(model)
    (target / "full.onnx").write_bytes(model.SerializeToString())
    return signed(target)


def signed(folder: Path) -> Path:
    """The artifact, with a manifest that has the sizes and hashes of its files."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for file in (content["weights"]["file"], *(graph["file"] for graph in content["graphs"].values())):
        data = (folder / file["path"]).read_bytes()
        file["bytes"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"location": "/etc/passwd"},
        {"location": "../weights.bin"},
        {"location": "./weights.bin"},
        {"location": "full.onnx"},
        {"location": "*/_ORT_MEM_ADDR_/*"},
        {"offset": "999999999999"},
        {"offset": "-4"},
        {"length": "99999999"},
        {"length": ""},
        {"length": "٤"},
        {"checksum": "0"},
    ],
    ids=str,
)
def test_external_data_is_within_the_pool(folder: Path, tmp_path: Path, change: dict[str, str]) -> None:
    for place, put in enumerate(of_tensor(external(PLACE | change))):
        forged = with_graph(folder, tmp_path / str(place), put)
        with pytest.raises(ArtifactError, match=r"the data of tensor 'data' must be in the \d+ bytes of weights\.bin"):
            check_files(forged, read_manifest(forged))


def test_external_data_in_the_pool_passes(folder: Path, tmp_path: Path) -> None:
    for place, put in enumerate(of_tensor(external(PLACE))):
        forged = with_graph(folder, tmp_path / str(place), put)
        check_files(forged, read_manifest(forged))


def test_a_graph_of_other_inputs_than_the_manifest_says_is_refused(folder: Path, tmp_path: Path) -> None:
    """So a manifest cannot ask for caches that no graph reads."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    path.write_text(path.read_text().replace('"float32"', '"float64"'))
    with pytest.raises(
        ArtifactError, match=r"\.onnx has other (in|out)puts than the manifest says: .*float32.*, not .*float64"
    ):
        check_files(tmp_path / "copy", read_manifest(tmp_path / "copy"))


def test_a_selectable_branch_has_no_more_tokens_than_its_cache(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    if not content["branches"]:
        pytest.skip("this policy selects no tokens")
    content["branches"][0]["tokens"] = 2**31 - 1
    with pytest.raises(ArtifactError, match=r"branches: branch \d+ has 2147483647 tokens, and its cache \d+ numbers"):
        Manifest.loads(json.dumps(content))


def mutated(data: bytes, draw: st.DataObject) -> bytes:
    """Other bytes in place of some; cut short in one of eight cases."""
    start = draw.draw(st.integers(0, len(data)))
    if draw.draw(st.integers(0, 7)) == 0:
        return data[:start]
    end = draw.draw(st.integers(start, min(len(data), start + 16)))
    return data[:start] + draw.draw(st.binary(max_size=16)) + data[end:]


@pytest.mark.slow
@settings(THOROUGH, max_examples=1000)
@given(draw=st.data())
def test_changed_graphs_are_refused_or_agree_with_the_manifest(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    manifest = read_manifest(folder)
    graph = manifest.graphs[draw.draw(st.sampled_from(sorted(manifest.graphs)))]
    path = tmp_path_factory.getbasetemp() / "changed.onnx"
    path.write_bytes(mutated((folder / graph.file.path).read_bytes(), draw))
    refusal(check_onnx, path, graph, manifest.weights.file)


@pytest.mark.slow
@settings(THOROUGH, max_examples=500)
@given(draw=st.data())
def test_changed_files_do_not_load(folder: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject) -> None:
    """Damage: the hashes are the old ones."""
    manifest = read_manifest(folder)
    names = [manifest.weights.file.path, *(graph.file.path for graph in manifest.graphs.values())]
    target = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    path = target / draw.draw(st.sampled_from(names))
    before = path.read_bytes()
    path.write_bytes(mutated(before, draw))
    assert bool(refusal(duca_compile.load, target)) == (path.read_bytes() != before)


def test_weights_without_bytes_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    assert map_pool(tmp_path / "weights.bin").shape == (0,)
    with pytest.raises(ArtifactError, match=r"none\.bin cannot be read"):
        map_pool(tmp_path / "none.bin")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_model_whose_weights_are_all_in_its_graphs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("duca_compile.export.onnx.INLINE", 2**30)
    manifest = export(optimized(DuCa(interval=2), steps=2), tmp_path / "artifact")
    assert manifest.weights.file.bytes == 0
    loaded = duca_compile.load(tmp_path / "artifact", backend)
    call = {name: tensor.numpy() for name, tensor in example(2).items()}
    assert np.isfinite(loaded(**call).sample).all()


# ---- packages of AOTInductor


def package(path: Path, *entries: tuple[str, bytes], compression: int = ZIP_STORED) -> Path:
    with warnings.catch_warnings(), ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in entries:
            file.writestr(name, data)
    return path


def test_packages_that_would_fill_the_disk_or_leave_their_folder_are_refused(tmp_path: Path) -> None:
    check = aoti._check_package
    check(package(tmp_path / "right.pt2", ("data/model.so", b"code"), ("version", b"1")))
    with pytest.raises(ArtifactError, match="would unpack to more than its own bytes"):
        check(package(tmp_path / "bomb.pt2", ("data/model.so", bytes(2**20)), compression=ZIP_DEFLATED))
    for name in ("../model.so", "/tmp/model.so", "data/../../model.so", "..\\model.so"):
        with pytest.raises(ArtifactError, match="lead out of it"):
            check(package(tmp_path / "out.pt2", (name, b"code")))
    with pytest.raises(ArtifactError, match="the same one twice"):
        check(package(tmp_path / "twice.pt2", ("model.so", b"code"), ("model.so", b"other")))
    (tmp_path / "none.pt2").write_bytes(b"PK")
    with pytest.raises(ArtifactError, match="is no package of AOTInductor"):
        check(tmp_path / "none.pt2")


@pytest.mark.slow
@settings(THOROUGH, max_examples=1000)
@given(draw=st.data())
def test_changed_packages_are_refused_or_pass(tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.pt2"
    data = package(path, ("data/model.so", b"code" * 8), ("version", b"1")).read_bytes()
    path.write_bytes(mutated(data, draw))
    refusal(aoti._check_package, path)
