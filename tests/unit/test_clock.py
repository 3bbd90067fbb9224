"""Steps, passes and requests, told apart by the timesteps of the calls alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duca_compile.runtime.clock import CallPosition, StepClock, same_time
from duca_compile.runtime.request import MAX_PASSES

TOTALS = st.one_of(st.none(), st.integers(1, 50))


def apart(values: list[float]) -> bool:
    """Whether no two are one timestep but for the last bits."""
    values = sorted(values)
    return not any(same_time(one, other, values[-1]) for one, other in pairwise(values))


LOOPS = (
    st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=30, unique=True)
    .filter(apart)
    .flatmap(lambda values: st.sampled_from([sorted(values), sorted(values, reverse=True)]))
)


def positions(clock: StepClock, values: list[Any]) -> list[CallPosition]:
    """Without their timesteps, which are those that were given."""
    return [clock.locate(torch.tensor(value))._replace(timestep=None) for value in values]


def one_request(steps: int) -> list[CallPosition]:
    return [CallPosition(step, 0, step == 0) for step in range(steps)]


@given(loop=LOOPS, batch=st.integers(0, 3))
def test_any_monotone_sequence_counts_up(loop: list[float], batch: int) -> None:
    """Also where more steps come than were announced; a batch of 0 is a 0-dimensional timestep."""
    values = [[value] * batch if batch else value for value in loop]
    assert positions(StepClock(None), values) == one_request(len(loop))


@given(loop=LOOPS, more=st.integers(0, 3))
def test_a_known_number_of_steps_counts_the_same(loop: list[float], more: int) -> None:
    assert positions(StepClock(len(loop) + more), loop) == one_request(len(loop))


@given(loop=LOOPS, passes=st.integers(1, MAX_PASSES), total=TOTALS)
def test_a_repeated_timestep_is_a_further_pass(loop: list[float], passes: int, total: int | None) -> None:
    total = total if total is None or total > 1 else None
    got = positions(StepClock(total and len(loop)), [value for value in loop for _ in range(passes)])
    assert got == [CallPosition(s, p, s == p == 0) for s in range(len(loop)) for p in range(passes)]


@given(loop=LOOPS.filter(lambda loop: len(loop) >= 2), requests=st.integers(2, 4), known=st.booleans())
def test_the_same_loop_again_is_a_new_request_each_time(loop: list[float], requests: int, known: bool) -> None:
    assert positions(StepClock(len(loop) if known else None), loop * requests) == one_request(len(loop)) * requests


@given(loop=LOOPS.filter(lambda loop: len(loop) >= 3), data=st.data())
def test_a_jump_back_is_a_new_request_even_in_mid_loop(loop: list[float], data: st.DataObject) -> None:
    stop = data.draw(st.integers(2, len(loop) - 1))
    start = data.draw(st.integers(0, stop - 1))
    got = positions(StepClock(None), loop[: stop + 1] + loop[start:])
    assert got == one_request(stop + 1) + one_request(len(loop) - start)


@given(first=LOOPS.filter(lambda loop: len(loop) >= 2))
def test_a_request_may_run_the_other_way_than_the_one_before(first: list[float]) -> None:
    clock = StepClock(len(first))
    positions(clock, first)
    clock.reset()
    assert positions(clock, first[::-1]) == one_request(len(first))


def test_reset_starts_a_request_at_any_timestep() -> None:
    clock = StepClock(None)
    positions(clock, [9.0, 8.0, 7.0])
    clock.reset()
    assert positions(clock, [7.0, 6.0]) == one_request(2)


def test_single_step_requests() -> None:
    """With the number known each new timestep is a new request; unknown, they are taken for the steps of one."""
    assert positions(StepClock(1), [9.0, 5.0, 7.0]) == one_request(1) * 3
    assert positions(StepClock(None), [9.0, 5.0, 7.0]) == [*one_request(2), CallPosition(0, 0, True)]
    assert positions(StepClock(1), [9.0, 9.0]) == [CallPosition(0, 0, True), CallPosition(0, 1, False)], (
        "guidance in two passes"
    )


def test_timesteps_that_differ_by_sample() -> None:
    loop = [[9.0, 9.0], [8.0, 7.0], [8.0, 6.0], [7.0, 5.0]]
    doubled = [value for value in loop for _ in range(2)]
    assert positions(StepClock(None), loop * 2) == one_request(4) * 2
    assert [t.step for t in positions(StepClock(None), doubled)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16])
def test_any_number_type_is_a_timestep(dtype: torch.dtype) -> None:
    clock = StepClock(None)
    found = [clock.locate(torch.tensor([t, t], dtype=dtype)) for t in (30, 20, 10)]
    assert found == [each._replace(timestep=t) for each, t in zip(one_request(3), (30.0, 20.0, 10.0), strict=True)]


class OnDevice:
    """A timestep on an accelerator; ``value`` is None where it must not be read."""

    is_cpu, ndim = False, 0

    def __init__(self, place: int, version: int = 0, schedule: int = 0, value: float | None = None) -> None:
        self._place, self._writes, self._schedule, self._value = place, version, schedule, value

    def data_ptr(self) -> int:
        return self._place

    def untyped_storage(self) -> OnDevice:
        return OnDevice(self._schedule)

    def is_inference(self) -> bool:
        return self._writes < 0

    @property
    def _version(self) -> int:
        return self._writes

    def flatten(self) -> torch.Tensor:
        assert self._value is not None, "reading waits for the device"
        return torch.tensor([self._value])


def places(clock: StepClock, seen: list[OnDevice]) -> list[tuple[int, int]]:
    return [(t.step, t.pass_index) for t in map(clock.locate, seen)]  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [None, 3])
def test_on_an_accelerator_views_of_one_schedule_are_never_read(total: int | None) -> None:
    got = places(StepClock(total), [OnDevice(place) for place in (1, 1, 2, 2, 3, 3, 1, 1, 2)])
    assert got == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1), (1, 0)]


def test_on_an_accelerator_fresh_tensors_are_told_by_value() -> None:
    """Two passes at each step, each with a timestep computed anew: the memory says nothing."""
    values = [0.9, 0.9, 0.6, 0.6, 0.3, 0.3, 0.9, 0.9]
    seen = [OnDevice(10 + i, schedule=10 + i, value=value) for i, value in enumerate(values)]
    assert places(StepClock(3), seen) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]


def test_on_an_accelerator_another_schedule_is_compared_by_value() -> None:
    """A request is abandoned in the middle and the scheduler makes its timesteps anew."""
    first = [OnDevice(i, schedule=1, value=9.0 - i) for i in range(3)]
    second = [OnDevice(100 + i, schedule=2, value=9.0 - i) for i in range(3)]
    assert places(StepClock(8), first + second) == [(0, 0), (1, 0), (2, 0)] * 2


@pytest.mark.parametrize("total", [None, 4])
def test_on_an_accelerator_a_timestep_written_in_place_is_read_from_then_on(total: int | None) -> None:
    """The first value is lost, so the loop's direction is that of the next ones; the second loop is a new request."""
    values = [9.0, 9.0, 6.0, 6.0, 3.0, 1.0, 9.0, 6.0]
    seen = [
        OnDevice(1, version=i, value=None if i == 0 else v) for i, v in zip((0, 0, *range(1, 7)), values, strict=True)
    ]
    seen[3]._writes = 1
    got = places(StepClock(total), seen)
    assert got == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (0, 0), (1, 0)]


def test_inference_tensors_have_no_version_and_are_read() -> None:
    seen = [OnDevice(1, version=-1, value=value) for value in (3.0, 3.0, 2.0)]
    assert places(StepClock(3), seen) == [(0, 0), (0, 1), (1, 0)]
    with torch.inference_mode():
        assert positions(StepClock(None), [3.0, 2.0]) == one_request(2)
