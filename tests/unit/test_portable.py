"""Rewrites for exports: before and after, near misses, nothing to do, and a second run that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from tracing import module, raw

from duca_compile.core.fx_utils import copy_graph, op_name, to_module
from duca_compile.passes.base import Draft, PortablePass
from duca_compile.passes.exact.dead_code import RemoveDeadCode
from duca_compile.passes.pipeline import prepare, run_passes
from duca_compile.passes.portable.logical_select import LogicalSelect
from duca_compile.passes.portable.real_pairs import RealPairs
from duca_compile.passes.portable.whole_copies import WholeCopies
from duca_compile.passes.portable.zero_memory import ZeroMemory

X = torch.randn(2, 4, 3, 8)
ANGLES = torch.randn(4, 4)
MASK = torch.rand(2, 4) > 0.5


def rewritten(a_pass: PortablePass, model: nn.Module, **arguments: Tensor) -> tuple[fx.Graph, bool, list[Tensor]]:
    """The graph after the pass and whether it changed; checks a second run, and that results have their metadata.

    Returns also the difference of each result from that of the graph before.
    """
    captured = prepare(raw(model, **arguments))
    draft = Draft(copy_graph(captured.graph))
    changed = a_pass.apply(draft)
    assert a_pass.apply(draft) is False, "a second run changes nothing, and says so"
    run_passes(draft, (RemoveDeadCode(),))
    draft.graph.lint()
    found = to_module(captured, draft.graph)(*arguments.values())
    before = to_module(captured, captured.graph)(*arguments.values())
    for node, value in zip(draft.graph.output_node().args[0], found, strict=True):  # type: ignore[arg-type]
        assert node.meta["val"].shape == value.shape  # type: ignore[union-attr]
    return draft.graph, changed, [a - b for a, b in zip(found, before, strict=True)]


def is_complex(graph: fx.Graph) -> bool:
    return any(isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_complex() for n in graph.nodes)


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def table(angles: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angles), angles)


def written_table(angles: Tensor) -> Tensor:
    """Row by row, and one row in two parts, as for prompts of several lengths."""
    written = torch.zeros(4, 4, dtype=angles.dtype)
    written[0] = angles[1]
    written[1:, -3:] = angles[:3, :3]
    written[3, :1] = angles[3, :1]
    return written


Forward = Callable[[Any, Tensor, Tensor], Tensor]
ROTATIONS: dict[str, Forward] = {
    "polar": lambda self, x, a: torch.view_as_real(pairs(x) * table(a)[None, :, None]).flatten(3),
    "cosines and sines": lambda self, x, a: torch.view_as_real(
        pairs(x) * torch.complex(a.cos(), a.sin()).unsqueeze(1)
    ).flatten(3),
    "conjugate": lambda self, x, a: torch.view_as_real(pairs(x) * table(a)[None, :, None].conj()).flatten(-2),
    "parts": lambda self, x, a: (pairs(x) * table(a)[:, None]).real + (pairs(x) * table(a)[:, None]).imag,
    "by a real number": lambda self, x, a: torch.view_as_real(pairs(x) * 2.0 / (a[:, None].cos() + 2)),
    "sums": lambda self, x, a: torch.view_as_real(-(pairs(x) + table(a)[:, None]) - pairs(x)),
    "length": lambda self, x, a: (pairs(x) * table(a)[:, None]).abs(),
    "tables of several axes": lambda self, x, a: torch.view_as_real(
        pairs(x) * torch.cat([part.expand(4, -1) for part in table(a).split([1, 3], dim=-1)], dim=-1)[None, :, None]
    ),
    "chosen positions": lambda self, x, a: torch.view_as_real(
        pairs(x) * table(a)[torch.tensor([3, 1, 0, 2])].reshape(1, 4, 1, -1)
    ),
    "moved dimensions": lambda self, x, a: torch.view_as_real(
        (pairs(x).transpose(1, -2).permute(0, 1, 3, -2) * table(a).t().unbind(0)[1]).repeat(1, 2, 1, 1).flatten(-2)
    ),
    "gathered positions": lambda self, x, a: torch.view_as_real(
        pairs(x)
        * torch.gather(table(a)[None].repeat(2, 1, 1), 1, torch.tensor([3, 1, 0, 2]).view(1, 4, 1).expand(2, 4, 4))[
            :, :, None
        ]
    ),
    "written to zeros": lambda self, x, a: torch.view_as_real(pairs(x) * written_table(table(a))[:, None]),
    "written to indices": lambda self, x, a: torch.view_as_real(
        pairs(x) * table(a).index_put((torch.tensor([2, 0]),), table(a)[1])[:, None]
    ),
    "padded": lambda self, x, a: torch.view_as_real(
        pairs(x) * nn.utils.rnn.pad_sequence([table(a), table(a)[:2]], batch_first=True)[:, :, None]
    ),
    "chosen": lambda self, x, a: torch.view_as_real(torch.where(x[..., :4] > 0, pairs(x), table(a)[:, None])),
    "stacked": lambda self, x, a: torch.view_as_real(
        torch.stack([pairs(x), pairs(x) * 2], -1).select(-1, 1).squeeze(-1)[:, 1:] * table(a)[1:, None]
    ),
    "double": lambda self, x, a: torch.view_as_real(
        pairs(x.double()) * table(a).to(torch.complex128)[:, None].contiguous()
    ),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_complex_numbers_become_pairs_of_real_ones(name: str) -> None:
    graph, changed, differences = rewritten(RealPairs(), module(ROTATIONS[name]), x=X, a=ANGLES)
    assert changed
    assert not is_complex(graph)
    assert all(difference.abs().max() <= 1e-6 for difference in differences)


def test_a_complex_weight_is_read_as_real() -> None:
    model = module(lambda self, x: torch.view_as_real(pairs(x) * self.freqs), freqs=table(ANGLES)[:, None])
    graph, changed, (difference,) = rewritten(RealPairs(), model, x=X)
    complex_nodes = [n for n in graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_complex()]
    assert changed
    assert [n.op for n in complex_nodes] == ["get_attr"]
    assert {op_name(user) for user in complex_nodes[0].users} == {"view_as_real"}
    assert difference.abs().max() <= 1e-6


def test_an_operator_without_a_rule_stays_complex() -> None:
    graph, changed, (difference,) = rewritten(
        RealPairs(), module(lambda self, x: torch.view_as_real(torch.fft.fft(pairs(x)) * pairs(x))), x=X
    )
    assert changed, "the product after it is real"
    assert is_complex(graph)
    assert difference.abs().max() <= 1e-5
    graph, changed, _ = rewritten(RealPairs(), module(lambda self, x: torch.view_as_real(torch.fft.fft(x))), x=X)
    assert not changed


def test_real_numbers_stay() -> None:
    graph, changed, _ = rewritten(RealPairs(), module(lambda self, x: x.transpose(1, 2) * x.transpose(1, 2)), x=X)
    assert not changed
    assert [op_name(n) for n in graph.nodes if n.op == "call_function"] == ["transpose", "mul"]


CHOICES: dict[str, Callable[..., Tensor]] = {
    "where": lambda self, mask, x: torch.where(mask, x, ~x.roll(1)),
    "filled with true": lambda self, mask, x: x.masked_fill(mask, True),
    "filled with false": lambda self, mask, x: x.masked_fill(mask, False),
    "of another shape": lambda self, mask, x: x[:, None].masked_fill(mask[:1], 1),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_booleans_becomes_logic(name: str) -> None:
    graph, changed, (difference,) = rewritten(LogicalSelect(), module(_bools(CHOICES[name])), mask=MASK, x=X[..., 0, 0])
    assert changed
    assert not {"where", "masked_fill"} & {op_name(n) for n in graph.nodes}
    assert not difference.any()


def _bools(choice: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, mask, x: choice(self, mask, x > 0).int()


def test_a_choice_of_numbers_stays() -> None:
    graph, changed, _ = rewritten(
        LogicalSelect(),
        module(lambda self, mask, x: torch.where(mask, x, 0.0).masked_fill(mask, 2)),
        mask=MASK,
        x=X[..., 0, 0],
    )
    assert not changed
    assert [op_name(n) for n in graph.nodes if n.op == "call_function"][-2:] == ["where", "masked_fill"]


def written(self: Any, x: Tensor, row: Tensor) -> Tensor:
    target = torch.zeros(2, 4, 8)
    target[:, 1:].copy_(row[:3])
    target[:1].copy_(x[:1])
    return target


def test_a_copy_takes_a_tensor_of_its_target_s_shape() -> None:
    graph, changed, (difference,) = rewritten(WholeCopies(), module(written), x=X[:, :, 0], row=X[0, :, 1])
    copies = [n for n in graph.nodes if op_name(n) == "copy"]
    assert changed
    assert [[op_name(n.args[1]) for n in copies], not difference.any()] == [["expand", "slice"], True]
    assert all(n.args[1].meta["val"].shape == n.meta["val"].shape for n in copies)


def interleaved(self: Any, x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    result[..., 0::2], result[..., 1::2] = x[..., 1::2] * 2, x[..., 0::2]
    return result


def test_memory_that_is_filled_later_is_zero_before() -> None:
    graph, changed, (difference,) = rewritten(ZeroMemory(), module(interleaved), x=X)
    assert changed
    assert next(op_name(n) for n in graph.nodes if n.op == "call_function") == "zeros"
    assert not difference.any()
