"""Steps, requests and guidance passes, as real pipelines and their schedulers make them."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from torch import Tensor

import duca_compile
from duca_compile import FORA, DuCa, Interval, Policy, Uncached, published
from duca_compile.integrations.diffusers import PipelineSchedule
from tests.pipelines import CASES, make, noise, patterns, quiet, run, wan

# Full steps are counted back from the last one: the pattern says how many steps were expected.
BACKWARDS = FORA(Interval(3, descending=True))


def planned(policy: Policy, total: int) -> str:
    return "".join(step.kind.value[0] for step in policy.steps(total))


@pytest.mark.parametrize("policy", [BACKWARDS, published("duca", "dit", interval=3)], ids=["fora", "published duca"])
def test_the_number_of_steps_is_learnt_from_the_scheduler(policy: Policy) -> None:
    pipe = duca_compile.optimize(make("DiT"), policy, "eager")
    for steps in (8, 5, 1, 1, 7):
        run(pipe, "DiT", steps=steps)
        assert patterns(pipe.transformer) == {(None, 0): planned(policy, steps)}


@pytest.mark.parametrize("name", ["SD3", "FLUX"])
def test_image_to_image_starts_in_the_middle_of_the_schedule(name: str) -> None:
    kind = {"SD3": diffusers.StableDiffusion3Img2ImgPipeline, "FLUX": diffusers.FluxImg2ImgPipeline}[name]
    torch.manual_seed(0)
    pipe = quiet(CASES[name].build(kind))  # type: ignore[call-arg]
    image = noise(4, 16, 16)[:, :, : CASES[name].arguments["height"], : CASES[name].arguments["width"]]
    plain = run(pipe, name, image=image, strength=0.6)
    duca_compile.optimize(pipe, Uncached(), "eager")
    assert torch.equal(run(pipe, name, image=image, strength=0.6), plain)
    duca_compile.restore(pipe)
    duca_compile.optimize(pipe, BACKWARDS, "eager")
    for strength, steps in ((0.5, 4), (1.0, 8), (0.75, 6)):
        run(pipe, name, image=image, strength=strength)
        assert set(patterns(pipe.transformer).values()) == {planned(BACKWARDS, steps)}


def test_a_pipeline_made_of_an_optimized_ones_parts_starts_where_it_starts() -> None:
    """The other pipeline announces its steps to its own attributes, which the first one's scheduler need not know."""
    first = duca_compile.optimize(make("SD3"), BACKWARDS, "eager")
    second = quiet(diffusers.StableDiffusion3Img2ImgPipeline(**first.components))
    for pipe, more, steps in (
        (first, {}, 8),
        (second, {"image": noise(4, 16, 16), "strength": 0.5}, 4),
        (first, {}, 8),
    ):
        run(pipe, "SD3", **more)
        assert patterns(first.transformer) == {(None, 0): planned(BACKWARDS, steps)}


class Announced:
    """As much of a pipeline as its schedule looks at."""

    def __init__(self, scheduler: Any, num_timesteps: int | None) -> None:
        self.scheduler, self.num_timesteps = scheduler, num_timesteps


@pytest.mark.parametrize(
    ("first", "announced", "steps"),
    [
        (900, None, 10),
        (500, None, 6),
        (0.5, None, 6),  # as a fraction, as FLUX takes it
        (0.123, 4, 4),  # as the model alone understands it
        (0.123, None, 10),
        (0.123, 1000, 10),  # of another run
    ],
)
def test_a_scheduler_that_is_not_told_where_to_begin(first: float, announced: int | None, steps: int) -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    schedule = PipelineSchedule(pipe := Announced(scheduler, announced))
    assert schedule.run() is scheduler.timesteps
    times = schedule.timesteps(torch.tensor([first, first], dtype=torch.float64))
    assert times == scheduler.timesteps.tolist()[-steps:]
    pipe.scheduler = None
    assert schedule.run() is None


class Bare:
    """A scheduler of one's own: no config, no begin_index."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def set_timesteps(self, steps: int, **options: Any) -> None:
        self._inner.set_timesteps(steps, **options)
        self.timesteps = self._inner.timesteps

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample

    def step(self, *args: Any, **options: Any) -> Any:
        return self._inner.step(*args, **options)


def test_a_scheduler_without_config() -> None:
    pipe = make("DiT")
    pipe.scheduler = Bare(pipe.scheduler)
    duca_compile.optimize(pipe, BACKWARDS, "eager")
    run(pipe, "DiT", steps=5)
    assert patterns(pipe.transformer) == {(None, 0): planned(BACKWARDS, 5)}


def test_hooks_of_before_are_removed_through_the_pipeline() -> None:
    """As ``enable_model_cpu_offload`` sets them."""
    pipe = make("SD3")
    plain, source = run(pipe, "SD3"), pipe.transformer
    add_hook_to_module(source, ModelHook())
    duca_compile.optimize(pipe, Uncached(), "eager")
    assert torch.equal(run(pipe, "SD3"), plain)
    pipe.remove_all_hooks()
    assert not hasattr(source, "_hf_hook")
    assert torch.equal(run(pipe, "SD3"), plain)
    assert len(pipe.transformer.history) == 8


def test_a_scheduler_may_be_swapped_for_one_with_two_evaluations_per_step() -> None:
    """Heun's: the second evaluation at a timestep is a further pass, which joins at the second step."""
    pipe = make("SD3")
    heun = diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    euler, pipe.scheduler = pipe.scheduler, heun
    plain = run(pipe, "SD3", steps=6)
    pipe.scheduler = euler
    duca_compile.optimize(pipe, Uncached(), "eager")
    run(pipe, "SD3")
    pipe.scheduler = heun
    assert torch.equal(run(pipe, "SD3", steps=6), plain)
    assert patterns(pipe.transformer) == {(None, 0): "ffffff", (None, 1): ".fffff"}
    duca_compile.restore(pipe)
    duca_compile.optimize(pipe, DuCa(interval=4), "eager")
    cached = run(pipe, "SD3", steps=6)
    assert patterns(pipe.transformer) == {(None, 0): "fpspfp", (None, 1): ".fspfp"}
    assert torch.equal(run(pipe, "SD3", steps=6), cached)


def test_two_experts_share_one_loop() -> None:
    torch.manual_seed(0)
    pipe = quiet(wan(experts=2))
    originals = (pipe.transformer, pipe.transformer_2)
    plain = run(pipe, "Wan")
    duca_compile.optimize(pipe, Uncached(), "eager")
    assert torch.equal(run(pipe, "Wan"), plain)
    switch = next(i for i, t in enumerate(pipe.scheduler.timesteps) if t < 875)
    assert 0 < switch < 7
    duca_compile.restore(pipe)
    assert (pipe.transformer, pipe.transformer_2) == originals
    policy = FORA(8)
    duca_compile.optimize(pipe, policy, "eager")
    cached = run(pipe, "Wan")
    joined = "".join("f" if i in (0, switch) else "r" for i in range(8))
    assert patterns(pipe.transformer) == {("cond", 0): joined, ("uncond", 0): joined}
    assert pipe.transformer_2.history == pipe.transformer.history
    assert torch.equal(run(pipe, "Wan"), cached)
    pipe.transformer.reset()
    assert pipe.transformer_2.cache_bytes == 0


def test_a_callback_may_change_the_latents() -> None:
    def dim(pipe: DiffusionPipeline, step: int, time: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": given["latents"] * (1 - 0.01 * step)}

    pipe = make("SD3")
    plain = run(pipe, "SD3", callback_on_step_end=dim)
    assert not torch.equal(plain, run(pipe, "SD3"))
    duca_compile.optimize(pipe, Uncached(), "eager")
    assert torch.equal(run(pipe, "SD3", callback_on_step_end=dim), plain)
    duca_compile.restore(pipe)
    duca_compile.optimize(pipe, DuCa(interval=4), "eager")
    run(pipe, "SD3", callback_on_step_end=dim)
    assert patterns(pipe.transformer) == {(None, 0): "fpspfpsp"}


def without_guidance(pipe: DiffusionPipeline, step: int, time: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    if step != 4:
        return {}
    pipe._guidance_scale = 1.0
    return {name: given[name].chunk(2)[-1] for name in ("prompt_embeds", "pooled_prompt_embeds")}


def test_guidance_may_be_switched_off_half_way() -> None:
    """Half of the batch is another captured shape: it joins late, so in full, and the loop goes on."""
    options = {
        "callback_on_step_end": without_guidance,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    }
    pipe = make("SD3")
    plain = run(pipe, "SD3", **options)
    duca_compile.optimize(pipe, Uncached(), "eager")
    assert torch.equal(run(pipe, "SD3", **options), plain)
    duca_compile.restore(pipe)
    duca_compile.optimize(pipe, FORA(8), "eager")
    first = run(pipe, "SD3", **options)
    assert patterns(pipe.transformer) == {(None, 0): "frrrrfrr"}
    assert torch.equal(run(pipe, "SD3", **options), first)


def test_skip_layer_guidance_is_a_pass_of_its_own() -> None:
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
    pipe = make("SD3")
    plain = run(pipe, "SD3", **options)
    duca_compile.optimize(pipe, Uncached(), "eager")
    assert torch.equal(run(pipe, "SD3", **options), plain)
    duca_compile.restore(pipe)
    duca_compile.optimize(pipe, FORA(4), "eager")
    run(pipe, "SD3", **options)
    assert patterns(pipe.transformer) == {(None, 0): "frrrfrrr", (None, 1): ".frrfr.."}


class ThreePasses(diffusers.DiTPipeline):
    """Perturbed guidance as video pipelines do it: three calls at each step, named, in any order."""

    def __call__(self, orders: Sequence[str], **_: Any) -> Tensor:
        latent = noise(4, 8, 8)
        self.scheduler.set_timesteps(len(orders))
        for time, order in zip(self.scheduler.timesteps, orders, strict=True):
            total = torch.zeros_like(latent)
            for letter in order:
                with getattr(self.transformer, "cache_context", lambda name: nullcontext())(letter):
                    label = torch.tensor([ord(letter) - ord("a")])
                    output = self.transformer(latent, timestep=time[None], class_labels=label).sample[:, :4]
                total += output * (ord(letter) - ord("b") + 0.5)
            latent = self.scheduler.step(total, time, latent).prev_sample
        return latent


@torch.no_grad()
def test_named_passes_have_their_own_caches_in_any_order() -> None:
    parts = make("DiT").components
    pipe = ThreePasses(**parts)
    in_order, mixed = ["abc"] * 6, ["abc", "cab", "bca", "cba", "acb", "bac"]
    plain = pipe(mixed)
    duca_compile.optimize(pipe, Uncached(), "eager")
    assert torch.equal(pipe(mixed), plain)
    duca_compile.restore(pipe)
    duca_compile.optimize(pipe, DuCa(interval=4), "eager")
    outputs = [pipe(orders) for orders in (in_order, mixed)]
    assert patterns(pipe.transformer) == {(letter, 0): "fpspfp" for letter in "abc"}
    assert torch.allclose(*outputs, rtol=0, atol=1e-5)  # the sum of the three is rounded in another order
    pipe(["abca"] * 6)
    assert patterns(pipe.transformer) == dict.fromkeys([("a", 0), ("b", 0), ("c", 0), ("a", 1)], "fpspfp")


@torch.no_grad()
def test_a_new_run_of_the_scheduler_is_a_new_request_and_nothing_else_is() -> None:
    """The first timestep comes again with another latent: a further pass in one run, a new request in the next.

    Later calls are of the pass whose latent they go on with.
    """
    pipe = duca_compile.optimize(make("DiT"), FORA(3), "eager")
    model, scheduler = pipe.transformer, pipe.scheduler
    label = torch.tensor([1])
    for _ in range(2):
        scheduler.set_timesteps(3)
        for seed in range(2):
            model(noise(4, 8, 8, seed=seed), timestep=scheduler.timesteps[:1], class_labels=label)
        assert patterns(model) == {(None, 0): "f", (None, 1): "f"}
    for time in scheduler.timesteps[1:]:
        model(noise(4, 8, 8), timestep=time[None], class_labels=label)
    assert patterns(model) == {(None, 0): "f..", (None, 1): "frr"}
    model(noise(4, 8, 8), timestep=scheduler.timesteps[:1], class_labels=label)  # a loop of the caller's own
    assert patterns(model) == {(None, 0): "f"}


@torch.no_grad()
def test_a_schedule_may_turn_back() -> None:
    """Where the scheduler's own timesteps go up and down, a jump back is a step and not a request."""
    pipe = duca_compile.optimize(make("DiT"), FORA(3), "eager")
    pipe.scheduler.timesteps = torch.tensor([900, 600, 700, 400, 500, 200])
    for time in pipe.scheduler.timesteps:
        pipe.transformer(noise(4, 8, 8), timestep=time[None], class_labels=torch.tensor([1]))
    assert patterns(pipe.transformer) == {(None, 0): "frrfrr"}


def test_a_request_may_be_interrupted() -> None:
    """The next one starts further down the schedule: by timesteps alone it would be the second step of the first."""

    def stop(pipe: DiffusionPipeline, step: int, time: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = True
        return {}

    pipe = duca_compile.optimize(make("SD3"), FORA(3), "eager")
    other = quiet(diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components))
    image = {"image": noise(4, 16, 16), "strength": 0.5}
    expected = run(other, "SD3", **image)
    run(pipe, "SD3", callback_on_step_end=stop)
    assert patterns(pipe.transformer) == {(None, 0): "f"}
    assert torch.equal(run(other, "SD3", **image), expected)
    assert patterns(pipe.transformer) == {(None, 0): "frrf"}
