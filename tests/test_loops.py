"""Loops as people run them around an optimized model or an artifact: modes of torch, tiles, steps that are said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, DuCa, Interval, OptimizedModel, Policy, Session, TaylorSeer, Uncached, UsageError
from duca_compile.runtime.torch.prologue import Prologue
from duca_compile.runtime.torch.rows import Rows
from tests import artifacts, models
from tests.pipelines import CASES, make, noise, patterns, run

STEPS = 6
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "neither": nullcontext,
}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often loop-invariant and timestep-only values are computed."""
    counts = {"invariant": 0, "timestep": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return count

    with monkeypatch.context() as patch:
        patch.setattr(Prologue, "compute", counting("invariant", Prologue.compute))
        patch.setattr(Rows, "compute", counting("timestep", Rows.compute))
        patch.setattr(Rows, "compute_all", counting("timestep", Rows.compute_all))
        yield counts


def loop(
    model: Callable[..., Tensor], modes: Sequence[str], *, given: dict[str, Tensor] | None = None, scale: float = 1.0
) -> list[Tensor]:
    """One step in each of these modes, from the same noise; the timesteps are views of a schedule."""
    given = models.example() if given is None else given
    latent, text, outputs = given["x"], given["text"] * scale, []
    for time, mode in zip(torch.linspace(900, 100, len(modes)), modes, strict=True):
        with MODES[mode]():
            outputs.append(model(x=latent, timestep=time.expand(2), text=text))
            latent = latent - 0.1 * outputs[-1]
    return [output.detach().clone() for output in outputs]


MIXED = [
    ["inference", "no grad"] * 3,
    ["no grad", "inference", "inference", "neither", "no grad", "inference"],
    ["inference"] * 6,
    ["neither", "inference"] * 3,
]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return models.build(models.CrossBlock).requires_grad_(False)


@pytest.fixture(scope="module")
def optimized_by(source: nn.Module) -> Callable[[Policy], Session]:
    """A session of one optimized model for each policy, captured once."""
    known: dict[str, OptimizedModel] = {}

    def get(policy: Policy) -> Session:
        if policy.name not in known:
            known[policy.name] = duca_compile.optimize(source, policy, "eager")
        return known[policy.name].session()

    return get


@pytest.mark.parametrize(
    "policy", [DuCa(3, fresh_ratio=0.3), FORA(3), TaylorSeer(2), Uncached()], ids=lambda policy: policy.name
)
def test_modes_of_torch_may_change_within_a_request(optimized_by: Callable[[Policy], Session], policy: Policy) -> None:
    optimized = optimized_by(policy)
    expected = loop(optimized, ["no grad"] * STEPS)
    for modes in MIXED:
        found = loop(optimized, modes)
        assert all(map(torch.equal, found, expected)), modes
        assert [each.step for each in optimized.history] == list(range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [DuCa(3, fresh_ratio=0.3), TaylorSeer(2)], ids=lambda policy: policy.name)
def test_modes_of_torch_may_change_between_compiled_steps(source: nn.Module, policy: Policy) -> None:
    optimized = duca_compile.optimize(source, policy, "inductor", strict=True)
    expected = loop(optimized, ["no grad"] * STEPS)
    for modes in MIXED:
        assert all(map(torch.equal, loop(optimized, modes), expected)), modes


@pytest.mark.parametrize("inputs", ["no grad", "inference"])
def test_values_that_stay_are_computed_once_per_request_in_any_mode(
    optimized_by: Callable[[Policy], Session], inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the eager backend timestep-only values are computed step by step."""
    expected: list[Tensor] = []
    with MODES[inputs]():
        given = {name: value.clone() for name, value in models.example().items()}
    for modes in (*MIXED, ["no grad"] * STEPS):
        optimized = optimized_by(FORA(3))
        with counted(monkeypatch) as counts:
            found = loop(optimized, modes, given=given)
        expected = expected or found
        assert all(map(torch.equal, found, expected))
        assert counts == {"invariant": 1, "timestep": STEPS}, modes


@pytest.mark.parametrize("prompts", [1, 3])
def test_an_argument_that_is_written_to_under_inference_mode_is_seen(
    source: nn.Module, optimized_by: Callable[[Policy], Session], prompts: int
) -> None:
    optimized = optimized_by(Uncached())
    with torch.inference_mode():
        given = {name: value.clone() for name, value in models.example().items()}
        for step in range(3):
            given["timestep"].fill_(900 - step)
            given["text"].mul_(1.5 if step < prompts else 1.0)
            given["x"].mul_(0.9)
            assert torch.equal(optimized(**given), source(**given))
    assert prompts > 1 or [each.step for each in optimized.history] == [0, 1, 2]


def test_a_gradient_that_is_asked_for_is_refused(source: nn.Module, optimized_by: Callable[[Policy], Session]) -> None:
    optimized = optimized_by(Uncached())
    given = models.example()
    for name in ("x", "text"):
        asking = given | {name: given[name].clone().requires_grad_(True)}
        with pytest.raises(UsageError, match=r"inference only: call duca_compile.restore\(model\)"):
            optimized(**asking)
        with torch.no_grad():
            assert torch.equal(optimized(**asking), source(**given))
    trained = models.build(models.CrossBlock).requires_grad_(True)
    assert not duca_compile.optimize(trained, Uncached(), "eager")(**given).requires_grad


def test_what_transforms_the_model_is_refused(optimized_by: Callable[[Policy], Session]) -> None:
    optimized, given = optimized_by(Uncached()), models.example()

    def run(x: Tensor) -> Tensor:
        return optimized(**given | {"x": x})  # type: ignore[no-any-return]

    def dual(x: Tensor) -> None:
        with torch.autograd.forward_ad.dual_level():
            run(torch.autograd.forward_ad.make_dual(x, x))

    with torch.no_grad():
        for transformed in (
            torch.func.vmap(run),
            lambda x: torch.func.jvp(run, (x[0],), (x[0],)),
            lambda x: dual(x[0]),
        ):
            with pytest.raises(UsageError, match=r"duca_compile.restore\(model\)"):
                transformed(given["x"][None])
        run(given["x"])


def test_a_name_holds_within_that_of_another_model(source: nn.Module) -> None:
    one, other = (duca_compile.optimize(source, FORA(3), "eager") for _ in range(2))
    with torch.no_grad(), one.cache_context("cond", step_index=2), other.cache_context("control"):
        one(**models.example())
        other(**models.example())
    assert [(each.pass_name, each.step) for each in (*one.history, *other.history)] == [("cond", 2), ("control", 0)]


def test_bad_steps_are_refused(source: nn.Module) -> None:
    optimized = duca_compile.optimize(source, FORA(3), "eager")
    for bad in (-1, 1.0, "2", True, torch.tensor(0.5)):
        with pytest.raises(UsageError, match="step_index"), optimized.cache_context("cond", step_index=bad):
            pass
    for good in (None, 0, torch.tensor(3)):
        with optimized.cache_context("cond", step_index=good):
            pass


class Named(models.DiT):
    """Its own ``cache_context`` takes a name and nothing else, as in older versions of diffusers."""

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        yield


def test_a_step_is_not_told_to_a_model_that_takes_none() -> None:
    optimized = duca_compile.optimize(Named().eval(), FORA(3), "eager")
    for step in range(4):
        with optimized.cache_context("cond", step_index=step), torch.no_grad():
            optimized(**models.example(timestep=5.0))
    assert [each.step for each in optimized.history] == [0, 1, 2, 3]


def tiles(optimized: OptimizedModel, count: int, named: bool) -> list[Tensor]:
    given = models.example()
    latents = [models.example(seed=i)["x"] for i in range(count)]
    for time in torch.linspace(900, 100, STEPS):
        for i in range(count):
            with optimized.cache_context(f"tile {i}") if named else nullcontext(), torch.no_grad():
                out = optimized(x=latents[i], timestep=time.expand(2), text=given["text"])
            latents[i] = latents[i] - 0.1 * out
    return latents


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("count", [3, 10])
def test_each_tile_equals_a_loop_of_its_own(source: nn.Module, count: int, named: bool) -> None:
    """The second step of unnamed ones is full."""
    optimized = duca_compile.optimize(source, FORA(3), "eager")
    found = tiles(optimized, count, named)
    for i in (0, 1, count - 1):
        alone = optimized.session()
        given, latent = models.example(), models.example(seed=i)["x"]
        for step, time in enumerate(torch.linspace(900, 100, STEPS)):
            if step == 1 and not named:
                alone.request._states.clear()  # the first step is lost
            with torch.no_grad():
                latent = latent - 0.1 * alone(x=latent, timestep=time.expand(2), text=given["text"])
        assert torch.equal(found[i], latent)


def flux_at_2048(dtype: torch.dtype) -> Any:
    pipe = make("FLUX")
    shift = math.exp(1.15 + (16384 - 4096) * (1.15 - 0.5) / (4096 - 256))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return pipe.to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [DuCa(5), FORA(Interval(3, descending=True))], ids=lambda policy: policy.name)
def test_steps_are_the_schedulers_where_the_model_is_given_rounded_timesteps(policy: Policy) -> None:
    kinds = "".join(step.kind.value[0] for step in policy.steps(28))
    arguments = {
        key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in CASES["FLUX"].arguments.items()
    }
    pipe = duca_compile.optimize(flux_at_2048(torch.bfloat16), policy, "eager")
    for _ in range(2):
        run(pipe, "FLUX", steps=28, **arguments)
        assert patterns(pipe.transformer) == {("cond", 0): kinds, ("uncond", 0): kinds}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("loops") / "artifact"
    artifacts.export(artifacts.optimized(FORA(3)), folder)
    return duca_compile.load(folder)


def artifact_loop(artifact: Any, seed: int, label: int, steps: Sequence[int], name: str | None = None) -> list[Any]:
    latent, outputs = noise(2, 8, 8, seed=seed).numpy(), []
    for step in steps:
        with artifact.cache_context(name) if name else nullcontext():
            call = {"hidden_states": latent, "timestep": torch.tensor([990 - step]).numpy()}
            outputs.append(artifact(**call, class_labels=torch.tensor([label]).numpy()).sample)
        latent = latent * 0.9
    return outputs


@pytest.mark.slow
def test_an_artifact_tells_requests_and_passes_as_a_model_does(artifact: Any) -> None:
    alone = artifact_loop(artifact, 1, 5, range(STEPS))
    artifact.reset()
    artifact_loop(artifact, 1, 3, range(1))
    after = artifact_loop(artifact, 1, 5, range(STEPS))
    assert all(torch.equal(*map(torch.from_numpy, pair)) for pair in zip(alone, after, strict=True))
    assert [(each.step, each.pass_index) for each in artifact.history] == [(step, 0) for step in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_an_artifacts_tiles_have_their_own_caches(artifact: Any, named: bool) -> None:
    artifact.reset()
    latents, kinds = [noise(2, 8, 8, seed=i).numpy() for i in range(10)], []
    expected = [artifact_loop(artifact.session(), i, 5, range(4)) for i in range(10)] if named else None
    for step in range(4):
        for i in range(10):
            call = {"hidden_states": latents[i] * 0.9**step, "timestep": torch.tensor([990 - step]).numpy()}
            with artifact.cache_context(f"tile {i}", step_index=step) if named else nullcontext():
                output = artifact(**call, class_labels=torch.tensor([5]).numpy()).sample
            kinds.append(artifact.history[-1].kind.value[0])
            if expected is not None:
                assert abs(output - expected[i][step]).max() < 1e-5
    assert "".join(kinds) == "f" * 10 + ("r" if named else "f") * 10 + "r" * 10 + "f" * 10


@pytest.mark.slow
def test_a_gradient_through_an_artifact_is_refused(artifact: Any) -> None:
    given = artifacts.example(1)
    with pytest.raises(UsageError, match="inference only"):
        artifact(**given | {"hidden_states": given["hidden_states"].requires_grad_(True)})
