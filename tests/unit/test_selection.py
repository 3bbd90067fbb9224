"""Which tokens a partial step recomputes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duca_compile.errors import PolicyError
from duca_compile.policies import Selection
from duca_compile.policies.base import SelectionKind
from duca_compile.runtime.arrays import NumpyArrays
from duca_compile.runtime.selection import TokenSelector, TokenSet, check_grid
from duca_compile.runtime.torch.arrays import TorchArrays

BATCH, TOKENS = 2, 16
CPU = TorchArrays(torch.device("cpu"))


def selector(
    selection: Selection,
    branches: int = 1,
    batch: int = BATCH,
    tokens: int = TOKENS,
    grid: tuple[int, ...] | None = None,
) -> TokenSelector:
    return TokenSelector(selection, [TokenSet(batch, tokens, grid)] * branches, CPU)


def scored(selection: Selection, *scores: Tensor, grid: tuple[int, ...] | None = None) -> TokenSelector:
    made = selector(selection, len(scores), *scores[0].shape, grid)
    made.refresh(dict(enumerate(scores)))
    return made


@given(scores=st.permutations(range(TOKENS)), count=st.integers(1, TOKENS))
def test_the_highest_scores_come_first_row_by_row(scores: list[int], count: int) -> None:
    rows = torch.tensor([scores, scores[::-1]], dtype=torch.float32) - 9.5  # scores of value norms are negative too
    (index,) = scored(Selection("v_norm"), rows).select([0], [count], 3)
    assert index.dtype is torch.int64
    assert index.shape == (2, count)
    assert torch.equal(index, rows.sort(dim=-1, descending=True).indices[:, :count])


def test_with_the_scores_of_value_norms_the_smallest_norm_comes_first() -> None:
    """The scores are sums over heads of 1 - norm."""
    value = torch.randn(BATCH, 3, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    norms = value.norm(dim=-1)
    (index,) = scored(Selection("v_norm"), (1 - norms).sum(1)).select([0], [5], 3)
    assert torch.equal(index, norms.sum(1).topk(5, largest=False).indices)


def test_scores_are_weighed_relative_to_their_norm() -> None:
    """A factor on the scores changes nothing, so staleness weighs the same in every layer."""
    scores = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(0))
    selection = Selection("attention", staleness=0.25)
    small, large = scored(selection, scores), scored(selection, 1000 * scores)
    for _ in range(5):
        assert torch.equal(small.select([0], [4], 3)[0], large.select([0], [4], 3)[0])


def test_staleness_lets_every_token_win_in_time() -> None:
    scores = torch.linspace(1, 2, TOKENS).expand(BATCH, -1)
    stale = scored(Selection("attention", staleness=0.25), scores)
    fixed = scored(Selection("attention"), scores)
    seen = [stale.select([0], [2], 3)[0] for _ in range(16)]
    assert all(torch.cat(seen, -1)[row].unique().numel() == TOKENS for row in range(BATCH))
    assert {tuple(fixed.select([0], [2], 3)[0][0].tolist()) for _ in range(16)} == {(15, 14)}


def test_staleness_adds_its_weight_for_each_step_over_the_interval() -> None:
    """Normalised scores 0.8 and 0.6: the lower one wins once 0.25 * steps / 2 exceeds 0.2, at the third choice."""
    chosen = scored(Selection("attention", staleness=0.25), torch.tensor([[0.8, 0.6]]))
    assert [chosen.select([0], [1], 2)[0].item() for _ in range(4)] == [0, 0, 1, 0]
    slower = scored(Selection("attention", staleness=0.25), torch.tensor([[0.8, 0.6]]))
    assert [slower.select([0], [1], 4)[0].item() for _ in range(6)] == [0, 0, 0, 0, 1, 0]


def test_a_shared_choice_goes_by_the_mean_of_the_normalised_scores() -> None:
    """The mean of (0.6, 0.8, 0) and (1, 0, 0): the first token leads, the second comes next in both branches."""
    scores = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[7.0, 0.0, 0.0]])
    shared = scored(Selection("attention", shared=True), *scores)
    assert [index.tolist() for index in shared.select([0, 1], [2, 1], 3)] == [[[0, 1]], [[0]]]
    own = scored(Selection("attention"), *scores)
    assert [index.tolist() for index in own.select([0, 1], [1, 1], 3)] == [[[1]], [[0]]]


def test_a_full_step_makes_every_token_fresh() -> None:
    scores = torch.tensor([[0.8, 0.6]])
    chosen = scored(Selection("attention", staleness=0.25), scores)
    for _ in range(3):
        assert [chosen.select([0], [1], 2)[0].item() for _ in range(2)] == [0, 0]
        chosen.refresh({0: scores})


def test_only_the_chosen_tokens_of_each_branch_become_fresh() -> None:
    """Two branches choose 1 and 3 tokens at once: what only the longer one needs stays stale in the shorter."""
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    chosen = scored(Selection("attention", staleness=10.0), scores, scores)
    one, three = (set() for _ in range(2))
    for _ in range(4):
        a, b = chosen.select([0, 1], [1, 3], 1)
        assert (a.shape, b.shape) == ((1, 1), (1, 3))
        one |= set(a[0].tolist())
        three |= set(b[0].tolist())
    assert one == three == {0, 1, 2, 3}
    staleness = chosen._groups[0]._staleness
    expected = staleness.clone() + 1
    a, b = chosen.select([0, 1], [1, 3], 1)
    expected[0, 0, a[0]] = 0
    expected[1, 0, b[0]] = 0
    assert torch.equal(staleness, expected)


def test_branches_that_are_not_asked_keep_their_state() -> None:
    scores = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(0))
    chosen = scored(Selection("attention", staleness=0.25), scores, scores, scores)
    chosen.select([0, 2], [4, 4], 3)
    staleness = chosen._groups[0]._staleness
    assert staleness[1].eq(0).all()
    assert staleness[[0, 2]].sum() == 2 * BATCH * (TOKENS - 4)


def test_branches_over_other_tokens_choose_on_their_own() -> None:
    """Image and text branches in turn: each gets indices of its own range, in the order asked for."""
    chosen = TokenSelector(Selection("attention"), [TokenSet(BATCH, 16), TokenSet(BATCH, 5), TokenSet(BATCH, 16)], CPU)
    chosen.refresh({0: torch.arange(16.0).expand(BATCH, -1), 1: -torch.arange(5.0).expand(BATCH, -1), 2: None})
    image, text = chosen.select([0, 1], [2, 3], 3)
    assert image[0].tolist() == [15, 14]
    assert text[0].tolist() == [0, 1, 2]
    assert chosen.select([1, 2], [0, 4], 3)[1].shape == (BATCH, 4)


def test_a_branch_without_scores_is_chosen_by_staleness_alone() -> None:
    chosen = selector(Selection("v_norm", staleness=0.25), branches=2)
    chosen.refresh({0: torch.rand(BATCH, TOKENS), 1: None})
    seen = torch.cat([chosen.select([1], [4], 3)[0] for _ in range(4)], -1)
    assert torch.equal(seen.sort(-1).values, torch.arange(TOKENS).expand(BATCH, -1))


class TestPatchBonus:
    def test_favours_the_best_token_of_each_patch(self) -> None:
        """A 4x4 grid in 2x2 patches, scores rising: the last token of each patch wins over all others."""
        scores = torch.arange(1.0, 17.0)[None]
        chosen = scored(Selection("attention", patch_bonus=5.0, patch=2), scores, grid=(4, 4))
        assert chosen.select([0], [5], 3)[0].tolist() == [[15, 13, 7, 5, 14]]

    def test_multiplies_by_one_plus_the_bonus(self) -> None:
        """One patch of four, best 3 and second 2.9 against a lone patch-best 1.5: 1.5 * (1 + 1) is enough, 0.9 not."""
        row = torch.full((16,), 0.1)
        row[[0, 1, 10]] = torch.tensor([3.0, 2.9, 1.5])
        order = [
            scored(Selection("attention", patch_bonus=bonus, patch=2), row[None], grid=(4, 4))
            .select([0], [3], 3)[0]
            .tolist()
            for bonus in (1.0, 0.9)
        ]
        assert order == [[[0, 10, 1]], [[0, 1, 10]]]

    def test_lowers_a_negative_score_as_in_the_released_code(self) -> None:
        scores = -torch.arange(1.0, 17.0)[None]
        penalised = scored(Selection("v_norm", patch_bonus=8.5, patch=4), scores, grid=(4, 4))
        order = penalised.select([0], [16], 3)[0][0].tolist()
        assert order == [1, 2, 3, 4, 5, 6, 7, 8, 0, *range(9, 16)], "-1 became -9.5"

    def test_is_given_in_each_frame_of_a_grid_of_any_sides(self) -> None:
        """Two frames of 2 x 6 in 2x2 patches: the bonus lifts the best of each of the six patches over all others."""
        scores = torch.rand(1, 24, generator=torch.Generator().manual_seed(0)) + 1
        chosen = scored(Selection("attention", patch_bonus=5.0, patch=2), scores, grid=(2, 2, 6))
        best = set()
        for frame in range(2):
            for column in (0, 2, 4):
                patch = [12 * frame + 6 * row + column + i for row in range(2) for i in range(2)]
                best.add(max(patch, key=lambda token: float(scores[0, token])))
        assert set(chosen.select([0], [6], 3)[0][0].tolist()) == best

    def test_is_none_for_tokens_that_lie_nowhere(self) -> None:
        scores = torch.arange(1.0, 17.0)[None]
        plain, text = (scored(Selection("attention", patch_bonus=bonus), scores) for bonus in (0.0, 5.0))
        assert torch.equal(plain.select([0], [5], 3)[0], text.select([0], [5], 3)[0])

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (TokenSet(2, 16), "layout of the 16 tokens, which this model's graph does not show; say Selection"),
            (TokenSet(2, 15, (3, 5)), "that 2x2 patches tile, and the grid of the 15 tokens is 3 x 5"),
            (TokenSet(2, 24, (3, 2, 4)), None),
            (TokenSet(2, 24, (4, 2, 3)), "that 2x2 patches tile, and the grid of the 24 tokens is 4 x 2 x 3"),
            (TokenSet(2, 16, (4, 6)), r"grid=\(4, 6\) has 24 places, and the model has 16 tokens"),
        ],
    )
    def test_needs_a_known_grid_that_patches_tile(self, tokens: TokenSet, message: str | None) -> None:
        check_grid(Selection("random", patch=2), tokens)  # without a bonus any tokens will do
        if message is None:
            check_grid(Selection("random", patch_bonus=0.5, patch=2), tokens)
            return
        with pytest.raises(PolicyError, match=message):
            check_grid(Selection("random", patch_bonus=0.5, patch=2), tokens)


class TestRandom:
    def draws(self, seed: int = 0, batch: int = 4, steps: int = 3, shared: bool = False) -> list[list[Tensor]]:
        chosen = selector(Selection("random", seed=seed, shared=shared), 2, batch, 64)
        chosen.refresh({0: None, 1: None})
        return [chosen.select([0, 1], [5, 9], 3) for _ in range(steps)]

    def test_is_the_same_for_the_same_seed_and_different_for_another(self) -> None:
        first, again, other = self.draws(), self.draws(), self.draws(seed=1)
        assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
        assert not torch.equal(first[0][0], other[0][0])

    def test_is_the_same_in_every_row_of_the_batch(self) -> None:
        for index in (index for step in self.draws() for index in step):
            assert torch.equal(index, index[:1].expand_as(index))

    def test_differs_between_steps_and_between_branches(self) -> None:
        (a0, b0), (a1, _), _ = self.draws()
        assert not torch.equal(a0, a1)
        assert not torch.equal(a0, b0[:, :5])

    def test_one_choice_serves_all_branches_where_it_is_shared(self) -> None:
        (a0, b0), (a1, b1), _ = self.draws(shared=True)
        assert not torch.equal(a0, a1)
        assert torch.equal(a0, b0[:, :5])
        assert torch.equal(a1, b1[:, :5])
        assert Selection("random").shared
        assert not Selection("v_norm").shared

    def test_draws_distinct_tokens_as_many_as_asked_for(self) -> None:
        for first, second in self.draws():
            assert [first.shape, second.shape] == [(4, 5), (4, 9)]
            assert first[0].unique().numel() == 5
            assert second[0].unique().numel() == 9

    def test_does_not_disturb_the_global_generator(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        self.draws()
        assert torch.equal(torch.rand(3), expected)

    def test_ignores_scores(self) -> None:
        chosen = selector(Selection("random"), batch=1, tokens=64)
        chosen.refresh({0: torch.arange(64.0)[None]})
        assert chosen.select([0], [4], 3)[0].tolist() != [[63, 62, 61, 60]]


@given(
    kind=st.sampled_from(["v_norm", "attention", "random"]),
    staleness=st.sampled_from([0.0, 0.25]),
    bonus=st.sampled_from([0.0, 0.8]),
    shared=st.booleans(),
    seed=st.integers(0, 5),
)
def test_numpy_and_torch_choose_the_same(
    kind: SelectionKind, staleness: float, bonus: float, shared: bool, seed: int
) -> None:
    """What runs an artifact has no torch, and is to choose the tokens that the optimized model chooses."""
    selection = Selection(kind, staleness, bonus, seed=seed, shared=shared)
    random = np.random.default_rng(seed)
    tokens = [TokenSet(BATCH, TOKENS, (4, 4))] * 2
    pair = [TokenSelector(selection, tokens, arrays) for arrays in (CPU, NumpyArrays())]
    for _ in range(3):
        scores = random.standard_normal((2, BATCH, TOKENS), np.float32)
        pair[0].refresh({i: torch.from_numpy(scores[i]) for i in range(2)})
        pair[1].refresh({i: scores[i] for i in range(2)})
        for counts in ([3, 3], [5, 2]):
            tensors, arrays = (each.select([0, 1], counts, 3) for each in pair)
            for tensor, array in zip(tensors, arrays, strict=True):
                assert tensor.dtype is torch.int64
                assert array.dtype == np.int64
                assert np.array_equal(tensor.numpy(), array)
