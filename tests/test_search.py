"""Full steps found by a shortest path and by running loops."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import duca_compile
from duca_compile import Calibrated, PolicyError, UsageError, calibrate
from duca_compile.app.cli import app
from duca_compile.methods.calibration import Calibration
from duca_compile.methods.search import ClosedLoopSearch, shortest_path
from duca_compile.runtime.torch.samples import products
from tests.artifacts import loop, tiny_dit

STEPS = 10


def line(hidden: Tensor, i: int, j: int, t: int) -> Tensor:
    return hidden[j] + (hidden[j] - hidden[i]) * (t - j) / (j - i)


def table(hidden: Tensor) -> np.ndarray:
    steps = len(hidden)
    errors = np.zeros((steps,) * 3)
    for i, j, t in combinations(range(steps), 3):
        errors[i, j, t] = float((line(hidden, i, j, t) - hidden[t]).norm())
    return errors


def cost(errors: np.ndarray, full: tuple[int, ...]) -> float:
    steps = len(errors)
    ends = [*full[2:], steps]
    return sum(errors[i, j, j + 1 : end].sum() for i, j, end in zip(full, full[1:], ends, strict=False))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 6), first=st.integers(2, 3), gap=st.integers(3, 8))
def test_the_shortest_path_is_the_best_of_all(seed: int, count: int, first: int, gap: int) -> None:
    errors = table(torch.from_numpy(np.random.default_rng(seed).normal(size=(9, 20)).cumsum(0)))
    count = max(count, first)
    rest = combinations(range(first, 9), count - first)
    possible = [(*range(first), *more) for more in rest]
    possible = [full for full in possible if max(np.diff([*full, 9])) <= gap]
    if not possible:
        with pytest.raises(PolicyError, match=f"leave gaps of more than {gap} steps"):
            shortest_path(errors, count, first, gap)
        return
    found = shortest_path(errors, count, first, gap)
    assert found in possible
    assert cost(errors, found) == pytest.approx(min(cost(errors, full) for full in possible), rel=1e-9)


def test_the_errors_of_lines_are_those_of_the_vectors() -> None:
    torch.manual_seed(0)
    loops = [torch.randn(8, 30).double().cumsum(0) for _ in range(2)]
    calibration = Calibration([products([*each]) for each in loops])
    policy = calibration.policy_by_path(4, first_full_steps=2, largest_gap=0.5)
    wanted = shortest_path(sum(table(each) for each in loops), 4, 2, 4)  # type: ignore[arg-type]
    assert policy.full_steps == wanted
    total = 0.0
    for step, each in enumerate(policy.measured):
        if each is not None:
            earlier = [full for full in policy.full_steps if full < step]
            assert each.factors == (step - earlier[-1],)
            errors = [(line(h, *earlier[-2:], step) - h[step]).norm() / h[step].norm() for h in loops]
            total += float(np.mean(np.square(errors)))
    assert policy.error == pytest.approx(np.sqrt(total / 4), rel=1e-6)


def test_annealing_and_climbing_find_what_is_hidden() -> None:
    hidden = (0, 1, 6, 13, 14, 19)

    def loss(full: tuple[int, ...]) -> float:
        assert full[:2] == (0, 1)
        assert len(full) == 6
        return 1e-3 * sum(abs(a - b) for a, b in zip(full, hidden, strict=True))

    search = ClosedLoopSearch(loss, 20, 2, seed=0)
    start = (0, 1, 2, 3, 4, 5)
    annealed = search.anneal(start, 200, 0.05, 1e-5)
    assert loss(annealed) < loss(start)
    assert search.climb(annealed, 20) == hidden
    assert search.runs <= 200 + 20 * 30, "no choice is run twice"
    assert ClosedLoopSearch(loss, 20, 2, seed=0).anneal(start, 200, 0.05, 1e-5) == annealed


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    search = ClosedLoopSearch(lambda full: float("nan") if 3 in full else float(full[-1]), 8, 1, seed=1)
    assert 3 not in search.climb(search.anneal((0, 3, 7), 30, 1.0, 1e-3), 9)


def sample(model: Any, number: int) -> Tensor:
    return loop(model, 2, seed=number, steps=STEPS)[-1]


@torch.no_grad()
def test_a_search_by_loops_ends_no_farther_from_the_uncached_one() -> None:
    """And what it measures is what the policy does when it is used."""
    model = tiny_dit()
    measured = calibrate(model, sample)
    first = measured.policy(4)
    found = measured.policy_by_loops(4, iterations=12, rounds=2, seed=3)
    wanted = sample(model, 0)

    def loss(policy: Calibrated) -> float:
        fast = duca_compile.optimize(model, policy, "eager", STEPS)
        return float((sample(fast, 0) - wanted).double().square().mean())

    assert len(found.full_steps) == 4
    assert found == measured.policy(found.full_steps)
    trials = measured._trials
    assert trials is not None
    tried = trials(0)
    for policy in (first, found, first):
        assert tried.loss(policy) == pytest.approx(loss(policy), rel=1e-6)
    assert loss(found) <= loss(first)


def test_what_cannot_be_searched_is_refused() -> None:
    model = tiny_dit()
    measured = calibrate(model, lambda drop_in, number: loop(drop_in, 2, seed=number, steps=STEPS))
    with pytest.raises(UsageError, match=r"must return the final latent, a tensor, .*; it returned list"):
        measured.policy_by_loops(3)
    for settings_, reason in (
        ({"forced": 4}, "forced=4 is invalid: it must be a whole number from 1 to 3"),
        ({"temperatures": (0.1, 0.2)}, "is invalid: it falls, and stays above 0"),
        ({"max_order": 5}, "max_order=5"),
    ):
        with pytest.raises(PolicyError, match=reason):
            measured.policy_by_loops(3, **settings_)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="leave gaps of more than 3 steps"):
        measured.policy_by_path(3)
    with pytest.raises(PolicyError, match="first_full_steps=1"):
        measured.policy_by_path(3, first_full_steps=1)


@pytest.mark.parametrize(
    "search", [pytest.param("path", marks=pytest.mark.slow), pytest.param("loops", marks=pytest.mark.exhaustive)]
)
def test_the_command_searches(search: str, tmp_path: Path) -> None:
    out = tmp_path / "calibrated.json"
    arguments = ["calibrate", "--steps", "8", "--full-steps", "5", "--search", search, "--iterations", "2"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert len(Calibrated.load(out).full_steps) == 5
