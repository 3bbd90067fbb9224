"""optimize() as a user meets it: a drop-in for a diffusers transformer, over whole denoising loops."""

import copy
import inspect
import logging
from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, DuCa, OptimizedModel, Selection, Uncached
from tests import models
from tests.unit.tracing import module

LABELS = torch.tensor([1, 2, 10, 10])


@pytest.fixture(scope="module")
def model() -> DiTTransformer2DModel:
    return build()


def build(depth: int = 3) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=depth,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()


def latent(step: int, size: int = 8, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(step))


def loop(model: nn.Module, steps: int = 8, start: int = 990) -> list[Tensor]:
    return [
        model(latent(i), timestep=torch.full((4,), start - 10 * i), class_labels=LABELS).sample for i in range(steps)
    ]


def kinds(optimized: OptimizedModel) -> str:
    return "".join(executed.kind.value[0] for executed in optimized.history)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@torch.no_grad()
def test_uncached_and_interval_one_equal_the_model_bit_for_bit(model: nn.Module) -> None:
    expected = loop(model)
    for policy in (Uncached(), DuCa(interval=1), FORA(1)):
        assert same(loop(duca_compile.optimize(model, policy, "eager")), expected)


@torch.no_grad()
def test_reuse_right_after_full_with_the_same_latent_changes_nothing(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, FORA(2), "eager")
    outputs = []
    for step in range(2):  # the gates and the caches of the second are those of the first
        with optimized.cache_context("only", step_index=step):
            outputs.append(optimized(latent(0), timestep=torch.full((4,), 500), class_labels=LABELS).sample)
    assert kinds(optimized) == "fr"
    assert torch.equal(*outputs)


@torch.no_grad()
def test_duca_takes_full_partial_and_skip_steps_and_is_finite(model: nn.Module) -> None:
    for first, expected in (("partial", "fpspfpsp"), ("skip", "fspsfsps")):
        optimized = duca_compile.optimize(model, DuCa(interval=4, fresh_ratio=0.25, first=first), "eager")
        outputs = loop(optimized)
        assert kinds(optimized) == expected
        assert all(torch.isfinite(output).all() for output in outputs)
        uncached = loop(model)
        changed = [not torch.equal(a, b) for a, b in zip(outputs, uncached, strict=True)]
        assert changed == [kind != "f" for kind in expected]


@torch.no_grad()
@pytest.mark.parametrize("selection", ["v_norm", "attention", "random"])
def test_fresh_ratio_one_recomputes_every_token(model: nn.Module, selection: str) -> None:
    """With the attention input unchanged, a partial step of all tokens is a full one up to rounding."""
    optimized = duca_compile.optimize(model, DuCa(interval=3, fresh_ratio=1.0, selection=selection), "eager")
    time = torch.full((4,), 500)
    optimized(latent(0), timestep=time, class_labels=LABELS)
    partial = optimized(latent(0), timestep=time - 1, class_labels=LABELS).sample
    reference = duca_compile.optimize(model, FORA(3), "eager")
    reference(latent(0), timestep=time, class_labels=LABELS)
    reused = reference(latent(0), timestep=time - 1, class_labels=LABELS).sample
    exact = model(latent(0), timestep=time - 1, class_labels=LABELS).sample
    assert (partial - exact).norm() < (reused - exact).norm()


@torch.no_grad()
def test_request_b_after_a_equals_b_alone(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, DuCa(interval=4, selection="random"), "eager")
    alone = loop(optimized)
    optimized.reset()
    loop(optimized, steps=3)  # abandoned in the middle; the timestep jumps back up
    assert same(loop(optimized), alone)
    loop(optimized, steps=5)
    optimized.reset()
    assert same(loop(optimized, start=600), loop(duca_compile.optimize(model, optimized.policy, "eager"), start=600))


@torch.no_grad()
def test_random_selection_depends_on_its_seed_alone(model: nn.Module) -> None:
    def run(seed: int) -> list[Tensor]:
        policy = DuCa(interval=4, fresh_ratio=0.3, selection=Selection("random", seed=seed))
        return loop(duca_compile.optimize(model, policy, "eager"))

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


@torch.no_grad()
def test_separate_guidance_passes_keep_separate_caches(model: nn.Module) -> None:
    """Two calls at each timestep, conditional and unconditional, equal two loops of their own."""

    def call(target: nn.Module, step: int, label: int) -> Tensor:
        time = torch.full((4,), 990 - 10 * step)
        return target(latent(step), timestep=time, class_labels=torch.full((4,), label)).sample

    policy = DuCa(interval=4, selection="random")
    both = duca_compile.optimize(model, policy, "eager")
    pairs = [(call(both, i, 3), call(both, i, 10)) for i in range(8)]
    for place, label in enumerate((3, 10)):
        single = duca_compile.optimize(model, policy, "eager")
        assert same([pair[place] for pair in pairs], [call(single, i, label) for i in range(8)])


@torch.no_grad()
def test_it_is_a_drop_in(model: DiTTransformer2DModel) -> None:
    optimized = duca_compile.optimize(model, "duca", "eager")
    assert isinstance(optimized, nn.Module)
    assert optimized.config is model.config
    assert optimized.dtype == model.dtype
    assert optimized.device == model.device
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert [n for n, _ in optimized.named_modules()][1:] == [n for n, _ in model.named_modules()][1:]
    time = torch.tensor([5] * 4)
    output = optimized(latent(0), timestep=time, class_labels=LABELS)
    assert type(output) is type(model(latent(0), timestep=time, class_labels=LABELS))
    as_tuple = optimized(latent(0), time, LABELS, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.sample)
    assert list(optimized.state_dict()) == list(model.state_dict())


@torch.no_grad()
def test_the_source_is_neither_modified_nor_patched() -> None:
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes, forward = set(vars(model)), type(model).forward
    loop(duca_compile.optimize(model, "duca", "eager"))
    assert set(vars(model)) == attributes
    assert type(model).forward is forward
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_weights_are_shared_with_the_source() -> None:
    model = build()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    loop(optimized, steps=1)
    torch.manual_seed(7)
    other = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    optimized.load_state_dict(other)
    assert same(loop(optimized), loop(model))
    for weight in model.parameters():
        weight.data.mul_(0.5)
    optimized.reset()
    assert same(loop(optimized), loop(model))


@torch.no_grad()
def test_another_dtype_shape_or_batch_captures_anew() -> None:
    model = build()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    loop(optimized, steps=2)
    time = torch.full((2,), 5)
    pair = optimized(latent(0, batch=2), timestep=time, class_labels=LABELS[:2]).sample
    assert torch.equal(pair, model(latent(0, batch=2), timestep=time, class_labels=LABELS[:2]).sample)
    optimized.to(torch.float64)
    assert next(model.parameters()).dtype == torch.float64
    double = optimized(latent(0).double(), timestep=torch.full((4,), 5), class_labels=LABELS).sample
    assert double.dtype == torch.float64
    assert torch.equal(double, model(latent(0).double(), timestep=torch.full((4,), 5), class_labels=LABELS).sample)


@torch.no_grad()
def test_a_bounded_number_of_shapes_is_kept(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    with caplog.at_level(logging.INFO, "duca_compile"):
        for batch in (1, 2, 3, 4, 1, 5, 1):  # the fifth shape drops the one of batch 2
            time = torch.full((batch,), 5)
            labels = torch.ones(batch, dtype=torch.int64)
            expected = model(latent(0, batch=batch), timestep=time, class_labels=labels).sample
            assert torch.equal(optimized(latent(0, batch=batch), timestep=time, class_labels=labels).sample, expected)
    messages = [r.getMessage() for r in caplog.records if r.name == "duca_compile"]
    assert sum("capturing DiTTransformer2DModel anew" in m for m in messages) == 4
    assert sum("dropping the least recently used" in m for m in messages) == 1


@torch.no_grad()
def test_two_optimized_models_of_one_source_do_not_meddle(model: nn.Module) -> None:
    policy = DuCa(interval=3, selection="random")
    alone = loop(duca_compile.optimize(model, policy, "eager"))
    left, right = (duca_compile.optimize(model, policy, "eager") for _ in range(2))
    outputs = []
    for i in range(8):
        time = torch.full((4,), 990 - 10 * i)
        outputs.append(left(latent(i), timestep=time, class_labels=LABELS).sample)
        right(latent(i + 100), timestep=time, class_labels=LABELS.flip(0))
    assert same(outputs, alone)


@torch.no_grad()
def test_changed_labels_within_a_request_are_seen(model: nn.Module) -> None:
    """Loop-invariant values are recomputed when their inputs are other tensors, or were changed in place."""
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    labels = LABELS.clone()
    for step in range(3):
        labels[0] = step
        time = torch.full((4,), 990 - 10 * step)
        expected = model(latent(step), timestep=time, class_labels=labels).sample
        assert torch.equal(optimized(latent(step), timestep=time, class_labels=labels).sample, expected)


@torch.no_grad()
def test_caches_have_the_announced_size(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, DuCa(interval=4), "eager")
    assert optimized.cache_bytes == 0
    loop(optimized)
    time = torch.full((4,), 5)
    assert (
        optimized.cache_bytes
        == duca_compile.explain(optimized, latent(0), timestep=time, class_labels=LABELS).cache_bytes
    )
    optimized.reset()
    assert optimized.cache_bytes == 0


def test_it_works_in_inference_mode(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, DuCa(interval=3, selection="random"), "eager")
    with torch.no_grad():
        expected = loop(optimized)
    optimized.reset()
    with torch.inference_mode():
        assert same(loop(optimized), expected)


@torch.no_grad()
def test_autocast_is_followed(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, FORA(1), "eager")
    plain = loop(optimized, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(loop(optimized, 1), loop(model, 1))
    assert same(loop(optimized, 1), plain)


class Shared(nn.Module):
    """Takes a second latent that a caller may pass as the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, other: Tensor) -> Tensor:
        return x + t.sin().view(-1, 1, 1) * self.mlp(x) + 2 * other


@torch.no_grad()
def test_one_tensor_passed_twice_is_still_two_arguments() -> None:
    model = Shared().eval()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    x, other = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    assert torch.equal(optimized(x, torch.ones(1), x), model(x, torch.ones(1), x))
    assert torch.equal(optimized(x, torch.zeros(1), other), model(x, torch.zeros(1), other))


@torch.no_grad()
def test_a_pass_that_joins_in_mid_request_starts_in_full(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, DuCa(interval=4), "eager")
    loop(optimized, 3)
    time, labels = torch.full((4,), 970), torch.zeros(4, dtype=torch.int64)
    joined = optimized(latent(9), timestep=time, class_labels=labels).sample
    assert torch.equal(joined, model(latent(9), timestep=time, class_labels=labels).sample)
    assert [(e.pass_index, e.kind.value) for e in optimized.history][-2:] == [(0, "skip"), (1, "full")]


class NumberTime(nn.Module):
    """Takes its timestep as a tensor or as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        gate = torch.sin(torch.as_tensor(t, dtype=torch.float32))
        return x + gate * self.mlp(x)


@torch.no_grad()
def test_a_timestep_given_as_a_number_is_one_graph_for_all_steps() -> None:
    model = NumberTime().eval()
    optimized = duca_compile.optimize(model, DuCa(interval=3, selection="random"), "eager")
    outputs = [optimized(torch.ones(1, 4, 8), 0.9 - 0.1 * step) for step in range(6)]
    assert kinds(optimized) == "fpsfps"
    assert torch.equal(outputs[3], model(torch.ones(1, 4, 8), 0.9 - 0.1 * 3))


@torch.no_grad()
def test_torch_compile_around_it_changes_nothing(model: nn.Module) -> None:
    policy = DuCa(interval=3)
    expected = loop(duca_compile.optimize(model, policy, "eager"), steps=4)
    optimized = duca_compile.optimize(model, policy, "eager")
    assert same(loop(torch.compile(optimized), steps=4), expected)
    assert kinds(optimized) == "fpsf"


def test_deepcopy_of_the_source_is_independent(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    optimized = duca_compile.optimize(model, "duca", "eager")
    loop(optimized, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def positions_of_caches(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor, cache_position: Tensor) -> Tensor:
    return self.inner(x * cache_position, timestep, text)


def first_tokens(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor, tokens_1: Tensor) -> Tensor:
    return self.inner(x * tokens_1, timestep, text)


def wide_timestep(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor, timestep_float32: Tensor) -> Tensor:
    return self.inner(x * timestep_float32, timestep, text)


@torch.no_grad()
@pytest.mark.parametrize("forward", [positions_of_caches, first_tokens, wide_timestep])
def test_arguments_may_have_the_names_of_our_own_inputs(forward: Callable[..., Tensor]) -> None:
    """They would be taken for caches and the like, and every step would be full, without a word."""
    given = models.example()
    *_, name = inspect.signature(forward).parameters
    model = module(forward, inner=models.build())
    optimized = duca_compile.optimize(model, DuCa(interval=3), "eager")
    for step in range(4):
        call = given | {"timestep": given["timestep"] - step, name: torch.full((2, 1, 1), 0.9)}
        output = optimized(**call)
    assert torch.equal(output, model(**call))
    assert kinds(optimized) == "fpsf"
