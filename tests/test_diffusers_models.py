"""Transformers of diffusers, tiny and with random weights: found without a word about any of them."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import duca_compile
from duca_compile import DuCa
from duca_compile.policies import StepKind
from tests import zoo

BLOCKS = 4


@dataclass(frozen=True)
class Expected:
    """What the architecture has: branches by kind, and whether partial steps recompute tokens of its MLPs."""

    build: zoo.Build
    kinds: dict[str, int]
    partial: bool = True


SELF, CROSS, MLP, BOTH = "self_attention", "cross_attention", "mlp", "attention+mlp"
MODELS = {
    "PixArt": Expected(zoo.pixart, {SELF: BLOCKS, CROSS: BLOCKS, MLP: BLOCKS}),
    # The text stream ends in the joint attentions: with those cached nothing reads it.
    "SD3": Expected(zoo.stable_diffusion_3, {SELF: BLOCKS, MLP: BLOCKS}),
    "SD3, dual attention": Expected(zoo.stable_diffusion_3_dual, {SELF: BLOCKS + BLOCKS // 2, MLP: BLOCKS}),
    # Image and text in each double block, both at once in each single block.
    "FLUX": Expected(zoo.flux, {SELF: 2 * BLOCKS, MLP: 2 * BLOCKS, BOTH: BLOCKS}),
    # Its MLP reads the stream with the attention added, so each block is one branch.
    "AuraFlow": Expected(zoo.auraflow, {BOTH: 2 * BLOCKS + BLOCKS}, partial=False),
    "Wan": Expected(zoo.wan, {SELF: BLOCKS, CROSS: BLOCKS, MLP: BLOCKS}),
    "LTX-Video": Expected(zoo.ltx_video, {SELF: BLOCKS, CROSS: BLOCKS, MLP: BLOCKS}),
    # Linear attention without an attention operator, and a convolutional MLP: both mix tokens.
    "Sana": Expected(zoo.sana, {"mixing": 2 * BLOCKS, CROSS: BLOCKS}, partial=False),
    "QwenImage": Expected(zoo.qwen_image, {SELF: BLOCKS, MLP: BLOCKS}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_is_captured_understood_and_run(name: str) -> None:
    torch.manual_seed(0)
    expected = MODELS[name]
    model, arguments = expected.build(BLOCKS)
    model.eval()
    optimized = duca_compile.optimize(model, DuCa(interval=3, fresh_ratio=0.5), "eager")
    assert torch.equal(optimized(**arguments)[0], model(**arguments)[0])
    found = duca_compile.explain(optimized, **arguments)
    assert Counter(branch.kind for branch in found.branches) == expected.kinds
    assert (found.facts.latent, found.facts.timestep) == ("hidden_states", "timestep")
    planned = {step.kind: step for step in found.schedule(num_inference_steps=3).steps}
    assert planned[StepKind.SKIP].flops <= 0.1 * found.flops
    assert (planned[StepKind.PARTIAL].fresh_share == 0.5) == expected.partial
    for step in range(1, 6):
        arguments["timestep"] = arguments["timestep"] * (1 - 0.1 * step)
        assert torch.isfinite(optimized(**arguments)[0]).all()
    assert "".join(e.kind.value[0] for e in optimized.history) == "fpsfps"
