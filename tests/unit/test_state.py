"""What a pass carries from step to step: inputs that are gathered once are those of now, and plans are the policy's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duca_compile import DuCa, Policy, TaylorSeer, Uncached
from duca_compile.core.ports import Port, PortKind, argument, hoisted
from duca_compile.core.steps import Step, StepKind
from duca_compile.core.tensors import TensorVersions
from duca_compile.runtime.cache_state import CacheState
from duca_compile.runtime.loops import PlannedSteps


@dataclass(eq=False)
class Program:
    inputs: tuple[Port, ...]
    caches: frozenset[Port]

    @property
    def reads(self) -> frozenset[Port]:
        return self.caches


CACHES = A, B, C = tuple(Port(PortKind.BRANCH, index) for index in range(3))
HOISTED = (hoisted("a"), hoisted("b"))
GIVEN = ("latent", "cache_branch_0")  # the second argument has the name of a cache
LATENT, OTHER = ARGUMENTS = tuple(map(argument, GIVEN))
PROGRAMS = [
    Program(ports, frozenset(ports) & {*CACHES})
    for ports in (ARGUMENTS, (*CACHES, *ARGUMENTS), (LATENT, B, HOISTED[0]), (*HOISTED, C, LATENT))
]
CHANGES = st.one_of(
    st.tuples(st.just("store"), st.sets(st.sampled_from(CACHES), min_size=1)),
    st.tuples(st.just("drop"), st.sets(st.sampled_from(CACHES))),
    st.tuples(st.just("hoist"), st.just(set[Port]())),
    st.tuples(st.just("run"), st.just(set[Port]())),
)


@given(st.lists(CHANGES, max_size=30))
def test_inputs_that_are_gathered_once_are_those_of_now(changes: list[tuple[str, set[Port]]]) -> None:
    state, number = CacheState(), 0

    def values(keys: Any) -> dict[Any, int]:
        nonlocal number
        number += 1
        return {key: 1000 * number + place for place, key in enumerate(sorted(keys, key=str))}

    state.hoist(values(HOISTED), TensorVersions.of([]))
    for change, ports in changes:
        if change == "store":
            state.store(values(ports))
        elif change == "drop":
            state.drop(ports)
        elif change == "hoist":
            state.hoist(values(HOISTED), TensorVersions.of([]))
        call = values(GIVEN)
        for program in PROGRAMS:
            whole = program.caches <= state.caches.keys()
            assert state.gather(program).complete == whole
            if whole:
                now = {**call, **state.hoisted, **state.caches}
                assert state.inputs(program, call) == [now[port.key] for port in program.inputs]


def test_caches_that_were_written_in_place_are_not_gathered_again() -> None:
    state, one, other = CacheState(), object(), object()
    state.store(dict.fromkeys(CACHES, one))
    values = dict.fromkeys(GIVEN, one)
    state.inputs(PROGRAMS[1], values)
    gathered = state.gathered[PROGRAMS[1]]
    state.store({A: one})
    state.inputs(PROGRAMS[1], values)
    assert state.gathered[PROGRAMS[1]] is gathered
    state.store({A: one, B: other})
    assert state.inputs(PROGRAMS[1], values)[:3] == [one, other, one]


def test_what_is_dropped_is_not_held_for_a_program() -> None:
    state = CacheState()
    state.store({A: object(), B: object(), C: object()})
    for program in PROGRAMS[:2]:
        state.inputs(program, dict.fromkeys(GIVEN))
    state.drop([B])
    assert [*state.gathered] == [PROGRAMS[0]]


@pytest.mark.parametrize("policy", [Uncached(), DuCa(interval=4), TaylorSeer(3, 1, lite=True)], ids=repr)
@pytest.mark.parametrize("total", [None, 1, 9])
def test_planned_steps_are_the_policys(policy: Policy, total: int | None) -> None:
    expected = [*islice(policy.planned(total), 12)]
    steps = PlannedSteps(lambda: policy.planned(total))
    order = [5, 0, 11, *range(12)]
    assert [steps.at(index) for index in order] == [expected[i] if i < len(expected) else None for i in order]
    assert len({id(steps.at(index)) for index in range(12)}) == len({*expected}) + (total is not None and total < 12)


def test_a_policy_that_cannot_be_planned_says_so_at_once() -> None:
    def broken() -> Any:
        raise ValueError("no steps")
        yield Step(StepKind.FULL)

    with pytest.raises(ValueError, match="no steps"):
        PlannedSteps(broken)


def test_an_error_of_a_later_step_is_raised_each_time_that_it_is_asked_for() -> None:
    def broken() -> Any:
        yield from [Step(StepKind.FULL)] * 3
        raise ValueError("no fourth step")

    steps = PlannedSteps(broken)
    for _ in range(2):
        assert steps.at(2) == Step(StepKind.FULL)
        with pytest.raises(ValueError, match="no fourth step"):
            steps.at(3)


def test_a_sight_holds_of_the_same_objects_until_one_is_written_to() -> None:
    one, other = torch.zeros(2), torch.zeros(2)
    seen = TensorVersions.of([one, other])
    assert seen.matches([one, other])
    assert not seen.matches([one])
    assert not seen.matches([other, one])
    assert not seen.matches([one, other.clone()])
    other.add_(1)
    assert not seen.matches([one, other])


def test_inference_tensors_do_not_tell_that_they_were_written_to_and_are_compared_by_value() -> None:
    with torch.inference_mode():
        one = torch.zeros(2)
        seen = TensorVersions.of([one])
        assert seen.matches([one])
        assert seen.matches([one.clone()])
        one.add_(1)
        assert not seen.matches([one])


def test_arrays_are_compared_by_value() -> None:
    array = torch.zeros(2).numpy()
    seen = TensorVersions.of([array])  # type: ignore[list-item]
    assert seen.matches([array])  # type: ignore[list-item]
    assert seen.matches([array.copy()])  # type: ignore[list-item]
    array[0] = 1
    assert not seen.matches([array])  # type: ignore[list-item]
