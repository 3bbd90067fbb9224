"""Artifacts of policies that decide while they run, and of those whose steps read what others do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import duca_compile
from duca_compile import (
    RFC,
    ArtifactError,
    DisCa,
    ExportError,
    OptimizedModel,
    Policy,
    PolicyError,
    ResidualGate,
    SpeCa,
    TaylorSeer,
    TrainingSettings,
    train_predictor,
)
from duca_compile.artifact.manifest import Manifest, Rule, read_manifest
from duca_compile.artifact.model import Artifact
from duca_compile.export.trace import Traced
from duca_compile.policies import Step, StepKind
from tests.artifacts import distance, example, export, loop, optimized, tiny_dit, without_torch

STEPS = 12
TOLERANCE = 1e-4  # relative, of each step; what is seen is below 1e-5


def agree(model: OptimizedModel, artifact: Artifact, rows: int) -> None:
    """The artifact's outputs, steps, measures and FLOPs are the model's, over a whole loop.

    The released SpeCa divides element by element, and what divides may be near zero. One such element carries most of
    an error, so runtimes whose values agree to 1e-5 differ in it by some percent, how many depends on the processor.
    """
    released = isinstance(model.policy, SpeCa) and model.policy.compat == "released"
    expected = loop(model, rows, steps=STEPS)
    assert distance(expected, loop(artifact, rows, arrays=True, steps=STEPS)) < TOLERANCE
    assert len(artifact.history) == len(model.history) == STEPS
    for mine, theirs in zip(artifact.history, model.history, strict=True):
        assert (mine.step, mine.kind, mine.rows) == (theirs.step, theirs.kind, theirs.rows)
        assert mine.measured == pytest.approx(theirs.measured, rel=5e-2 if released else 1e-4)
        assert mine.flops == pytest.approx(theirs.flops, rel=1e-12)
    assert artifact.cache_bytes == model.cache_bytes > 0


def kinds(model: OptimizedModel | Artifact) -> str:
    return "".join(executed.kind.letter for executed in model.history)


GATE = ResidualGate(0.3, "first_block", accumulate=False)


@pytest.fixture(scope="module")
def small() -> OptimizedModel:
    return optimized(GATE, tiny_dit(layers=1), STEPS)


@pytest.fixture(scope="module")
def folder(small: OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "artifact"
    export(small, path, dynamic_batch=False)
    return path


def test_what_is_measured_decides_as_in_torch(small: OptimizedModel, folder: Path) -> None:
    artifact = duca_compile.load(folder, threads=1)
    assert artifact.policy == GATE
    agree(small, artifact, 2)
    assert set(kinds(artifact)) == {"F", "S"}


def test_a_step_without_a_graph_is_full_and_said(
    small: OptimizedModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = duca_compile.load(folder, threads=1)
    planner = artifact._dispatcher(2).planner
    assert planner.plan(Step(StepKind.FULL)).step.kind is StepKind.FULL
    assert not caplog.records
    for _ in range(2):
        assert planner.plan(Step(StepKind.PARTIAL)).step.kind is StepKind.FULL
    (record,) = caplog.records
    assert "no graph for the partial steps" in record.getMessage()


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], str]:
    """The manifest with something else in it."""

    def read(folder: Path) -> str:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        return json.dumps(content)

    return read


def looking(**changed: Any) -> Callable[[Path], str]:
    """The manifest with another look."""
    return rewritten(lambda content: content["schedule"]["look"].update(changed))


def rule(**changed: Any) -> Callable[[Path], str]:
    """The manifest with other fields of the policy."""
    return rewritten(lambda content: content["policy"]["rule"]["fields"].update(changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewritten(lambda c: c["policy"]["rule"].update(policy="Oracle")), "'Oracle' decides .* knows only .*; update"),
        (rewritten(lambda c: c["policy"]["rule"].pop("fields")), "policy.rule.fields is missing"),
        (rule(colour="red"), "policy.rule.fields.colour is unknown in schema 1"),
        (rule(threshold="low"), "policy.rule.fields.threshold must be float, not 'low'"),
        (rule(threshold=-1), "policy.rule.fields: threshold=-1.0 is invalid"),
        (rule(probe="last_block"), "policy.rule.fields.probe must be one of .*'first_block'.*, not 'last_block'"),
        (rule(decide_per="row"), "the graphs are not for decide_per='row'"),
        (rule(cached="branches"), "policy.rule may choose .*REUSE.*, which is not there"),
        (rule(cached="forecast"), "policy.forecast is not that of policy.rule"),
        (rewritten(lambda c: c["schedule"].update(look=None)), "schedule.look must be there for residual gate"),
        (looking(variant="full"), "its graph lacks the output 'probe_change'"),
        (looking(variant="none"), "there is no variant 'none'"),
    ],
)
def test_a_manifest_whose_rule_does_not_fit_is_refused(
    folder: Path, change: Callable[[Path], str], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        Manifest.loads(change(folder))


def test_a_rule_survives_being_written(folder: Path) -> None:
    found = read_manifest(folder)
    assert Manifest.loads(found.dumps()) == found
    policy = ResidualGate(np.float32(0.25), coefficients=(1, 0.5), max_cached_steps=np.int64(3))
    assert Rule(**json.loads(json.dumps(vars(Rule.of(policy))))).rebuilt() == policy


class Stricter(SpeCa):
    """Its threshold is code, which no manifest holds."""

    def threshold(self, index: int, total: int | None) -> float:
        return super().threshold(index, total) / 2


def test_a_policy_of_ones_own_is_refused() -> None:
    with pytest.raises(ExportError, match=r"by the code of Stricter, .* one of \['EasyCache', 'Relational"):
        Rule.of(Stricter())


def test_rows_of_a_type_that_numpy_lacks_are_refused() -> None:
    model = optimized(RFC(decide_per="row"), tiny_dit().bfloat16(), STEPS)
    call = example(2) | {"hidden_states": example(2)["hidden_states"].bfloat16()}
    with pytest.raises(ExportError, match="numpy, which lacks bfloat16"):
        Traced(model, call, STEPS, dynamic_batch=False)


POLICIES: dict[str, tuple[Policy, str]] = {
    "SpeCa": (SpeCa(2, 0.06, 0.5, first_full_steps=2), "FT"),
    "SpeCa, as released": (SpeCa(2, 1.5, 0.7, compat="released", min_taylor_steps=2), "FT"),
    "RFC": (RFC(0.2), "FT"),
    "gate, modulated": (ResidualGate(0.35), "FS"),
    "gate, first block": (ResidualGate(0.4, "first_block", accumulate=False), "FS"),
    "relational TaylorSeer": (TaylorSeer(interval=4, max_order=2, relational=True), "FT"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_decisions_are_those_of_torch(name: str, tmp_path: Path) -> None:
    policy, letters = POLICIES[name]
    model = optimized(policy, steps=STEPS)
    export(model, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    agree(model, artifact, 3)
    assert set(kinds(artifact)) == set(letters)
    assert "FTF" in kinds(artifact) or "FSF" in kinds(artifact) or letters[1] * 3 in kinds(artifact)


BY_ROW: dict[str, Policy] = {
    "SpeCa": SpeCa(2, 0.03, 1.0, first_full_steps=2, decide_per="row"),
    "RFC": RFC(0.2, decide_per="row"),
    "gate": ResidualGate(0.4, "first_block", accumulate=False, decide_per="row"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_decide_for_themselves(name: str, tmp_path: Path) -> None:
    """As in torch; and a request gives what it gives alone."""
    model = optimized(BY_ROW[name], steps=STEPS)
    export(model, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    agree(model, artifact, 3)
    assert any(len({*executed.rows}) == 2 for executed in artifact.history), "some rows did something else"
    together = loop(artifact, 3, steps=STEPS)
    first = [executed.rows[0] for executed in artifact.history]
    alone = loop(artifact, 1, steps=STEPS)
    assert distance(alone, [output[:1] for output in together]) < TOLERANCE
    assert [executed.kind for executed in artifact.history] == first


@pytest.mark.slow
def test_pairs_decide_together(tmp_path: Path) -> None:
    policy = ResidualGate(0.4, "first_block", cached="forecast", decide_per="pair")
    model = optimized(policy, steps=STEPS)
    with pytest.raises(PolicyError, match="needs an even batch, and there are 3 rows"):
        duca_compile.save(model, tmp_path / "artifact", example(3))
    export(model, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    agree(model, artifact, 4)
    assert any(len({*executed.rows}) == 2 for executed in artifact.history)
    with pytest.raises(PolicyError, match="needs an even batch, and there are 3 rows"):
        loop(artifact, 3, steps=STEPS)


@pytest.mark.slow
def test_a_learned_predictor_is_in_the_graphs(tmp_path: Path) -> None:
    source = tiny_dit(layers=3)
    learned = train_predictor(
        source,
        lambda drop_in, number: loop(drop_in, 2, seed=number, steps=STEPS),
        tmp_path / "predictor.safetensors",
        TrainingSettings(loops=2, updates=5),
    )
    model = optimized(DisCa(learned, interval=3), source, STEPS)
    found = export(model, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    agree(model, artifact, 3)
    assert kinds(artifact) == "FLLFLLFLLFLL"
    own = sum(weight.numel() * weight.element_size() for weight in learned.weights.values())
    assert found.source.weight_bytes < found.weights.file.bytes <= 1.05 * (found.source.weight_bytes + own)


@pytest.fixture(scope="module")
def speca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OptimizedModel, Path]]:
    path = tmp_path_factory.mktemp("speca") / "artifact"
    model = optimized(SpeCa(2, 0.06, 0.5, first_full_steps=2), steps=STEPS)
    export(model, path)
    yield model, path
    shutil.rmtree(path.parent)


@pytest.mark.slow
def test_a_process_without_torch_decides_the_same(speca: tuple[OptimizedModel, Path], tmp_path: Path) -> None:
    folder = speca[1]
    artifact = duca_compile.load(folder, threads=1)
    calls = {name: tensor.numpy() for name, tensor in example(3).items()}
    times = np.arange(999, 0, -80)[:STEPS]
    expected = [artifact(**calls | {"timestep": np.full(3, time)}).sample for time in times]
    assert set(kinds(artifact)) == {"F", "T"}
    np.savez(tmp_path / "in.npz", **{**calls, "timestep": np.repeat(times[:, None], 3, 1)})
    code = "from duca_compile.app.cli import app; app()"
    shown = without_torch(
        code, "run", folder, "--npz", tmp_path / "in.npz", "--out", tmp_path / "out.npz", "--threads", "1"
    )
    assert kinds(artifact) in shown
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["sample"], np.stack(expected))


@pytest.mark.slow
def test_each_pass_of_each_request_decides_for_itself(speca: tuple[OptimizedModel, Path]) -> None:
    """Two guidance passes, with another request's steps between theirs."""
    model, folder = speca
    artifact = duca_compile.load(folder, threads=1)

    def guided(run: Any, between: Callable[[int], object]) -> list[torch.Tensor]:
        outputs = []
        for time in range(999, 39, -80):
            for name, scale in (("cond", 1.0), ("uncond", 3.0)):
                with run.cache_context(name):
                    call = example(2) | {"timestep": torch.full((2,), time)}
                    call["hidden_states"] = call["hidden_states"] * (1 + scale * (999 - time) / 999)
                    outputs.append(run(**call).sample)
            between(time)
        return outputs

    other = artifact.session()
    model.reset()
    expected = guided(model, lambda time: None)
    call = example(3)
    found = guided(artifact, lambda time: other(**call | {"timestep": torch.full((3,), time)}))
    assert distance(expected, found) < TOLERANCE
    assert [(e.pass_name, e.kind) for e in artifact.history] == [(e.pass_name, e.kind) for e in model.history]
    by_pass = {name: [e.kind for e in artifact.history if e.pass_name == name] for name in ("cond", "uncond")}
    assert by_pass["cond"] != by_pass["uncond"]
