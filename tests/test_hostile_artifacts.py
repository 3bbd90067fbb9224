"""Whatever an artifact's JSON files say, reading them ends in an artifact or in an ArtifactError."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duca_compile import ArtifactError, BackendError, DuCa, ResidualGate
from duca_compile.artifact import tensorrt_build
from duca_compile.artifact.decoding import MAX_DEPTH
from duca_compile.artifact.loader import check_files
from duca_compile.artifact.manifest import Graph, Manifest, read_manifest
from duca_compile.artifact.model import Artifact
from tests.artifacts import export, optimized

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
    (folder / tensorrt_build.RECORD).write_text(json.dumps(content))
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
