"""Which steps SpeCa and residual gates choose for given measurements."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duca_compile.core.tensors import Array
from duca_compile.errors import PolicyError
from duca_compile.policies import RFC, AdaptivePolicy, ResidualGate, SpeCa, Step, StepKind, published
from duca_compile.runtime.adaptive import Decisions, merged
from duca_compile.runtime.arrays import Arrays, NumpyArrays
from duca_compile.runtime.torch.arrays import TorchArrays

Measure = Callable[[int], float | None]


def run(policy: AdaptivePolicy, total: int, measure: Measure, start: int = 0) -> str:
    """One letter for each step from ``start`` on; a small one for a step whose draft is verified and used."""
    decider, letters = policy.decider(total), []
    for index in range(start, total):
        proposed = decider.propose(index)
        step = decider.decide(index, proposed, measure(index))
        letters.append(step.kind.letter.lower() if step.verified else step.kind.letter)
    return "".join(letters)


def always(value: float | None) -> Measure:
    return lambda _: value


class TestSpeCa:
    def test_a_bad_draft_is_computed_in_its_own_step(self) -> None:
        policy = SpeCa(base_threshold=1.0, decay_rate=1.0, first_full_steps=2, max_taylor_steps=9)
        assert run(policy, 10, lambda i: 2.0 if i in (4, 7) else 0.5) == "FFttFttFtt"
        assert run(policy, 6, always(2.0)) == "FFFFFF"
        assert run(policy, 6, always(nan)) == "FFFFFF", "an error that is no number is no small one"
        assert run(policy, 6, always(1.0)) == "FFtttt", "as large as the threshold is accepted"

    def test_drafts_end_after_so_many_and_the_first_ones_may_be_unseen(self) -> None:
        policy = SpeCa(base_threshold=1.0, decay_rate=1.0, first_full_steps=1, max_taylor_steps=3, min_taylor_steps=1)
        assert run(policy, 9, always(0.0)) == "FTttFTttF"
        assert run(policy, 9, always(9.0)) == "FTFTFTFTF"

    def test_the_threshold_falls_over_the_loop_to_its_floor(self) -> None:
        policy = SpeCa(base_threshold=1.0, decay_rate=0.01, min_threshold=0.1)
        assert [policy.threshold(i, 4) for i in range(4)] == pytest.approx([0.01**0.25, 0.1, 0.1, 0.1], rel=1e-12)
        assert policy.threshold(99, 4) == 0.1
        early = SpeCa(base_threshold=1.0, decay_rate=0.01, first_full_steps=1, max_taylor_steps=99)
        assert run(early, 10, always(0.1)) == "Ftttt" + "F" * 5, "10 ** -(2 p) is 0.1 at p = 0.5"

    def test_a_pass_that_joins_late_warms_up_too(self) -> None:
        policy = SpeCa(base_threshold=1.0, decay_rate=1.0, first_full_steps=3)
        assert run(policy, 12, always(0.0), start=6) == "FFFttt"

    def test_its_cheapest_steps_are_those_without_a_rejection(self) -> None:
        policy = SpeCa(decay_rate=1.0, first_full_steps=2, max_taylor_steps=3)
        kinds = [step.kind.letter for step in islice(policy.steps(None), 10)]
        assert "".join(kinds) == "FFTTTFTTTF"

    @pytest.mark.parametrize("compat", ["paper", "released"])
    def test_a_falling_threshold_needs_the_number_of_steps(self, compat: str) -> None:
        policy = SpeCa(base_threshold=0.5, compat=compat)  # type: ignore[arg-type]
        with pytest.raises(PolicyError, match="num_inference_steps"):
            next(policy.steps(None))


class TestSpeCaAsReleased:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # Always bad: two unseen drafts, a verified one that is used, and then a full step.
            ({"first_full_steps": 1}, "FTTtFTTtFTTt"),
            # The step behind a full one is a draft even among the first three.
            ({"first_full_steps": 3}, "FTFTTtFTTtFT"),
            ({"first_full_steps": 1, "min_taylor_steps": 4, "max_taylor_steps": 12}, "FTTTTtFTTTTt"),
            ({"first_full_steps": 1, "max_taylor_steps": 2}, "FTTFTTFTTFTT"),
        ],
    )
    def test_an_error_decides_the_next_step(self, settings: dict[str, int], expected: str) -> None:
        policy = published("speca", "dit", **settings)
        assert isinstance(policy, SpeCa)
        assert run(policy, 12, always(inf)) == expected

    def test_good_drafts_end_after_so_many(self) -> None:
        policy = published("speca", "dit", first_full_steps=1)
        assert isinstance(policy, SpeCa)
        assert run(policy, 13, always(0.0)) == "FTTtttFTTtttF"

    def test_an_error_is_held_to_the_threshold_of_the_step_that_it_decides(self) -> None:
        """0.02 is accepted while 0.1 * 0.01 ** ((i + 1) / 50) is above, which is up to i = 16."""
        policy = published("speca", "dit", first_full_steps=1, max_taylor_steps=99, min_threshold=0.0)
        assert isinstance(policy, SpeCa)
        assert run(policy, 50, always(0.02)).index("F", 1) == 17

    def test_numbers_of_the_families(self) -> None:
        found = {family: published("speca", family) for family in ("dit", "flux", "hunyuanvideo")}
        numbers = {
            family: (
                p.base_threshold,
                p.decay_rate,
                p.min_taylor_steps,
                p.max_taylor_steps,
                p.max_order,
                p.first_full_steps,
                p.min_threshold,
            )
            for family, p in found.items()
            if isinstance(p, SpeCa)
        }
        assert numbers == {
            "dit": (0.1, 0.01, 2, 5, 4, 3, 0.01),
            "flux": (7.0, 0.3, 2, 8, 2, 3, 0.1),
            "hunyuanvideo": (1.0, 0.1, 4, 12, 1, 1, 0.1),
        }


class TestGate:
    def test_changes_add_up_until_a_step_is_full(self) -> None:
        policy = ResidualGate(threshold=0.5, last_full=False)
        assert run(policy, 9, always(0.2)) == "FSSFSSFSS"
        assert run(policy, 5, always(0.6)) == "FFFFF"
        assert run(policy, 5, always(nan)) == "FFFFF"

    def test_or_each_counts_by_itself(self) -> None:
        policy = ResidualGate(threshold=0.5, accumulate=False, last_full=False)
        assert run(policy, 6, lambda i: [0.0, 0.2, 0.4, 0.5, 0.4, 0.6][i]) == "FSSFSF"

    def test_a_threshold_of_none_is_all_full(self) -> None:
        assert run(ResidualGate(threshold=0.0), 6, always(0.0)) == "FFFFFF"

    def test_the_last_step_is_full_and_cheap_ones_are_limited(self) -> None:
        assert run(ResidualGate(threshold=1.0), 6, always(0.0)) == "FSSSSF"
        assert run(ResidualGate(threshold=1.0, max_cached_steps=2), 6, always(0.0)) == "FSSFSF"
        assert run(ResidualGate(threshold=1.0, last_full=False), 6, always(0.0)) == "FSSSSS"

    @pytest.mark.parametrize(("cached", "letter"), [("change", "S"), ("branches", "R"), ("forecast", "T")])
    def test_a_cheap_step_is_of_the_chosen_kind(self, cached: str, letter: str) -> None:
        assert run(ResidualGate(cached=cached), 4, always(0.0)) == f"F{letter}{letter}F"  # type: ignore[arg-type]

    @given(change=st.floats(0, 2), coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=5))
    def test_a_change_goes_through_its_polynomial(self, change: float, coefficients: list[float]) -> None:
        expected = sum(c * change**power for power, c in enumerate(reversed(coefficients)))
        found = ResidualGate(coefficients=tuple(coefficients)).rescaled(change)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def test_without_one_it_stays(self) -> None:
        assert ResidualGate().rescaled(0.3) == 0.3


class TestDecisions:
    """Of four rows, whose errors differ."""

    ERRORS = (0.1, 0.9, 0.1, 0.2)

    def kinds(self, decide_per: str, errors: tuple[float, ...] = ERRORS) -> str:
        policy = SpeCa(base_threshold=0.5, decay_rate=1.0, first_full_steps=1, decide_per=decide_per)  # type: ignore[arg-type]
        decisions = Decisions(policy, 10, 4)
        assert [step.kind for step in decisions.propose(0)] == [StepKind.FULL] * 4
        decisions.decide(0, decisions.propose(0), ())
        proposed = decisions.propose(1)
        return "".join(step.kind.letter for step in decisions.decide(1, proposed, errors))

    def test_the_strictest_row_decides_for_the_batch(self) -> None:
        assert self.kinds("batch") == "FFFF"
        assert self.kinds("batch", (0.1, 0.2, 0.3, 0.4)) == "TTTT"
        assert self.kinds("batch", (0.1, nan, 0.3, 0.4)) == "FFFF"

    def test_each_row_decides_for_itself(self) -> None:
        assert self.kinds("row") == "TFTT"

    def test_both_halves_of_guidance_decide_together(self) -> None:
        assert self.kinds("pair") == "TFTF", "rows 1 and 3"


ARRAYS: list[tuple[Arrays, Callable[..., Array]]] = [
    (TorchArrays(torch.device("cpu")), torch.tensor),
    (NumpyArrays(), np.array),
]


@pytest.mark.parametrize(("arrays", "array"), ARRAYS, ids=["torch", "numpy"])
def test_rows_are_merged(arrays: Arrays, array: Callable[..., Array]) -> None:
    full, cheap = array([[1.0, 2.0], [3.0, 4.0]]), array([[5.0, 6.0], [7.0, 8.0]])
    (found,) = merged(arrays, [False, True], [full], [cheap])
    assert found.tolist() == [[5.0, 6.0], [3.0, 4.0]]
    assert type(found) is type(full)


@pytest.mark.parametrize(("arrays", "array"), ARRAYS, ids=["torch", "numpy"])
@pytest.mark.parametrize(("value", "shape"), [([[0.0, 0.0]] * 3, r"\(3, 2\)"), (0.0, r"\(\)")])
def test_results_without_rows_cannot_be_merged(
    arrays: Arrays, array: Callable[..., Array], value: object, shape: str
) -> None:
    with pytest.raises(PolicyError, match=rf"there is one of shape {shape}; use decide_per='batch'"):
        merged(arrays, [True, False], [array(value)], [array(value)])


CHOOSING: list[AdaptivePolicy] = [
    SpeCa(decay_rate=1.0),
    SpeCa(decay_rate=1.0, min_taylor_steps=2),
    SpeCa(decay_rate=1.0, min_taylor_steps=3, max_taylor_steps=3),
    SpeCa(decay_rate=1.0, compat="released"),
    SpeCa(decay_rate=1.0, compat="released", max_taylor_steps=1),
    RFC(),
    ResidualGate(max_cached_steps=4),
    ResidualGate(cached="branches"),
    ResidualGate(cached="forecast"),
]


@pytest.mark.parametrize("policy", CHOOSING, ids=repr)
@pytest.mark.parametrize("start", [0, 3])
def test_the_choices_are_all_that_is_proposed_or_chosen(policy: AdaptivePolicy, start: int) -> None:
    """Whatever is measured: here thousands of random values, small ones and large ones."""
    random, found = np.random.default_rng(0), set()
    for _ in range(50):
        decider = policy.decider(20)
        for index in range(start, 20):
            proposed = decider.propose(index)
            value = None if proposed.kind is StepKind.FULL else 10.0 ** random.uniform(-4, 1)
            found |= {proposed, decider.decide(index, proposed, value)}
    assert found == {*policy.choices}
    assert len(found) == len(policy.choices)
    assert policy.choices[0] == Step(StepKind.FULL)
