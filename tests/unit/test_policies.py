"""Which step is of which kind, how many tokens a partial step recomputes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duca_compile.errors import PolicyError
from duca_compile.policies import (
    FORA,
    DuCa,
    Interval,
    Linear,
    Policy,
    ResidualGate,
    Selection,
    SpeCa,
    Step,
    StepKind,
    TaylorSeer,
    ToCa,
    TokenQuery,
    Uncached,
    published,
)

LETTERS = {StepKind.FULL: "F", StepKind.PARTIAL: "C", StepKind.SKIP: "A", StepKind.REUSE: "R", StepKind.FORECAST: "T"}


def schedule(policy: Policy, total: int | None = 50) -> str:
    """One letter per step: Full, Conservative, Aggressive, Reuse, Taylor."""
    return "".join(LETTERS[step.kind] for step in islice(policy.steps(total), total or 50))


def duca(interval: int, latched: bool = True) -> Policy:
    return published("duca", "dit", interval=interval, latched=latched)


def test_uncached_is_all_full() -> None:
    assert schedule(Uncached(), 7) == "F" * 7
    assert schedule(Uncached(), None) == "F" * 50
    assert Uncached().selection is None


@pytest.mark.parametrize(("interval", "full"), [(3, 18), (4, 14), (5, 11), (6, 10)])
def test_fora_runs_as_many_full_steps_as_its_published_flops_say(interval: int, full: int) -> None:
    """23.74 TFLOPs over 50 full steps against 8.56, 6.66, 5.24 and 4.76 for these intervals."""
    assert schedule(published("fora", "dit", interval=interval)).count("F") == full


def test_fora_on_dit_counts_down_so_the_first_two_steps_are_full() -> None:
    assert schedule(published("fora", "dit", interval=3)) == "F" + "FRR" * 16 + "F"
    assert schedule(FORA(3), 8) == "FRRFRRFR", "counting up"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (duca(3), "FCACFFCACFCACFCACFCFACFACFACFACFCFCFCFCFCFCFCFCFCF"),
        (duca(3, latched=False), "FCACCFCACFCACFCACACFACFACFACFACFCFCFCFCFCFCFCFCFCF"),
        (duca(4), "FFCACACFCFACACFACACFCFCACFCACFCACFCFCFCFCFCFACFACF"),
    ],
    ids=["N=3", "N=3 as released", "N=4"],
)
def test_duca_on_dit_runs_the_recorded_steps(policy: Policy, expected: str) -> None:
    assert schedule(policy) == expected


def test_the_released_code_runs_the_first_block_of_a_mixed_step_in_full() -> None:
    """At s = 45 and 32, counted down: a full step that stops being one after its first block."""
    steps = list(duca(3, latched=False).steps(50))
    assert [49 - i for i, step in enumerate(steps) if step.leading_full] == [45, 32]
    assert {step.leading_full for step in steps} == {0, 1}
    assert not any(step.leading_full for step in duca(3).steps(50))


def test_a_default_duca_needs_no_number_of_steps() -> None:
    assert schedule(DuCa(), None) == "FCACA" * 10


@given(length=st.integers(1, 12), total=st.integers(1, 60), first=st.sampled_from(["partial", "skip"]))
def test_partial_and_skip_steps_alternate_between_full_ones(length: int, total: int, first: Any) -> None:
    steps = list(DuCa(length, first=first).steps(total))
    assert len(steps) == total
    cached = [StepKind.PARTIAL, StepKind.SKIP] if first == "partial" else [StepKind.SKIP, StepKind.PARTIAL]
    for index, step in enumerate(steps):
        residue = index % length
        assert step.kind is (cached[(residue - 1) % 2] if residue else StepKind.FULL)
        assert step.interval == length


def test_taylorseer_starts_with_full_steps_and_then_counts_the_interval() -> None:
    released = published("taylorseer", "dit", interval=4, max_order=2)
    assert schedule(released) == "F" + "FTTT" * 12 + "F", "the recorded one"
    assert schedule(TaylorSeer(6, first_full_steps=3), 20) == "FFFTTTTTFTTTTTFTTTTT"
    assert schedule(TaylorSeer(5, first_full_steps=1), None) == "FTTTT" * 10
    assert schedule(released).replace("T", "R") == schedule(published("fora", "dit", interval=4))


@given(length=st.integers(1, 12), first=st.integers(1, 5), total=st.integers(1, 60))
def test_full_steps_of_taylorseer(length: int, first: int, total: int) -> None:
    full = [step.kind is StepKind.FULL for step in TaylorSeer(length, first_full_steps=first).steps(total)]
    assert full == [i < first or (i - first + 1) % length == 0 for i in range(total)]


@pytest.mark.parametrize(("interval", "full"), [(4, 17), (5, 14), (6, 13), (7, 14)])
def test_toca_on_dit_runs_as_many_full_steps_as_published(interval: int, full: int) -> None:
    assert schedule(published("toca", "dit", interval=interval)).count("F") == full


@pytest.mark.parametrize(
    ("family", "interval", "total", "mixed"),
    [("dit", 3, 50, [4, 17]), ("dit", 4, 50, [7, 19, 41]), ("pixart", 3, 20, [4])],
)
def test_where_the_released_toca_runs_a_full_step_in_its_first_block_alone(
    family: str, interval: int, total: int, mixed: list[int]
) -> None:
    """On DiT at 45 and 32 of 50 steps counted down for N=3, and at 42, 30 and 8 for N=4; on PixArt at 4, counted up."""
    released = list(published("toca", family, interval=interval, latched=False).steps(total))
    assert [i for i, step in enumerate(released) if step.leading_full] == mixed
    latched = list(published("toca", family, interval=interval).steps(total))
    assert all(latched[i].kind is StepKind.FULL and released[i].kind is StepKind.PARTIAL for i in mixed)


def test_toca_is_partial_between_full_steps() -> None:
    assert schedule(ToCa(3), None) == ("FCC" * 17)[:50]
    assert schedule(published("toca", "flux"), 12) == "FFFCCCFCCCFC", "three full steps, then every fourth"
    assert ToCa().selection == Selection("attention", staleness=0.25)
    assert ToCa(selection=Selection("random")).selection == Selection("random")


@given(length=st.integers(1, 12), first=st.integers(1, 5), total=st.integers(1, 60))
def test_the_first_steps_of_an_interval_may_all_be_full(length: int, first: int, total: int) -> None:
    full = [moment.residue == 0 for moment in Interval(length, first_full=first).moments(total)]
    assert full == [i < first or (i - first + 1) % length == 0 for i in range(total)]


@given(length=st.integers(1, 12), total=st.integers(1, 60))
def test_descending_schedules_are_anchored_at_the_last_step(length: int, total: int) -> None:
    kinds = [step.kind for step in FORA(Interval(length, descending=True)).steps(total)]
    full = [index == 0 or (total - 1 - index) % length == 0 for index in range(total)]
    assert [kind is StepKind.FULL for kind in kinds] == full
    assert kinds[-1] is StepKind.FULL


@pytest.mark.parametrize(
    "policy", [FORA(1), DuCa(1), DuCa(1, first="skip"), published("fora", "dit", interval=1), TaylorSeer(1)]
)
def test_an_interval_of_one_is_all_full(policy: Policy) -> None:
    assert schedule(policy) == "F" * 50


@pytest.mark.parametrize(
    "interval", [Interval(3, descending=True), Interval(3, factor=Linear(1.0)), Interval(3, forced=(0.2, 0.4, 2))]
)
def test_a_schedule_that_needs_the_number_of_steps_says_so(interval: Interval) -> None:
    for policy in (FORA(interval), DuCa(interval)):
        with pytest.raises(PolicyError, match="num_inference_steps"):
            next(policy.steps(None))


def test_a_full_step_sets_the_interval_that_follows() -> None:
    """N=4 over 0.8 + 0.4 x, counting up: 5 after the first step, 4 after those at x = 0.25, 0.4, 0.6 and 0.8."""
    interval = Interval(4, factor=Linear(0.8, 0.4))
    residues = [moment.residue for moment in interval.moments(20)]
    assert residues == [0, 1, 2, 3, 4, 0, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


class TestFreshTokens:
    def count(self, policy: Policy, step: Step, block: int = 0, blocks: int = 28, kind: str = "mlp") -> int:
        return policy.fresh_tokens(step, TokenQuery(block, blocks, kind, 256))

    @pytest.mark.parametrize("block", [0, 13, 27])
    @pytest.mark.parametrize("countdown", [36, 24, 10, 1])
    def test_follow_the_published_factors(self, block: int, countdown: int) -> None:
        policy = published("duca", "dit", interval=3, fresh_ratio=0.05)
        step = list(policy.steps(50))[49 - countdown]
        ratio = 0.05 * (3 - 4 * countdown / 50) * (0.8 + 0.4 * block / 27) * 2.5
        assert self.count(policy, step, block) == int(ratio * 256)

    @pytest.mark.parametrize("blocks", [28, 4])
    @pytest.mark.parametrize("index", [1, 11, 19])
    def test_of_toca_on_pixart_follow_the_step_the_layer_and_the_module(self, blocks: int, index: int) -> None:
        """The depth is the model's, whatever it is."""
        policy = published("toca", "pixart")
        step = Step(StepKind.PARTIAL, 3, list(policy.steps(20))[index].ratio)
        for block in range(blocks):
            for kind, factor in (("mlp", 1.6), ("cross_attention", 0.6)):
                ratio = 0.3 * (1.9 - 1.8 * index / 20) * (1.6 - 1.2 * block / (blocks - 1)) * factor
                assert self.count(policy, step, block, blocks, kind) == int(min(1.0, ratio) * 256)

    def test_of_the_first_quarter_are_none(self) -> None:
        policy = published("duca", "dit", interval=3)
        early = [self.count(policy, step, block=27) for step in list(policy.steps(50))[:12]]
        assert early == [0] * 12

    def test_default_to_a_share_of_the_mlp_tokens_alone(self) -> None:
        policy = DuCa(interval=3, fresh_ratio=0.1)
        step = Step(StepKind.PARTIAL, 3, 0.1)
        counts = {kind: self.count(policy, step, kind=kind) for kind in ("mlp", "cross_attention", "attention+mlp")}
        assert counts == {"mlp": 25, "cross_attention": 0, "attention+mlp": 0}

    def test_never_exceed_the_tokens_nor_fall_below_none(self) -> None:
        policy = DuCa(fresh_ratio=1.0, block_factor=Linear(-1.0, 5.0), kind_factor={"mlp": 3.0})
        step = Step(StepKind.PARTIAL, 3, 1.0)
        assert [self.count(policy, step, block) for block in (0, 27)] == [0, 256]

    def test_of_a_single_block_use_its_first_factor(self) -> None:
        policy = DuCa(fresh_ratio=0.5, block_factor=Linear(1.0, 9.0))
        assert self.count(policy, Step(StepKind.PARTIAL, 3, 0.5), blocks=1) == 128

    def test_are_none_without_partial_steps(self) -> None:
        assert self.count(FORA(), Step(StepKind.REUSE, 3)) == 0


REFUSED: list[tuple[Callable[[], Any], str]] = [
    *((lambda v=v, make=make: make(v), f"interval={v!r} is invalid: it must be a whole number of at least 1")
      for make in (DuCa, FORA, Interval) for v in (0, -3, True, 2.5, nan, "3", None)),
    *((lambda v=v: DuCa(fresh_ratio=v), f"fresh_ratio={v!r} is invalid") for v in (-0.1, 1.01, nan, inf, True, "1")),
    *((lambda v=v: DuCa(kind_factor={"mlp": v}), f"kind_factor['mlp']={v!r} is invalid") for v in (-1, nan, None)),
    *((lambda v=v: Selection("random", staleness=v), f"staleness={v!r} is invalid") for v in (-0.25, nan, inf)),
    *((lambda v=v: Selection("random", patch_bonus=v), f"patch_bonus={v!r} is invalid") for v in (-1, nan)),
    *((lambda v=v: Selection("random", patch=v), f"patch={v!r} is invalid") for v in (0, -2, 2.0, False)),
    *((lambda v=v: Selection("random", seed=v), f"seed={v!r} is invalid") for v in (-1, 0.5)),
    *((lambda v=v: Linear(v), f"start={v!r} is invalid") for v in (nan, inf, "1")),
    (lambda: Linear(1.0, nan), "slope=nan is invalid"),
    (lambda: Interval(3, factor=Linear(1.0, -1.0)), "factor=Linear(start=1.0, slope=-1.0) is invalid"),
    (lambda: Interval(3, factor=Linear(0.0, 1.0)), "factor=Linear(start=0.0, slope=1.0) is invalid"),
    (lambda: Interval(3, forced=(-0.1, 0.4, 2)), "forced[0]=-0.1 is invalid"),
    (lambda: Interval(3, forced=(0.1, nan, 2)), "forced[1]=nan is invalid"),
    (lambda: Interval(3, forced=(0.1, 0.4, 0)), "forced[2]=0 is invalid"),
    (lambda: DuCa(selection="norm"), "selection='norm' is unknown; choose one of ('v_norm', 'attention', 'entropy', "
     "'random')"),
    (lambda: DuCa(selection=None), "selection=None is unknown"),
    (lambda: Selection("norm"), "selection='norm' is unknown"),
    (lambda: DuCa(first="full"), "first='full' is unknown; choose 'partial' or 'skip'"),
    (lambda: published("duca", "flux"), "there are no published settings for duca/flux, only for ['duca/dit', "
     "'duca/hunyuanvideo', 'duca/pixart', 'easycache/hunyuanvideo', "),
    (lambda: Interval(3, first_full=0), "first_full=0 is invalid"),
    (lambda: Interval(3, descending=True, first_full=2), "first_full=2 is invalid with descending=True"),
    (lambda: Selection("random", grid=(16,)), "grid=(16,) is invalid: it is (height, width) or "),
    (lambda: Selection("random", grid=(4, 0)), "grid[1]=0 is invalid"),
    (lambda: Selection("entropy", paired="yes"), "paired='yes' is invalid"),
    (lambda: ToCa(interval=0), "interval=0 is invalid"),
    (lambda: ToCa(fresh_ratio=2), "fresh_ratio=2 is invalid"),
    (lambda: ToCa(kind_factor={"attention": 1.0}), "kind_factor names 'attention'; only ('mlp', 'cross_attention')"),
    *((lambda v=v: SpeCa(max_order=v), f"max_order={v!r} is invalid") for v in (-1, 5, 1.0)),
    *((lambda v=v: SpeCa(base_threshold=v), f"base_threshold={v!r} is invalid") for v in (-0.1, nan, inf)),
    *((lambda v=v: SpeCa(decay_rate=v), f"decay_rate={v!r} is invalid") for v in (-0.1, 1.5, nan)),
    (lambda: SpeCa(min_threshold=-1), "min_threshold=-1 is invalid"),
    (lambda: SpeCa(min_taylor_steps=-1), "min_taylor_steps=-1 is invalid"),
    (lambda: SpeCa(max_taylor_steps=0), "max_taylor_steps=0 is invalid"),
    (lambda: SpeCa(first_full_steps=0), "first_full_steps=0 is invalid"),
    (lambda: SpeCa(compat="code"), "compat='code' is unknown; choose 'paper' or 'released'"),
    (lambda: SpeCa(verify_of="head"), "verify_of='head' is unknown; choose 'stream' or 'branch'"),
    (lambda: SpeCa(decide_per="sample"), "decide_per='sample' is unknown; choose 'batch', 'row' or 'pair'"),
    (lambda: SpeCa(compat="released", decide_per="row"), "compat='released' takes one error for the whole batch"),
    (lambda: ResidualGate(threshold=-1), "threshold=-1 is invalid"),
    (lambda: ResidualGate(probe="head"), "probe='head' is unknown; choose 'modulated' or 'first_block'"),
    (lambda: ResidualGate(cached="all"), "cached='all' is unknown; choose one of ['branches', 'change', 'forecast']"),
    (lambda: ResidualGate(coefficients=(1.0, nan)), "coefficients[1]=nan is invalid"),
    (lambda: ResidualGate(max_order=9), "max_order=9 is invalid"),
    (lambda: ResidualGate(max_cached_steps=0), "max_cached_steps=0 is invalid"),
    (lambda: ResidualGate(accumulate=1), "accumulate=1 is invalid: it must be True or False"),
    (lambda: ResidualGate(decide_per="half"), "decide_per='half' is unknown"),
    (lambda: published("speca", "dit", interval=3), "published('speca', 'dit'): "),
    *((lambda v=v: TaylorSeer(v), f"interval={v!r} is invalid: it must be a whole number of at least 1")
      for v in (0, True, 2.5, Interval(3))),
    *((lambda v=v: TaylorSeer(max_order=v), f"max_order={v!r} is invalid: it must be a whole number from 0 to 4")
      for v in (-1, 5, True, 1.0, None)),
    *((lambda v=v: TaylorSeer(first_full_steps=v), f"first_full_steps={v!r} is invalid") for v in (0, -1, 1.5)),
    (lambda: TaylorSeer(lite="no"), "lite='no' is invalid: it must be True or False"),
    (lambda: published("taylorseer", "dit", lite=True), "published('taylorseer', 'dit'): "),
    (lambda: published("taylor", "dit"), "there are no published settings for taylor/dit"),
    (lambda: published("fora", "dit", fresh_ratio=0.1), "published('fora', 'dit'): "),
    (lambda: published("duca", "dit", interval=0), "interval=0 is invalid"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_impossible_settings_are_refused_by_name_and_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        make()
    assert message in str(refused.value)


def test_numbers_of_numpy_are_numbers() -> None:
    policy = DuCa(np.int64(4), np.float32(0.25))
    assert schedule(policy, 8) == "FCACFCAC"


def test_published_names_are_not_case_sensitive() -> None:
    assert published("DuCa", "DiT") == published("duca", "dit")


def test_policies_are_values() -> None:
    assert DuCa(3) == DuCa(Interval(3))
    assert DuCa(selection="random") == DuCa(selection=Selection("random"))
    assert DuCa(3).selection == Selection("random")
    assert [p.name for p in (DuCa(4), FORA(Interval(6)), Uncached())] == ["DuCa (N=4)", "FORA (N=6)", "uncached"]
    seers = [TaylorSeer(6, 1), TaylorSeer(lite=True)]
    adaptive = [ToCa(3), SpeCa(), SpeCa(4, 0.3, compat="released"), ResidualGate(0.2)]
    assert [p.name for p in adaptive] == [
        "ToCa (N=3)",
        "SpeCa (threshold 0.1, order 2)",
        "SpeCa (threshold 0.3, order 4, as released)",
        "residual gate (modulated, threshold 0.2, change)",
    ]
    assert [p.name for p in seers] == ["TaylorSeer (N=6, order 1)", "TaylorSeer lite (N=5, order 2)"]
    with pytest.raises(AttributeError):
        DuCa().interval = 3  # type: ignore[misc]
