"""Calibration: full steps and forecasts that are measured on the model's own loop."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import duca_compile
from duca_compile import Calibrated, PolicyError, TaylorSeer, UsageError, calibrate
from duca_compile.app import demo
from duca_compile.app.cli import app
from duca_compile.methods.calibration import Calibration
from duca_compile.policies import StepKind
from duca_compile.policies.base import FittedFactors, Forecast
from duca_compile.policies.fitting import differences
from duca_compile.runtime.forecast_state import ForecastState
from duca_compile.runtime.torch.samples import products
from tests.artifacts import distance, loop, tiny_dit
from tests.artifacts import export as saved
from tests.pipelines import CASES, make, patterns, run

STEPS = 12


class Decay(nn.Module):
    """Its stream ends in a + b * 0.7^step, where the timestep is 100 less the step: one difference says all."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.branch, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        stream = self.into(x if condition is None else x + condition)
        fading = torch.pow(torch.full_like(timestep, 0.7), 100 - timestep)[:, None, None]
        stream = stream + fading * self.branch(stream)
        return self.out(stream)


def decaying(steps: int = STEPS) -> Callable[[Any, int], list[Tensor]]:
    def sample(model: Any, number: int) -> list[Tensor]:
        x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            return [model(x=x, timestep=torch.full((2,), 100.0 - step)) for step in range(steps)]

    return sample


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    one, other = torch.cat([each.flatten() for each in found]), torch.cat([each.flatten() for each in wanted])
    return float((one - other).norm() / other.norm())


def optimized(model: nn.Module, policy: Any, steps: int = STEPS, backend: str = "eager") -> Any:
    return duca_compile.optimize(model, policy, backend, steps, strict=True)


def test_what_fades_is_forecast_exactly_and_a_taylor_series_is_not() -> None:
    torch.manual_seed(0)
    model = Decay().eval()
    policy = calibrate(model, decaying()).policy(4, max_order=1)
    wanted = decaying()(model, 5)
    fast = optimized(model, policy)
    assert apart(decaying()(fast, 5)[policy.full_steps[1] :], wanted[policy.full_steps[1] :]) < 1e-6
    series = optimized(model, TaylorSeer(3, 1, 1, lite=True))
    assert apart(decaying()(series, 5)[3:], wanted[3:]) > 1e-3
    assert [each.kind is StepKind.FULL for each in fast.history] == [s in policy.full_steps for s in range(STEPS)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), order=st.integers(1, 3), passes=st.integers(1, 2), data=st.data())
def test_factors_are_those_of_least_squares(seed: int, order: int, passes: int, data: st.DataObject) -> None:
    """Against the vectors themselves, where calibration knows their products alone."""
    torch.manual_seed(seed)
    loops = [torch.randn(9, 40).cumsum(0) for _ in range(passes)]
    full = tuple(sorted({0, *data.draw(st.sets(st.integers(1, 7), min_size=1, max_size=4))}))
    policy = Calibration([products([*loop]) for loop in loops]).policy(full, order)
    assert policy.full_steps == full
    assert policy == Calibration([products([*loop]) for loop in loops]).policy(np.array(full), order)
    for step, each in enumerate(policy.measured):
        if each is None or step < full[1]:
            assert each in (None, FittedFactors(0, ()))
            continue
        last = tuple(s for s in full if s <= step)[-order - 1 :]
        sides, wanted = [], []
        for hidden in loops:
            values = hidden.double().numpy()
            weight = 1 / np.linalg.norm(values[step])
            sides.append(weight * (differences(last) @ values[[*last]]).T)
            wanted.append(weight * (values[step] - values[last[-1]]))
        own, *_ = np.linalg.lstsq(np.concatenate(sides), np.concatenate(wanted), rcond=None)
        assert each.last_full == last[-1]
        assert np.abs(np.array(each.factors) - own).max() <= 1e-5 * max(1.0, np.abs(own).max())


def test_differences_are_those_that_full_steps_keep() -> None:
    """By hand: gaps 2 and 3, each order divided by the latest."""
    first, second = differences((0, 2, 5))
    assert first.tolist() == pytest.approx([0, -1 / 3, 1 / 3])
    assert second.tolist() == pytest.approx([1 / 6, -1 / 9 - 1 / 6, 1 / 9])


@pytest.mark.parametrize("seed", range(3))
def test_full_steps_are_where_the_error_is_smallest(seed: int) -> None:
    torch.manual_seed(seed)
    calibration = Calibration([products([*torch.randn(8, 30).cumsum(0)])])
    chosen = calibration.policy(4, 1)
    others = [calibration.policy((0, *rest), 1) for rest in itertools.combinations(range(1, 8), 3)]
    assert chosen.error == min(other.error for other in others)
    assert chosen.error < np.median([other.error for other in others])


def test_its_error_is_that_of_the_forecasts_of_the_loop() -> None:
    """Where forecasts do not change the latents of later steps: the loop of ``Decay`` is the same in any case."""
    torch.manual_seed(1)
    hidden = torch.randn(6, 50).cumsum(0)
    policy = Calibration([products([*hidden])]).policy((0, 2, 3))
    errors = []
    for step, each in enumerate(policy.measured):
        if each is not None:
            last = tuple(s for s in (0, 2, 3) if s <= step)
            changes = torch.from_numpy(differences(last)).float() @ hidden[[*last]] if len(last) > 1 else []
            found = hidden[last[-1]] + sum(f * change for f, change in zip(each.factors, changes, strict=True))
            errors.append(float((found - hidden[step]).norm() / hidden[step].norm()))
    assert policy.error == pytest.approx(np.sqrt(np.square(errors).mean()), rel=1e-5)


def test_measured_factors_hold_behind_their_own_full_steps_alone() -> None:
    measured = (None, FittedFactors(0, ()), None, FittedFactors(2, (1.5,)), FittedFactors(2, (2.5,)), None)
    forecast = Forecast(2, lite=True, first=0, measured=measured)
    assert ForecastState((0, 2), 1).factors(4, forecast) == (2.5, 0.0)
    assert ForecastState((0, 1), 1).factors(4, forecast) == (3.0, 4.5), "another full step"
    assert ForecastState((1, 2), 1).factors(4, forecast) == (2.0, 2.0), "another full step before it"
    assert ForecastState((2,), 0).factors(4, forecast) == (2.0, 2.0), "fewer differences"
    assert ForecastState((0, 2), 1).factors(7, forecast) == (5.0, 12.5), "a step beyond"
    assert ForecastState((0,), 0).after(2, forecast) == ((0, 2), 1)


def dit_loop(model: Any, number: int) -> list[Tensor]:
    return loop(model, 2, seed=number, steps=STEPS)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_is_calibrated_and_closer_than_by_taylor_series(backend: str) -> None:
    model = tiny_dit()
    policy = calibrate(model, dit_loop, loops=2).policy(4)
    wanted = dit_loop(model, 9)
    fast, series = optimized(model, policy, backend=backend), optimized(model, TaylorSeer(3, 2, 1, lite=True))
    found = dit_loop(fast, 9)
    assert fast.cache_bytes == 3 * 2 * 16 * 16 * 4, "h and two differences: 2 rows of 16 tokens of width 16"
    assert [each.kind for each in fast.history].count(StepKind.FULL) == 4
    assert apart(found, wanted) < 0.8 * apart(dit_loop(series, 9), wanted)
    assert [each.kind for each in series.history].count(StepKind.FULL) == 4


def test_an_artifact_forecasts_alike(tmp_path: Path) -> None:
    model = tiny_dit()
    fast = optimized(model, calibrate(model, dit_loop).policy(5))
    saved(fast, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    assert distance(dit_loop(fast, 3), dit_loop(artifact, 3)) < 1e-5
    assert [each.kind for each in artifact.history] == [each.kind for each in fast.history]


def test_it_is_saved_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = calibrate(Decay().eval(), decaying()).policy(4)
    policy.save(tmp_path / "calibrated.json")
    assert Calibrated.load(tmp_path / "calibrated.json") == policy
    assert policy.name == "calibrated (4 of 12 full)"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UsageError, match=r"cannot write .*other\.json: No space left on device"):
        policy.save(tmp_path / "other.json")
    assert [each.name for each in tmp_path.iterdir()] == ["calibrated.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "cannot be interpreted"),
        ("{}", "'format'"),
        ('{"format": 2}', "another version"),
        ('{"format": 1, "measured": [null], "speed": 3}', "speed"),
        ('{"format": 1, "measured": []}', "no full step"),
        ('{"format": 1, "measured": [null, {"last_full": 0, "factors": ["x"]}]}', "factors.0.='x' is invalid"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(
        UsageError, match=rf"(?s)some.json does not hold a calibrated policy: .*{reason}.*; make one with"
    ):
        Calibrated.load(path)
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.json: No such file"):
        Calibrated.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ((FittedFactors(0, ()),), r"measured\[0\].*the full step before it is missing"),
        ((None, FittedFactors(1, ())), r"measured\[1\].*the full step before it is 0"),
        ((None, FittedFactors(0, (1.0, 2.0, 3.0))), "2 orders at most"),
        ((None, FittedFactors(0, (float("nan"),))), r"measured\[1\].factors\[0\]=nan is invalid"),
        ((), "no full step"),
    ],
)
def test_what_cannot_be_is_refused(measured: Any, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Calibrated(measured)


def test_it_is_for_loops_of_its_length() -> None:
    model = Decay().eval()
    policy = calibrate(model, decaying()).policy(4)
    with pytest.raises(PolicyError, match="calibrated for 12 steps, and there are 20; calibrate the model for that"):
        optimized(model, policy, 20)
    endless = optimized(model, policy, None)
    wanted = decaying(15)(endless, 1)
    assert len(wanted) == 15
    assert [each.kind for each in endless.history[12:]] == [StepKind.FULL] * 3


def test_loops_that_cannot_be_measured_are_refused() -> None:
    model = Decay().eval()
    with pytest.raises(UsageError, match="must run one denoising loop of at least two steps"):
        calibrate(model, lambda drop_in, number: None)
    measured = calibrate(model, decaying())
    for full_steps, reason in ((13, "full_steps=13"), ((1, 2), "lacks step 0"), ((0, 12), r"full_steps\[1\]=12")):
        with pytest.raises(PolicyError, match=reason):
            measured.policy(full_steps)
    with pytest.raises(UsageError, match=r"loops of the same length; these have \[6, 7\] steps"):
        calibrate(model, lambda drop_in, number: decaying(6 + number)(drop_in, number), loops=2)


def test_two_passes_of_a_loop_share_what_was_measured() -> None:
    """The two calls of guidance; each pass has caches of its own."""
    model = Decay().eval()

    def guided(drop_in: Any, number: int) -> list[Tensor]:
        x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(number))
        conditions, times = (torch.zeros(3), torch.ones(3)), [torch.full((2,), 100.0 - step) for step in range(STEPS)]
        with torch.no_grad():
            return [drop_in(x=x, timestep=time, condition=each) for time in times for each in conditions]

    policy = calibrate(model, guided).policy(4, max_order=1)
    start = 2 * policy.full_steps[1]
    assert apart(guided(optimized(model, policy), 7)[start:], guided(model, 7)[start:]) < 1e-6


@pytest.mark.parametrize("name", ["SD3", "Wan"])
def test_a_pipeline_is_calibrated(name: str) -> None:
    """In SD3's, guidance is one batch; in Wan's, two calls in contexts of their own."""
    pipe = make(name)
    model, expected = pipe.transformer, run(pipe, name)

    def sample(drop_in: Any, number: int) -> None:
        pipe.transformer = drop_in
        run(pipe, name, seed=number)

    policy = calibrate(model, sample).policy(4)
    pipe.transformer = model
    duca_compile.optimize(pipe, policy, "eager")
    found = run(pipe, name)
    full = {each.step for each in pipe.transformer.history if each.kind is StepKind.FULL}
    assert full == set(policy.full_steps)
    assert patterns(pipe.transformer).keys() == set(CASES[name].passes)
    assert 0 < apart([found], [expected]) < 0.5
    with pytest.raises(PolicyError, match="calibrated for 8 steps, and there are 6"):
        run(pipe, name, steps=6)
    assert torch.equal(run(pipe, name), found), "a refused request leaves nothing behind"


def test_the_command_calibrates_and_the_demo_runs_it(tmp_path: Path) -> None:
    out = tmp_path / "calibrated.json"
    arguments = ["calibrate", "--steps", "6", "--full-steps", "3", "--loops", "1", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [each is None for each in found["measured"]].count(True) == 3
    assert "full steps" in done.output
    assert demo.make_policy(str(out), None) == Calibrated.load(out)
    with pytest.raises(UsageError, match="has no interval"):
        demo.make_policy(str(out), 3)
    shown = CliRunner().invoke(app, ["explain", "--steps", "6", "--policy", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "calibrated (3 of 6 full)" in shown.output
