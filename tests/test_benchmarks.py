"""The benchmarks: the page is what their results say, and the suite runs on tiny models whatever is installed."""

import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.stem for path in FOLDER.glob("*.py")}


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, FOLDER / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[ModuleType]:
    """The scripts import each other by name, as they do when they are run."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module(name)
    for each in SCRIPTS & sys.modules.keys():
        del sys.modules[each]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from script(monkeypatch, "compare")


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from script(monkeypatch, "methods")


def point(name: str, speed: float, psnr: float, mode: str = "compile", library: str = "other") -> dict[str, Any]:
    where = {"steps": 50, "library": library, "method": library, "setting": name, "mode": mode, "status": "ok"}
    return {**where, "speedup": {"median": speed}, "psnr": psnr}


def test_the_pages_say_what_the_results_say(tmp_path: Path) -> None:
    run("report.py", FOLDER / "results", "--out", tmp_path)
    for name in ("README.md", "results.md"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), "run python benchmarks/report.py"


def test_the_summary_is_two_screens() -> None:
    assert len((FOLDER / "README.md").read_text().splitlines()) <= 100


def test_the_frontier_is_what_nothing_else_beats(compare: ModuleType) -> None:
    fast, slow = point("fast", 5.0, 20.0), point("slow", 2.0, 30.0)
    beaten, equal = point("beaten", 1.9, 29.0), point("equal", 5.0, 19.0)
    assert compare.frontier([slow, beaten, equal, fast]) == [fast, slow]


def test_ours_is_compared_at_an_equal_or_higher_psnr(compare: ModuleType) -> None:
    own = [point("rough", 6.0, 19.9), point("good", 3.0, 29.96), point("better", 2.0, 40.0)]
    others = [point("a", 4.0, 20.0), point("b", 2.0, 30.0), point("c", 1.5, 50.0)]
    found = [(match.own and match.own["setting"], match.ratio) for match in compare.matches(own, others)]
    assert found == [("good", 0.75), ("good", 1.5), (None, 0.0)]  # 29.96 counts as 30.0


def test_the_faster_mode_counts_and_what_failed_does_not(compare: ModuleType) -> None:
    eager, compiled = point("a", 2.0, 30.0, "eager", "cache-dit"), point("a", 3.0, 30.0, "compile", "cache-dit")
    failed = {**point("b", 9.0, 30.0, library="cache-dit"), "status": "RuntimeError: no"}
    exact = point("c", 1.0, 126.0, library="cache-dit")  # skipped nothing
    assert compare.peers_of(compare.split([eager, compiled, failed, exact], 50)) == [compiled]


@pytest.mark.slow
def test_the_methods_run_are_kept_and_compared_with_fewer_steps(
    tmp_path: Path, methods: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, out = tmp_path / "state", tmp_path / "methods.json"
    command = ["methods.py", "--state", str(state), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--quick", "--methods", "FORA", "RFC"])
    methods.main()
    found = json.loads(out.read_text())
    points = {f"{each['method']}, {each['setting']}": each for each in found["points"]}
    assert {each["method"] for each in points.values()} == {"fewer steps", "FORA", "RFC"}
    assert {(each["images"], each["seeds"]) for each in points.values()} == {(4, 2)}
    fora, plain = points["FORA, N=2"], points["fewer steps, 2 steps"]
    assert plain["flops"] == 0.5 < fora["flops"] < 0.505
    assert fora["kinds"] == {"full": 2, "reuse": 2}
    assert fora["cache_bytes"] > plain["cache_bytes"] == 0
    assert fora["frechet"]["mean"] > 0
    gained = fora["psnr"]["mean"] - points[fora["plain"]]["psnr"]["mean"]
    assert fora["over_plain"]["mean"] == pytest.approx(gained, abs=1e-9)
    rows = [*csv.DictReader(out.with_suffix(".csv").read_text().splitlines())]
    assert [float(each["psnr_mean"]) for each in rows] == [each["psnr"]["mean"] for each in found["points"]]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rounds = {path: path.stat().st_mtime_ns for path in state.glob("4-steps/*")}
    monkeypatch.setattr(sys, "argv", [*command, "--report"])
    methods.main()
    assert json.loads(out.read_text()) == found
    assert {path: path.stat().st_mtime_ns for path in state.glob("4-steps/*")} == rounds


def test_the_table_of_methods_says_what_the_results_say(methods: ModuleType) -> None:
    found = json.loads((FOLDER / "results" / "methods.json").read_text())
    assert "\n".join(methods.methods_tables(found)) + "\n" == (FOLDER / "results" / "methods.md").read_text()
    assert methods.table(found["points"]) == (FOLDER / "results" / "methods.csv").read_text()


def test_distances_are_zero_of_the_same_images_and_grow(methods: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 28, 28, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    judge = methods.load_judge(methods.RESULTS / "judge.safetensors", Path("not needed"))
    distances = torch.stack([methods.perceptual(judge, images + s * noise, images) for s in (0.0, 0.1, 0.3)])
    assert (distances[0] == 0).all()
    assert (distances.diff(dim=0) > 0).all()
    assert methods.psnr(images + 0.2, images) == pytest.approx([20.0] * 4, abs=1e-4)  # 10 log10(4 / 0.04)
    features = torch.randn(50, 8, generator=generator).double()
    moved = methods.paired_frechet(features + 0.5, features)
    assert moved["mean"] == pytest.approx(8 * 0.25, abs=1e-9)
    assert moved["error"] == pytest.approx(0.0, abs=1e-9)  # pairs are drawn, and all have moved alike


@pytest.mark.slow
def test_the_suite_runs_on_a_tiny_model(tmp_path: Path) -> None:
    parts = ("--parts", "loops", "calls", "host")
    run("suite.py", "--quick", "--modes", "eager", "--models", "tiny DiT", *parts, "--out", tmp_path / "suite.json")
    found = json.loads((tmp_path / "suite.json").read_text())
    rows = found["models"]["tiny DiT"]["loops"]["found"]
    assert {row["status"] for row in rows.values() if row["library"] != "cache-dit"} == {"ok"}
    assert {row["status"] for row in rows.values() if row["library"] == "cache-dit"} <= {"ok", "not installed"}
    plain, none, duca = (
        rows[f"{name}, eager"] for name in ("PyTorch, plain", "duca_compile, none", "duca_compile, duca")
    )
    assert plain["blocks_run"] == plain["blocks_uncached"] == 36
    assert none["steps"] == {"full": 12}
    assert duca["steps"] == {"full": 3, "partial": 5, "skip": 4}
    assert rows["diffusers, FirstBlockCache, eager"]["blocks_run"] == 12 + 3 * 2  # the first block always runs
    assert 1 == plain["ideal"] <= none["ideal"] < duca["ideal"]
    assert set(found["models"]["tiny DiT"]["calls"]["found"]) == {"plain", "full", "partial", "reuse", "skip"}
    assert found["host"]["found"]["eager"]["duca_compile, skip"]["host_seconds_outside_the_graph"]["median"] > 0
    run("report.py", tmp_path, "--out", tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("# Benchmarks")
    assert "| duca_compile, duca, eager |" in (tmp_path / "results.md").read_text()
