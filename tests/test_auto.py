"""``Auto``: a schedule that is learnt from the first request of each kind, followed, watched and learnt anew."""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from typer.testing import CliRunner

import duca_compile
from duca_compile import Auto, Calibrated, ExportError, PolicyError, UsageError, calibrate
from duca_compile.app import demo
from duca_compile.app.cli import app
from duca_compile.core.variants import ForecastVariant
from duca_compile.policies import StepKind
from duca_compile.policies.auto import FEWEST_STEPS, PassProducts, learnt_from
from duca_compile.policies.fitting import Fitting, differences, in_terms_of
from duca_compile.runtime.learning import SAMPLED, _Stream, _stretches
from duca_compile.runtime.torch.samples import TorchSamples, products
from tests.artifacts import export, loop, tiny_dit
from tests.pipelines import make, quiet, run, wan
from tests.test_calibrated import apart

STEPS = 16
FULL = StepKind.FULL


class Fades(nn.Module):
    """What its branches add fades at five speeds, so that forecasts of order 2 come close and are not exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 3)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        stream = self.into(x if condition is None else x + condition)
        for speed, branch in enumerate(self.branches):
            fading = torch.exp((timestep - 100) * 0.05 * 2**speed)[:, None, None]
            stream = stream + fading * branch(stream).sin()
        return self.out(stream)


def sampled(model: Any, number: int, steps: int = STEPS, rows: int = 2, passes: int = 1) -> Tensor:
    """A loop that moves the latent along the model's outputs; with several passes, along their mean."""
    latent = torch.randn(rows, 4, 3, generator=torch.Generator().manual_seed(number))
    conditions: list[dict[str, Tensor]] = (
        [{}] if passes == 1 else [{"condition": torch.full((3,), p)} for p in range(passes)]
    )
    with torch.no_grad():
        for step in range(steps):
            time = torch.full((rows,), 100.0 - step)
            outputs = [model(x=latent, timestep=time, **condition) for condition in conditions]
            latent = latent - 0.1 * torch.stack(outputs).mean(0)
    return latent


def optimized(
    model: nn.Module, policy: Any = "auto", steps: int | None = STEPS, backend: str = "eager", **options: Any
) -> Any:
    return duca_compile.optimize(model, policy, backend, steps, strict=True, **options)


def letters(model: Any) -> str:
    return "".join(each.kind.letter for each in model.history)


def reasons(model: Any) -> set[str]:
    return {each.reason for each in model.history}


@pytest.fixture
def model() -> nn.Module:
    return Fades().eval().requires_grad_(False)


# Learning


def test_the_first_request_is_the_models_own_and_the_next_ones_follow_what_it_taught(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    fast = optimized(model, Auto(error=0.01))
    with caplog.at_level(logging.INFO, "duca_compile"):
        assert torch.equal(sampled(fast, 0), sampled(model, 0))
    assert letters(fast) == "F" * STEPS
    assert [each.reason for each in fast.history] == ["", *["learning"] * (STEPS - 1)]
    assert "a request of 16 steps, latent 2x4x3 is computed in full and learnt from; the samples take" in caplog.text
    (learnt,) = fast.learnt().known
    full = learnt.policy.full_steps
    assert f"learnt from a request of 16 steps, latent 2x4x3: {len(full)} of 16 steps are full" in caplog.text
    assert 1 < len(full) < 0.8 * STEPS
    for number in (1, 2):
        found, wanted = sampled(fast, number), sampled(model, number)
        assert tuple(each.step for each in fast.history if each.kind is FULL) == full
        assert reasons(fast) == {""}
        assert 0 < apart([found], [wanted]) < 0.01
        measured = {each.step for each in fast.history if each.measured}
        assert measured == {*full[1:]}, "what each full step says of its forecast"
    assert fast.learnt().known == (learnt,)


@pytest.mark.slow
def test_its_schedule_is_that_of_a_calibration_with_as_many_full_steps(model: nn.Module) -> None:
    fast = optimized(model, Auto(error=0.01))
    sampled(fast, 0)
    learnt = fast.learnt().known[0].policy
    own = calibrate(model, sampled).policy(len(learnt.full_steps))
    assert learnt.full_steps == own.full_steps
    for one, other in zip(learnt.measured, own.measured, strict=True):
        assert one == other or (one is not None and other is not None and one.factors == pytest.approx(other.factors))


@pytest.mark.slow
def test_a_smaller_error_takes_more_full_steps(model: nn.Module) -> None:
    counts, found = [], []
    for error in (0.1, 0.01, 0.001):
        fast = optimized(model, Auto(error))
        sampled(fast, 0)
        counts.append(len(fast.learnt().known[0].policy.full_steps))
        found.append(apart([sampled(fast, 1)], [sampled(model, 1)]))
        assert fast.learnt().known[0].error <= error
    assert counts == sorted({*counts})
    assert found == sorted(found, reverse=True)


@pytest.mark.slow
def test_the_same_requests_give_the_same_results(model: nn.Module) -> None:
    one, other = optimized(model), optimized(model)
    for number in (3, 4, 5):
        assert torch.equal(sampled(one, number), sampled(other, number))
    assert one.learnt() == other.learnt()


@pytest.mark.slow
def test_each_kind_is_learnt_by_itself(model: nn.Module) -> None:
    fast = optimized(model)
    for kind in ({"rows": 2}, {"rows": 3}, {"passes": 2}):
        sampled(fast, 0, **kind)
        assert "T" not in letters(fast)
        sampled(fast, 1, **kind)
        assert "T" in letters(fast)
    assert len(fast.learnt().known) == 3
    assert [len(each.kind.passes) for each in fast.learnt().known] == [1, 1, 2]


@pytest.mark.parametrize("steps", [4, FEWEST_STEPS - 1])
def test_short_loops_are_full_and_keep_nothing(steps: int, model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    fast = optimized(model, steps=steps)
    for number in (0, 1):
        assert torch.equal(sampled(fast, number, steps), sampled(model, number, steps))
        assert letters(fast) == "F" * steps
        assert reasons(fast) == {"not worth it"}
        assert fast.cache_bytes == 0
    assert caplog.text.count(f"loops of {steps} steps are computed in full: forecasts need 10 steps at least") == 1


@pytest.mark.slow
def test_what_cannot_be_forecast_is_full_and_said_to_be(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    fast = optimized(model, Auto(error=1e-9))
    for number in (0, 1):
        assert torch.equal(sampled(fast, number), sampled(model, number))
    assert reasons(fast) == {"", "not worth it"}
    assert "would still err by more than error=1e-09" in caplog.text
    assert fast.learnt().known[0].policy.full_steps == tuple(range(STEPS))


def test_a_request_that_breaks_off_teaches_nothing(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    fast = optimized(model)
    sampled(fast, 0, STEPS - 1)
    fast.reset()
    sampled(fast, 0, 3)
    assert fast.learnt().known == ()
    sampled(fast, 0)
    sampled(fast, 1)
    assert "T" in letters(fast)
    assert "nothing can be learnt" not in caplog.text


def test_the_number_of_steps_must_be_known(model: nn.Module) -> None:
    with pytest.raises(PolicyError, match=r"what policy='auto' learns depends on the number of steps; pass optimize"):
        optimized(model, steps=None)


# Watching


def test_other_weights_are_noticed_and_learnt(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    fast = optimized(model, Auto(error=0.01))
    for number in range(3):
        sampled(fast, number)
    before = fast.learnt()
    with torch.no_grad():
        for branch in model.branches:
            branch.weight.mul_(3)
    wanted = sampled(model, 3)
    sampled(fast, 3)
    drifted = [each.step for each in fast.history if each.reason == "drift"]
    assert drifted == [*range(drifted[0], STEPS)]
    assert all(each.kind is FULL for each in fast.history[drifted[0] :])
    assert "the other steps are full, and the next request of this kind is learnt from, too" in caplog.text
    assert fast.learnt().known == ()
    assert torch.equal(sampled(fast, 3), wanted)
    assert reasons(fast) == {"", "learning"}
    sampled(fast, 4)
    assert reasons(fast) == {""}
    assert apart([sampled(fast, 5)], [sampled(model, 5)]) < 0.015
    assert len(fast.learnt().known[0].policy.full_steps) > len(before.known[0].policy.full_steps)


def test_what_a_full_step_measures_is_the_error_of_its_forecast(model: nn.Module) -> None:
    """Against the model's outputs in the same loop, where forecast steps change no latent."""
    latents = torch.randn(STEPS, 2, 4, 3, generator=torch.Generator().manual_seed(7))

    def fixed(called: Any) -> list[Tensor]:
        with torch.no_grad():
            return [
                called(x=x, timestep=torch.full((2,), 100.0 - i)) for i, x in enumerate(latents[:1].expand_as(latents))
            ]

    fast = optimized(model, Auto(error=0.01))
    fixed(fast)
    outputs = fixed(fast)
    learnt = fast.learnt().known[0]
    for check in learnt.checks:
        last = tuple(full for full in learnt.policy.full_steps if full < check.step)[-3:]
        terms = in_terms_of(last, check.forecast.factors)
        forecast = sum(term * outputs[at] for term, at in zip(terms.tolist(), last, strict=True))
        error = float((forecast - outputs[check.step]).norm() / outputs[check.step].norm())
        (executed,) = [each for each in fast.history if each.step == check.step]
        assert executed.measured == (pytest.approx(error, rel=1e-3),)
        assert error**2 == pytest.approx(check.expected, rel=1e-2)


def test_a_request_that_misses_a_step_is_full_until_its_full_steps_are_those_of_the_schedule(model: nn.Module) -> None:
    """Where a forecast was learnt for other full steps, nothing is known of its error."""
    fast = optimized(model, Auto(error=0.005))

    def loop(called: Any, missed: int | None) -> None:
        with torch.no_grad():
            for step in range(STEPS):
                if step != missed:
                    with fast.cache_context("only", step_index=step):
                        called(x=torch.ones(2, 4, 3), timestep=torch.full((2,), 100.0 - step))

    loop(fast, None)
    measured = fast.learnt().known[0].measured
    missed = next(step for step, each in enumerate(measured) if each is not None and measured[step + 1] is not None)
    loop(fast, missed)
    kinds = {each.step: each.kind for each in fast.history}
    for step in range(missed + 1, STEPS):
        fitted = measured[step]
        after = [full for full in range(missed + 1, step) if kinds[full] is FULL]
        wanted = [full for full in range(step) if measured[full] is None][-1 - len(fitted.factors if fitted else ()) :]
        assert (kinds[step] is FULL) == (fitted is None or after[-len(wanted) :] != wanted)


# Requests


def test_requests_at_once_have_lessons_of_their_own(model: nn.Module) -> None:
    fast = optimized(model)
    sessions = [fast.session() for _ in range(2)]
    latents = [torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    for _ in range(2):
        values = [*latents]
        with torch.no_grad():
            for step in range(STEPS):
                for place, session in enumerate(sessions):
                    output = session(x=values[place], timestep=torch.full((2,), 100.0 - step))
                    values[place] = values[place] - 0.1 * output
    assert [letters(session) for session in sessions] == [letters(sessions[0])] * 2
    assert "T" in letters(sessions[0])
    assert torch.equal(sampled(fast, 0), values[0])


@pytest.mark.slow
def test_threads_share_what_was_learnt(model: nn.Module) -> None:
    fast = optimized(model)
    sampled(fast, 0)
    wanted = [sampled(fast, number) for number in range(4)]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        found[number] = sampled(fast, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted[number]) for number in range(4))


def guided(model: Any, number: int, last: int = STEPS, first: int = 0) -> Tensor:
    """Two calls at each step; the second one only from the step ``first`` to before ``last``."""
    latent = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(number))
    with torch.no_grad():
        for step in range(STEPS):
            time = torch.full((2,), 100.0 - step)
            output = model(x=latent, timestep=time, condition=torch.zeros(3))
            if first <= step < last:
                output = 2 * output - model(x=latent, timestep=time, condition=torch.ones(3))
            latent = latent - 0.1 * output
    return latent


@pytest.mark.parametrize("last", [7, *(pytest.param(last, marks=pytest.mark.slow) for last in (STEPS, STEPS - 1))])
def test_guidance_may_end_before_the_loop_does(last: int, model: nn.Module) -> None:
    fast = optimized(model, Auto(error=0.01))
    for number in range(2):
        guided(fast, number, last)
    assert reasons(fast) == {""}
    assert "T" in letters(fast)
    assert apart([guided(fast, 2, last)], [guided(model, 2, last)]) < 0.02


@pytest.mark.slow
def test_guidance_that_joins_late_is_said_to_be_in_the_way(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    fast = optimized(model)
    for number in range(2):
        assert torch.equal(guided(fast, number, first=5), guided(model, number, first=5))
    fast.reset()
    assert reasons(fast) == {"", "learning"}
    assert "nothing can be learnt from requests of 16 steps" in caplog.text


def test_parts_of_a_loop_with_models_of_their_own_are_learnt_apart() -> None:
    def stream(first: int, last: int) -> _Stream:
        return _Stream(1, [*range(first, last + 1)])

    one, two, three = stream(0, 4), stream(0, 2), stream(5, 9)
    assert _stretches([one, two, three], 10) == [(0, 5, [one, two]), (5, 10, [three])]
    assert _stretches([stream(0, 9), stream(3, 9)], 10) is None
    assert _stretches([stream(0, 3), stream(5, 9)], 10) is None
    assert _stretches([_Stream(1, [0, 1, 3])], 4) is None
    assert _stretches([stream(2, 9)], 10) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD3", "Wan"])
def test_a_pipeline_learns_for_each_number_of_steps(name: str) -> None:
    pipe = make(name)
    plain = {steps: run(pipe, name, steps=steps) for steps in (10, 12)}
    duca_compile.optimize(pipe, Auto(error=0.5), "eager")
    for steps in (10, 12, 10, 12):
        found = run(pipe, name, steps=steps)
        learning = "learning" in reasons(pipe.transformer)
        assert torch.equal(found, plain[steps]) == learning
    known = pipe.transformer.learnt().known
    assert [each.kind.steps for each in known] == [10, 12]
    assert known[0].kind.scheduler == type(pipe.scheduler).__name__
    assert len(known[0].kind.times) == 10


@pytest.mark.slow
def test_two_experts_of_a_pipeline_are_learnt_apart() -> None:
    torch.manual_seed(0)
    pipe = quiet(wan(experts=2))
    plain = run(pipe, "Wan", steps=12)
    switch = next(i for i, t in enumerate(pipe.scheduler.timesteps) if t < 875)
    duca_compile.optimize(pipe, Auto(error=0.5), "eager")
    assert torch.equal(run(pipe, "Wan", steps=12), plain)
    found = run(pipe, "Wan", steps=12)
    (learnt,) = pipe.transformer.learnt().known
    assert pipe.transformer_2.learnt().known == (learnt,)
    assert {0, switch} <= {*learnt.policy.full_steps} < {*range(12)}
    assert {each.step for each in pipe.transformer.history if each.kind is FULL} == {*learnt.policy.full_steps}
    assert 0 < apart([found], [plain]) < 0.5


# Memory


@pytest.mark.slow
def test_caches_may_be_narrow(model: nn.Module) -> None:
    fast = optimized(model, Auto(error=0.02), cache_dtype=torch.bfloat16)
    for number in range(2):
        found = sampled(fast, number)
    assert "T" in letters(fast)
    assert apart([found], [sampled(model, 1)]) < 0.02


def test_samples_stay_within_the_budget_or_nothing_is_learnt(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    fast = optimized(model, cache_budget_bytes=3 * 2 * 4 * 8 * 4)
    for number in range(2):
        assert torch.equal(sampled(fast, number), sampled(model, number))
    assert caplog.text.count("cache_budget_bytes leaves no room to learn from requests: all are full") == 1
    assert fast.learnt().known == ()


def test_a_sample_is_spread_over_all_dimensions() -> None:
    value = torch.arange(6 * 96 * 64).reshape(6, 96, 64)
    sample = TorchSamples().of(value, 2000)
    assert 1000 < len(sample) <= 2000
    rows, tokens, channels = np.unravel_index(sample.numpy(), (6, 96, 64))
    for found, size in ((rows, 6), (tokens, 96), (channels, 64)):
        counts = np.bincount(found, minlength=size)
        assert counts.min() > 0.5 * len(sample) / size
    assert torch.equal(TorchSamples().of(value, SAMPLED), value.flatten())


# Fitting


def test_errors_of_another_feature_are_those_of_its_vectors() -> None:
    torch.manual_seed(0)
    ends, outputs = torch.randn(7, 30).cumsum(0), torch.randn(7, 12).cumsum(0)
    fitting, full = Fitting([products([*ends])], 2), (0, 1, 4)
    errors = fitting.errors_of([products([*outputs])], full)[0]
    assert errors[0] == 0
    for step in range(1, 7):
        last = tuple(each for each in full if each < step)[-3:]
        changes = differences(last) if len(last) > 1 else np.zeros((0, len(last)))
        values = outputs.double().numpy()
        found = values[last[-1]] + np.array(fitting.forecast(step, full).factors) @ (changes @ values[[*last]])
        assert errors[step] == pytest.approx(((found - values[step]) ** 2).sum() / (values[step] ** 2).sum())


def test_of_several_loops_the_worst_one_decides() -> None:
    torch.manual_seed(0)
    smooth, rough = (PassProducts(*[products([*torch.randn(12, 50).cumsum(0).cumsum(0) ** p])] * 2) for p in (1, 3))
    alone = [learnt_from([[each]], 0.1, 2) for each in (smooth, rough)]
    both = learnt_from([[smooth], [rough]], 0.1, 2)
    fewest = [sum(each is None for each in found[0]) for found in (*alone, both)]
    assert fewest[2] >= max(fewest[:2])
    assert both[2] <= 0.1


def test_a_pass_that_ended_counts_for_nothing() -> None:
    torch.manual_seed(0)
    values = [*torch.randn(12, 50).cumsum(0)]
    whole, short = products(values), products(values[:5]).padded(12)
    errors = Fitting([whole, short], 2).errors_of([whole, short], (0, 2, 4))
    assert np.isfinite(errors).all()
    assert not errors[1, 5:].any()
    assert errors[1, 3] == pytest.approx(errors[0, 3])


# Saving


def test_what_was_learnt_is_saved_and_read(model: nn.Module, tmp_path: Path) -> None:
    fast = optimized(model)
    sampled(fast, 0)
    wanted = sampled(fast, 1)
    fast.learnt().save(tmp_path / "learnt.json")
    again = optimized(model, tmp_path / "learnt.json")
    assert again.policy == fast.learnt() == again.learnt()
    assert torch.equal(sampled(again, 1), wanted)
    assert again.learnt().name == "auto"
    for other in (copy.copy(fast), copy.deepcopy(fast)):
        assert torch.equal(sampled(other, 1), wanted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f["known"][0].update(error=-1), "error=-1"),
        (lambda f: f["known"][0]["kind"].update(steps=9), "does not fit its 9 steps"),
        (lambda f: f["known"][0]["measured"].__setitem__(0, {"last_full": 3, "factors": []}), "measured.0."),
        (lambda f: f.update(max_order=0), "max_order=0"),
        (lambda f: f["known"][0].pop("checks"), "checks"),
    ],
)
def test_a_file_that_was_changed_is_refused(
    change: Callable[[Any], None], reason: str, model: nn.Module, tmp_path: Path
) -> None:
    fast = optimized(model)
    sampled(fast, 0)
    path = tmp_path / "learnt.json"
    fast.learnt().save(path)
    written = json.loads(path.read_text())
    change(written["fields"])
    path.write_text(json.dumps(written))
    with pytest.raises(UsageError, match=f"(?s)learnt.json does not hold a policy: .*{reason}"):
        optimized(model, path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"error": 2}, "error=2 is invalid"),
        ({"error": float("nan")}, "error=nan is invalid"),
        ({"max_order": 5}, "max_order=5"),
        ({"known": ("x",)}, r"known\[0\]='x' is invalid"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Auto(**options)


def test_names_say_what_differs() -> None:
    assert [each.name for each in (Auto(), Auto(0.05), Auto(max_order=1))] == [
        "auto",
        "auto (error 0.05)",
        "auto (order 1)",
    ]


def test_only_a_model_that_learns_says_what_it_learnt(model: nn.Module) -> None:
    with pytest.raises(UsageError, match=r'learns nothing: optimize the model with policy="auto"'):
        optimized(model, "fora").learnt()


# Other parts


def test_a_warm_up_compiles_forecasts_too(model: nn.Module) -> None:
    fast = optimized(model)
    fast.warm_up(x=torch.zeros(2, 4, 3), timestep=torch.zeros(2))
    (compiled,) = fast._compiled.values()
    assert {*map(type, compiled.programs.by_spec)} >= {ForecastVariant}
    before = len(compiled.programs.by_spec)
    sampled(fast, 0)
    sampled(fast, 1)
    assert len(compiled.programs.by_spec) == before


@pytest.mark.slow
def test_explanations_show_what_was_learnt(model: nn.Module) -> None:
    fast = optimized(model)
    call = {"x": torch.zeros(2, 4, 3), "timestep": torch.zeros(2)}
    assert "learnt at run time" in str(duca_compile.explain(fast, **call).schedule(None, STEPS))
    sampled(fast, 0)
    sampled(fast, 1)
    report = duca_compile.explain(fast, **call).schedule(None, STEPS)
    assert "".join(step.kind.letter for step in report.steps) == letters(fast)
    assert report.policy.startswith("calibrated (")
    assert not report.learns


@pytest.mark.slow
def test_an_artifact_holds_what_was_learnt(tmp_path: Path) -> None:
    dit = tiny_dit()
    fast = optimized(dit, Auto(error=0.3), steps=20)
    with pytest.raises(ExportError, match=r"learnt nothing of requests of 20 steps .* run one such request first"):
        export(fast, tmp_path / "artifact")
    wanted = [loop(fast, 2, seed=seed) for seed in (1, 3)][1]
    export(fast, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    assert apart(loop(artifact, 2, seed=3), wanted) < 1e-5
    assert letters(artifact) == letters(fast)
    assert isinstance(fast.learnt().known[0].policy, Calibrated)


@pytest.mark.slow
def test_the_command_line_takes_the_name_and_the_file(model: nn.Module, tmp_path: Path) -> None:
    Auto(0.05).save(tmp_path / "learnt.json")
    for policy in ("auto", str(tmp_path / "learnt.json")):
        shown = CliRunner().invoke(app, ["explain", "--steps", "16", "--policy", policy])
        assert shown.exit_code == 0, shown.output
        assert "learnt at run time" in shown.output
    done = CliRunner().invoke(app, ["export", str(tmp_path / "artifact"), "--policy", "auto"])
    assert done.exit_code == 2
    assert "has learnt nothing of requests of 50 steps" in " ".join(done.output.split())
    options = ["--steps", "12", "--backend", "eager", "--policy", "auto", "--out", str(tmp_path / "demo.png")]
    drawn = CliRunner().invoke(app, ["demo", *options])
    assert drawn.exit_code == 0, drawn.output
    assert "auto, 12 steps" in drawn.output
    assert "uncached, 12 steps" in drawn.output
    assert "forecast" in drawn.output


def test_tuning_does_not_try_it(model: nn.Module) -> None:
    with pytest.raises(PolicyError, match="'auto', which has no settings to try"):
        duca_compile.tune(model, [0], sampled, policies=["auto"], backend="eager", speedup=1.0)


# On the trained model in the package


class Trained:
    """The model's loop with guidance in one batch, for some of the classes."""

    def __init__(self) -> None:
        self.demo = demo.DemoModel.load(torch.device("cpu"))

    def sample(self, model: Any, seed: int, classes: tuple[int, ...] = (0, 1, 2, 3), steps: int = 20) -> Tensor:
        scheduler = DDIMScheduler(**self.demo.scheduler)
        scheduler.set_timesteps(steps)
        latent = self.demo.noise(seed)[: len(classes)]
        labels = torch.tensor([*classes, *[self.demo.null_class] * len(classes)])
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = model(torch.cat([latent] * 2), timestep=t.expand(len(labels)), class_labels=labels).sample
                conditional, plain = output.chunk(2)
                guided = plain + self.demo.guidance_scale * (conditional - plain)
                latent = scheduler.step(guided, t, latent).prev_sample
        return latent.clamp(-1, 1)


def psnr(one: Tensor, other: Tensor) -> float:
    return 10 * float(torch.log10(4 / (one - other).square().mean()))


@pytest.fixture
def trained() -> Trained:
    return Trained()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.exhaustive)])
def test_other_noise_and_classes_stay_above_30_db(steps: int, trained: Trained) -> None:
    model = trained.demo.transformer
    fast = optimized(model, steps=steps)
    trained.sample(fast, 0, steps=steps)
    for seed, classes in ((1, (0, 1, 2, 3)), (2, (5, 6, 7, 9))):
        found = trained.sample(fast, seed, classes, steps)
        full = letters(fast).count("F")
        assert reasons(fast) == {""}
        assert full <= 0.4 * steps
        wanted = trained.sample(model, seed, classes, steps)
        assert psnr(found, wanted) > 30
        assert psnr(found, wanted) > psnr(trained.sample(model, seed, classes, full + 1), wanted), "fewer plain steps"


@pytest.mark.slow
@pytest.mark.parametrize(("strength", "drifts"), [(0.5, False), (2.0, True)])
def test_a_fused_adapter_is_followed_or_noticed_and_learnt(strength: float, drifts: bool, trained: Trained) -> None:
    """``strength`` is the norm of the change over that of the weights. Forecasts follow a small one."""
    model = trained.demo.transformer
    fast = optimized(model, steps=20)
    for seed in range(2):
        trained.sample(fast, seed)
    generator = torch.Generator().manual_seed(0)
    for block in model.transformer_blocks:
        for weight in (block.attn1.to_v.weight, block.ff.net[2].weight):
            one, other = (torch.randn(size, 4, generator=generator) for size in weight.shape)
            low = one @ other.T
            weight.add_(strength * low * weight.norm() / low.norm())
    trained.sample(fast, 2)
    assert reasons(fast) == ({"", "drift"} if drifts else {""})
    if drifts:
        trained.sample(fast, 3)
        assert reasons(fast) == {"", "learning"}
    found = trained.sample(fast, 4)
    assert reasons(fast) == {""}
    assert "T" in letters(fast)
    assert psnr(found, trained.sample(model, 4)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 8])
def test_short_loops_of_the_trained_model_are_its_own(steps: int, trained: Trained) -> None:
    fast = optimized(trained.demo.transformer, steps=steps)
    for seed in range(2):
        assert torch.equal(
            trained.sample(fast, seed, steps=steps), trained.sample(trained.demo.transformer, seed, steps=steps)
        )
    assert reasons(fast) == {"not worth it"}


@pytest.mark.slow
def test_compiled_requests_learn_and_follow_alike(model: nn.Module) -> None:
    eager, compiled = optimized(model), optimized(model, backend="inductor")
    for number in range(3):
        one, other = sampled(eager, number), sampled(compiled, number)
        assert apart([other], [one]) < 1e-4
        assert letters(compiled) == letters(eager)
