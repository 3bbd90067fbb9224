"""What the command line prints at 60, 80 and 120 columns, without a terminal: no figure is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import duca_compile.export.tensorrt
from duca_compile import Explanation, Uncached, explanation
from duca_compile.app import cli, demo
from duca_compile.app.paper_flops import loop_flops, published_policies
from duca_compile.policies import StepKind
from tests.test_explain import example

WIDTHS = (60, 80, 120)
MIB = 2**20


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


@pytest.fixture(scope="module")
def found() -> Explanation:
    model, arguments = example()
    return explanation.explain(model, **arguments)


@pytest.fixture
def explained(found: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are explained at once."""
    monkeypatch.setattr(explanation, "explain", lambda *_, **__: found)


def printed(width: int, *arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return whole(result.output, width)


def whole(text: str, width: int) -> str:
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    return text


def run(name: str, **changes: Any) -> demo.Run:
    times = {kind: 0.22812 + place for place, kind in enumerate(StepKind)}
    values: dict[str, Any] = {
        "images": torch.zeros(1, 1, 2, 2),
        "kinds": tuple(StepKind),
        "seconds": 1234.56,
        "compile_seconds": 987.6,
        "flops": 1e12,
        "cache_bytes": int(1535.9 * MIB),
        "step_seconds": times,
    }
    return demo.Run(name=name, **values | changes)


def test_demo(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = run("uncached, 50 steps", images=torch.ones(1, 1, 2, 2), seconds=12345.67)
    cached = run("calibrated (10 of 50 full), 50 steps")
    fast = run("TaylorSeer (N=5, O=2), 50 steps", step_seconds={StepKind.FULL: 0.00067})

    def compare(*given: Any) -> list[demo.Run]:
        watch: Callable[[str, int], Callable[[], None]] = given[-1]
        for each in (plain, cached, fast):
            watch(each.name, 150)()
        return [plain, cached, fast]

    monkeypatch.setattr(demo, "compare", compare)
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    text = printed(width, "demo")
    for figure in ("12345.67 s", "1234.56 s", "10.00x", "1.00x", "6.0 dB", "1535.9 MiB", "987.6 s", "1/150"):
        assert figure in text
    for milliseconds in ("0.67 ms", *(f"{seconds * 1e3:.2f} ms" for seconds in plain.step_seconds.values())):
        assert milliseconds in text


@pytest.mark.usefixtures("explained")
def test_explain(width: int, found: Explanation) -> None:
    text = printed(width, "explain", "--steps", "20")
    figures = [f"{branch.flops * len(found.branches) / 2 / found.flops:.2%}" for branch in found.branches]
    figures += [f"{found.schedule('duca', 20).ideal_speedup:.2f}x", "100.00%", "6.2% of each MLP"]
    for figure in (*figures, "attention_processor.py:"):
        assert figure in text


def test_reports_as_text(width: int, found: Explanation) -> None:
    plan = found.schedule("duca", 20)
    for report in (found, plan):
        assert "%" in whole(str(report), width)
    assert f"{plan.steps[1].flops / found.flops:.2%}" in str(plan)


@pytest.mark.usefixtures("explained")
def test_flops(width: int, found: Explanation) -> None:
    text = printed(width, "flops", "tests.test_explain:example", "--interval", "5", "--interval", "6")
    for policy in (Uncached(), *published_policies((5, 6))):
        row = loop_flops(found, policy, 50)
        for figure in (f"{row.papers_speedup:.2f}x", f"{row.counted_speedup:.2f}x"):
            assert figure in text


def test_inspect(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "read_manifest", lambda _: manifest())
    text = printed(width, "inspect", str(tmp_path))
    for figure in (
        "675,129,632 parameters",
        "2,700,518,528",
        "1,234,567,890",
        "98765",
        "4.53e+09",
        "1234",
        "4321",
        "(50 steps)",
        "float32[2, 1024, 128, 128]",
    ):
        assert figure in " ".join(text.split())
    assert "1,234,567,890" in text


def manifest() -> Any:
    """As much of a large model's manifest as is shown."""
    file = SimpleNamespace(bytes=1_234_567_890)
    operators = {"FusedMatMul": 1234, "LayerNormalization": 567, "Add": 1, "Mul": 2, "Gather": 3, "Other": 4321}
    graph = SimpleNamespace(file=file, inputs=range(98_765), outputs=range(12), operators=operators)
    latent = SimpleNamespace(name="hidden_states", dtype="float32", shape=(2, 1024, 128, 128), at=lambda rows: (rows,))
    flops = SimpleNamespace(fixed=0.0, per_row=4.53e9)
    step = SimpleNamespace(kind=StepKind.PARTIAL)
    return SimpleNamespace(
        source=SimpleNamespace(model="DiTTransformer2DModel", parameters=675_129_632, weight_bytes=2_700_518_528),
        precision="float32",
        versions={"duca_compile": "0.1.0", "torch": "2.13.0", "diffusers": "0.39.0", "onnx": "1.20.0"},
        format="onnx",
        opset=20,
        inputs=(latent, latent),
        signature=SimpleNamespace(options={"return_dict": True, "added_cond_kwargs": None}),
        policy=SimpleNamespace(name="DuCa (N=5)", rule=None),
        schedule=SimpleNamespace(
            steps=(0,) * 50, plans=(SimpleNamespace(step=step),), runs=(SimpleNamespace(variant="v", flops=flops),)
        ),
        weights=SimpleNamespace(file=file, chunks=range(400)),
        graphs={"prologue": graph, "partial_with_512_tokens": graph},
        variants={"v": SimpleNamespace(graph="partial_with_512_tokens")},
        caches=(latent,),
    )


def test_build(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = SimpleNamespace(bytes=1535.9 * MIB)
    engine = SimpleNamespace(bytes=12345.6 * MIB, weights=(weight,), file="partial_with_512_tokens.sm89.engine")
    built = SimpleNamespace(
        engines={"partial_with_512_tokens": engine, "full": engine},
        weights={"all": weight},
        options=SimpleNamespace(library="tensorrt_rtx", targets=("sm89",)),
        version="1.7",
    )
    monkeypatch.setattr(duca_compile.export.tensorrt, "build", lambda *_, **__: built)
    text = printed(width, "build", str(tmp_path))
    for figure in ("12345.6 MiB", "24691.2 MiB", "1535.9 MiB", "partial_with_512_tokens.sm89.engine"):
        assert figure in text
