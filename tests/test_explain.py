"""What explain() tells, and that it is what the variants then do."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import duca_compile
from duca_compile import FORA, DuCa, Uncached
from duca_compile.app.cli import app
from duca_compile.core.ir import Variance
from duca_compile.policies import StepKind
from tests.test_optimize import LABELS, build, latent, loop

ROWS, TOKENS, WIDTH, DEPTH = 4, 16, 32, 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(DEPTH)


@pytest.fixture(scope="module")
def found(model: nn.Module) -> duca_compile.Explanation:
    return duca_compile.explain(model, latent(0), timestep=torch.full((4,), 5), class_labels=LABELS)


def test_it_finds_the_branches_of_a_dit(found: duca_compile.Explanation) -> None:
    kinds = [(b.block, b.path, b.kind, b.gated) for b in found.branches]
    expected = []
    for block in range(DEPTH):
        path = f"transformer_blocks.{block}"
        expected += [(block, path, "self_attention", True), (block, path, "mlp", True)]
    assert kinds == expected
    assert all(b.shape == (ROWS, TOKENS, WIDTH) for b in found.branches)
    assert all(b.cache_bytes == ROWS * TOKENS * WIDTH * 4 for b in found.branches)
    assert found.cache_bytes == (2 * DEPTH + 1) * ROWS * TOKENS * WIDTH * 4
    assert found.not_understood == ()


def test_flops_follow_the_formulas(found: duca_compile.Explanation) -> None:
    attention = ROWS * (8 * TOKENS * WIDTH**2 + 4 * TOKENS**2 * WIDTH)
    mlp = ROWS * 16 * TOKENS * WIDTH**2
    assert [b.flops for b in found.branches] == [attention, mlp] * DEPTH
    assert sum(found.share(v) for v in Variance) == pytest.approx(1, abs=1e-12)
    assert found.hoisted  # the class embedding and the frequencies do not change within a request
    assert found.share(Variance.TIMESTEP) > 0


def test_the_schedule_is_what_runs(model: nn.Module, found: duca_compile.Explanation) -> None:
    policy = DuCa(interval=4, fresh_ratio=0.25)
    plan = found.schedule(policy, 8)
    optimized = duca_compile.optimize(model, policy, "eager")
    with torch.no_grad():
        loop(optimized, 8)
    assert [s.kind for s in plan.steps] == [e.kind for e in optimized.history]
    assert [s.flops for s in plan.steps] == [e.flops for e in optimized.history]
    assert [s.fresh_share for s in plan.steps] == [0.25 if s.kind is StepKind.PARTIAL else 0 for s in plan.steps]


def test_ideal_speed_ups(found: duca_compile.Explanation) -> None:
    assert found.schedule(Uncached(), 10).ideal_speedup == pytest.approx(1, abs=0)
    fora = found.schedule(FORA(5), 10)
    assert fora.full_steps == 2
    reused = next(s.flops for s in fora.steps if s.kind is StepKind.REUSE)
    assert fora.ideal_speedup == pytest.approx(10 / (2 + 8 * reused / found.flops), rel=1e-12)
    few, many = (found.schedule(DuCa(5, fresh_ratio=r), 10).ideal_speedup for r in (0.1, 0.5))
    assert many < few < 5


def test_the_report_names_what_it_must(found: duca_compile.Explanation) -> None:
    text = str(found)
    for word in (
        "transformer_blocks.0 to",
        "self_attention",
        "mlp",
        "loop-invariant",
        "timestep-only",
        "no, scaled_dot",
    ):
        assert word in text
    assert "FPSPSF" in str(found.schedule("duca", 10))


def test_an_optimized_model_is_explained_with_its_own_policy(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, FORA(2), "eager")
    found = duca_compile.explain(optimized, latent(0), timestep=torch.full((4,), 5), class_labels=LABELS)
    assert found.schedule(num_inference_steps=4).policy == "FORA (N=2)"


def test_the_command_explains_the_embedded_model_and_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["explain", "--steps", "10", "--interval", "5"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "24 branches in 12 blocks" in result.output
    assert "FPSPSFPSPS" in result.output
    seer = CliRunner().invoke(app, ["explain", "--steps", "10", "--policy", "taylorseer"], env={"COLUMNS": "200"})
    assert seer.exit_code == 0, seer.output
    assert "FFTTTTFTTT" in seer.output
    own = CliRunner().invoke(app, ["explain", "tests.test_explain:example"], env={"COLUMNS": "200"})
    assert own.exit_code == 0, own.output
    assert f"{2 * DEPTH} branches in {DEPTH} blocks" in own.output
    missing = CliRunner().invoke(app, ["explain", "tests.test_explain:nothing"])
    assert missing.exit_code == 2
    assert "write it as package.module:function" in " ".join(missing.output.split())


def example() -> tuple[nn.Module, dict[str, object]]:
    return build(DEPTH), {"hidden_states": latent(0), "timestep": torch.full((4,), 5), "class_labels": LABELS}
