"""Whole variants against results computed by hand, and what every variant keeps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import models
import pytest
import torch
from models import BATCH, TOKENS, WIDTH
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tracing import COMPUTE, PARTIAL, REUSE, Runner, caches, distinct_indices, module

from duca_compile.core.fx_utils import op_name
from duca_compile.core.ports import STREAM_END, Port, PortKind
from duca_compile.core.variants import Action

Structure = Callable[[], nn.Module]


@pytest.fixture(scope="module")
def run() -> Runner:
    return Runner(models.build(models.CrossBlock), **models.example())


def everywhere(run: Runner, pick: Callable[[str], Action]) -> list[Action]:
    return [pick(b.kind) for b in run.facts.branches]


def partial(kind: str) -> Action:
    return REUSE if kind == "self_attention" else PARTIAL


def chosen_tokens(run: Runner, counts: dict[int, int]) -> dict[str, Tensor]:
    return {f"tokens_{i}": distinct_indices(BATCH, TOKENS, k, seed=i) for i, k in counts.items()}


def test_full_is_the_model_bit_for_bit(run: Runner) -> None:
    for seed, timestep in ((0, 7.0), (1, 2.0)):
        call = models.example(seed, timestep)
        assert torch.equal(run.run(run.variant(COMPUTE), call)["output_0"], run.model(**call))


@pytest.mark.parametrize("skip", [False, True])
def test_reuse_after_full_with_the_same_inputs_is_the_model_bit_for_bit(run: Runner, skip: bool) -> None:
    call = models.example()
    full = run.run(run.variant(COMPUTE), call)
    reused = run.run(run.variant(REUSE, skip=skip), call, **caches(full))
    assert torch.equal(reused["output_0"], run.model(**call))
    if not skip:
        assert torch.equal(reused["stream_end"], full["stream_end"])


def test_partial_of_all_tokens_with_the_same_inputs_is_the_model(run: Runner) -> None:
    call = models.example()
    full = run.run(run.variant(COMPUTE), call)
    spec = everywhere(run, partial)
    counts = {i: TOKENS for i, action in enumerate(spec) if action is PARTIAL}
    again = run.run(run.variant(*spec), call, **caches(full), **chosen_tokens(run, counts))
    for name in ("output_0", "stream_end", *(f"branch_{i}" for i in counts)):
        torch.testing.assert_close(again[name], full[name], rtol=0, atol=1e-5)


class ByHand:
    """The CrossBlock model step by step, branch outputs given or computed: the reference for any mix of actions."""

    def __init__(self, model: nn.Module, actions: list[Action], cached: dict[str, Tensor], index: dict[str, Tensor]):
        self.model, self.actions, self.cached, self.index = model, actions, cached, index
        self.cores: list[Tensor] = []

    def core(self, body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        place = len(self.cores)
        action, cache = self.actions[place], self.cached[f"cache_branch_{place}"]
        core = cache if action is REUSE else body(x)
        if action is PARTIAL:
            chosen = torch.zeros(BATCH, TOKENS, 1, dtype=torch.bool)
            chosen[torch.arange(BATCH)[:, None], self.index[f"tokens_{place}"]] = True
            core = torch.where(chosen, core, cache)
        self.cores.append(core)
        return core

    def __call__(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        model = self.model
        condition = F.silu(model.embed_t(models.embed(timestep, WIDTH)))
        text = F.gelu(model.embed_text(text))
        x = model.embed_x(x) + model.position
        for block in model.blocks:
            parts = block.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
            x = x + gate_a * self.core(lambda s: block.attention(block.norm(s) * (1 + scale_a) + shift_a), x)  # noqa: B023
            x = x + self.core(lambda s: block.cross(s, text), x)  # noqa: B023
            x = x + gate_m * self.core(lambda s: block.mlp(block.norm(s) * (1 + scale_m) + shift_m), x)  # noqa: B023
        return model.head(x * (1 + model.head_modulation(condition)[:, None]))


MIXES: dict[str, tuple[list[Action], dict[int, int]]] = {
    "all reused": ([REUSE] * 6, {}),
    "only cross-attention": ([REUSE, PARTIAL, REUSE] * 2, {1: 3, 4: 3}),
    "another count in each layer": ([REUSE, REUSE, PARTIAL] * 2, {2: 1, 5: 9}),
    "every pointwise branch": ([REUSE, PARTIAL, PARTIAL] * 2, {1: 2, 2: 5, 4: 7, 5: 16}),
    "the first block in full": ([COMPUTE] * 3 + [REUSE, PARTIAL, PARTIAL], {4: 4, 5: 2}),
    "every action": ([COMPUTE, PARTIAL, REUSE, REUSE, COMPUTE, PARTIAL], {1: 6, 5: 3}),
}


@pytest.mark.parametrize("name", MIXES)
def test_any_mix_of_actions_with_a_changed_latent_equals_the_model_by_hand(run: Runner, name: str) -> None:
    actions, counts = MIXES[name]
    cached = caches(run.run(run.variant(COMPUTE), models.example()))
    index = chosen_tokens(run, counts)
    call = models.example(seed=1, timestep=6.0)
    by_hand = ByHand(run.model, actions, cached, index)
    expected = by_hand(**call)
    variant = run.variant(*actions)
    got = run.run(variant, call, **cached, **index)
    torch.testing.assert_close(got["output_0"], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(got["output_0"], run.model(**call), rtol=0, atol=1e-3), "the caches matter"
    for place, action in enumerate(actions):
        assert (f"branch_{place}" in got) == (action is not REUSE)
        if action is not REUSE:
            torch.testing.assert_close(got[f"branch_{place}"], by_hand.cores[place], rtol=0, atol=1e-5)
    assert {port.input_name for port in variant.dynamic_inputs} == set(index)


def test_a_partial_step_changes_exactly_the_chosen_tokens_of_the_cache(run: Runner) -> None:
    cached = caches(run.run(run.variant(COMPUTE), models.example()))
    index = chosen_tokens(run, {1: 3, 2: 5, 4: 7, 5: 2})
    written = {name: value.clone() for name, value in cached.items()}
    got = run.run(run.variant(REUSE, PARTIAL, PARTIAL, REUSE, PARTIAL, PARTIAL), models.example(1), **written, **index)
    for name, positions in index.items():
        place = name.removeprefix("tokens_")
        assert got[f"branch_{place}"].data_ptr() == written[f"cache_branch_{place}"].data_ptr(), "written in place"
        changed = (got[f"branch_{place}"] != cached[f"cache_branch_{place}"]).any(-1)
        expected = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
        expected[torch.arange(BATCH)[:, None], positions] = True
        assert torch.equal(changed, expected)


STRUCTURES: dict[str, Structure] = {
    "ungated": models.UngatedBlock,
    "parallel": models.ParallelBlock,
    "scaled": models.ScaledBlock,
    "nested": models.NestedBlock,
    "rotary": lambda: models.Block(rotary=True),
}


@pytest.mark.parametrize("name", ["plain", *STRUCTURES])
def test_one_choice_for_all_branches_gives_the_bits_of_equal_choices_of_each(name: str) -> None:
    run = Runner(models.build(STRUCTURES[name]) if name in STRUCTURES else models.build(), **models.example())
    cached = caches(run.run(run.variant(COMPUTE), models.example()))
    spec, index = everywhere(run, partial), distinct_indices(BATCH, TOKENS, 5)
    places = [place for place, action in enumerate(spec) if action is PARTIAL]
    own = run.variant(*spec)
    one = run.variant(*spec, chosen_with=tuple(places[0] if place in places else place for place in range(len(spec))))
    assert one.dynamic_inputs == (Port(PortKind.TOKENS, places[0]),)
    call, found = models.example(seed=1, timestep=6.0), []
    for variant in (own, one):
        given = {key: value.clone() for key, value in cached.items()}
        found.append(run.run(variant, call, **given, **{port.input_name: index for port in variant.dynamic_inputs}))
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_with_one_choice_for_all_branches_other_tokens_are_touched_at_the_end_alone(run: Runner) -> None:
    chosen_with = (0, 1, 1, 3, 1, 1)
    variant = run.variant(REUSE, PARTIAL, PARTIAL, REUSE, PARTIAL, PARTIAL, chosen_with=chosen_with)
    nodes = [n for n in variant.module.graph.nodes if n.op == "call_function"]
    writes = [place for place, n in enumerate(nodes) if op_name(n) == "index_put_"]
    adds = [place for place, n in enumerate(nodes) if n.name in {branch.add for branch in run.facts.branches}]
    assert len(writes) == 4
    assert len(adds) == 6
    last = max(nodes.index(nodes[place].args[2]) for place in writes)
    assert min(writes + adds) > last, "all that is written is computed before any cache or stream is read as a whole"


def test_skip_runs_the_head_on_the_cached_end_with_the_current_timestep(run: Runner) -> None:
    cached = caches(run.run(run.variant(COMPUTE), models.example()))
    call = models.example(seed=1, timestep=2.0)
    variant = run.variant(REUSE, skip=True)
    assert {port for port in variant.inputs if port.kind is not PortKind.HOISTED} == {
        Port(PortKind.ROW, "float32"),
        STREAM_END,
    }
    condition = F.silu(run.model.embed_t(models.embed(call["timestep"], WIDTH)))
    head = run.model.head(cached["cache_stream_end"] * (1 + run.model.head_modulation(condition)[:, None]))
    assert torch.equal(run.run(variant, call, **cached)["output_0"], head)


@pytest.mark.parametrize("name", STRUCTURES)
def test_partial_of_all_mlp_tokens_equals_computing_the_mlps(name: str) -> None:
    run = Runner(models.build(STRUCTURES[name]), **models.example())
    cached = caches(run.run(run.variant(COMPUTE), models.example()))
    call = models.example(seed=1, timestep=6.0)
    spec = everywhere(run, partial)
    index = chosen_tokens(run, {i: TOKENS for i, action in enumerate(spec) if action is PARTIAL})
    assert len(index) == 2
    got = run.run(run.variant(*spec), call, **cached, **index)
    computed = everywhere(run, lambda kind: REUSE if kind == "self_attention" else COMPUTE)
    expected = run.run(run.variant(*computed), call, **cached)
    for result in ("output_0", "branch_1", "branch_3"):
        torch.testing.assert_close(got[result], expected[result], rtol=0, atol=1e-5)


def test_every_variant_is_well_formed_and_shares_the_weights(run: Runner) -> None:
    live = {p.data_ptr(): p for p in run.model.parameters()}
    pointwise = (COMPUTE, PARTIAL, REUSE)
    seen: set[int] = set()
    every = [(block * 2, False) for block in product((COMPUTE, REUSE), pointwise, pointwise)]
    every += [((COMPUTE,) * count + (REUSE,) * (6 - count), True) for count in range(7)]
    for actions, skip in every:
        variant = run.variant(*actions, skip=skip, scores="v_norm")
        variant.module.graph.lint()
        tensors = [*variant.module.parameters(), *variant.module.buffers()]
        attributes = [getattr(variant.module, str(n.target)) if "." not in str(n.target) else
                      variant.module.get_parameter(str(n.target))
                      for n in variant.module.graph.nodes if n.op == "get_attr"]  # fmt: skip
        for tensor in [*tensors, *attributes]:
            assert tensor.data_ptr() in live, "a copy of a weight"
            seen.add(tensor.data_ptr())
        assert len(set(variant.inputs)) == len(variant.inputs)
        assert len(set(variant.outputs)) == len(variant.outputs)
        assert not [n for n in variant.module.graph.nodes if not n.users and n.op != "output"], "dead nodes"
    invariant, timestep = 2 + 2 * 4, 2 + 2 * 2 + 2
    assert len(seen) == len(live) - invariant - timestep, (
        "all but what is hoisted: the text's embedding, keys and values; the timestep's embedding and modulations"
    )


def test_a_changed_weight_is_seen_by_variants_built_before(run: Runner) -> None:
    model = models.build()
    own = Runner(model, **models.example())
    variant = own.variant(COMPUTE)
    model.head.weight.mul_(2)
    call = models.example()
    assert torch.equal(own.run(variant, call)["output_0"], model(**call))


def test_per_token_values_of_another_stream_are_gathered_too() -> None:
    """A branch that adds, token by token, a value of the latent that is no part of the stream."""

    def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        side = self.side(x).sum(-1)  # (batch, tokens)
        x = self.first(x) * timestep.sin()[:, None, None]
        return x + self.last(torch.where(side[..., None] > 0, x, self.table) * side[..., None])

    torch.manual_seed(0)
    children = {name: nn.Linear(8, 8) for name in ("side", "first", "last")}
    model = module(forward, **children, table=nn.Parameter(torch.randn(6, 1)))
    call = {"x": torch.randn(3, 6, 8), "timestep": torch.ones(3)}
    run = Runner(model, **call)
    cache, index = torch.randn(3, 6, 8), distinct_indices(3, 6, 4)
    expected = run.run(run.variant(COMPUTE), call)["branch_0"]
    got = run.run(run.variant(PARTIAL), call, cache_branch_0=cache, tokens_0=index)["branch_0"]
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(got[rows, index], expected[rows, index], rtol=0, atol=2e-6)
