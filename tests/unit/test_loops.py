"""Steps, passes and requests of real schedulers' loops, as pipelines and as loops of one's own run them.

No model runs: what it would be called with is handed to a request. Where a loop of one's own rounds its timesteps, its
number of steps is known, as with ``optimize(..., num_inference_steps=N)``, unless a test says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

from duca_compile import FORA
from duca_compile.integrations.diffusers import PipelineSchedule
from duca_compile.runtime.clock import CallPosition
from duca_compile.runtime.request import Request

FLUX_2048 = 1.15 + (16384 - 4096) * (1.15 - 0.5) / (4096 - 256)  # what its pipeline shifts by at 2048x2048
LOOPS = ("pipeline", "views", "anew", "fractions", "rounded views")
PASSES = ("one", "named", "unnamed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Names:
    latent, timestep = "hidden_states", "timestep"
    changing = (latent, timestep)


@dataclass(frozen=True)
class Published:
    """A scheduler as a model's pipeline makes it, and how it is told its steps."""

    make: Callable[[], Any]
    steps: int
    options: Callable[[int], dict[str, Any]] = lambda steps: {}
    evaluations: tuple[int, ...] = (1,)  # of the first step, and of each later one
    between: bool = False  # whether there are evaluations between timesteps, which are steps too

    def scheduler(self) -> Any:
        made = self.make()
        given = self.options(self.steps)
        made.set_timesteps(**({"num_inference_steps": self.steps} if "sigmas" not in given else {}), **given)
        return made

    @property
    def expected(self) -> list[int]:
        """The step of each evaluation."""
        if self.between:
            return [*range(2 * self.steps - 1)]
        first, later = self.evaluations[0], self.evaluations[-1]
        return [step for step in range(self.steps) for _ in range(later if step else first)]


def flow(shift: float) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def dynamic(**settings: Any) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)


def unipc(shift: float) -> Callable[[], Any]:
    return lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def linear(mu: float | None = None) -> Callable[[int], dict[str, Any]]:
    """Sigmas as FLUX, Qwen-Image and LTX give them."""
    return lambda steps: {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()} | ({} if mu is None else {"mu": mu})


HEUN = (1, 2)
SCHEDULES = {
    "FLUX 1024": Published(dynamic(), 28, linear(1.15)),
    "FLUX 2048": Published(flow(math.exp(FLUX_2048)), 28),
    "FLUX 2048, 50 steps": Published(dynamic(), 50, linear(FLUX_2048)),
    "FLUX schnell": Published(flow(1.0), 4, linear()),
    "SD3": Published(flow(3.0), 28),
    "Wan, shift 3": Published(flow(3.0), 50),
    "Wan, shift 5": Published(flow(5.0), 40),
    "Wan, shift 8": Published(flow(8.0), 40),
    "Wan, shift 17": Published(flow(17.0), 40),
    "Wan, UniPC, shift 3": Published(unipc(3.0), 50),
    "Wan, UniPC, shift 5": Published(unipc(5.0), 50),
    "Wan, UniPC, shift 8": Published(unipc(8.0), 40),
    "Wan, UniPC, shift 17": Published(unipc(17.0), 40),
    "HunyuanVideo, shift 7": Published(flow(7.0), 50, linear()),
    "HunyuanVideo, shift 17": Published(flow(17.0), 50, linear()),
    "LTX": Published(dynamic(shift_terminal=0.1), 50, linear(2.05)),
    "Qwen-Image": Published(dynamic(shift_terminal=0.02), 50, linear(0.9)),
    "DMD, 3 steps": Published(flow(1.0), 3, lambda _: {"sigmas": [1.0, 0.757, 0.522]}),
    "custom sigmas": Published(flow(1.0), 6, lambda _: {"sigmas": [1.0, 0.9974, 0.995, 0.75, 0.4, 0.05]}),
    "LCM, 1 step": Published(diffusers.LCMScheduler, 1),
    "LCM, 4 steps": Published(diffusers.LCMScheduler, 4),
    "TCD, 8 steps": Published(diffusers.TCDScheduler, 8),
    "SDXL-turbo": Published(lambda: diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), 1),
    "Lightning, 2 steps": Published(lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"), 2),
    "flow, 8 steps": Published(flow(3.0), 8),
    "Heun, flow": Published(diffusers.FlowMatchHeunDiscreteScheduler, 20, evaluations=HEUN),
    "Heun": Published(diffusers.HeunDiscreteScheduler, 25, evaluations=HEUN),
    "DPM2": Published(diffusers.KDPM2DiscreteScheduler, 20, between=True),
    "DPM2 ancestral": Published(diffusers.KDPM2AncestralDiscreteScheduler, 20, evaluations=HEUN),
    "DPM++ 2M": Published(diffusers.DPMSolverMultistepScheduler, 25),
    "DPM++ 2M, Karras": Published(lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True), 25),
    "DPM++ single": Published(diffusers.DPMSolverSinglestepScheduler, 20),
    "Euler": Published(diffusers.EulerDiscreteScheduler, 50),
    "Euler ancestral": Published(diffusers.EulerAncestralDiscreteScheduler, 30),
    "EDM": Published(diffusers.EDMEulerScheduler, 18),
    "DEIS": Published(diffusers.DEISMultistepScheduler, 20),
    "SA": Published(diffusers.SASolverScheduler, 20),
    "IPNDM": Published(diffusers.IPNDMScheduler, 20),
    "DDIM": Published(diffusers.DDIMScheduler, 50),
    "DDPM": Published(diffusers.DDPMScheduler, 50),
}


class Pipe:
    """As much of a pipeline as its schedule looks at."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


class Call(NamedTuple):
    """What one evaluation of a loop calls the model with."""

    latent: Tensor
    timestep: Tensor


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def evaluations(scheduler: Any, kind: str, dtype: torch.dtype, seed: int) -> Iterator[Call]:
    """A denoising loop towards another noise; what the model would say is worked out from its latent."""
    latent, end = noise(seed), noise(seed + 100)
    draw = torch.Generator().manual_seed(seed)
    latent = latent * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else latent
    for t, rounded in zip(scheduler.timesteps, scheduler.timesteps.to(dtype), strict=True):
        given = scheduler.scale_model_input(latent, t) if hasattr(scheduler, "scale_model_input") else latent
        if kind == "anew":
            timestep = torch.tensor([t.item()]).to(dtype)
        elif kind == "fractions":
            timestep = (t.expand(1) / 1000).to(dtype)
        elif kind == "rounded views":
            timestep = rounded.expand(1)
        else:
            timestep = t.expand(1).to(dtype)
        yield Call(given.to(dtype), timestep)
        guess = given - end
        try:
            latent = scheduler.step(guess, t, latent, generator=draw).prev_sample
        except TypeError:
            latent = scheduler.step(guess, t, latent).prev_sample


def positions(request: Request, calls: Iterator[Call], passes: str, prompt: int) -> list[list[CallPosition]]:
    """Those of each evaluation."""
    texts = [noise(1000 + prompt, 1, 7, 8), noise(2000, 1, 7, 8)]
    found = []
    for latent, timestep in calls:
        names = {"one": (None,), "named": ("cond", "uncond"), "unnamed": (None, None)}[passes]
        found.append(
            [
                request.locate(Names, {"hidden_states": latent, "timestep": timestep, "text": text}, name)
                for name, text in zip(names, texts, strict=False)
            ]
        )
    return found


def plain(found: list[list[CallPosition]]) -> list[list[tuple[int, int, bool]]]:
    return [[(position.step, position.pass_index, position.new_request) for position in each] for each in found]


def expected(steps: list[int], passes: str) -> list[list[tuple[int, int, bool]]]:
    """One request, whose steps are evaluated so; each evaluation of a step has passes of its own."""
    found = []
    for step, each in groupby(steps):
        for stage, _ in enumerate(each):
            first = step == stage == 0
            if passes == "unnamed":
                found.append([(step, 2 * stage, first), (step, 2 * stage + 1, False)])
            else:
                found.append([(step, stage, first), (step, stage, False)][: 1 if passes == "one" else 2])
    return found


def check(name: str, kind: str, dtype: torch.dtype, passes: str, known: bool = True) -> None:
    """Two loops of different prompts and noise are a request each, with the schedule's steps and these passes."""
    published = SCHEDULES[name]
    steps = published.expected
    schedule, total = None, len({*steps}) if known else None
    pipe = Pipe(published.scheduler())
    if kind == "pipeline":
        schedule, total = PipelineSchedule(pipe), None
    request = Request(FORA(3), total, schedule)
    for seed in (1, 2):
        found = positions(request, evaluations(pipe.scheduler, kind, dtype, seed), passes, seed)
        assert plain(found) == expected(steps, passes), f"{kind}, {dtype}, {passes}, loop {seed}"
        assert request.total == (len({*steps}) if known else None)
        pipe.scheduler = published.scheduler()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "duca_compile"]


@pytest.mark.parametrize("name", ["FLUX 2048", "Wan, UniPC, shift 17", "Heun, flow", "LCM, 1 step"])
def test_a_loop_in_bfloat16_has_the_schedules_steps(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for kind in LOOPS:
        check(name, kind, torch.bfloat16, "unnamed")
    assert not said(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_loop_has_the_schedules_steps_and_passes_and_is_one_request(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is rounded to, and however its timesteps are made."""
    for kind, dtype, passes in product(LOOPS, DTYPES, PASSES):
        check(name, kind, dtype, passes)
    assert not said(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, each in SCHEDULES.items() if each.steps > 1])
def test_the_number_of_steps_need_not_be_known(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where timesteps are not rounded, or are views of one tensor."""
    for passes in PASSES:
        for kind in LOOPS[1:]:
            check(name, kind, torch.float32, passes, known=False)
        check(name, "rounded views", torch.bfloat16, passes, known=False)
    assert not said(caplog)
