"""Tuning: the race on simulated loops, and all of it on a tiny model and a pipeline."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import duca_compile
from duca_compile import (
    FORA,
    Calibrated,
    DisCa,
    DuCa,
    PolicyError,
    TaylorSeer,
    Tuned,
    UsageError,
    calibrate,
    published,
    tune,
)
from duca_compile.app import demo
from duca_compile.app.cli import app
from duca_compile.compiler import captures
from duca_compile.methods.tuning import tuner
from duca_compile.methods.tuning.candidates import Candidate, Candidates, named_series
from duca_compile.methods.tuning.measuring import Bench, Run, quiet
from duca_compile.methods.tuning.quality import arrays, peak_of, psnr, value_of
from duca_compile.methods.tuning.report import expression, page, pictures
from duca_compile.methods.tuning.search import Search
from duca_compile.methods.tuning.trials import FILE, Journal, Trial
from duca_compile.methods.tuning.wishes import Outcome, Wish, read_wish
from duca_compile.policies import Policy, StepKind
from duca_compile.policies.files import as_fields, from_fields, known, load_policy, save_policy
from duca_compile.policies.named import POLICIES
from tests.artifacts import loop, tiny_dit
from tests.pipelines import CASES, make
from tests.test_calibrated import Decay, decaying
from tests.test_site import CHROMIUM

STEPS = 8
CALLS = ["<a> & 1", "<a> & 2", "<a> & 3"]
FEW: list[str | Policy] = [FORA(2), TaylorSeer(2, 1, lite=True), DuCa(2), "calibrated"]
SECONDS = 1e-9  # of a FLOP, where FLOPs stand for time
EASY: dict[str, Any] = {"max_seconds": 1000.0, "backend": "eager"}  # met however loaded the machine is


def sample(model: Any, call: str) -> Tensor:
    """One channel of the last output of a short loop, (2, 1, 8, 8)."""
    return loop(model, 2, seed=int(call[-1]), steps=STEPS)[-1][:, :1]


def target() -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    return decay(), outputs


def outputs(model: Any, call: int, steps: int = 4) -> Tensor:
    """The outputs of a loop of a model that is cheap to capture."""
    return torch.stack(decaying(steps)(model, call))


def decay() -> nn.Module:
    torch.manual_seed(0)
    return Decay().eval()


def decibels(one: Tensor, other: Tensor, peak: float) -> float:
    return float(10 * torch.log10(peak**2 / (one - other).double().square().mean()))


@pytest.fixture(scope="module", autouse=True)
def by_flops() -> Iterator[None]:
    """Steps take what their FLOPs say, so that what is chosen does not depend on the machine's load."""

    def step_seconds(run: Run) -> dict[StepKind, float]:
        kinds = {each.kind for each in run.history}
        flops = {kind: [each.flops * SECONDS for each in run.history if each.kind is kind] for kind in kinds}
        return {kind: sum(each) / len(each) for kind, each in flops.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step_seconds", property(step_seconds))
        patch.setattr(Run, "warm_seconds", property(lambda run: sum(each.flops * SECONDS for each in run.history)))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Tuned:
    return tune(tiny_dit(), CALLS, sample, policies=FEW, folder=folder, **EASY)


def test_the_closest_by_the_calls_that_choose_is_judged_by_another(tuned: Tuned) -> None:
    how = tuned.conditions
    assert (how.choosing, how.judging, how.steps) == ((0, 1), (2,), STEPS)
    by_policy: dict[str, list[float]] = {}
    for trial in tuned.trials:
        assert trial.call in how.choosing
        by_policy.setdefault(trial.policy.name, []).append(trial.quality)
    means = {name: float(np.mean(found)) for name, found in by_policy.items() if len(found) == 2}
    assert len(means) >= 3
    assert tuned.met
    assert tuned.policy.name == max(means, key=lambda name: means[name])
    model = tiny_dit()
    fast = duca_compile.optimize(model, tuned.policy, "eager", STEPS)
    found, wanted = sample(fast, CALLS[2]), sample(model, CALLS[2])
    assert tuned.quality == pytest.approx(decibels(found, wanted, how.peak), abs=1e-3)
    assert tuned.judged[0].letters == "".join(each.kind.letter for each in fast.history)
    assert tuned.cache_bytes == fast.cache_bytes
    assert len(tuned.judged[0].speedups) >= 3
    assert tuned.verdict.startswith(f"{tuned.policy.name}: {tuned.speedup:.2f} times as fast")
    assert "on 1 call that did not choose it" in tuned.verdict
    assert tuned.verdict in " ".join(str(tuned).split())


def test_its_file_is_a_policy_wherever_one_is_named(tuned: Tuned, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "trials.json", "tuned.json"]
    path = folder / "tuned.json"
    for given in (path, str(path)):
        assert duca_compile.optimize(tiny_dit(), given, "eager", STEPS).policy == tuned.policy
    assert demo.make_policy(str(path), None) == tuned.policy
    about = json.loads(path.read_text())["about"]
    assert about["met"] is True
    assert about["speedup"] == tuned.speedup
    assert about["wish"] == "at most 1000 s for a call"


class Page(HTMLParser):
    """The elements of a page, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_nothing(tuned: Tuned, folder: Path) -> None:
    text = (folder / "report.html").read_text()
    shown = Page(text)
    assert shown.open == []
    assert not any(word in text for word in ("http:", "https:", "<script", "url(", "@import"))
    assert tuned.verdict in shown.text
    assert CALLS[2] in shown.text, "a prompt is text, not markup"
    for each in tuned.judged:
        assert shown.text.count(each.policy.name) >= 4, "a finalist: in two tables, its schedule and its pictures"
    kinds = [base64.b64decode(source.partition(";base64,")[2]) for source in shown.sources]
    assert len(kinds) == 1 + 1 + 2 * len(tuned.judged)
    assert all(source.startswith(("data:image/svg+xml;", "data:image/png;")) for source in shown.sources)
    assert ElementTree.fromstring(kinds[0]).tag.endswith("svg")
    plain, cached = (imread(io.BytesIO(kind)) for kind in kinds[1:3])
    assert plain.shape[:2] == (8, 16), "two rows of a batch beside each other"
    assert not np.array_equal(plain, cached)
    assert 'optimize(model, "tuned.json", backend="eager", num_inference_steps=8)' in shown.text


def test_it_goes_on_after_an_interruption(tmp_path: Path) -> None:
    """And what is known is not tried again, whatever the wish."""
    real, left = Bench.trial, 2
    settings: dict[str, Any] = {"policies": [FORA(2), FORA(3), TaylorSeer(2, 1)], "folder": tmp_path}

    def trial(bench: Bench, policy: Policy, number: int) -> Trial:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return real(bench, policy, number)

    model = decay()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "trial", trial)
        with pytest.raises(KeyboardInterrupt):
            tune(model, [1, 2, 3], outputs, **settings, **EASY)
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        assert len(json.loads((tmp_path / FILE).read_text())["trials"]) == 2
        left = 4  # of six, three settings on two calls
        done = tune(model, [1, 2, 3], outputs, **settings, **EASY)
        assert left == 0
        assert len(json.loads((tmp_path / FILE).read_text())["trials"]) == 6
        other = tune(model, [1, 2, 3], outputs, **settings, speedup=1.01, backend="eager")
        assert other.policy == done.policy


def test_a_folder_of_another_tuning_is_refused(folder: Path, tmp_path: Path) -> None:
    identity, signature = {"seed": 0, "steps": 8}, [[1.0, 2.0]]
    journal = Journal(tmp_path, identity, signature)
    journal.add(Trial(FORA(3), 0, math.inf, 1.0, 2.0, 10, "FR", {"F": 0.5}, 0.5))
    assert Journal(tmp_path, identity, [[1.001, 2.0]]).find(FORA(3), 0) == journal.find(FORA(3), 0)
    assert Journal(tmp_path, identity, signature).find(FORA(2), 0) is None
    with pytest.raises(UsageError, match=r"trials.json belongs to a tuning with seed=0, and now it is 1; choose"):
        Journal(tmp_path, {**identity, "seed": 1}, signature)
    with pytest.raises(UsageError, match="its uncached results differ"):
        Journal(tmp_path, identity, [[1.5, 2.0]])
    for text in ("{", "[]", '{"format": 9}', '{"format": 1, "of": {}, "signature": [], "trials": [{"call": 1}]}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UsageError, match=r"trials\.json cannot be resumed"):
            Journal(tmp_path, identity, signature)
    with pytest.raises(UsageError, match="is a file; folder= names a folder"):
        tune(tiny_dit(), CALLS, sample, folder=tmp_path / FILE, **EASY)


def test_one_capture_serves_all_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    real = captures.CaptureCache._captured

    def counted(self: Any, *arguments: Any) -> Any:
        made = real(self, *arguments)
        found.append(made.captured.graph)
        return made

    monkeypatch.setattr(captures.CaptureCache, "_captured", counted)
    model = decay()
    before = dict(vars(model))
    tune(model, [1, 2], outputs, policies=[FORA(2), TaylorSeer(2, 1)], **EASY)
    assert len(set(map(id, found))) == 1
    assert vars(model) == before


def test_a_wish_that_cannot_be_met() -> None:
    missed = tune(decay(), [1, 2], outputs, policies=[FORA(2), FORA(4)], speedup=50, backend="eager")
    assert not missed.met
    assert missed.verdict.startswith(
        "cannot: nothing that was tried gives at least 50 times as fast. What came closest"
    )
    assert missed.policy == FORA(4)
    assert "at most" in missed.left_out["FORA (N=2) to FORA (N=2)"]
    small = tune(decay(), [1, 2], outputs, policies=[FORA(2)], max_cache_bytes=1, backend="eager")
    assert not small.met
    assert "bytes" in small.left_out["FORA (N=2)"]
    assert small.cache_bytes > 1


def test_a_file_of_a_missed_wish_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_policy(FORA(2), tmp_path / "tuned.json", {"met": False})
    assert load_policy(tmp_path / "tuned.json") == FORA(2)
    assert "the wish that it was tuned for was not met" in caplog.text


@pytest.mark.parametrize("name", ["DiT", pytest.param("FLUX", marks=pytest.mark.exhaustive)])
def test_a_pipeline_is_tuned_and_left_as_it_was(name: str, tmp_path: Path) -> None:
    pipe, case = make(name), CASES[name]
    original = pipe.transformer
    calls = [{**case.arguments, "num_inference_steps": 4, "guidance_scale": scale} for scale in (2.0, 3.0)]
    generator = torch.Generator().manual_seed(5)
    calls[1]["generator"] = generator
    state = generator.get_state()
    tuned = tune(pipe, calls, policies=[FORA(2)], folder=tmp_path, **EASY)
    assert pipe.transformer is original
    assert torch.equal(generator.get_state(), state)
    assert tuned.met
    assert tuned.conditions.is_pipeline
    duca_compile.optimize(pipe, tmp_path / "tuned.json", "eager")
    (judged,) = tuned.judged
    assert np.array_equal(*(arrays(result)[0] for result in (pipe(**calls[1]), judged.results[0])))
    assert judged.letters == "FRFR"
    assert "pipe = duca_compile.optimize(pipe, duca_compile.FORA(interval=2)" in (tmp_path / "report.html").read_text()
    with pytest.raises(UsageError, match="optimized already"):
        tune(pipe, calls, **EASY)


def test_an_own_metric_decides() -> None:
    def closeness(found: Tensor, uncached: Tensor) -> float:
        return -float((found - uncached).abs().max())

    model, settings = decay(), [TaylorSeer(n, 1, lite=True) for n in (4, 2)]
    tuned = tune(model, [1, 2], outputs, policies=settings, metric=closeness, min_metric=-9.0, **EASY)
    assert tuned.policy == settings[1]
    fast = duca_compile.optimize(model, settings[1], "eager", 4)
    assert tuned.quality == pytest.approx(closeness(outputs(fast, 2), outputs(model, 2)), rel=1e-5)
    assert "closeness" in str(tuned)
    with pytest.raises(UsageError, match="larger must be closer, so return the negative of a distance"):
        tune(model, [1, 2], outputs, metric=lambda a, b: -closeness(a, b), min_metric=1.0, backend="eager")


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({}, "say what you wish for: speedup=3"),
        ({"speed": 3}, r"speed is no wish; the wishes are \['max_cache_bytes'"),
        ({"speedup": 0}, "speedup=0 is invalid"),
        ({"speedup": "fast"}, "speedup='fast' is invalid"),
        ({"min_psnr": math.nan}, "min_psnr=nan is invalid"),
        ({"max_cache_bytes": 1.5}, "max_cache_bytes=1.5 is invalid"),
        ({"metric": "lpips", "speedup": 2}, "metric='lpips' is unknown: it is 'psnr', or a function"),
        ({"metric": max}, "add min_metric="),
        ({"metric": max, "min_psnr": 30}, "bound it by min_metric"),
        ({"metric": max, "max_cache_bytes": 10}, "add min_metric="),
        ({"min_metric": 1, "min_psnr": 30}, "leave one of them out"),
        ({"speedup": 2, "minutes": -1}, "minutes=-1 is invalid"),
        ({"speedup": 2, "seed": -1}, "seed=-1 is invalid"),
        ({"speedup": 2, "policies": ["fancy"]}, "policies names 'fancy'"),
        ({"speedup": 2, "backend": "fast"}, "backend='fast' is unknown"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_before_anything_runs(wish: dict[str, Any], reason: str) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it ran")

    with pytest.raises(UsageError, match=reason):
        tune(decay(), CALLS, never, **wish)


@pytest.mark.parametrize(
    ("calls", "sample", "reason"),
    [
        ([1], sample, "calls holds 1, and two are needed"),
        ("a cat", sample, "calls must be a list"),
        ([1, 2], None, "a model needs sample="),
        ([1, 2], "loop", "must be a function"),
        ([1, 2], lambda model, call: torch.ones(1), r"calls\[0\] must run one denoising loop"),
        ([4, 6], lambda m, n: outputs(m, 0, steps=n)[-1], r"calls\[1\] has 6 steps, and calls\[0\] 4"),
        ([1, 2], lambda m, n: outputs(m, 0)[:n], r"calls\[1\] returned 2x2x4x3, and calls\[0\] 1x2x4x3"),
        ([1, 2], lambda m, n: [outputs(m, 0), "no"][1], "returned no numbers to compare"),
        ([1, 2], lambda m, n: outputs(m, 0) / 0, "not finite"),
        ([1, 2], lambda m, n: outputs(m, time.perf_counter_ns() % 10**9), "gave another result when it ran"),
    ],
)
def test_calls_that_show_nothing_are_refused(calls: Any, sample: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        tune(decay(), calls, sample, policies=[FORA(2)], **EASY)


def test_calls_of_a_pipeline_are_prompts_or_arguments() -> None:
    with pytest.raises(UsageError, match=r"calls\[1\] is a int: a call of a pipeline is a prompt, or a dictionary"):
        tune(make("DiT"), ["a cat", 3], speedup=2)


def test_noise_from_the_global_generator_is_seeded() -> None:
    def drawn(model: Any, call: int) -> Tensor:
        return outputs(model, int(torch.randint(1000, ())))

    model = decay()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tune(model, [0, 1], drawn, policies=[FORA(2)], **EASY)
    assert torch.equal(torch.get_rng_state(), before)


# Policies say what to try


@pytest.mark.parametrize("steps", [2, 4, 28, 50])
def test_settings_are_series_that_cache_more_and_more(steps: int) -> None:
    kinds = {type(policy) for series in named_series(None, steps) for policy in series}
    assert kinds == ({*POLICIES.values()} - {duca_compile.Uncached, duca_compile.Auto}) if steps > 2 else kinds
    for series in named_series(None, steps):
        assert len({policy.name for policy in series}) == len(series)
        full = [sum(step.kind is StepKind.FULL for step in policy.steps(steps)) for policy in series]
        assert full == sorted(full, reverse=True)
        assert all(from_fields(json.loads(json.dumps(as_fields(policy)))) == policy for policy in series)


def test_the_code_to_paste_makes_the_policy() -> None:
    policies = [policy for series in named_series(None, 28) for policy in series]
    for policy in [*policies, published("duca", "dit"), published("speca", "flux")]:
        assert eval(expression(policy), {"duca_compile": duca_compile}) == policy
    assert expression(FORA(2)) == "duca_compile.FORA(interval=2)"


def test_calibrated_settings_are_those_of_each_number_of_full_steps() -> None:
    measured = calibrate(tiny_dit(), lambda model, number: sample(model, str(number)))
    first, second = measured.settings()
    assert [len(policy.full_steps) for policy in second] == [4, 3, 2]
    assert list(second) == [measured.policy(count) for count in (4, 3, 2)]
    assert list(first) == [measured.policy(count, 1) for count in (4, 3, 2)]
    assert first[0].name == "calibrated (4 of 8 full, order 1)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"format": 2}', "another version"),
        ('{"format": 1}', "'policy'"),
        ('{"format": 1, "policy": "Fancy"}', "policy='Fancy' is not one of"),
        ('{"format": 1, "policy": "FORA", "fields": {"interval": 0}}', "interval=0 is invalid"),
        ('{"format": 1, "policy": "DuCa", "fields": {"fresh_ratio": "much"}}', "Expected `float`"),
    ],
)
def test_a_file_without_a_policy_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"(?s)tuned.json does not hold a policy: .*{reason}.*; make one with tune"):
        duca_compile.optimize(decay(), path)
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.json: No such file"):
        duca_compile.optimize(decay(), tmp_path / "nowhere.json")


def test_a_policy_of_ones_own_is_tried_but_not_written(tmp_path: Path) -> None:
    class Own(FORA):
        pass

    assert Own.__name__ not in known()
    with pytest.raises(UsageError, match="Own is no policy of duca_compile, or has a predictor"):
        save_policy(Own(2), tmp_path / "own.json", {})
    assert not list(tmp_path.iterdir())


# The race, on loops that are simulated

COSTS = {"full": 1.0, "partial": 0.3, "reuse": 0.1, "skip": 0.02, "forecast": 0.03}
LONG = 28


def simulated(policy: Policy) -> Candidate:
    kinds = [step.kind for step in policy.steps(LONG)]
    steps = tuple(SimpleNamespace(kind=kind, flops=COSTS[kind.value]) for kind in kinds)
    report: Any = SimpleNamespace(adaptive=False, steps=steps, uncached_flops=1.0, cache_bytes=1000)
    return Candidate(policy, report)


class Simulation:
    """A bench whose loops take what their FLOPs say and a bit more, and whose quality falls with speed."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.steps, self.passes, self.seconds = LONG, 1, LONG + 2.0
        history = tuple(SimpleNamespace(kind=StepKind.FULL) for _ in range(LONG))
        plain = SimpleNamespace(warm_seconds=self.seconds, step_seconds={StepKind.FULL: 1.0}, history=history)
        self.uncached = [plain] * 4
        self._slope = {name: draw.uniform(2, 9) for name in ("DuCa", "FORA", "TaylorSeer", "ToCa")}
        self._offset = [draw.gauss(0, 0.7) for _ in range(4)]
        self.ran = 0

    def quality(self, policy: Policy, number: int) -> float:
        return 48 - self._slope[type(policy).__name__] * (self.speedup(policy) - 1) + self._offset[number]

    def speedup(self, policy: Policy) -> float:
        return self.seconds / (2 + sum(COSTS[step.kind.value] * 1.02 for step in policy.steps(LONG)))

    def trial(self, policy: Policy, number: int) -> Trial:
        self.ran += 1
        letters = "".join(step.kind.letter for step in policy.steps(LONG))
        took = {kind.letter: COSTS[kind.value] * 1.02 for kind in StepKind if kind.value in COSTS}
        seconds = self.seconds / self.speedup(policy)
        return Trial(policy, number, self.quality(policy, number), seconds, self.seconds, 1000, letters, took, 1.0)

    def time_uncached(self, number: int) -> None:
        pass


def raced(bench: Simulation, wish: Wish, seconds: float = 1e9) -> tuple[Search, list[Trial]]:
    series = named_series(["duca", "fora", "taylorseer", "toca"], LONG)
    candidates = Candidates([tuple(map(simulated, each)) for each in series])
    search = Search(bench, wish, candidates, Journal(None, {}, []), range(2), seconds, lambda *_: None)  # type: ignore[arg-type]
    return search, search.race()


WISHES = [{"speedup": s} for s in (1.5, 2, 3, 4, 5)] + [{"min_psnr": q} for q in (25, 28, 30, 35, 38)]


@pytest.mark.parametrize("seed", range(2))
def test_wishes_are_met_on_calls_that_did_not_choose(seed: int) -> None:
    bench = Simulation(seed)
    kept = 0
    for given in WISHES:
        wish, bench.ran = read_wish(given), 0
        search, ranked = raced(bench, wish)
        policy = ranked[0].policy
        judged = float(np.mean([bench.quality(policy, number) for number in (2, 3)]))
        speedup = bench.speedup(policy)
        kept += wish.shortfall(Outcome(judged, speedup, bench.seconds / speedup, 1000)) <= 0
        count = sum(len(series) for series in search._candidates.series)
        assert bench.ran < 0.7 * count, "most settings are ruled out without a run"
    assert kept >= 9


def test_the_best_of_all_is_found() -> None:
    """Compared with a search that tries everything."""
    bench = Simulation(1)
    every = [policy for series in named_series(["duca", "fora", "taylorseer", "toca"], LONG) for policy in series]
    _, ranked = raced(bench, read_wish({"speedup": 3}))
    fast = [policy for policy in every if bench.speedup(policy) >= 3 * 1.05]
    best = max(bench.quality(policy, 0) for policy in fast)
    assert bench.quality(ranked[0].policy, 0) == pytest.approx(best)
    _, ranked = raced(bench, read_wish({"min_psnr": 30}))
    close = [policy for policy in every if min(bench.quality(policy, n) for n in (0, 1)) >= 32]
    assert bench.speedup(ranked[0].policy) >= 0.95 * max(map(bench.speedup, close))


def test_the_time_box_ends_the_race() -> None:
    search, ranked = raced(bench := Simulation(0), read_wish({"speedup": 2}), seconds=0.0)
    assert search.cut_short
    assert bench.ran == len(ranked) == 1


def test_a_setting_that_fails_is_left_out() -> None:
    class Fails(Simulation):
        def trial(self, policy: Policy, number: int) -> Trial:
            if isinstance(policy, DuCa):
                raise PolicyError("this one\ndoes not run")
            return super().trial(policy, number)

    search, ranked = raced(Fails(0), read_wish({"speedup": 2}))
    assert ranked
    assert not any(isinstance(trial.policy, DuCa) for trial in ranked)
    assert "this one" in search._candidates.left_out.values()


# Parts


def test_bounds_and_ranks() -> None:
    wish = Wish(speedup=2.0, min_quality=30.0, max_cache_bytes=100)
    good = Outcome(33.0, 2.5, 1.0, 100)
    assert wish.shortfall(good) == -0.0
    assert wish.shortfall(Outcome(27.0, 2.5, 1.0, 100)) == pytest.approx(0.1)
    assert wish.shortfall(Outcome(math.inf, 1.0, 1.0, 100)) == pytest.approx(0.5)
    assert wish.shortfall(Outcome(33.0, 2.5, 1.0, 150)) == pytest.approx(0.5)
    assert Wish(max_seconds=2.0).shortfall(Outcome(1.0, 1.0, 3.0, 0)) == pytest.approx(0.5)
    assert Wish(min_quality=30.0).shortfall(Outcome(40.0, 0.9, 1.0, 0)) == pytest.approx(0.1), "slower than uncached"
    assert Wish(min_quality=-0.2).shortfall(Outcome(-0.3, 2.0, 1.0, 0)) == pytest.approx(0.5)
    closest = sorted([Outcome(10.0, 1.9, 1.0, 0), good, Outcome(35.0, 2.2, 1.0, 0)], key=wish.rank)
    assert [found.quality for found in closest] == [35.0, 33.0, 10.0]
    assert read_wish({"max_cache_bytes": 5}).min_quality == 30.0
    assert str(wish) == "at least 2 times as fast, PSNR of at least 30.0 dB, caches of at most 100 bytes"


def test_results_of_any_form_are_compared() -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    result = {"images": [image, image], "latents": torch.ones(2, dtype=torch.bfloat16), "flags": None, "name": "x"}
    assert [array.shape for array in arrays(result)] == [(2, 2, 3), (2, 2, 3), (2,)]
    one, other = [np.zeros((2, 2), np.uint8)], [np.full((2, 2), 255, np.uint8)]
    assert psnr(one, other, 255.0) == 0.0
    assert psnr(one, one, 255.0) == math.inf
    assert psnr([np.array([math.nan])], [np.zeros(1)], 1.0) == -math.inf
    assert peak_of([one, other]) == 255
    assert peak_of([[np.array([0.0, 0.9])]]) == 1
    assert peak_of([[np.array([-0.5, 0.9])], [np.array([0.1, 0.2])]]) == 2
    assert peak_of([[np.array([-3.0])], [np.array([5.0])]]) == 8
    assert value_of(lambda a, b: torch.tensor(2.5), 0, 0) == 2.5
    assert value_of(lambda a, b: math.nan, 0, 0) == -math.inf
    for wrong in ("2", None, [1], torch.ones(2)):
        with pytest.raises(UsageError, match="must return one number"):
            value_of(lambda a, b, wrong=wrong: wrong, 0, 0)


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [
        ((8, 6), 1, (8, 6)),
        ((3, 8, 6), 1, (8, 6)),
        ((2, 1, 8, 6), 2, (8, 6)),
        ((2, 8, 6, 3), 2, (8, 6)),
        ((2, 5, 8, 6, 3), 2, (8, 6)),
        ((2, 3, 5, 8, 6), 2, (8, 6)),
        ((2, 16, 8, 6), 0, None),
        ((1, 20, 64), 1, (20, 64)),
    ],
)
def test_pictures_are_found(shape: tuple[int, ...], count: int, size: tuple[int, int] | None) -> None:
    found = pictures([torch.rand(shape) * 2 - 1])
    assert [each.shape for each in found] == [(*(size or ()), 3)] * count
    assert all(0 <= each.min() <= each.max() <= 1 for each in found)


def test_a_page_without_pictures(tuned: Tuned) -> None:
    latents = (torch.ones(1, 16, 8, 8),)
    judged = tuple(replace(each, results=latents) for each in tuned.judged)
    text = page(replace(tuned, judged=judged, uncached=latents))
    assert "The results hold no pictures" in Page(text).text


def test_times_are_those_of_steps_that_do_not_compile() -> None:
    full, skip = StepKind.FULL, StepKind.SKIP
    assert quiet([full, skip, skip, full, full], [9.0, 5.0, 0.5, 1.0, 1.2]) == {full: 1.2, skip: 0.5}
    assert quiet([], []) == {}


def test_the_command_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "named_series", lambda given, steps: [(FORA(2), FORA(4))])
    arguments = ["tune", "tests.test_tune:target", "--backend", "eager", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--max-seconds", "1000"], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    for figure in ("FORA (N=2)", "MiB", " dB", "report.html"):
        assert figure in done.output
    assert (tmp_path / "out" / "report.html").exists()
    assert isinstance(load_policy(tmp_path / "out" / "tuned.json"), FORA | Calibrated)
    missed = CliRunner().invoke(app, [*arguments, "--speedup", "90"], env={"COLUMNS": "60"})
    assert missed.exit_code == 1, missed.output
    assert "cannot" in missed.output
    none = CliRunner().invoke(app, arguments)
    assert none.exit_code == 2
    assert "say what you wish for" in none.output


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files(tmp_path: Path) -> None:
    code = f"from tests.test_tune import *; tune(tiny_dit(), CALLS, sample, folder={str(tmp_path)!r}, **EASY)"
    running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    path, known = tmp_path / FILE, 0
    try:
        while known < 3:
            assert running.poll() is None, "it ended before it was killed"
            time.sleep(0.2)
            known = len(json.loads(path.read_text())["trials"]) if path.exists() else 0
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    known = len(json.loads(path.read_text())["trials"])
    tuned = tune(tiny_dit(), CALLS, sample, folder=tmp_path, **EASY)
    assert tuned.met
    assert len(json.loads(path.read_text())["trials"]) > known
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".") and each.suffix != f".{running.pid}"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(tuned: Tuned, tmp_path: Path) -> None:
    tuned.report(tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = ["--window-size=1100,1800", f"--screenshot={shot}"]
    command = [str(CHROMIUM), *flags, *size, (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert imread(shot).std() > 0.05


@pytest.mark.exhaustive
def test_the_embedded_model_is_tuned(tmp_path: Path) -> None:
    arguments = ["tune", "--steps", "8", "--backend", "eager", "--max-seconds", "1000", "--minutes", "0.5"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = Page((tmp_path / "report.html").read_text())
    assert "DiTTransformer2DModel" in found.text
    assert len(found.sources) >= 4
    assert isinstance(load_policy(tmp_path / "tuned.json"), Policy)


def test_a_trained_predictor_is_no_setting_of_a_file() -> None:
    assert "DisCa" in known()
    assert DisCa.settings(50) == ()
