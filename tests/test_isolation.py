"""Requests that run at once: in sessions, in threads, in pipelines that share a model."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import duca_compile
from duca_compile import FORA, DuCa, OptimizedModel, Policy, Session, Uncached
from tests import models
from tests.pipelines import make, patterns, run

STEPS = 6
Model = Callable[..., Tensor]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return models.build()


def step(model: Model, request: int, index: int) -> Tensor:
    """One step of a request: its number makes its latents, its prompt and its timesteps."""
    latent = models.example(seed=100 * request + index)["x"]
    text = models.example()["text"] * (request + 1)
    with torch.no_grad():
        return model(x=latent, timestep=torch.full((2,), 900.0 - 90 * index - 7 * request), text=text)


def loop(model: Model, request: int, steps: int = STEPS) -> list[Tensor]:
    return [step(model, request, index) for index in range(steps)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def close(left: list[Tensor], right: list[Tensor]) -> bool:
    """Up to rounding: torch.export turns oneDNN off in all threads while it traces."""
    return all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(left, right, strict=True))


def together(*work: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Runs each in a thread of its own, all starting at once."""
    barrier = threading.Barrier(len(work))

    def started(each: Callable[[], list[Tensor]]) -> list[Tensor]:
        barrier.wait()
        return each()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(started, work))


INTERVALS = st.integers(1, 5)
POLICIES = st.one_of(st.builds(DuCa, INTERVALS, fresh_ratio=st.just(0.3)), st.builds(FORA, INTERVALS))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=POLICIES, order=st.permutations([0] * STEPS + [1] * STEPS))
def test_any_interleaving_of_two_requests_equals_each_alone(
    source: nn.Module, optimized_by: Callable[[Policy], OptimizedModel], policy: Policy, order: list[int]
) -> None:
    optimized = optimized_by(policy)
    alone = [loop(optimized.session(), request) for request in (0, 1)]
    sessions = [optimized.session(), optimized.session()]
    found: list[list[Tensor]] = [[], []]
    for request in order:
        found[request].append(step(sessions[request], request, len(found[request])))
    assert same(found[0], alone[0])
    assert same(found[1], alone[1])
    assert [e.step for e in sessions[0].history] == list(range(STEPS))


@pytest.fixture(scope="module")
def optimized_by(source: nn.Module) -> Callable[[Policy], OptimizedModel]:
    """One optimized model for each policy, captured once."""
    known: dict[str, OptimizedModel] = {}

    def get(policy: Policy) -> OptimizedModel:
        if repr(policy) not in known:
            known[repr(policy)] = duca_compile.optimize(source, policy, "eager")
        return known[repr(policy)]

    return get


@pytest.mark.parametrize("policy", [DuCa(4, fresh_ratio=0.3), FORA(3)], ids=lambda policy: policy.name)
def test_threads_share_a_model_without_sessions(source: nn.Module, policy: Policy) -> None:
    """Capture, too, happens in both at once."""
    alone = [loop(duca_compile.optimize(source, policy, "eager"), request) for request in (0, 1)]
    optimized = duca_compile.optimize(source, policy, "eager")
    for _ in range(3):
        found = together(*(lambda request=request: loop(optimized, request) for request in (0, 1)))
        assert same(found[0], alone[0])
        assert same(found[1], alone[1])
    assert len(optimized._compiled) == 1
    assert optimized.history == ()
    assert optimized.cache_bytes == 0


def test_threads_with_sessions(source: nn.Module) -> None:
    optimized = duca_compile.optimize(source, DuCa(4, fresh_ratio=0.3), "eager")
    alone = [loop(optimized.session(), request) for request in (0, 1)]
    sessions = [optimized.session(), optimized.session()]

    def inside(request: int) -> list[Tensor]:
        with sessions[request]:
            return loop(optimized, request)

    work = (lambda: loop(sessions[0], 0), lambda: loop(sessions[1], 1), lambda: inside(0), lambda: inside(1))
    for pair in (work[:2], work[2:]):
        found = together(*pair)
        assert same(found[0], alone[0])
        assert same(found[1], alone[1])


def test_a_thread_captures_while_another_runs(source: nn.Module) -> None:
    """Other shapes for one, compiled steps for the other."""
    optimized = duca_compile.optimize(source, FORA(3), "eager")
    alone = loop(optimized, 0)
    stop = threading.Event()

    def running() -> list[Tensor]:
        while not stop.is_set():
            assert close(loop(optimized, 0), alone)
        return []

    def capturing() -> list[Tensor]:
        try:
            for batch in (1, 3, 4, 5, 6):
                with torch.no_grad():
                    optimized(**{n: t[:1].repeat_interleave(batch, 0) for n, t in models.example().items()})
        finally:
            stop.set()
        return []

    together(running, capturing)
    assert len(optimized._compiled) == 4
    assert same(loop(optimized, 0), alone)


def test_a_thread_captures_and_compiles_while_another_runs_compiled_code(source: nn.Module) -> None:
    other = models.build(depth=1)
    optimized = duca_compile.optimize(source, FORA(2), "inductor", strict=True)
    alone = loop(optimized, 0, 3)
    stop = threading.Event()

    def running() -> list[Tensor]:
        while not stop.is_set():
            optimized.reset()
            assert close(loop(optimized, 0, 3), alone)
            time.sleep(0.002)  # leaves the other something of the interpreter
        return []

    def compiling() -> list[Tensor]:
        try:
            return loop(duca_compile.optimize(other, Uncached(), "inductor", strict=True), 0, 1)
        finally:
            stop.set()

    with inductor_config.patch(force_disable_caches=True):  # what is found in a cache is not traced
        found = together(running, compiling)[1]
    assert close(found, loop(other, 0, 1))


def test_tasks_with_sessions_take_turns_in_one_thread(source: nn.Module) -> None:
    optimized = duca_compile.optimize(source, DuCa(3), "eager")
    alone = [loop(optimized.session(), request) for request in (0, 1)]

    async def serve(request: int) -> list[Tensor]:
        found = []
        with optimized.session():
            for index in range(STEPS):
                found.append(step(optimized, request, index))
                await asyncio.sleep(0)
        return found

    async def both() -> list[list[Tensor]]:
        return await asyncio.gather(serve(0), serve(1))

    found = asyncio.run(both())
    assert same(found[0], alone[0])
    assert same(found[1], alone[1])


def test_a_session_holds_its_own_state_and_drops_it(source: nn.Module) -> None:
    optimized: OptimizedModel = duca_compile.optimize(source, DuCa(4), "eager")
    loop(optimized, 0, 2)
    outer, held = optimized.history, optimized.cache_bytes
    with optimized.session() as session:
        assert isinstance(session, Session)
        assert (optimized.history, optimized.cache_bytes) == ((), 0)
        loop(optimized, 1, 3)
        assert optimized.history == session.history
        assert [e.step for e in session.history] == [0, 1, 2]
        assert session.cache_bytes == optimized.cache_bytes == held > 0
        with optimized.session() as inner:
            loop(optimized, 2, 1)
            assert (len(inner.history), len(session.history)) == (1, 3)
        assert inner.cache_bytes == 0
        optimized.reset()
        assert session.cache_bytes == 0
        loop(session, 1, 1)
        assert session.cache_bytes == held
    assert session.cache_bytes == 0
    assert (optimized.history, optimized.cache_bytes) == (outer, held)
    step(optimized, 0, 2)
    assert [e.step for e in optimized.history] == [0, 1, 2]


def test_a_session_entered_twice_keeps_its_caches_until_it_is_left_twice(source: nn.Module) -> None:
    optimized = duca_compile.optimize(source, FORA(3), "eager")
    with optimized.session() as session:
        loop(optimized, 0, 2)
        with session:
            step(optimized, 0, 2)
        assert session.cache_bytes > 0
        step(optimized, 0, 3)
        assert "".join(e.kind.value[0] for e in session.history) == "frrf"
    assert session.cache_bytes == 0


def test_a_session_of_one_model_is_none_of_anothers(source: nn.Module) -> None:
    left, right = (duca_compile.optimize(source, FORA(3), "eager") for _ in range(2))
    with left.session() as session:
        loop(right, 0, 2)
        assert session.history == ()
    assert len(right.history) == 2


def test_a_failed_call_leaves_its_session(source: nn.Module) -> None:
    optimized = duca_compile.optimize(source, FORA(3), "eager")
    session = optimized.session()
    with pytest.raises(duca_compile.UsageError, match="does not fit"):
        session(wrong=1)
    loop(optimized, 0, 1)
    assert (len(optimized.history), session.history) == (1, ())


def test_caches_go_with_the_captured_shape_the_thread_and_the_session(source: nn.Module) -> None:
    optimized: OptimizedModel = duca_compile.optimize(source, FORA(9), "eager")
    loop(optimized, 0, 1)
    session = optimized.session()
    loop(session, 0, 1)
    alive = weakref.WeakSet[Tensor]()
    alive.update(t for s in _states(optimized) + _states(session) for t in s.caches.values())
    assert len(alive) > 2
    given = models.example(timestep=500.0)
    for batch in (1, 3, 4, 5):  # the fifth shape drops the first
        with torch.no_grad(), optimized.session() as other:
            other(**{name: tensor[:1].repeat_interleave(batch, 0) for name, tensor in given.items()})
    assert session.cache_bytes == optimized.cache_bytes == 0
    assert len(alive) == 0

    def in_a_thread() -> list[Tensor]:
        loop(optimized, 0, 1)
        alive.update(t for s in _states(optimized) for t in s.caches.values())
        assert len(alive) > 1
        return []

    together(in_a_thread)
    gc.collect()  # the thread's own remains
    assert len(alive) == 0


def _states(owner: Any) -> list[Any]:
    request = owner.request if isinstance(owner, Session) else owner._requests.current()
    return [state for states in request._states.values() for state in states.values()]


@pytest.mark.parametrize("policy", [Uncached(), DuCa(1), FORA(1)], ids=lambda policy: policy.name)
def test_interval_one_equals_uncached_and_restored_equals_the_original(source: nn.Module, policy: Policy) -> None:
    keys = list(source.state_dict())
    expected = loop(source, 0)
    optimized = duca_compile.optimize(source, policy, "eager")
    assert same(loop(optimized, 0), expected)
    with optimized.session():
        assert same(loop(optimized, 0), expected)
    assert list(optimized.state_dict()) == list(source.state_dict()) == keys
    restored = duca_compile.restore(optimized)
    assert restored is source
    assert same(loop(restored, 0), expected)


def test_request_b_after_a_equals_b_alone(source: nn.Module) -> None:
    policy = DuCa(4, fresh_ratio=0.3)
    alone = loop(duca_compile.optimize(source, policy, "eager"), 1)
    optimized = duca_compile.optimize(source, policy, "eager")
    loop(optimized, 0)
    assert same(loop(optimized, 1), alone)
    loop(optimized, 0, 2)
    optimized.reset()
    assert same(loop(optimized, 1), alone)


def test_pipelines_of_two_threads_share_one_model() -> None:
    """Each has a scheduler of its own, and so a place of its own in the loop."""
    pipes = [make("SD3") for _ in range(2)]
    transformer = pipes[0].transformer
    for pipe in pipes:
        pipe.transformer = transformer
    expected = [run(duca_compile.optimize(pipe, DuCa(3), "eager"), "SD3", seed=i) for i, pipe in enumerate(pipes)]
    shared = duca_compile.optimize(transformer, DuCa(3), "eager")
    for pipe in pipes:
        pipe.transformer = shared
    for _ in range(2):
        found = together(*(lambda i=i, pipe=pipe: [run(pipe, "SD3", seed=i)] for i, pipe in enumerate(pipes)))
        assert torch.equal(found[0][0], expected[0])
        assert torch.equal(found[1][0], expected[1])
    with shared.session() as session:
        assert torch.equal(run(pipes[1], "SD3", seed=1), expected[1])
        assert patterns(session) == {(None, 0): "fpsfpsfp"}  # type: ignore[arg-type]


class Contextual(models.DiT):
    """Has a ``cache_context`` of its own, as models of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[Any] = []
        self.inside: str | None = None

    @contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        self.entered.append((name, options))
        self.inside = name
        yield
        self.inside = None

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if self.inside is None:
            raise RuntimeError("no cache context")
        return super().forward(x, timestep, text)


def test_the_sources_own_cache_context_is_entered_when_the_source_runs() -> None:
    optimized = duca_compile.optimize(Contextual().eval(), FORA(3), "eager")
    other = duca_compile.optimize(models.build(), FORA(3), "eager")
    with optimized.cache_context("cond", sigma=0.5):
        assert optimized.source.entered == []
        loop(optimized, 0, 2)
        loop(other, 0, 1)
    assert optimized.source.entered == [("cond", {"sigma": 0.5})]
    assert {e.pass_name for e in optimized.history} == {"cond"}
    assert {e.pass_name for e in other.history} == {None}
