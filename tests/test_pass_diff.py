"""What ``passes`` shows of each pass, and that it is the variant that a step runs."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from duca_compile import FORA, DuCa, Explanation, ResidualGate, UsageError, explain
from duca_compile.app.cli import app
from duca_compile.app.pass_diff import PassReport, pass_report
from duca_compile.passes.pipeline import REWRITE, build_variant
from duca_compile.policies import StepKind
from duca_compile.runtime.planning import plan_step
from tests.test_explain import example

POLICY, STEPS = DuCa(interval=5), 10


@pytest.fixture(scope="module")
def found() -> Explanation:
    model, arguments = example()
    return explain(model, **arguments)


@pytest.fixture(scope="module")
def partial(found: Explanation) -> PassReport:
    return pass_report(found, POLICY, STEPS)


def diff(report: PassReport, name: str) -> list[str]:
    (change,) = report.only([name]).changes
    return list(change.diff())


def test_it_has_each_pass_once_in_the_order_of_the_pipeline(partial: PassReport) -> None:
    assert partial.title == "DiTTransformer2DModel, DuCa (N=5): step 1 of 10, partial"
    assert [change.name for change in partial.changes] == [type(each).__name__ for each in REWRITE]
    for change, after in zip(partial.changes, partial.changes[1:], strict=False):
        assert change.after == after.before


def test_it_ends_in_the_graph_that_the_step_runs(found: Explanation, partial: PassReport) -> None:
    spec, counts = plan_step(found.facts, POLICY, list(POLICY.planned(STEPS))[1])
    variant = build_variant(found.captured, found.facts, spec)
    last = partial.changes[-1].after
    assert last.nodes == len(variant.module.graph.nodes)
    assert 0 < last.flops <= variant.flops(counts), "timestep-only values are computed outside of the graph"
    assert [line.split()[1] for line in last.lines if line.startswith("return ")] == [
        port.result_name for port in variant.outputs
    ]


def test_a_line_says_what_a_node_is_computed_from_and_where(partial: PassReport) -> None:
    lines = partial.changes[0].before.lines
    assert "hidden_states: float32[4, 3, 8, 8] = input" in lines
    assert "pos_embed_proj_bias: float32[32] = weight pos_embed.proj.bias" in lines
    assert "flatten: float32[4, 32, 16] = flatten(conv2d, 2)  # pos_embed" in lines
    assert any(line.startswith("chunk: (float32[4, 32], float32[4, 32], ") for line in lines)


def test_a_diff_has_what_was_added_and_what_was_removed(found: Explanation) -> None:
    report = pass_report(found, POLICY, STEPS, "skip", context=0)
    lines = [line for line in diff(report, "SkipBlocks") if not line.startswith(("@@", " "))]
    assert lines[0] == "+cache_stream_end: float32[4, 16, 32] = input"
    assert [line[0] for line in lines] == ["+", "-", "+"]
    assert "cache_stream_end" in lines[2]
    assert not diff(report, "RecomputeTokens")


@pytest.mark.parametrize(
    ("policy", "step", "title"),
    [
        (POLICY, None, "step 1 of 10, partial"),
        (POLICY, "full", "step 0 of 10, full"),
        (POLICY, "2", "step 2 of 10, skip"),
        (FORA(1), None, "step 0 of 10, full"),
        (FORA(2), StepKind.REUSE.value, "step 1 of 10, reuse"),
        (ResidualGate(), "probe", "probe"),
    ],
)
def test_a_step_is_named_by_its_kind_or_its_number(
    found: Explanation, policy: DuCa | FORA | ResidualGate, step: str | None, title: str
) -> None:
    assert pass_report(found, policy, STEPS, step).title.endswith(f"{policy.name}: {title}")


def test_what_there_is_not_is_refused(found: Explanation, partial: PassReport) -> None:
    for step in ("forecast", "10", "-1"):
        with pytest.raises(UsageError, match=rf"step='{step}' is not among the 10 steps .*\(full, partial, skip\)"):
            pass_report(found, POLICY, STEPS, step)
    with pytest.raises(UsageError, match=r"DuCa \(N=5\) has no probe"):
        pass_report(found, POLICY, STEPS, "probe")
    with pytest.raises(UsageError, match=r"pass 'Skip' is unknown; choose one of Hoist, .*, WriteLast"):
        partial.only(["Skip"])


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_the_command(found: Explanation, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setattr("duca_compile.explanation.explain", lambda *_, **__: found)

    def printed(*arguments: str) -> str:
        command = ["passes", "tests.test_explain:example", "--steps", "10", *arguments]
        result = CliRunner().invoke(app, command, env={"COLUMNS": columns})
        assert result.exit_code == 0, result.output
        assert "…" not in result.output
        return result.output

    whole = printed()
    assert "SkipBlocks: changes nothing\n" in whole
    for change in pass_report(found, POLICY, STEPS).changes:
        assert f"{change.name}: " in whole
        assert all(f"{line}\n" in whole for line in change.diff()), "lines are neither cut nor wrapped"
    one = printed("--step", "skip", "--pass", "SkipBlocks")
    assert "+cache_stream_end" in one
    assert "RemoveDeadCode" not in one
    stat = printed("--stat")
    last = pass_report(found, POLICY, STEPS).changes[-1].after
    assert f"{last.flops / 1e9:.4g}" in stat
    assert str(last.nodes) in stat


def test_the_command_refuses_what_there_is_not(found: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duca_compile.explanation.explain", lambda *_, **__: found)
    result = CliRunner().invoke(app, ["passes", "tests.test_explain:example", "--pass", "Nothing"])
    assert result.exit_code == 2
    assert "pass 'Nothing' is unknown" in result.stderr
