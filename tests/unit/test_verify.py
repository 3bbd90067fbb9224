"""Where the token analysis is wrong, the values of the first call tell, for every branch of that kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import TOKENS, WIDTH, Block, build, example
from torch import Tensor, fx, nn

from duca_compile.analysis import tokens
from duca_compile.compiler.analyze import analyze_call
from duca_compile.core.ir import Facts
from duca_compile.frontend.binder import Binder

REASON = "recomputing some tokens gave different values than computing all of them"
MLPS = {"mlp", "mixing"}


class OverTokens(nn.Module):
    """Mixes tokens, by an operator that the analysis is made to take for pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(1))


class Wrong(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = OverTokens()


class Fixed(Block):
    """Mixes tokens by a product with a matrix, which only fits all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = BetweenTokens()


class BetweenTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(TOKENS, TOKENS) / TOKENS)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix @ x)


class Mended(Block):
    """The same operators along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softmax(2), nn.Linear(WIDTH, WIDTH))


@pytest.fixture(autouse=True)
def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokens._RULES, "softmax", lambda node, places: tokens._source(node, places))
    monkeypatch.setitem(tokens._RULES, "matmul", lambda node, places: places[node.args[1].name])


@pytest.fixture
def linears(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products that verification computed."""
    seen: list[str] = []
    run_node = fx.Interpreter.run_node

    def watched(self: fx.Interpreter, node: fx.Node) -> object:
        if "linear" in str(node.target):
            seen.append(node.name)
        return run_node(self, node)

    monkeypatch.setattr(fx.Interpreter, "run_node", watched)
    return seen


def facts_of(model: nn.Module) -> Facts:
    return analyze_call(model, Binder(model)((), example()), None)[1]


def mlps(facts: Facts) -> list[bool]:
    """For each MLP, whether it is taken for pointwise."""
    return [b.pointwise for b in facts.branches if b.kind in MLPS]


def test_all_of_the_kind_are_computed_in_full_and_told() -> None:
    facts = facts_of(build(Wrong, depth=3))
    assert mlps(facts) == [False] * 3
    assert [note.endswith(REASON) for note in facts.notes] == [True] * 3
    assert [b.mixing_reason for b in facts.branches if b.kind == "mixing"] == [REASON] * 3


def test_others_stay() -> None:
    kinds: Iterator[type[Block]] = iter([Mended, Wrong, Block, Wrong])
    facts = facts_of(build(lambda: next(kinds)(), depth=4))
    assert mlps(facts) == [True, False, True, False]


def test_one_that_cannot_run_on_some_tokens_is_computed_in_full_alone() -> None:
    kinds: Iterator[type[Block]] = iter([Mended, Fixed, Wrong, Fixed])
    facts = facts_of(build(lambda: next(kinds)(), depth=4))
    assert mlps(facts) == [True, False, False, False]
    assert ["cannot run on some of its tokens" in note for note in facts.notes] == [True, True, False]


@pytest.mark.parametrize("silenced", [1, 2, 3])
def test_a_block_whose_tokens_are_all_alike_tells_nothing_of_the_next(silenced: int) -> None:
    model = build(Wrong, depth=3)
    for block in list(model.get_submodule("blocks").children())[:silenced]:
        torch.nn.init.zeros_(block.get_submodule("mlp.down").weight)  # type: ignore[arg-type]
    assert mlps(facts_of(model)) == [silenced == 3] * 3


def test_each_kind_is_computed_once(linears: list[str]) -> None:
    counts = []
    for depth in (2, 6):
        linears.clear()
        assert mlps(facts_of(build(Block, depth=depth))) == [True] * depth
        counts.append(len(linears))
    assert 0 < counts[0] == counts[1]
