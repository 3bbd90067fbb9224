"""The residual stream and its branches, from the graph alone."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from models import BATCH, TOKENS, WIDTH
from torch import Tensor, nn
from torch.nn import functional
from tracing import COMPUTE, REUSE, Runner, analysed, caches, module, node

from duca_compile.core.fx_utils import op_name
from duca_compile.core.ir import Facts
from duca_compile.errors import StructureError

SELF, MLP, CROSS = "self_attention", "mlp", "cross_attention"


def facts_of(block: Callable[[], nn.Module] = models.Block, depth: int = 2, long_skip: str = "") -> Facts:
    return analysed(models.build(block, depth, long_skip), **models.example())[1]


@pytest.mark.parametrize(
    ("block", "kinds", "gates"),
    [
        (models.Block, [SELF, MLP], [True, True]),
        (lambda: models.Block(rotary=True), [SELF, MLP], [True, True]),
        (lambda: models.Block(conv=True), [SELF, "mixing"], [True, True]),
        (models.UngatedBlock, [SELF, MLP], [False, False]),
        (models.CrossBlock, [SELF, CROSS, MLP], [True, False, True]),
        (models.FusedBlock, ["attention+mlp"], [False]),
        (models.ParallelBlock, [SELF, MLP], [False, False]),
        (models.ScaledBlock, [SELF, MLP], [True, True]),
        (models.NestedBlock, [SELF, MLP], [True, True]),
    ],
    ids=["adaLN-Zero", "rotary", "conv", "ungated", "cross", "fused", "parallel", "x + x * scale", "nested"],
)
def test_branches_of_each_structure(block: Callable[[], nn.Module], kinds: list[str], gates: list[bool]) -> None:
    facts = facts_of(block, depth=3)
    assert [b.kind for b in facts.branches] == kinds * 3
    assert [b.gated for b in facts.branches] == gates * 3
    assert [b.block for b in facts.branches] == [i for i in range(3) for _ in kinds]
    assert [b.path for b in facts.branches] == [f"blocks.{i}" for i in range(3) for _ in kinds]
    assert [b.index for b in facts.branches] == list(range(3 * len(kinds)))
    assert facts.blocks == 3
    assert {b.shape for b in facts.branches} == {(BATCH, TOKENS, WIDTH)}
    assert facts.stream_end == facts.branches[-1].add
    assert all("models.py:" in b.source for b in facts.branches)
    assert bool(facts.notes) == ("mixing" in kinds)


@pytest.mark.parametrize("block", [models.Block, models.UngatedBlock, models.CrossBlock])
def test_the_core_is_the_value_before_the_gate(block: Callable[[], nn.Module]) -> None:
    captured, facts = analysed(models.build(block), **models.example())
    for branch in facts.branches:
        core = node(captured.graph, branch.core)
        assert op_name(core) == "linear", "the projection out of the attention or the MLP"
        (user,) = core.users
        assert op_name(user) == ("mul" if branch.gated else "add")
        assert branch.core in branch.body
        assert branch.stream not in branch.body
        assert (user.name == branch.add) == (not branch.gated)


def test_a_gate_that_depends_on_the_latent_stays_with_the_core() -> None:
    def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep.sin()[:, None, None] * (x.sigmoid() * self.a(x))
        return x + (0.5 * self.b(x)).clamp(-9, 9) * self.scale

    model = module(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8), scale=nn.Parameter(torch.ones(8)))
    captured, facts = analysed(model, x=torch.randn(2, 4, 8), timestep=torch.ones(2))
    first, second = (node(captured.graph, b.core) for b in facts.branches)
    assert [op_name(n) for n in first.all_input_nodes] == ["sigmoid", "linear"]
    assert (op_name(second), second.args[1]) == ("mul", 0.5), "a constant factor is part of the branch"
    assert [b.gated for b in facts.branches] == [True, True]


@pytest.mark.parametrize("long_skip", ["end", "middle"])
def test_a_long_skip_is_no_branch(long_skip: str) -> None:
    facts = facts_of(depth=3, long_skip=long_skip)
    assert [b.kind for b in facts.branches] == [SELF, MLP] * 3
    assert facts.stream_end == facts.branches[-1].add


def test_a_residual_around_the_whole_model_is_no_branch() -> None:
    class Whole(models.DiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return x + super().forward(x, timestep, text)

    facts = analysed(Whole(depth=3).eval(), **models.example())[1]
    assert [b.kind for b in facts.branches] == [SELF, MLP] * 3


def test_the_stream_goes_on_behind_a_projection() -> None:
    """As behind the concatenated skip of a U-shaped transformer."""

    class UShaped(models.DiT):
        def __init__(self) -> None:
            super().__init__(depth=3)
            self.join = nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            condition = self.embed_t(models.embed(timestep, WIDTH))
            start = self.blocks[0](self.embed_x(x), condition, text)
            x = self.blocks[1](start, condition, text)
            x = self.join(torch.cat([x, start], dim=-1))
            return self.head(self.blocks[2](x, condition, text))

    facts = analysed(UShaped().eval(), **models.example())[1]
    assert [b.path for b in facts.branches] == [f"blocks.{i}" for i in (0, 0, 1, 1, 2, 2)]


def test_two_streams_that_join_are_one() -> None:
    """Text and image branches side by side, then one over both."""

    def forward(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        time = timestep.sin()[:, None, None]
        text = text + time * self.text(text * x.mean(1, keepdim=True))
        image = x + time * self.image(x)
        text = text + time * self.text_again(text)
        both = torch.cat([text, image], 1)
        both = both + time * self.both(both)
        return both[:, 3:]

    children = {name: nn.Linear(8, 8) for name in ("text", "image", "text_again", "both")}
    model = module(forward, **children)
    call = {"x": torch.randn(2, 6, 8), "timestep": torch.ones(2), "text": torch.randn(2, 3, 8)}
    run = Runner(model, **call)
    assert [b.shape[1] for b in run.facts.branches] == [3, 6, 3, 9]
    assert [b.kind for b in run.facts.branches] == [MLP] * 4
    assert [b.role.value for b in run.facts.branches] == ["text", "refiner", "text", "main"]
    assert all(b.pointwise for b in run.facts.branches)
    full = run.run(run.variant(COMPUTE), call)
    for skip in (False, True):
        variant = run.variant(REUSE, skip=skip)
        assert torch.equal(run.run(variant, call, **caches(full))["output_0"], model(**call))


def test_parallel_branches_read_the_same_stream() -> None:
    facts = facts_of(models.ParallelBlock, depth=1)
    attention, mlp = facts.branches
    assert attention.stream == mlp.stream
    assert attention.add != mlp.add


def test_every_stream_that_the_output_reads_is_cached() -> None:
    def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        side = self.small(x)
        side = side + self.light(side)
        x = x * timestep.sin()[:, None, None]
        x = x + self.heavy(x)
        return torch.cat([x, side], -1)

    children = {"small": nn.Linear(8, 4), "light": nn.Linear(4, 4), "heavy": nn.Linear(8, 8)}
    facts = analysed(module(forward, **children), x=torch.randn(2, 4, 8), timestep=torch.ones(2))[1]
    assert [(b.shape, b.flops) for b in facts.branches] == [
        ((2, 4, 4), 2 * 2 * 4 * 4 * 4),
        ((2, 4, 8), 2 * 2 * 4 * 8 * 8),
    ]
    assert list(map(str, facts.ends)) == ["stream_end_0", "stream_end"]


def test_what_only_cached_attention_reads_needs_no_cache() -> None:
    """Even where it is longer than the latent's tokens."""

    def forward(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        text = text + timestep.sin()[:, None, None] * self.text(text * x.mean(1, keepdim=True))
        text = text + self.text_again(text)
        x = x + self.mlp(x)
        both = torch.cat([x, text], 1)[:, None]
        return x + self.out(functional.scaled_dot_product_attention(x[:, None], both, both)[:, 0])

    children = {name: nn.Linear(8, 8) for name in ("text", "text_again", "out", "mlp")}
    call = {"x": torch.randn(2, 4, 8), "timestep": torch.ones(2), "text": torch.randn(2, 50, 8)}
    facts = analysed(module(forward, **children), **call)[1]
    assert {branch.shape for branch in facts.branches} == {(2, 4, 8)}
    assert {(stream.role.value, stream.branches, stream.cached) for stream in facts.streams} == {
        ("text", 2, False),
        ("main", 2, True),
    }


class JointBlock(models.UngatedBlock):
    """The image attends to the text and the image."""

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        image = x + condition[:, None]
        x = x + self.attention(image, torch.cat([text, image], 1))
        return x + self.mlp(x)


class PooledBlock(models.UngatedBlock):
    """Attention to every second token: its keys are not the stream's tokens."""

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        x = x + self.attention(x + condition[:, None], x[:, ::2])
        return x + self.mlp(x)


def test_an_attention_whose_keys_are_not_the_tokens_gives_no_token_scores() -> None:
    for block in (JointBlock, PooledBlock):  # JointBlock joins before the projection: the pieces are out of sight
        facts = facts_of(block)
        assert [b.kind for b in facts.branches] == [SELF, MLP] * 2
        assert [b.attention for b in facts.branches] == [None] * 4
        assert facts.score_source(facts.branches[1], "attention") is None


@pytest.mark.parametrize("order", ["image first", "text first"])
@pytest.mark.parametrize("kind", ["v_norm", "attention"])
@pytest.mark.parametrize("layout", ["(batch, heads, tokens)", "(batch, tokens, heads)"])
def test_joint_attention_scores_the_tokens_of_the_stream(order: str, kind: str, layout: str) -> None:
    def joined(image: Tensor, text: Tensor) -> Tensor:
        parts = [part.view(2, -1, 2, 4) for part in ((text, image) if order == "text first" else (image, text))]
        if layout == "(batch, tokens, heads)":
            return torch.cat(parts, 1).transpose(1, 2)
        return torch.cat([part.transpose(1, 2) for part in parts], 2)

    def forward(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        image, text = self.image(x).chunk(3, -1), self.text(text).chunk(3, -1)
        y = functional.scaled_dot_product_attention(*(joined(a, b) for a, b in zip(image, text, strict=True)))
        y = y.transpose(1, 2).flatten(2)
        x = x + timestep.sin()[:, None, None] * self.out(y[:, 3:] if order == "text first" else y[:, :6])
        return x + self.mlp(x)

    torch.manual_seed(0)
    children = {"image": nn.Linear(8, 24), "text": nn.Linear(8, 24), "out": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)}
    model = module(forward, **children)
    call = {"x": torch.randn(2, 6, 8), "timestep": torch.ones(2), "text": torch.randn(2, 3, 8)}
    run = Runner(model, **call)
    got = run.run(run.variant(COMPUTE, scores=kind), call)["score_0"]
    parts = zip(model.image(call["x"]).chunk(3, -1), model.text(call["text"]).chunk(3, -1), strict=True)
    q, k, v = (joined(a, b) for a, b in parts)
    received = (q @ k.transpose(-1, -2) / 2).softmax(-1).sum(2).mean(1)
    score = (1 - v.norm(dim=-1)).sum(1) if kind == "v_norm" else received
    expected = score[:, 3:] if order == "text first" else score[:, :6]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_the_scores_of_an_mlp_come_from_the_self_attention_before_it() -> None:
    facts = facts_of(models.CrossBlock)
    sources = [facts.score_source(b, "v_norm") for b in facts.branches]
    assert [s and s.index for s in sources] == [0, 0, 0, 3, 3, 3]
    spread = [facts.score_source(b, "entropy") for b in facts.branches]
    assert [s and s.index for s in spread] == [None, 1, 1, 1, 4, 4], "its own tokens too"


def test_no_residual_is_an_error() -> None:
    def forward(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.sin()[:, None, None]
        return self.linear(x + x * time) + time

    with pytest.raises(StructureError, match="no residual branch found"):
        analysed(module(forward, linear=nn.Linear(8, 8)), x=torch.randn(2, 4, 8), timestep=torch.ones(2))


STRUCTURES = [
    models.Block, models.UngatedBlock, models.CrossBlock, models.FusedBlock, models.ParallelBlock, models.ScaledBlock,
    models.NestedBlock, "middle", "end",
]  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_reuses_and_skips_to_the_same_numbers(structure: Callable[[], nn.Module] | str) -> None:
    model = models.build(long_skip=structure) if isinstance(structure, str) else models.build(structure)
    call = models.example()
    run = Runner(model, **call)
    full = run.run(run.variant(COMPUTE), call)
    assert torch.equal(full["output_0"], model(**call))
    cached = caches(full)
    for skip in (False, True):
        variant = run.variant(REUSE, skip=skip)
        assert torch.equal(run.run(variant, call, **cached)["output_0"], full["output_0"])
        assert variant.flops({}) < run.variant(COMPUTE).flops({}) / 4
