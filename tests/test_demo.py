"""The embedded model and the demo on it."""

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from duca_compile import FORA, RFC, DuCa, ResidualGate, SpeCa, TaylorSeer, ToCa, UsageError
from duca_compile.app import demo
from duca_compile.app.cli import app
from duca_compile.core.files import check_writable
from duca_compile.explanation import KIND_STYLES
from duca_compile.policies import StepKind
from duca_compile.policies.named import POLICIES


@pytest.fixture(scope="module")
def embedded() -> demo.DemoModel:
    return demo.DemoModel.load()


def test_the_embedded_model_is_what_its_card_says(embedded: demo.DemoModel) -> None:
    config = embedded.transformer.config
    assert (config.sample_size // config.patch_size) ** 2 >= 196
    assert config.num_layers >= 12
    assert len(embedded.class_names) == 10
    folder = resources.files("duca_compile") / "app" / "data" / "demo"
    assert len((folder / "model.safetensors").read_bytes()) <= 12e6
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"accuracy", "frechet"} <= set(metrics)


def test_the_loop_compares_cached_and_fewer_steps(embedded: demo.DemoModel, tmp_path: Path) -> None:
    plain, cached, fewer = demo.compare(embedded, [DuCa(interval=3)], "eager", steps=6, seed=1)
    assert [k.value for k in cached.kinds] == ["full", "partial", "skip"] * 2
    assert len(fewer.kinds) == 2
    assert plain.psnr(plain) == float("inf")
    assert 0 < cached.psnr(plain) < 100
    assert plain.flops / fewer.flops == pytest.approx(3, abs=1e-9)
    assert plain.cache_bytes == 0 < cached.cache_bytes
    picture = tmp_path / "demo.png"
    demo.draw([plain, cached, fewer], embedded.class_names, picture)
    assert imread(picture).std() > 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"]


def test_nothing_is_half_written(embedded: demo.DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "demo.png"
    picture.write_text("the old one")
    runs = demo.compare(embedded, [DuCa(interval=2)], "eager", steps=2, seed=0)
    monkeypatch.setattr("os.replace", _disk_full)
    with pytest.raises(OSError, match="disk full"):
        demo.draw(runs, embedded.class_names, picture)
    assert picture.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"]


def _disk_full(*_: object) -> None:
    raise OSError("disk full")


def test_a_read_only_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(UsageError, match=r"cannot write .*demo.png: Permission denied; choose another --out"):
        check_writable(tmp_path / "demo.png", "choose another --out")


def test_the_seed_alone_decides_the_noise(embedded: demo.DemoModel) -> None:
    assert torch.equal(embedded.noise(3), embedded.noise(3))
    assert not torch.equal(embedded.noise(3), embedded.noise(4))


@pytest.mark.slow
def test_the_command_writes_a_picture_and_prints_the_tables(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    arguments = [
        "demo",
        "--steps",
        "4",
        "--interval",
        "2",
        "--backend",
        "eager",
        "--policy",
        "fora",
        "--out",
        str(picture),
    ]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000
    for word in ("uncached, 4 steps", "FORA (N=2), 4 steps", "uncached, 2 steps", "speed-up", "PSNR", "reuse"):
        assert word in result.output


def test_every_policy_and_kind_of_step_can_be_shown() -> None:
    fixed = {"duca": DuCa, "fora": FORA, "taylorseer": TaylorSeer, "toca": ToCa}
    for name, policy in fixed.items():
        assert demo.make_policy(name, None) == policy()
        assert demo.make_policy(name, 4) == policy(4)
    for name, adaptive in {"gate": ResidualGate, "rfc": RFC, "speca": SpeCa}.items():
        assert demo.make_policy(name, None) == adaptive()
        with pytest.raises(UsageError, match=f"policy='{name}' has no interval"):
            demo.make_policy(name, 4)
    known = re.escape(str(sorted({"calibrated", *POLICIES})))
    with pytest.raises(UsageError, match=f"policy='fancy' is unknown; choose one of {known}"):
        demo.make_policy("fancy", None)
    own = demo.make_policy("calibrated", None)
    assert own.name == "calibrated (10 of 50 full)"
    assert demo.make_policies(None, 4, 50) == [DuCa(4), own]
    assert demo.make_policies(None, None, 20) == [DuCa()]
    assert demo.make_policies(["fora", "gate"], None, 50) == [FORA(), ResidualGate()]
    assert set(demo.COLORS) == set(KIND_STYLES) == set(StepKind)
    assert len({kind.letter for kind in StepKind}) == len(StepKind)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "duca_compile", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "explain" in done.stdout


@pytest.mark.slow
def test_the_command_with_its_defaults(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo.png")], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "DuCa (N=5), 50 steps" in result.output
    assert "calibrated (10 of 50 full), 50 steps" in result.output
