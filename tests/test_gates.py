"""SeaCache and EasyCache: what is measured, what is decided and what cheap steps yield, against loops by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import DuCa, EasyCache, PolicyError, SeaCache
from duca_compile.policies import Policy
from tests.artifacts import distance, export, loop, optimized, tiny_dit
from tests.support import Shared
from tests.test_models import loop as calls
from tests.test_models import sample
from tests.zoo import ZOO

STEPS = 12
DIT = Shared(tiny_dit())


def letters(made: Any) -> str:
    return "".join(each.kind.letter for each in made.history)


def wiener(value: Tensor, grid: tuple[int, ...], level: float, exponent: float) -> Tensor:
    """The filter by FFT, (rows, tokens, channels)."""
    s = min(max(level, 1e-6), 1 - 1e-6)
    gain = torch.ones(grid, dtype=torch.float64)
    for axis, size in enumerate(grid):
        power = 1 / (torch.fft.fftfreq(size).double().abs() ** exponent + 1e-16)
        along = (1 - s) * power / ((1 - s) ** 2 * power + s**2 + 1e-16)
        gain = gain * along.reshape([-1 if other == axis else 1 for other in range(len(grid))])
    gain = gain / gain.mean()
    axes = tuple(range(1, 1 + len(grid)))
    spectrum = torch.fft.fftn(value.double().unflatten(1, grid), dim=axes)
    return torch.fft.ifftn(spectrum * gain[..., None], dim=axes).real.flatten(1, len(grid))


@torch.no_grad()
def read_by(model: nn.Module, module: nn.Module, arguments: dict[str, Any]) -> Tensor:
    found = list[Tensor]()
    hook = module.register_forward_hook(
        lambda _, args, kwargs, out: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(**arguments)
    hook.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "policy", "path", "grid"),
    [
        ("DiT", SeaCache(1e9, exponent=2.0), "transformer_blocks.0.attn1", None),
        ("FLUX", SeaCache(1e9, pure_noise=1.0), "transformer_blocks.0.attn", 2),
        ("Wan", SeaCache(1e9, exponent=3.0), "blocks.0.attn1", None),
    ],
)
def test_the_change_is_that_of_the_input_filtered_by_fft(
    name: str, policy: SeaCache, path: str, grid: int | None
) -> None:
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(2)
    model.eval()
    tokens = read_by(model, model.get_submodule(path), arguments).shape[1]
    if grid is not None:
        policy = SeaCache(1e9, pure_noise=1.0, grid=(grid, tokens // grid))
    fast = Shared(model).optimized(policy, 8)
    before = None
    for step, each in enumerate(calls(ZOO[name], arguments)):
        sample(fast(**each))
        (compiled,) = fast._compiled.values()
        sizes = policy.grid or compiled.facts.grids[tokens]
        value = read_by(model, model.get_submodule(path), each)
        level = float(each[ZOO[name].timestep].flatten()[0]) / policy.pure_noise
        now = wiener(value, sizes, level, policy.exponent)
        if before is not None:
            expected = (now - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)
            assert fast.history[step].measured == pytest.approx(expected.tolist(), rel=2e-4)
        before = now
    assert letters(fast) == "FSSSSSSF"
    assert len(sizes) == (3 if name == "Wan" else 2)


def test_a_grid_that_is_missing_or_wrong_is_refused() -> None:
    torch.manual_seed(0)
    model, arguments = ZOO["FLUX"].build(2)
    shared = Shared(model.eval())
    for policy, reason in (
        (SeaCache(), r"SeaCache needs the grid of the \d+ tokens, which the graph does not show; pass grid="),
        (SeaCache(grid=(3, 100)), r"grid=\(3, 100\) has 300 places, and there are \d+ tokens"),
    ):
        with pytest.raises(PolicyError, match=reason):
            shared.optimized(policy, 8)(**arguments)


def mean(value: Tensor) -> Tensor:
    return value.abs().flatten(1).mean(1)


def by_hand(model: Any, run: Callable[[Any], list[Tensor]], policy: EasyCache, total: int) -> tuple[list[Tensor], str]:
    """The loop with EasyCache around the model, and its steps; the largest change of a row decides."""
    old = dict[str, Tensor]()
    kinds, gate = list[str](), 0.0

    def step(**arguments: Any) -> Any:
        nonlocal gate
        x, index = arguments["hidden_states"].clone(), len(kinds)
        full = index < policy.first_full_steps or index == total - 1
        if "x before" in old:
            gate += float((old["rate"] * mean(x - old["x before"]) / mean(old["v"])).max()) if "rate" in old else 0.0
        old["x before"] = x
        if full or gate >= policy.threshold:
            out = model(**arguments)
            v = sample(out)[0]
            if "v" in old:
                old["rate"] = mean(v - old["v"]) / mean(x - old["x"])
            old["x"], old["v"], gate = x, v.clone(), 0.0
            kinds.append("F")
            return out
        kinds.append("S")
        return type("Output", (), {"sample": x + (old["v"] - old["x"])})()

    return run(step), "".join(kinds)


def dit_loop(model: Any) -> list[Tensor]:
    return loop(model, 2, seed=5, steps=STEPS)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_easycache_is_the_loop_by_hand(threshold: float) -> None:
    policy = EasyCache(threshold, first_full_steps=3)
    fast = DIT.optimized(policy, STEPS)
    found = dit_loop(fast)
    wanted, kinds = by_hand(DIT.model, dit_loop, policy, STEPS)
    assert letters(fast) == kinds
    assert {"F", "S"} == set(kinds[3:-1]) or threshold == 0.5
    assert distance(wanted, found) < 1e-5
    latent = 2 * 2 * 8 * 8 * 4
    assert fast.cache_bytes == 3 * latent + 2 * 4, "the latent twice, the output, and a number for each row"


@torch.no_grad()
def test_a_skipped_step_runs_nothing_of_the_model() -> None:
    fast = DIT.optimized(EasyCache(1e9, first_full_steps=2), STEPS)
    dit_loop(fast)
    assert letters(fast) == "FF" + "S" * (STEPS - 3) + "F"
    assert {each.flops for each in fast.history if each.kind.letter == "S"} == {0}


@torch.no_grad()
def test_a_latent_that_is_changed_in_place_does_not_change_what_is_kept() -> None:
    fast, other = (DIT.optimized(EasyCache(1e9, first_full_steps=2, last_full=False), STEPS) for _ in range(2))
    for step in range(4):
        x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        arguments = {"timestep": torch.full((2,), 900 - 50 * step), "class_labels": torch.arange(2)}
        kept = x.clone()
        one = fast(hidden_states=x, **arguments).sample
        x.zero_()
        one_before = one.clone()
        one.zero_()
        assert torch.equal(other(hidden_states=kept, **arguments).sample, one_before)


def test_an_output_of_another_shape_is_refused() -> None:
    torch.manual_seed(0)
    model, arguments = ZOO["PixArt"].build(2)
    shapes = sample(model.eval()(**arguments))[0].shape, arguments["hidden_states"].shape
    assert shapes[0] != shapes[1]
    with pytest.raises(PolicyError, match=r"must return one tensor of the latent's shape and type, .*; it returns"):
        Shared(model).optimized(EasyCache(), 8)(**arguments)


@torch.no_grad()
@pytest.mark.parametrize("policy", [SeaCache(0.4), EasyCache(0.3, first_full_steps=2)], ids=["SeaCache", "EasyCache"])
def test_rows_decide_for_themselves(policy: Any) -> None:
    alone = type(policy)(policy.threshold, decide_per="row")
    fast = DIT.optimized(alone, STEPS)
    together = loop(fast, 3, seed=5, steps=STEPS)
    rows = [each.rows for each in fast.history]
    first = DIT.optimized(alone, STEPS)
    assert distance(loop(first, 3, seed=5, steps=STEPS), together) == 0.0
    assert len(rows[0]) == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(SeaCache(0.4), id="SeaCache"),
        pytest.param(EasyCache(0.3, 2), id="EasyCache", marks=pytest.mark.slow),
    ],
)
def test_an_artifact_decides_alike(policy: Policy, tmp_path: Path) -> None:
    fast = optimized(policy, DIT.model, STEPS)
    export(fast, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    wanted = loop(fast, 3, seed=5, steps=STEPS)
    assert distance(wanted, loop(artifact, 3, seed=5, steps=STEPS)) < 1e-4
    assert letters(artifact) == letters(fast)
    assert "FSF" in letters(fast) or "SF" in letters(fast)
    for one, other in zip(fast.history, artifact.history, strict=True):
        assert one.measured == pytest.approx(other.measured, rel=1e-3)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("policy", [SeaCache(0.4), EasyCache(0.3, 2)], ids=["SeaCache", "EasyCache"])
def test_compiled_steps_agree_with_eager_ones(policy: Policy) -> None:
    eager, compiled = (DIT.optimized(policy, STEPS, backend) for backend in ("eager", "inductor"))
    assert distance(dit_loop(eager), dit_loop(compiled)) < 1e-4
    assert letters(eager) == letters(compiled)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: EasyCache(first_full_steps=1),
            "first_full_steps=1 is invalid: it must be a whole",
        ),
        (lambda: EasyCache(-1), "threshold=-1 is invalid"),
        (lambda: EasyCache(decide_per="all"), "decide_per='all' is unknown"),  # type: ignore[arg-type]
        (lambda: SeaCache(pure_noise=0), "pure_noise=0 is invalid"),
        (lambda: SeaCache(grid=(4,)), r"grid=\(4,\) is invalid"),
        (lambda: SeaCache(last_full=1), "last_full=1 is invalid"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], DuCa], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        make()
