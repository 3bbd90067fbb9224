"""MagCache: published schedules, ratios measured on a model's own loop, and skip steps that add what blocks added."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import MagCache, PolicyError, UsageError, published, residual_ratios
from duca_compile.policies import StepKind
from tests.artifacts import distance, export, loop, optimized, tiny_dit

STEPS = 12


def full(policy: Any, total: int) -> list[int]:
    return [i for i, step in enumerate(policy.steps(total)) if step.kind is StepKind.FULL]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [0, 1, 2, 5, 9, 11, 17, 23, 26]),
        ({"always_full": ()}, [0, 1, 2, 5, 9, 15, 21, 26]),
        (
            {"threshold": 0.06, "max_cached_steps": 3, "first_share": 0.2, "always_full": ()},
            [0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 21, 24, 26, 27],
        ),
    ],
)
def test_full_steps_on_flux_are_the_published_ones(settings: dict[str, Any], steps: list[int]) -> None:
    assert full(published("magcache", "flux", **settings), 28) == steps


def test_other_lengths_take_the_nearest_ratios() -> None:
    policy = MagCache((1.0, 1.0, 1.5, 1.0), threshold=0.1, max_cached_steps=9, first_share=0.0)
    assert full(policy, 4) == [0, 2]
    assert full(policy, 10) == [0, 5, 6, 7], "places 0 0 1 1 1 2 2 2 3 3"
    assert full(policy, 1) == [0]
    assert full(MagCache((1.0,), first_share=0.0), 6) == [0, 4], "three skips at most"
    with pytest.raises(PolicyError, match="MagCache's schedule depends on the number of steps"):
        next(iter(policy.steps(None)))


class Growing(nn.Module):
    """What its one branch adds is ``1.2 ** step`` times a vector; the timestep is 100 less the step."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.branch, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        stream = self.into(x)
        size = torch.pow(torch.full_like(timestep, 1.2), 100 - timestep)[:, None, None]
        return self.out(stream + size * self.branch(stream))  # type: ignore[no-any-return]


@torch.no_grad()
def growing(model: Any, number: int) -> list[Tensor]:
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(number))
    return [model(x=x, timestep=torch.full((2,), 100.0 - step)) for step in range(STEPS)]


def test_ratios_are_those_of_the_residual() -> None:
    ratios = residual_ratios(Growing().eval(), growing, loops=2)
    assert ratios == pytest.approx([1.0, *[1.2] * (STEPS - 1)], rel=1e-5)
    with pytest.raises(UsageError, match="must run one denoising loop of at least two steps"):
        residual_ratios(Growing().eval(), lambda model, number: None)


def dit_loop(model: Any, number: int) -> list[Tensor]:
    return loop(model, 2, seed=number, steps=STEPS)


def test_ratios_of_a_model_are_those_by_hand() -> None:
    """From hooks around the blocks of the model itself."""
    model = tiny_dit()
    seen, changes = list[Tensor](), list[Tensor]()
    blocks = model.transformer_blocks
    hooks = [
        blocks[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True),
        blocks[-1].register_forward_hook(lambda module, args, output: changes.append(output - seen[-1])),
    ]
    dit_loop(model, 0)
    for hook in hooks:
        hook.remove()
    lengths = [change.double().norm(dim=-1) for change in changes]
    wanted = [1.0, *(float((now / before).mean()) for before, now in pairwise(lengths))]
    assert residual_ratios(model, dit_loop) == pytest.approx(wanted, rel=1e-5)


def by_hand(model: nn.Module, kinds: str) -> list[Tensor]:
    """The loop with the model itself, whose last block's result is replaced in skip steps."""
    blocks, step, start, change = model.transformer_blocks, 0, Tensor(), Tensor()

    def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal start
        start = args[0]

    def ends(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal step, change
        change = output - start if kinds[step] == "F" else change
        step += 1
        return start + change

    hooks = [
        blocks[0].register_forward_pre_hook(begins, with_kwargs=True),
        blocks[-1].register_forward_hook(ends),
    ]
    outputs = dit_loop(model, 3)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
def test_a_skip_step_adds_what_the_blocks_added_and_an_artifact_does_so_too(tmp_path: Path) -> None:
    model = tiny_dit()
    policy = MagCache(residual_ratios(model, dit_loop), threshold=0.5, max_cached_steps=2)
    fast = optimized(policy, model, STEPS)
    found = dit_loop(fast, 3)
    kinds = "".join(each.kind.letter for each in fast.history)
    assert [i for i, kind in enumerate(kinds) if kind == "F"] == full(policy, STEPS)
    assert "FS" in kinds
    assert fast.cache_bytes == 2 * 16 * 16 * 4, "one tensor: 2 rows of 16 tokens of width 16"
    assert distance(found, by_hand(model, kinds)) < 1e-5
    export(fast, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    assert distance(found, dit_loop(artifact, 3)) < 1e-4
    assert [each.kind for each in artifact.history] == [each.kind for each in fast.history]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ratios": ()}, "measure them with residual_ratios"),
        ({"ratios": (1.0, -1.0)}, r"ratios\[1\]=-1.0 is invalid"),
        ({"ratios": (1.0,), "max_cached_steps": 0}, "max_cached_steps=0 is invalid"),
        ({"ratios": (1.0,), "first_share": 1.5}, "first_share=1.5 is invalid"),
        ({"ratios": (1.0,), "always_full": (1,)}, r"always_full\[0\]=1 is invalid"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        MagCache(**settings)
