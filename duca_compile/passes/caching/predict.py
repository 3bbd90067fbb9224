"""Splices in a learned predictor in place of all blocks but the last two (DisCa, arXiv 2602.05449)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from duca_compile.analysis.closure import ancestors
from duca_compile.core.fx_utils import op_name
from duca_compile.core.ir import Branch, CapturedGraph, Facts
from duca_compile.core.ports import STREAM_END, hoisted
from duca_compile.core.variants import PredictVariant
from duca_compile.errors import PolicyError
from duca_compile.frontend.operators import carried_value
from duca_compile.passes.base import CachingPass, VariantDraft, check_one_end
from duca_compile.policies.predictor import FUSE, Predictor

aten = torch.ops.aten

DEPTH = 2  # blocks that a predictor keeps, with weights of its own
_PREFIX = "duca_predictor."  # prefix of its weights among the graph's attributes


@dataclass(frozen=True)
class PredictStream(CachingPass):
    """The stream enters the last two blocks as a fusion of the embedded tokens and the cached end of the stream.

    The fusion is Linear(2C, C), SiLU, Linear(C, C). The branches of all earlier blocks are left out, so the stream
    arrives there as embedded. The last two blocks use the predictor's weights and the model's own modulation.
    """

    def apply(self, draft: VariantDraft) -> bool:
        spec = draft.spec
        if not isinstance(spec, PredictVariant) or any(_is_predictor_weight(n) for n in draft.graph.nodes):
            return False
        tail = last_blocks(draft.facts)
        _fuse(draft, carried_value(draft.node(_entry(draft.facts, tail).stream)))
        _leave_out(draft, [b for b in draft.facts.branches if b not in tail])
        for branch in tail:
            for node in [n for n in draft.graph.nodes if n.name in branch.body]:
                for weight in [n for n in node.all_input_nodes if n.op == "get_attr"]:
                    if str(weight.target) in spec.weights:
                        node.replace_input_with(weight, _weight(draft, str(weight.target)))
        _check_replaceable(draft, tail)
        return True


def _fuse(draft: VariantDraft, entry: fx.Node) -> None:
    like = entry.meta["val"]
    cached = draft.input(STREAM_END, like)
    call = draft.graph.call_function
    first, first_bias, second, second_bias = (_weight(draft, name) for name in FUSE)
    with draft.graph.inserting_after(entry):
        joined = call(aten.cat.default, ([entry, cached], -1))
    with draft.graph.inserting_after(joined):
        hidden = call(aten.linear.default, (joined, first, first_bias))
    with draft.graph.inserting_after(hidden):
        active = call(aten.silu.default, (hidden,))
    with draft.graph.inserting_after(active):
        fused = call(aten.linear.default, (active, second, second_bias))
    fused.meta["val"] = like
    width = like.shape[-1]
    hidden.meta["flops"], fused.meta["flops"] = 4 * like.numel() * width, 2 * like.numel() * width
    entry.replace_all_uses_with(fused, delete_user_cb=lambda user: user is not joined)


def _leave_out(draft: VariantDraft, branches: list[Branch]) -> None:
    starts: dict[fx.Node, fx.Node] = {}
    for branch in branches:
        end = draft.node(branch.add)
        start = draft.find_input(hoisted(branch.carried)) or draft.node(branch.carried)  # text may start from an input
        starts[end] = starts.get(start, start)
        end.replace_all_uses_with(starts[end])


def _weight(draft: VariantDraft, name: str) -> fx.Node:
    """The predictor's weight of this name, added at the start of the graph if it is missing."""
    target = _PREFIX + name
    known: list[fx.Node] = draft.graph.find_nodes(op="get_attr", target=target)
    if known:
        return known[0]
    with draft.graph.inserting_before(next(iter(draft.graph.nodes))):
        return draft.graph.get_attr(target)


def _check_replaceable(draft: VariantDraft, tail: tuple[Branch, ...]) -> None:
    """Raises PolicyError if the last blocks need more from the earlier ones than the stream."""
    alive = {n.name for n in ancestors(draft.graph.output_node())}
    for branch in draft.facts.branches:
        if branch not in tail and branch.body & alive:
            raise PolicyError(
                f"the last {DEPTH} blocks need more from the earlier ones than the stream: {branch.path or 'a branch'} "
                f"at {branch.source} would still be computed. A predictor cannot replace them; use another policy."
            )


def _is_predictor_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(_PREFIX)


def last_blocks(facts: Facts) -> tuple[Branch, ...]:
    """The branches of the last two blocks.

    Raises:
        PolicyError: there is no earlier block to replace, the stream is not (batch, tokens, channels), or the model's
            results read more than its end.
    """
    check_one_end(facts, "a predictor gives")
    tail = tuple(b for b in facts.branches if b.block >= facts.blocks - DEPTH)
    if len(tail) == len(facts.branches):
        raise PolicyError(f"a predictor replaces all blocks but the last {DEPTH}, and this model has no others")
    end = facts.branches[-1]
    if not end.layout.is_sequence:
        raise PolicyError(f"a predictor needs a stream of (batch, tokens, channels); this one is {end.layout}")
    return tail


def _entry(facts: Facts, tail: tuple[Branch, ...]) -> Branch:
    """The first branch in ``tail`` of the stream that leads to the output."""
    end = facts.branches[-1]
    return next(b for b in tail if (b.role, b.shape) == (end.role, end.shape))


def trained_weights(captured: CapturedGraph, facts: Facts) -> dict[str, Tensor]:
    """The weights that a predictor replaces: the floating-point parameters of the last two blocks."""
    bodies = frozenset[str]().union(*(branch.body for branch in last_blocks(facts)))
    inside = [n for n in captured.graph.nodes if n.name in bodies]
    targets = {str(w.target): None for n in inside for w in n.all_input_nodes if w.op == "get_attr"}
    weights = {target: captured.attributes[target] for target in targets}
    return {n: w for n, w in weights.items() if isinstance(w, nn.Parameter) and w.is_floating_point()}


def last_products(captured: CapturedGraph, facts: Facts) -> list[tuple[str, ...]]:
    """For each branch of the last two blocks that ends in a linear layer, the names of that layer's weights."""
    nodes = {n.name: n for n in captured.graph.nodes}
    products = []
    for branch in last_blocks(facts):
        node = nodes[branch.core]
        while op_name(node) != "linear":
            inside = [n for n in node.all_input_nodes if n.name in branch.body]
            if len(inside) != 1:
                break
            (node,) = inside
        else:
            products.append(tuple(str(n.target) for n in node.all_input_nodes if n.op == "get_attr"))
    return products


def with_predictor(captured: CapturedGraph, facts: Facts, predictor: Predictor | None) -> CapturedGraph:
    """``captured`` with the predictor's weights added to the model's, in the model's dtype and on its device.

    Raises:
        PolicyError: the predictor was trained for another model; names what differs.
    """
    if predictor is None:
        return captured
    replaced, like = trained_weights(captured, facts), _stream_like(captured, facts)
    width = like.shape[-1]
    shapes = {FUSE[0]: (width, 2 * width), FUSE[1]: (width,), FUSE[2]: (width, width), FUSE[3]: (width,)}
    shapes |= {name: tuple(weight.shape) for name, weight in replaced.items()}
    given = {name: tuple(weight.shape) for name, weight in predictor.weights.items()}
    config = predictor.config
    if (config.width, config.blocks) != (width, facts.blocks) or given != shapes:
        names = sorted(name for name in given.keys() | shapes.keys() if given.get(name) != shapes.get(name))
        detail = f"; {names[0]} has shape {given.get(names[0])}, not {shapes.get(names[0])}" if names else ""
        raise PolicyError(
            f"this predictor was trained for {config.model} with {config.blocks} blocks and width {config.width}, and "
            f"this model has {facts.blocks} blocks and width {width}{detail}. Train one for it: duca-compile "
            "train-predictor."
        )
    weights = {
        _PREFIX + name: weight.to(device=like.device, dtype=replaced[name].dtype if name in replaced else like.dtype)
        for name, weight in predictor.weights.items()
    }
    return replace(captured, attributes={**captured.attributes, **weights})


def predictor_bytes(captured: CapturedGraph) -> int:
    """Bytes of the weights that ``with_predictor`` added."""
    added = [weight for name, weight in captured.attributes.items() if name.startswith(_PREFIX)]
    return sum(weight.numel() * weight.element_size() for weight in added)


def _stream_like(captured: CapturedGraph, facts: Facts) -> Tensor:
    node = next(n for n in captured.graph.nodes if n.name == facts.stream_end)
    value: Tensor = node.meta["val"]
    return value


def named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A predictor's weights by their names in a spliced graph."""
    return {_PREFIX + name: weight for name, weight in weights.items()}
