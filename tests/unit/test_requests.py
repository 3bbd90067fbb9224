"""Which request and pass a call belongs to, where timesteps alone do not say.

Loops are told what they truly are: each call has a lineage, the pass and the latent that it goes on with. What a pass
carries from step to step must never be another lineage's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duca_compile import FORA
from duca_compile.core.steps import StepKind
from duca_compile.runtime.cache_state import CacheState
from duca_compile.runtime.clock import CallPosition
from duca_compile.runtime.request import MAX_PASSES, Executed, Request

LINEAGES = dict[int, tuple[object, int]]


class Names:
    latent, timestep = "x", "t"
    changing = (latent, timestep)


class Owner:
    """A captured shape."""


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


PROMPTS = {name: noise(900 + i, 1, 7, 8) for i, name in enumerate("ABCDEFGHIJKLMN")}


@dataclass
class Runs:
    """A request, and what became of its calls."""

    total: int | None = None
    request: Request = field(init=False)
    owner: Owner = field(default_factory=Owner)
    positions: list[CallPosition] = field(default_factory=list)
    reused: int = 0  # calls that could use what the call of the step before left
    _known: LINEAGES = field(default_factory=dict)
    _kept: list[CacheState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.request = Request(FORA(3), self.total)

    def call(
        self,
        lineage: object,
        latent: Tensor,
        timestep: Tensor | float,
        name: str | None = None,
        step: int | None = None,
        **others: Tensor,
    ) -> CallPosition:
        time = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep])
        position = self.request.locate(Names, {"x": latent, "t": time, **others}, name, step)
        state = self.request.state(self.owner, (name, position.pass_index))
        self._kept.append(state)
        before = self._known.get(id(state))
        if before is not None and position.step - before[1] <= 1:
            assert before[0] == lineage, f"at step {position.step} a pass of {lineage} has what {before[0]} left"
            self.reused += 1
        self._known[id(state)] = lineage, position.step
        self.request.history.append(Executed(position.step, position.pass_index, StepKind.FULL, 0.0, 0.0, name))
        self.positions.append(position)
        return position

    @property
    def history(self) -> list[tuple[int, int, str | None]]:
        return [(each.step, each.pass_index, each.pass_name) for each in self.request.history]

    @property
    def states(self) -> int:
        return len(self.request._states.get(self.owner, {}))


Passes = tuple[tuple[str | None, str], ...]  # names and prompts


def loop(
    runs: Runs,
    passes: Passes,
    steps: int = 4,
    seed: int = 1,
    first: float = 1000.0,
    order: Callable[[int], list[int]] | None = None,
    fresh: bool = False,
    told: bool = False,
) -> list[tuple[int, int, str | None]]:
    """A loop with guidance; ``order`` is that of the passes at a step, ``fresh`` makes all arguments anew each time.

    With ``told``, each call says its step.
    """
    latent, key = noise(seed), object()
    for step in range(steps):
        for i in order(step) if order else range(len(passes)):
            name, prompt = passes[i]
            text = PROMPTS[prompt].clone() if fresh else PROMPTS[prompt]
            given = latent.clone() if fresh else latent
            time = first * (1 - step / steps)
            runs.call((key, name, prompt), given, time, name, step if told else None, text=text)
        latent = latent + 0.3 * noise(50 + step)
    return runs.history


ONE: Passes = ((None, "B"),)
TWO: Passes = ((None, "B"), (None, "N"))
NAMED: Passes = (("cond", "B"), ("uncond", "N"))


def as_prompt(passes: Passes, prompt: str, negative: str = "N") -> Passes:
    return tuple((name, prompt if each == "B" else negative) for name, each in passes)


@pytest.mark.parametrize("told", [False, True])
def test_named_passes_that_change_their_order_behind_a_request_of_one_step(told: bool) -> None:
    """None of them is given what the pass of its name left in the request before, on the same noise."""
    runs = Runs()
    loop(runs, as_prompt(NAMED, "A", "M"), steps=1, told=told)
    loop(runs, NAMED, order=lambda step: [0, 1] if step % 2 else [1, 0], told=told)


@pytest.mark.parametrize("passes", [ONE, TWO, NAMED], ids=["one", "two", "named"])
@pytest.mark.parametrize("before", [1, 2, 5, 11])
@pytest.mark.parametrize("negative", ["N", "M"])
@pytest.mark.parametrize("fresh", [False, True])
def test_one_step_requests_and_then_a_loop_on_the_same_noise(
    passes: Passes, before: int, negative: str, fresh: bool
) -> None:
    """Other prompts, with the same negative one or another, are other requests: the loop is as it is alone."""
    alone = Runs()
    expected = loop(alone, passes, fresh=fresh)
    runs = Runs()
    for i in range(before):
        loop(runs, as_prompt(passes, "ACDEFGHIJKL"[i], negative), steps=1, fresh=fresh)
    assert runs.states <= MAX_PASSES * len(passes)
    taken = runs.reused
    assert loop(runs, passes, fresh=fresh) == expected
    assert runs.states == alone.states
    assert runs.reused - taken >= alone.reused, "nothing that it left was lost"


def test_a_trial_call_without_a_name_and_then_a_loop_with_names() -> None:
    for passes in (NAMED, NAMED[::-1]):
        alone, runs = Runs(), Runs()
        loop(runs, as_prompt(ONE, "A"), steps=1, seed=3)
        assert loop(runs, passes) == loop(alone, passes)
        assert runs.states == alone.states


REQUESTS = st.tuples(
    st.sampled_from([ONE, TWO, NAMED]),
    st.sampled_from("AB"),  # prompts
    st.sampled_from("NL"),  # negative ones
    st.sampled_from([1, 2]),  # seeds
    st.sampled_from([1, 1, 2, 4]),  # steps
    st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6), total=st.sampled_from([None, 4]))
def test_requests_in_a_row_share_nothing(requests: list[Any], total: int | None) -> None:
    """Of any number of steps and passes, with the noise and the prompts of those before or with others."""
    runs = Runs(total)
    for passes, prompt, negative, seed, steps, fresh in requests:
        loop(runs, as_prompt(passes, prompt, negative), steps=steps, seed=seed, fresh=fresh)


@pytest.mark.parametrize("other", [{"seed": 2}, {"first": 900.0}], ids=["noise", "timestep"])
def test_a_one_step_request_and_then_a_loop_of_another_kind(other: dict[str, Any]) -> None:
    alone, runs = Runs(), Runs()
    loop(runs, as_prompt(ONE, "A"), steps=1)
    assert loop(runs, ONE, **other) == loop(alone, ONE, **other)


def test_the_same_prompt_twice_with_other_noise() -> None:
    alone, runs = Runs(), Runs()
    for seed in (3, 4, 3):
        loop(runs, TWO, steps=1, seed=seed)
    assert loop(runs, TWO) == loop(alone, TWO)


@settings(max_examples=50, deadline=None)
@given(swaps=st.lists(st.booleans(), min_size=6, max_size=6), fresh=st.booleans())
def test_unnamed_passes_may_change_their_order(swaps: list[bool], fresh: bool) -> None:
    runs = Runs()
    loop(runs, TWO, steps=6, order=lambda step: [1, 0] if swaps[step] else [0, 1], fresh=fresh)
    assert runs.reused == 10, "each pass but the first two goes on with what it left"
    assert {(step, index) for step, index, _ in runs.history} == {(s, p) for s in range(6) for p in range(2)}
    assert not any(position.new_request for position in runs.positions[1:])


@settings(max_examples=60, deadline=None)
@given(
    present=st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=3, max_size=8),
    seed=st.integers(0, 5),
    fresh=st.booleans(),
)
def test_passes_may_come_and_go_in_any_order(present: list[set[int]], seed: int, fresh: bool) -> None:
    """Unnamed ones of other prompts; that none is given another's caches is what is asserted."""
    draw = random.Random(seed)
    passes: Passes = ((None, "A"), (None, "B"), (None, "N"))
    loop(
        Runs(),
        passes,
        len(present),
        order=lambda step: draw.sample(sorted(present[step]), len(present[step])),
        fresh=fresh,
    )


def tiles(
    runs: Runs,
    count: int,
    steps: int,
    *,
    named: bool = False,
    guided: bool = False,
    order: Any = None,
    start: float = 1000,
) -> int:
    """Windows that are denoised by calls of their own. Returns the number of calls."""
    latents, calls = [noise(200 + i) for i in range(count)], 0
    for step in range(steps):
        for i in order(step) if order else range(count):
            for prompt in "BN" if guided else "B":
                name = f"tile {i}" if named else None
                runs.call((i, prompt), latents[i], start * (1 - step / steps), name, text=PROMPTS[prompt])
                calls += 1
            latents[i] = 0.9 * latents[i] + 0.1 * noise(300 + step)
    return calls


@pytest.mark.parametrize("count", [2, 4, 8, 9, 30])
@pytest.mark.parametrize("guided", [False, True])
def test_unnamed_tiles_have_their_own_caches_from_the_second_step_on(
    count: int, guided: bool, caplog: pytest.LogCaptureFixture
) -> None:
    runs = Runs()
    calls = tiles(runs, count, 6, guided=guided)
    assert runs.reused == calls * 4 // 6
    assert [record.getMessage() for record in caplog.records if "cache_context" in record.getMessage()]
    assert len(caplog.records) == 1
    runs.reused = 0
    assert tiles(runs, count, 6, guided=guided) == calls
    assert runs.reused == calls * 4 // 6, "another request"
    assert len(caplog.records) == 1, "said once"


@pytest.mark.parametrize("guided", [False, True])
def test_unnamed_tiles_in_any_order(guided: bool) -> None:
    draw = random.Random(0)
    runs = Runs()
    calls = tiles(runs, 12, 8, guided=guided, order=lambda step: draw.sample(range(12), 9 if step % 2 else 12))
    assert runs.reused > calls // 3


@pytest.mark.parametrize("count", [2, 9, 40])
def test_named_tiles_are_cached_from_the_first_step_on_whatever_their_number(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    runs = Runs()
    calls = tiles(runs, count, 6, named=True)
    assert runs.reused == calls - count
    assert sum(position.new_request for position in runs.positions) == 1
    assert not caplog.records


def test_requests_of_one_step_hold_no_more_than_one() -> None:
    """A server of a distilled model: other noise and prompts, at one timestep."""
    runs = Runs()
    for i in range(20):
        loop(runs, as_prompt(TWO, "ACDEF"[i % 5]), steps=1, seed=i)
        assert runs.states == 2
    assert loop(runs, TWO) == loop(Runs(), TWO)
    assert len(runs.history) == 8


def test_too_many_passes_that_nothing_tells_apart() -> None:
    """Of a loop that optimizes at one timestep, say: what is kept is bounded."""
    runs, latent = Runs(), noise(1)
    for step in range(3):
        for i in range(40):
            runs.call("A", latent + 0.01 * (i + 40 * step), 900.0 - step, text=PROMPTS["A"])
            assert runs.states <= MAX_PASSES


def test_what_changes_from_step_to_step_is_no_other_request() -> None:
    """Residuals of a ControlNet: known once they changed twice; then, a loop is one request."""
    runs = Runs()
    for request in range(3):
        for step in range(6):
            runs.call(request, noise(step), 1000.0 - 100 * step, text=PROMPTS["A"], residual=noise(60 + step))
    assert runs.history == [(step, 0, None) for step in range(6)]
    assert [position.new_request for position in runs.positions[6:]] == [True, *[False] * 5] * 2


def test_passes_that_differ_in_options_alone() -> None:
    """Skip-layer guidance: the same tensors, another captured kind; in any order."""

    class Skipping(Names):
        pass

    draw, runs, seen = random.Random(0), Runs(), set()
    for request in range(2):
        latent = noise(request)
        for step in range(6):
            for names, prompt in draw.sample([(Names, "B"), (Names, "N"), (Skipping, "B")], 3):
                call = {"x": latent, "t": torch.tensor([900.0 - step]), "text": PROMPTS[prompt]}
                position = runs.request.locate(names, call)
                assert position.step == step
                slot = runs.request._passes.get((None, position.pass_index))
                seen.add((request, names, prompt, id(slot)))
            latent = latent + 0.3 * noise(50 + step)
    assert len(seen) == 6


class Half(Names):
    pass


@pytest.mark.parametrize("kind", [Half, Names], ids=["model", "artifact"])
def test_guidance_that_is_switched_off_in_mid_loop(kind: type[Names]) -> None:
    """Half of the batch is another kind of call, of the same pass."""
    request = Request(FORA(3), None)
    for step in range(6):
        rows, names = (1, kind) if step > 2 else (2, Names)
        call = {"x": noise(step, rows, 4), "t": torch.tensor([900.0 - step]), "text": PROMPTS["B"].expand(rows, 7, 8)}
        assert request.locate(names, call)[:3] == (step, 0, step == 0)


def test_a_name_for_each_request_does_not_fill_the_memory() -> None:
    runs = Runs()
    for i in range(600):
        runs.call(i, noise(i), 1000.0, f"request {i}", text=PROMPTS["B"])
        assert runs.states <= 256


def test_a_prompt_that_changes_at_each_step(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing tells it from passes that come one at a time, but a name, or what else the model is conditioned on."""
    for name, pooled, steps in ((None, False, 1), (None, True, 6), ("cond", False, 6)):
        runs = Runs()
        for _ in range(2):
            for step, prompt in enumerate("ABCDEF"):
                more = {"pooled": PROMPTS["N"]} if pooled else {}
                runs.call(
                    prompt if steps == 1 else None, noise(step), 1000.0 - 100 * step, name, text=PROMPTS[prompt], **more
                )
        assert len(runs.history) == steps
        assert len(caplog.records) == (steps == 1)
        assert "cache_context" in caplog.text or steps > 1
        caplog.clear()


def test_a_pass_that_joins_late_and_comes_first() -> None:
    runs = Runs()
    loop(runs, TWO, 6, order=lambda step: [0] if step < 3 else [1, 0])
    assert runs.history[:3] == [(0, 0, None), (1, 0, None), (2, 0, None)]
    assert runs.reused == 5 + 2


@pytest.mark.parametrize("total", [None, 28])
@pytest.mark.parametrize("inference", [False, True])
def test_a_latent_and_a_timestep_that_are_written_in_place(total: int | None, inference: bool) -> None:
    with torch.inference_mode() if inference else nullcontext():
        runs, latent, time = Runs(total), noise(1), torch.zeros(1)
        for request in range(3):
            for step in range(28):
                time.fill_(1000 - 30 * step)
                for prompt in "BN":
                    runs.call((request, prompt), latent, time, text=PROMPTS[prompt])
                latent.mul_(0.9).add_(noise(step), alpha=0.1)
            latent.copy_(noise(request + 5))
        assert runs.history == [(step, i, None) for step in range(28) for i in range(2)]
        assert sum(position.new_request for position in runs.positions) == 3


def test_a_caller_may_say_the_step() -> None:
    """Whatever the timesteps do; a smaller one, or the first again with another latent, is a new request."""
    runs = Runs()
    for request in range(2):
        for step in range(5):
            for name, prompt in NAMED:
                runs.call((request, name), noise(step + request), 5.0 + step % 2, name, step, text=PROMPTS[prompt])
    assert runs.history == [(step, 0, name) for step in range(5) for name, _ in NAMED]
    assert [position.new_request for position in runs.positions] == [True, *[False] * 9] * 2
    assert runs.reused == 2 * 8
    for request in range(3):
        assert runs.call(request + 9, noise(request), 5.0, "cond", 0, text=PROMPTS["B"]).new_request
    assert runs.call(11, noise(2), 5.0, "cond", 7, text=PROMPTS["B"]).step == 7


def test_a_scheduler_has_no_step_index_at_first() -> None:
    runs = Runs()
    for index in (None, 1, 2):
        runs.call(0, noise(9) + 0.01 * (index or 0), torch.tensor([996.0]).bfloat16(), "cond", index, text=PROMPTS["B"])
    assert runs.history == [(0, 0, "cond"), (1, 0, "cond"), (2, 0, "cond")]


def second_order_ancestral(steps: int, ratio: float, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """dpmpp_2s_ancestral of k-diffusion: with ratio 1/2 its middle evaluation is all but at the next timestep."""
    low, high = 0.03 ** (1 / 7), 14.0 ** (1 / 7)
    sigmas = torch.cat([(high + torch.linspace(0, 1, steps) * (low - high)) ** 7, torch.zeros(1)])
    latent, draw = noise(1) * sigmas[0], torch.Generator().manual_seed(0)
    for now, after in pairwise(sigmas):
        yield latent / (now**2 + 1) ** 0.5, (now * 1000).expand(1).to(dtype)
        if after == 0:
            return
        up = (after**2 * (now**2 - after**2) / now**2).sqrt()
        t, until = -now.log(), -(after**2 - up**2).sqrt().log()
        middle = t + ratio * (until - t)
        yield (-middle).exp() / now * latent, ((-middle).exp() * 1000).expand(1).to(dtype)
        latent = (after**2 - up**2).sqrt() / now * latent + torch.randn(latent.shape, generator=draw) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("passes", [ONE, TWO, NAMED], ids=["one", "two", "named"])
@pytest.mark.parametrize("steps", [10, 20, 40])
def test_an_ancestral_sampler_of_second_order(
    steps: int, passes: Passes, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    later = [step for step in range(1, steps) for _ in range(2)]
    for ratio, expected in ((0.5, [0, *later]), (0.4, [*range(2 * steps - 1)])):
        runs = Runs()
        for request in range(2):
            for latent, timestep in second_order_ancestral(steps, ratio, dtype):
                for name, prompt in passes:
                    runs.call((request, prompt), latent, timestep, name, text=PROMPTS[prompt])
        assert [position.step for position in runs.positions[:: len(passes)]] == expected * 2
        assert sum(position.new_request for position in runs.positions) == 2
    assert not caplog.records


def restarting(runs: Runs, step_index: bool = False) -> None:
    """Restart sampling: twice, it goes back from a low noise level to a middle one."""
    levels = [14.6, 9.0, 5.0, 2.9, 1.5, 0.8, 0.3, 2.9, 1.5, 0.8, 0.3, 2.9, 1.5, 0.8, 0.3, 0.1, 0.03]
    for step, level in enumerate(levels):
        runs.call("B", noise(step), 1000 * level, "cond", step if step_index else None, text=PROMPTS["B"])


def test_a_restarting_sampler_starts_a_request_each_time_and_is_told_so_or_says_its_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = Runs()
    restarting(runs)
    assert [i for i, position in enumerate(runs.positions) if position.new_request] == [0, 7, 11]
    assert len(caplog.records) == 1
    assert "cache_context(name, step_index=i)" in caplog.text
    caplog.clear()
    runs = Runs()
    restarting(runs, step_index=True)
    assert [position.step for position in runs.positions] == [*range(17)]
    assert not caplog.records


def test_a_rounded_first_timestep_needs_the_number_of_steps(caplog: pytest.LogCaptureFixture) -> None:
    """The first ones are equal in bfloat16: with an unknown number each is a request, as a server's would be."""
    times = torch.tensor([1000.0, 998.5, 996.9, 995.2, 940.0, 800.0, 500.0]).bfloat16()
    for total, steps in ((7, [0, 1, 2, 3, 4, 5, 6]), (None, [0, 0, 1, 2, 3, 4, 5])):
        runs, latent = Runs(total), noise(1)
        for i, time in enumerate(times):
            for _, prompt in TWO:
                runs.call(prompt, latent, time.reshape(1).clone(), text=PROMPTS[prompt])
            latent = latent + 0.01 * noise(i)
        assert [position.step for position in runs.positions[::2]] == steps
        assert len(caplog.records) == (total is None)
    assert "num_inference_steps" in caplog.text
