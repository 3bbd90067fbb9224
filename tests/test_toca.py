"""ToCa: scores of real maps, both halves of guidance, the grid that a graph shows, and whole loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import DuCa, Explanation, PolicyError, Selection, ToCa, published
from duca_compile.policies import StepKind
from tests.support import Shared
from tests.test_models import sample
from tests.zoo import ZOO


def build(name: str, depth: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(depth)
    return model.eval(), arguments


def explained(name: str) -> Explanation:
    model, arguments = build(name)
    return duca_compile.explain(model, **arguments)


GRIDS = {
    "DiT": {16: (4, 4)},
    "PixArt": {16: (4, 4)},
    "SD3": {64: (8, 8)},
    "Wan": {32: (2, 4, 4)},
    "HunyuanVideo": {32: (2, 4, 4)},
    "Latte": {16: (4, 4)},
    "plain DiT": {16: (4, 4)},
    "FLUX": {},
}


@pytest.mark.parametrize("name", GRIDS)
def test_how_tokens_lie_is_what_the_graph_shows(name: str) -> None:
    assert explained(name).facts.grids == GRIDS[name]


def test_a_patch_bonus_where_the_graph_shows_no_grid_is_refused_until_it_is_given() -> None:
    found = explained("FLUX")
    with pytest.raises(PolicyError, match="layout of the 16 tokens, which this model's graph does not show"):
        found.schedule(ToCa(selection=Selection("attention", patch_bonus=0.6)), 4)
    found.schedule(ToCa(selection=Selection("attention", patch_bonus=0.6, grid=(4, 4))), 4)
    with pytest.raises(PolicyError, match="that 3x3 patches tile, and the grid of the 16 tokens is 4 x 4"):
        explained("DiT").schedule(ToCa(selection=Selection("attention", patch_bonus=0.6, patch=3)), 4)


def test_entropy_needs_a_cross_attention_and_pairs_an_even_batch() -> None:
    with pytest.raises(PolicyError, match="selection='entropy' needs a cross-attention"):
        explained("DiT").schedule(ToCa(selection="entropy"), 4)
    model, arguments = build("PixArt")
    rows = {n: v[:1] if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with pytest.raises(PolicyError, match=r"paired=True treats the two halves .* the batch size is 1"):
        duca_compile.explain(model, **rows).schedule(published("toca", "pixart"), 20)


class Maps:
    """Records the weights of every attention of a diffusers model, mean over heads, as it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Tensor] = []
        fused = torch.nn.functional.scaled_dot_product_attention

        def recorded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
            logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            logits = logits if attn_mask is None else logits + attn_mask
            self.found.append(logits.softmax(-1).mean(1))
            return fused(query, key, value, attn_mask=attn_mask, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)


def entropies(weights: Tensor) -> Tensor:
    """1 + H of each query, over the norm of a row, as the released code has it."""
    score = 1 - (weights * (weights + 1e-7).log()).sum(-1)
    return score / score.norm(dim=-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("paired", [False, True])
def test_cross_attention_that_is_most_spread_out_is_refreshed(monkeypatch: pytest.MonkeyPatch, paired: bool) -> None:
    """By hand, of the maps of the plain model: on pairs, of the mean of both halves."""
    model, arguments = build("PixArt")
    policy = ToCa(4, 0.4, Selection("entropy", paired=paired), kind_factor={"mlp": 1.0, "cross_attention": 1.0})
    optimized = duca_compile.optimize(model, policy, "eager")
    optimized(**arguments)
    (state,) = [s for states in optimized._requests.current()._states.values() for s in states.values()]
    maps = Maps(monkeypatch)
    model(**arguments)
    weights = maps.found[1]  # behind the self-attention's
    weights = weights.mean(0, keepdim=True).expand_as(weights) if paired else weights
    (scores,) = [group._scores for group in state.selector._groups]  # type: ignore[union-attr]
    for own in scores:
        torch.testing.assert_close(own, entropies(weights), rtol=1e-5, atol=0)
    chosen = state.selector.select([0, 1], [6, 6], 4)  # type: ignore[union-attr]
    for indices in chosen:
        assert torch.equal(indices, entropies(weights).topk(6).indices)
        assert torch.equal(indices[0], indices[1]) == paired


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "v_norm", "entropy", "random"])
def test_a_request_does_not_depend_on_others_in_its_batch(kind: Any) -> None:
    """Rows 0 and 2 are both halves of one request, 1 and 3 those of another."""
    model, arguments = build("PixArt", depth=2)
    shared = Shared(model)
    policy = ToCa(
        4, 0.3, Selection(kind, staleness=0.25, paired=True), kind_factor={"mlp": 1.0, "cross_attention": 1.0}
    )

    def call(step: int, rows: list[int]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        latent = torch.randn(2, 4, 8, 8, generator=generator)
        latent = torch.cat([latent, latent])
        text = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(99))
        time = torch.full((len(rows),), 900.0 - 20 * step)
        return arguments | {"hidden_states": latent[rows], "encoder_hidden_states": text[rows], "timestep": time}

    together = shared.optimized(policy, None)
    found = [sample(together(**call(step, [0, 1, 2, 3])))[0] for step in range(6)]
    for rows in ([0, 2], [1, 3]):
        alone = shared.optimized(policy, None)
        for step in range(6):
            (expected,) = sample(alone(**call(step, rows)))
            assert (found[step][rows] - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        ("PixArt", published("toca", "pixart"), "FPPPFPFPPFPPFPPFPPFP"),
        ("PixArt", published("duca", "pixart"), "FPSFPSFPSFPSFPSFPSFP"),
        ("FLUX", published("toca", "flux"), "FFFPPPFPPPFPPPFPPPFP"),
        ("HunyuanVideo", published("duca", "hunyuanvideo"), "FPSPSFPSPSFPSPSFPSPS"),
    ],
)
def test_published_settings_run_on_the_models_that_they_are_for(name: str, policy: Any, expected: str) -> None:
    model, arguments = build(name)
    optimized = duca_compile.optimize(model, policy, "eager", 20)
    for step in range(20):
        time = arguments["timestep"]
        moved = time - 10 * step if time.max() > 1 else time * (1 - step / 20)
        (output,) = sample(optimized(**arguments | {"timestep": moved}))
        assert torch.isfinite(output).all()
    assert "".join(executed.kind.letter for executed in optimized.history) == expected
    assert StepKind.PARTIAL in {executed.kind for executed in optimized.history}


@torch.no_grad()
def test_all_tokens_fresh_is_reused_attention_alone() -> None:
    """With a ratio of one, ToCa's and DuCa's partial steps agree, whatever the scores say."""
    model, arguments = build("DiT", depth=2)
    shared = Shared(model)
    policies = [ToCa(3, 1.0), ToCa(3, 1.0, Selection("random")), DuCa(3, 1.0, "v_norm")]
    optimized = [shared.optimized(policy, None) for policy in policies]
    for step in range(2):
        call = arguments | {"timestep": arguments["timestep"] - step}
        outputs = [sample(each(**call))[0] for each in optimized]
        assert all((a - outputs[0]).norm() <= 1e-6 * outputs[0].norm() for a in outputs)
