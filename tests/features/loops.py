"""Cases of docs/followed.md; see table.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, DuCa, OptimizedModel, Policy, Session
from tests import models
from tests.features.table import Outcome, feature
from tests.pipelines import CASES, make, run

STEPS = 6
Pair = tuple[Any, Any]


@cache
def source() -> nn.Module:
    return models.build(models.CrossBlock).requires_grad_(False)


def fast(policy: Policy | str = "none", total: int | None = None) -> Session:
    return optimized(policy, total).session()


@cache
def optimized(policy: Policy | str, total: int | None) -> OptimizedModel:
    return duca_compile.optimize(source(), policy, "eager", total)


FORA_3 = FORA(3)
TEXT = models.example()["text"]


def named(model: Any, name: str, step: int | None = None) -> AbstractContextManager[Any]:
    """Of a session: that of its model; of the source, none."""
    if not isinstance(model, Session):
        return nullcontext()
    return model._model.cache_context(name, step_index=step)  # type: ignore[attr-defined,no-any-return]


def loop(
    model: Any,
    text: Tensor = TEXT,
    steps: int = STEPS,
    mode: Callable[[int], AbstractContextManager[Any]] = lambda step: torch.no_grad(),
    times: Iterable[Tensor] | None = None,
    passes: Callable[[int], Iterable[float]] = lambda step: (1.0,),
) -> list[Tensor]:
    """A denoising loop; ``passes`` are factors of the prompt."""
    latent, outputs = models.example()["x"], []
    for step, time in enumerate(torch.linspace(900, 100, steps) if times is None else times):
        with mode(step):
            out = {each: model(x=latent, timestep=time.expand(2), text=text * each) for each in passes(step)}
            latent = latent - 0.02 * sum(out[each] for each in sorted(out))
        outputs.append(latent.detach().clone())
    return outputs


def steps_of(session: Session) -> Tensor:
    return torch.tensor([each.step for each in session.history])


@feature("loops", "conditional and unconditional calls, unnamed, whose order changes")
def swapped_passes() -> Pair:
    found = loop(fast(FORA_3), passes=lambda step: [(1, 2), (2, 1)][step % 2])
    return found, loop(fast(FORA_3), passes=lambda step: (1, 2))


@feature("loops", "a request of one step, then a loop with another prompt on the same noise")
def one_step_then_a_loop() -> Pair:
    session = fast(FORA_3)
    loop(session, TEXT * 2, steps=1, times=[torch.tensor(900.0)])
    return loop(session), loop(fast(FORA_3))


@feature("loops", "a request that stopped after its first step, then one that starts at a lower timestep")
def one_step_then_lower() -> Pair:
    session, lower = fast(FORA_3), torch.linspace(500, 100, STEPS)
    loop(session, TEXT * 2, steps=1)
    return loop(session, times=lower), loop(fast(FORA_3), times=lower)


def tiles(session: Session, naming: bool, count: int = 12) -> list[Tensor]:
    latents = [models.example(seed=i)["x"] for i in range(count)]
    for step, time in enumerate(torch.linspace(900, 100, STEPS)):
        for i in range(count):
            with torch.no_grad(), named(session, f"tile {i}", step) if naming else nullcontext():
                latents[i] = latents[i] - 0.1 * session(x=latents[i], timestep=time.expand(2), text=TEXT)
    return latents


@feature("loops", "tiles or context windows, each a call at every step, named by `cache_context`", note="any number")
def named_tiles() -> Pair:
    found = tiles(fast(FORA_3), True)
    alone = []
    for i in range(len(found)):
        session, latent = fast(FORA_3), models.example(seed=i)["x"]
        for time in torch.linspace(900, 100, STEPS):
            with torch.no_grad():
                latent = latent - 0.1 * session(x=latent, timestep=time.expand(2), text=TEXT)
        alone.append(latent)
    return found, alone


@feature(
    "loops",
    "the same, unnamed",
    Outcome.WARNED,
    says="have different latents, as tiles",
    note="told apart by their latents; the second step is computed in full",
)
def unnamed_tiles() -> Pair:
    return tiles(fast(FORA_3), False), tiles(fast(FORA_3), True)


ROUNDED = torch.tensor([1000.0, 998.5, 996.9, 995.2, 940.0, 800.0, 500.0]).bfloat16()


@feature("loops", "timesteps rounded to bfloat16, so that neighbours are equal", note="with `num_inference_steps`")
def rounded_timesteps() -> Pair:
    session = fast("none", 7)
    loop(session, times=[time.clone() for time in ROUNDED])
    return steps_of(session), torch.arange(7)


@feature("loops", "the same, as views of one tensor", note="with or without `num_inference_steps`")
def rounded_views() -> Pair:
    session = fast()
    loop(session, times=ROUNDED)
    return steps_of(session), torch.arange(7)


@feature(
    "loops",
    "the same, where the first ones are equal and the number of steps is unknown",
    Outcome.WARNED,
    says="num_inference_steps=N",
    note="the first step is taken for a request of its own",
)
def rounded_without_a_number() -> Pair:
    session = fast()
    loop(session, times=[time.clone() for time in ROUNDED])
    return steps_of(session), torch.arange(7)


@feature("loops", "`cache_context(name, step_index=i)` whatever the timesteps do")
def said_steps() -> Pair:
    session = fast(FORA_3)
    for step, time in enumerate([500.0, 500.0, 700.0, 300.0, 400.0]):
        with torch.no_grad(), named(session, "cond", step):
            session(**models.example(timestep=time))
    return steps_of(session), torch.arange(5)


@feature(
    "loops", "a `step_index` that is not a whole number", Outcome.REFUSED, says="must count the loop's steps from 0"
)
def bad_step() -> Pair:
    with named(fast(), "cond", 0.5):  # type: ignore[arg-type]
        return (), ()


@feature("loops", "the latent and the timestep written in place")
def in_place() -> Pair:
    return tuple(_in_place(model) for model in (fast(), source()))  # type: ignore[return-value]


def _in_place(model: Any) -> list[Tensor]:
    given, outputs = models.example(), []
    for step in range(STEPS):
        with torch.no_grad():
            given["timestep"].fill_(900.0 - 100 * step)
            outputs.append(model(**given).clone())
            given["x"].sub_(outputs[-1], alpha=0.1)
    return outputs


@feature("loops", "the same under `torch.inference_mode()`")
def in_place_in_inference_mode() -> Pair:
    with torch.inference_mode():
        return in_place()


def alternating(step: int) -> AbstractContextManager[Any]:
    return (torch.inference_mode, torch.no_grad, nullcontext)[step % 3]()


@feature("loops", "`torch.inference_mode()` for some steps, `no_grad()` or neither for others")
def modes() -> Pair:
    return loop(fast(), mode=alternating), loop(source())


@feature("loops", "the same with caches that partial steps write to")
def modes_with_caches() -> Pair:
    policy = DuCa(3, fresh_ratio=0.3)
    return loop(duca_compile.optimize(source(), policy, "eager"), mode=alternating), loop(
        duca_compile.optimize(source(), policy, "eager")
    )


@feature("loops", "a gradient with respect to an argument", Outcome.REFUSED, says="duca_compile.restore(model)")
def gradient() -> Pair:
    given = models.example()
    return fast()(**given | {"x": given["x"].requires_grad_(True)}), ()


def ancestral(model: Any, steps: int = 10) -> list[Tensor]:
    """dpmpp_2s_ancestral: its middle evaluation is at the next timestep, but for rounding."""
    low, high = 0.03 ** (1 / 7), 14.0 ** (1 / 7)
    sigmas = (high + torch.linspace(0, 1, steps) * (low - high)) ** 7
    draw, latent, outputs = torch.Generator().manual_seed(0), models.example()["x"], []
    for now, after in pairwise(sigmas):
        middle = (-((-now.log() - (after**2 / now).log()) / 2)).exp()
        for time in (now, middle):
            with torch.no_grad():
                outputs.append(model(x=latent, timestep=(1000 * time).expand(2), text=TEXT))
            latent = latent - 0.1 * outputs[-1]
        latent = latent + 0.1 * torch.randn(latent.shape, generator=draw)
    return outputs


@feature("loops", "a second-order ancestral sampler (`dpmpp_2s_ancestral` of k-diffusion)", note="one request")
def ancestral_sampler() -> Pair:
    session = fast()
    found, own = ancestral(session), ancestral(source())
    steps = [0, *(step for step in range(1, 9) for _ in range(2)), 9]
    return (found, steps_of(session)), (own, torch.tensor(steps))


RESTARTING = [14.6, 9.0, 5.0, 2.9, 1.5, 0.8, 0.3, 2.9, 1.5, 0.8, 0.3, 2.9, 1.5, 0.8, 0.3, 0.03]


def restarting(saying: bool) -> Pair:
    session, own = fast(), []
    found = []
    for step, level in enumerate(RESTARTING):
        given = models.example(seed=step, timestep=1000 * level) | {"text": TEXT}
        with torch.no_grad(), named(session, "cond", step) if saying else nullcontext():
            found.append(session(**given))
            own.append(source()(**given))
    return (found, steps_of(session)), (own, torch.arange(len(RESTARTING)))


@feature("loops", "a sampler that restarts in the middle of a loop, with `step_index`")
def restarting_said() -> Pair:
    return restarting(True)


@feature(
    "loops",
    "the same without",
    Outcome.WARNED,
    says="turned back in mid-loop",
    note="each restart is a request, so its first step is full",
)
def restarting_unsaid() -> Pair:
    found, own = restarting(False)
    size = max(len(found[1]), len(own[1]))
    return (found[0], torch.nn.functional.pad(found[1], (0, size - len(found[1])))), own


@feature(
    "loops",
    "a prompt that changes at each step, where the model is conditioned on nothing else",
    Outcome.WARNED,
    says="changes at each step",
    note="a name tells that it is one pass",
)
def prompt_travel() -> Pair:
    session, latent = fast(), models.example()["x"]
    for step in range(STEPS):
        with torch.no_grad():
            session(x=latent - 0.1 * step, timestep=torch.full((2,), 900.0 - step), text=TEXT * (1 + step))
    return torch.tensor(len(session.history)), torch.tensor(STEPS)


def scheduled(name: str, scheduler: Any, expected: list[int], steps: int, dtype: torch.dtype = torch.float32) -> Pair:
    """A pipeline's result, and the steps that were seen."""
    arguments = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in CASES[name].arguments.items()
    }
    pipe = make(name).to(dtype)
    pipe.scheduler = scheduler
    own = run(pipe, name, steps=steps, **arguments)
    duca_compile.optimize(pipe, "none", "eager")
    found = run(pipe, name, steps=steps, **arguments)
    seen = [each.step for each in pipe.transformer.history if each.pass_name in (None, "cond")]
    return (found, torch.tensor(seen)), (own, torch.tensor(expected))


@feature("diffusers", "FLUX in bfloat16 at 2048x2048, whose timesteps round to 23 values in 28 steps")
def flux_2048() -> Pair:
    shift = math.exp(1.15 + (16384 - 4096) * (1.15 - 0.5) / (4096 - 256))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return scheduled("FLUX", scheduler, [*range(28)], 28, torch.bfloat16)


@feature("diffusers", "SD3 in bfloat16 with a shift of 17, whose timesteps round to 33 values in 40 steps")
def shift_17() -> Pair:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=17.0)
    return scheduled("SD3", scheduler, [*range(40)], 40, torch.bfloat16)


TWICE = [0, *(step for step in range(1, 6) for _ in range(2))]


@feature("diffusers", "FlowMatchHeunDiscreteScheduler", note="the second evaluation of a step is a pass of its own")
def flow_heun() -> Pair:
    return scheduled("SD3", diffusers.FlowMatchHeunDiscreteScheduler(), TWICE, 6)


@feature("diffusers", "HeunDiscreteScheduler", note="the same")
def heun() -> Pair:
    return scheduled("PixArt-alpha", diffusers.HeunDiscreteScheduler(), TWICE, 6)


@feature("diffusers", "KDPM2AncestralDiscreteScheduler", note="the same")
def dpm2_ancestral() -> Pair:
    return scheduled("PixArt-alpha", diffusers.KDPM2AncestralDiscreteScheduler(), TWICE, 6)


@feature("diffusers", "KDPM2DiscreteScheduler", note="an evaluation between two timesteps is a step")
def dpm2() -> Pair:
    return scheduled("PixArt-alpha", diffusers.KDPM2DiscreteScheduler(), [*range(11)], 6)


@feature("diffusers", "EulerAncestralDiscreteScheduler")
def euler_ancestral() -> Pair:
    return scheduled("PixArt-alpha", diffusers.EulerAncestralDiscreteScheduler(), [*range(6)], 6)


@feature("diffusers", "UniPCMultistepScheduler with flow sigmas and a shift of 17, in bfloat16")
def unipc() -> Pair:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=17.0
    )
    return scheduled("Wan", scheduler, [*range(40)], 40, torch.bfloat16)
