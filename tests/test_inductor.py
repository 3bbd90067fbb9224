"""Variants under torch.compile: one graph each, the eager results, no recompilation after warm-up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.compile_fx import compile_fx

import duca_compile
from duca_compile import FORA, DuCa, Linear, Policy, TaylorSeer, UsageError
from duca_compile.backends.cuda_graphs import GraphReplay
from duca_compile.backends.inductor import private
from duca_compile.runtime.torch.rows import Rows
from tests.test_optimize import build, kinds, loop

# Token counts that differ by block and from step to step: 0, 1, 2, ... of 16 tokens.
VARYING = DuCa(
    interval=4, fresh_ratio=0.5, selection="random", step_factor=Linear(0.0, 1.0), block_factor=Linear(0.5, 1.0)
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(depth=2)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each graph that is compiled, by the number of its inputs."""
    found: list[int] = []

    def counted(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.append(len(inputs))
        return compile_fx(module, inputs)

    monkeypatch.setattr(private, "compile_fx", counted)
    return found


def close(left: list[Tensor], right: list[Tensor]) -> bool:
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(left, right, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(FORA(3), marks=pytest.mark.slow),
        VARYING,
        DuCa(interval=3, fresh_ratio=0.25, selection="v_norm"),
    ],
    ids=["fora", "duca, counts that vary", "duca, v_norm"],
)
def test_compiled_variants_agree_with_eager_ones_and_compile_once(
    model: nn.Module, policy: Policy, compilations: list[int]
) -> None:
    eager = duca_compile.optimize(model, policy, "eager", 16)
    expected = loop(eager, 16)
    optimized = duca_compile.optimize(model, policy, "inductor", 16, strict=True)
    assert close(loop(optimized, 16), expected)
    assert kinds(optimized) == kinds(eager)
    specs = {spec for each in optimized._compiled.values() for spec in each.programs.by_spec}
    assert len(compilations) == len(specs)
    optimized.reset()
    assert close(loop(optimized, 16), expected)
    assert len(compilations) == len(specs)


@pytest.mark.slow
@torch.no_grad()
def test_what_repeats_from_block_to_block_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    work: list[list[int]] = []  # evaluations of regions, and kernels
    evaluate = private.registered_hop_fake_fns[private._REGION]

    def evaluated(*arguments: Any) -> Any:
        work[-1][0] += 1
        return evaluate(*arguments)

    def measured(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        regions = [each for each in module.children() if isinstance(each, fx.GraphModule)]
        sizes.append([len(each.graph.nodes) for each in (module, *regions)])
        work.append([0, 0])
        metrics.reset()
        with inductor_config.patch(force_disable_caches=True):
            compiled = compile_fx(module, inputs)
        work[-1][1] = metrics.generated_kernel_count
        return compiled

    monkeypatch.setattr(private, "compile_fx", measured)
    monkeypatch.setitem(private.registered_hop_fake_fns, private._REGION, evaluated)
    policy = DuCa(interval=2, fresh_ratio=0.25)
    for depth in (4, 8):
        deep = build(depth=depth)
        found = loop(duca_compile.optimize(deep, policy, "inductor", strict=True), 2)
        assert close(found, loop(duca_compile.optimize(deep, policy, "eager"), 2))
    full, partial = sizes[::2], sizes[1::2]
    for (shallow, *one), (deeper, *same) in (full, partial):
        assert len(one) == 1
        assert one == same, "one region, whatever the depth"
        assert deeper - shallow < 4 * one[0], "four more blocks are four more calls, and what is done for all tokens"
    assert work[0] == work[2]
    assert [work[3][0] - work[1][0], work[3][1] - work[1][1]] == [0, 4], "what is more are the writes of four blocks"
    assert all(0 < evaluations < 4 for evaluations, _ in work)


@torch.no_grad()
@pytest.mark.parametrize("policy", [DuCa(interval=3, fresh_ratio=0.25), TaylorSeer(interval=3, max_order=1)])
def test_after_a_warm_up_nothing_is_compiled_and_no_request_is_touched(
    model: nn.Module, policy: Policy, compilations: list[int]
) -> None:
    optimized = duca_compile.optimize(model, policy, "inductor", strict=True)
    timestep, classes = torch.full((4,), 500), torch.zeros(4, dtype=torch.int64)
    optimized.warm_up(torch.randn(4, 3, 8, 8), timestep=timestep, class_labels=classes)
    assert len(compilations) == len({step.kind for step in policy.steps(8)})
    assert optimized.history == ()
    assert optimized.cache_bytes == 0
    before = len(compilations)
    assert close(loop(optimized, 8), loop(duca_compile.optimize(model, policy, "eager"), 8))
    assert len(compilations) == before


@torch.no_grad()
def test_timesteps_that_are_known_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    compute, compute_all = Rows.compute, Rows.compute_all

    def one(self: Rows, call: Any, hoisted: Any) -> Any:
        counts.append(1)
        return compute(self, call, hoisted)

    def several(self: Rows, call: Any, hoisted: Any, times: tuple[float, ...]) -> Any:
        counts.append(len(times))
        return compute_all(self, call, hoisted, times)

    model = build(depth=2)
    optimized = duca_compile.optimize(model, "none", "inductor", strict=True)
    first = loop(optimized, 6)
    optimized.reset()
    monkeypatch.setattr(Rows, "compute", one)
    monkeypatch.setattr(Rows, "compute_all", several)
    assert close(loop(optimized, 6), first)
    assert counts == [6], "the second request's timesteps are those of the first"


@torch.no_grad()
@pytest.mark.parametrize("lite", [False, True])
def test_forecasts_are_two_graphs_for_all_distances_and_orders(
    model: nn.Module, lite: bool, compilations: list[int]
) -> None:
    policy = TaylorSeer(interval=5, max_order=2, lite=lite)
    expected = loop(duca_compile.optimize(model, policy, "eager"), 16)
    optimized = duca_compile.optimize(model, policy, "inductor", strict=True)
    loop(optimized, 3)  # two full steps, and a forecast
    assert len(compilations) == 2
    optimized.reset()
    assert close(loop(optimized, 16), expected)
    assert len(compilations) == 2
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


def test_replayed_steps_keep_their_buffers_and_hand_out_copies() -> None:
    """With a stand-in for a CUDA graph, which fills the tensors of the recording anew at each replay."""
    recorded: list[tuple[Tensor, ...]] = []

    def record(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        results = run()
        recorded.append(results)

        def replay() -> None:
            for held, new in zip(results, run(), strict=True):
                held.copy_(new)

        return replay, results

    def step(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, cache.add_(x.sum())

    replayed = GraphReplay(step, record)
    cache, outputs = torch.zeros(3), []
    for number in range(1, 4):
        before = cache.clone()
        output, new = replayed(torch.full((2,), float(number)), cache)
        assert torch.equal(cache, before), "the caller's cache is not written to"
        cache = new
        outputs.append(output)
    assert [output.tolist() for output in outputs] == [[2, 2], [4, 4], [6, 6]], "later replays leave them alone"
    assert cache.tolist() == [12, 12, 12]
    assert len(recorded) == 1
    replayed(torch.ones(5), cache)
    assert len(recorded) == 2, "other shapes are another recording"


@torch.no_grad()
def test_the_mode_is_no_other_on_a_cpu(model: nn.Module) -> None:
    optimized = duca_compile.optimize(model, FORA(2), "inductor", strict=True, mode="reduce-overhead")
    assert close(loop(optimized, 4), loop(duca_compile.optimize(model, FORA(2), "eager"), 4))
    for backend, mode in (("eager", "reduce-overhead"), ("inductor", "fast")):
        with pytest.raises(UsageError, match=f"mode='{mode}' is unknown to backend='{backend}'"):
            duca_compile.optimize(model, backend=backend, mode=mode)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu(mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    model = build(depth=2).to("cuda")
    optimized = duca_compile.optimize(model, DuCa(interval=3), "inductor", 8, strict=True, mode=mode)
    for step in range(8):
        time = torch.full((4,), 900 - step, device="cuda")
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        output = optimized(torch.randn(4, 3, 8, 8, device="cuda"), timestep=time, class_labels=labels).sample
        assert torch.isfinite(output).all()
