"""Variants under torch.compile: one graph each, the eager results, no recompilation after warm-up."""

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, DuCa, Linear, Policy, TaylorSeer
from tests.test_optimize import build, kinds, loop


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(depth=2)


def graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def close(left: list[Tensor], right: list[Tensor]) -> bool:
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(left, right, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [
        FORA(3),
        # Token counts that differ by block and from step to step: 0, 1, 2, ... of 16 tokens.
        DuCa(
            interval=4,
            fresh_ratio=0.5,
            selection="random",
            step_factor=Linear(0.0, 1.0),
            block_factor=Linear(0.5, 1.0),
        ),
        DuCa(interval=3, fresh_ratio=0.25, selection="v_norm"),
    ],
    ids=["fora", "duca, counts that vary", "duca, v_norm"],
)
def test_compiled_variants_agree_with_eager_ones_and_compile_once(model: nn.Module, policy: Policy) -> None:
    eager = duca_compile.optimize(model, policy, "eager", 16)
    expected = loop(eager, 16)
    optimized = duca_compile.optimize(model, policy, "inductor", 16, strict=True)
    before = graphs_compiled()
    assert close(loop(optimized, 16), expected)
    assert kinds(optimized) == kinds(eager)
    assert graphs_compiled() > before
    optimized.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert close(loop(optimized, 16), expected)


@torch.no_grad()
@pytest.mark.parametrize("lite", [False, True])
def test_forecasts_are_two_graphs_for_all_distances_and_orders(model: nn.Module, lite: bool) -> None:
    policy = TaylorSeer(interval=5, max_order=2, lite=lite)
    expected = loop(duca_compile.optimize(model, policy, "eager"), 16)
    optimized = duca_compile.optimize(model, policy, "inductor", strict=True)
    torch._dynamo.reset()
    before = graphs_compiled()
    loop(optimized, 3)  # two full steps, and a forecast
    assert graphs_compiled() == before + 2
    optimized.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert close(loop(optimized, 16), expected)
    assert "".join(executed.kind.letter for executed in optimized.history) == "FFTTTT" + "FTTTT" * 2


@torch.no_grad()
def test_weights_stay_shared_under_inductor() -> None:
    model = build(depth=2)
    optimized = duca_compile.optimize(model, FORA(2), "inductor", strict=True)
    loop(optimized, 4)
    for weight in model.parameters():
        weight.data.mul_(0.5)
    optimized.reset()
    assert close(loop(optimized, 4), loop(duca_compile.optimize(model, FORA(2), "eager"), 4))


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    model = build(depth=2).to("cuda")
    optimized = duca_compile.optimize(model, DuCa(interval=3), "inductor", 8, strict=True)
    for step in range(8):
        time = torch.full((4,), 900 - step, device="cuda")
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        output = optimized(torch.randn(4, 3, 8, 8, device="cuda"), timestep=time, class_labels=labels).sample
        assert torch.isfinite(output).all()
