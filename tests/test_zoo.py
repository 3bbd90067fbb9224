"""The zoo itself: its models run in plain eager, and its data names arguments that matter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.zoo import ZOO, plain_dit, plain_dit_by_hand


@torch.no_grad()
def sample(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    """The denoised sample; Z-Image gives a list."""
    return tree_leaves(model(**arguments)[0])


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_it_runs_and_reads_its_latent_and_timestep(name: str) -> None:
    torch.manual_seed(0)
    entry = ZOO[name]
    model, arguments = entry.build(2)
    model.eval()
    first = sample(model, arguments)
    assert all(torch.isfinite(tensor).all() for tensor in first)
    assert same(first, sample(model, arguments))
    for key in (entry.latent, entry.timestep):
        changed = tree_map(lambda tensor: (tensor * 0.5).to(tensor.dtype), arguments[key])
        assert not same(first, sample(model, {**arguments, key: changed}))


@pytest.mark.parametrize("name", ZOO)
def test_depth_is_the_number_of_blocks(name: str) -> None:
    entry = ZOO[name]
    sizes = [sum(weight.numel() for weight in entry.build(depth)[0].parameters()) for depth in (2, 4, 6)]
    assert sizes[0] < sizes[1] < sizes[2]
    for branches in zip(*(entry.streams(depth).values() for depth in (2, 4, 6)), strict=True):
        assert branches[0] < branches[1]
        assert branches[2] - branches[1] == branches[1] - branches[0]


def test_attention_by_hand_is_the_same_function() -> None:
    torch.manual_seed(0)
    fused, arguments = plain_dit(2)
    written, _ = plain_dit_by_hand(2)
    written.load_state_dict(fused.state_dict())
    assert torch.allclose(fused(**arguments), written(**arguments), atol=1e-5)
