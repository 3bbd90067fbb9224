"""The benchmarks: the page is what their results say, and the suite runs on tiny models whatever is installed."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.stem for path in FOLDER.glob("*.py")}


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, FOLDER / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripts import each other by name, as they do when they are run."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("compare")
    for name in SCRIPTS & sys.modules.keys():
        del sys.modules[name]


def point(name: str, speed: float, psnr: float, mode: str = "compile", library: str = "other") -> dict[str, Any]:
    where = {"steps": 50, "library": library, "method": library, "setting": name, "mode": mode, "status": "ok"}
    return {**where, "speedup": {"median": speed}, "psnr": psnr}


def test_the_page_says_what_the_results_say() -> None:
    page = (FOLDER / "README.md").read_text()
    say = "run python benchmarks/report.py benchmarks/results > benchmarks/README.md"
    assert run("report.py", FOLDER / "results") == page, say


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
    (tmp_path / "README.md").write_text(run("report.py", tmp_path))
    assert "| duca_compile, duca, eager |" in (tmp_path / "README.md").read_text()
