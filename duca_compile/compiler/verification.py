"""Verifies the token analysis on values: recomputing some tokens must give the same as computing all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from duca_compile.core.fx_utils import port_of
from duca_compile.core.ir import Branch, CapturedGraph, Facts, TokenLayout
from duca_compile.core.ports import Port, PortKind
from duca_compile.core.variants import Action, FullVariant, PartialVariant, Variant
from duca_compile.errors import InternalError, first_line
from duca_compile.passes.exact.outline import form_of
from duca_compile.passes.pipeline import build_variant

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def verified(captured: CapturedGraph, facts: Facts, values: Mapping[Port, Tensor]) -> Facts:
    """``facts`` with every branch that fails the equivariance check f(x[idx]) = f(x)[idx] marked as mixing.

    Runs a full and a partial evaluation eagerly on ``values``, the call's tensors and hoisted values by port. They run
    side by side, so that only about one block's values are held, and stop once every form of branch was checked:
    branches whose bodies are the same operators on operands of the same shapes pass or fail together.
    """
    partial = [b for b in facts.branches if b.pointwise]
    if not partial or any(value.is_meta for value in values.values()):
        return facts
    full = build_variant(captured, facts, FullVariant())
    tokens = {b.index: Port(PortKind.TOKENS, b.index) for b in partial}
    spec = PartialVariant(tuple(tokens.get(b.index, Action.REUSE) for b in facts.branches))
    variant = build_variant(captured, facts, spec)
    forms = _forms(captured, partial)
    try:
        failed = _failed_forms(full, variant, facts, forms, values)
    except _NodeError as error:  # the node depends on the number of tokens
        index = error.node.meta.get("tokens_of", (None,))[0]
        alike = [b for b in partial if index is None or forms[b.slot] == forms[facts.branches[index].slot]]
        rest = _without_partial(facts, alike, f"it cannot run on some of its tokens ({error})")
        return verified(captured, rest, values)
    wrong = [b for b in partial if forms[b.slot] in failed]
    return _without_partial(facts, wrong, "recomputing some tokens gave different values than computing all of them")


class _NodeError(Exception):
    """A node of a variant failed."""

    def __init__(self, node: fx.Node, reason: Exception) -> None:
        super().__init__(first_line(reason))
        self.node = node


def _forms(captured: CapturedGraph, branches: list[Branch]) -> dict[Port, Hashable]:
    """The form of each branch by slot: what it computes from its stream and other operands, whatever their values."""
    nodes, forms = list(captured.graph.nodes), dict[Port, Hashable]()
    places = {node.name: place for place, node in enumerate(nodes)}
    for branch in branches:
        form = form_of([nodes[place] for place in sorted(places[name] for name in branch.body)])
        forms[branch.slot] = form.text, tuple(operand.name == branch.stream for operand in form.operands)
    return forms


def _failed_forms(
    full: Variant, partial: Variant, facts: Facts, forms: Mapping[Port, Hashable], values: Mapping[Port, Tensor]
) -> set[Hashable]:
    """The forms of the branches for which the values of ``partial`` differ from those of ``full``."""
    branches = {b.slot: b for b in facts.branches if b.slot in partial.inputs}
    by_tokens = {partial.spec.tokens_input(b.index): b for b in branches.values()}
    expected = _Expected(full, values, branches.keys())

    def value_of(port: Port) -> Tensor:
        if port in by_tokens:
            branch = by_tokens[port]
            return _some_tokens(branch, expected[branch.slot].device)
        if port not in branches:
            return values[port]
        value = expected[port]
        if branches[port].pointwise:
            return value.clone()  # a partial step writes to its cache
        expected.drop(port)
        return value

    failed, unchecked = set[Hashable](), {forms[slot] for slot, b in branches.items() if b.pointwise}
    for slot, recomputed in _results(partial, value_of):
        if slot not in branches:
            continue
        expected_value, form = expected[slot], forms[slot]
        expected.drop(slot)
        if not _close(recomputed, expected_value):
            failed.add(form)
            recomputed.copy_(expected_value)  # so that the error does not spread to later branches
        elif not _differs_by_token(expected_value, branches[slot].layout):
            continue  # equal tokens prove nothing: the values of any others would pass too
        unchecked.discard(form)
        if not unchecked:
            break
    return failed


class _Expected:
    """The values of each branch in a full evaluation, which runs only as far as they are requested."""

    def __init__(self, full: Variant, values: Mapping[Port, Tensor], slots: Collection[Port]) -> None:
        self._results = _results(full, values.__getitem__)
        self._slots = slots
        self._held: dict[Port, Tensor] = {}

    def __getitem__(self, slot: Port) -> Tensor:
        if slot not in self._held:
            self._run_to(slot)
        return self._held[slot]

    def _run_to(self, slot: Port) -> None:
        try:
            for port, value in self._results:
                if port in self._slots:
                    self._held[port] = value
                if port is slot:
                    return
        except _NodeError as error:
            raise InternalError(f"the graph fails on the call from which it was captured: {error}") from error

    def drop(self, slot: Port) -> None:
        del self._held[slot]


def _results(variant: Variant, value_of: Callable[[Port], Tensor]) -> Iterator[tuple[Port, Tensor]]:
    """Runs a variant, and yields each of its results with its port as soon as it is computed.

    An input is requested at its first use, and no value is kept after its last use. Raises _NodeError.
    """
    graph, runner = variant.module.graph, fx.Interpreter(variant.module)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    ports, unneeded = defaultdict[fx.Node, list[Port]](list), _unneeded_after(nodes)
    for port, node in zip(variant.outputs, graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        ports[node].append(port)
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in runner.env:
                runner.env[operand] = value_of(port_of(operand))
        try:
            runner.env[node] = runner.run_node(node)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _NodeError(node, error) from error
        for port in ports[node]:
            yield port, runner.env[node]
        for operand in unneeded[node]:
            del runner.env[operand]


def _unneeded_after(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that no later node reads."""
    last_use = {used: node for node in nodes for used in (node, *node.all_input_nodes)}
    unneeded = defaultdict[fx.Node, list[fx.Node]](list)
    for used, node in last_use.items():
        unneeded[node].append(used)
    return unneeded


def _without_partial(facts: Facts, wrong: list[Branch], reason: str) -> Facts:
    """``facts`` with the branches of ``wrong`` marked as mixing."""
    wrong_slots = {b.slot for b in wrong}
    branches = tuple(
        replace(b, kind="mixing", token_places=None, mixing_reason=reason) if b.slot in wrong_slots else b
        for b in facts.branches
    )
    notes = tuple(f"{b.path or 'model'} ({b.source}): {reason}" for b in wrong)
    return replace(facts, branches=branches, notes=facts.notes + notes)


def _some_tokens(branch: Branch, device: torch.device) -> Tensor:
    """Indices of a quarter of the tokens, uneven and out of order, but the same on every run."""
    count = max(1, branch.tokens // 4)
    generator = torch.Generator().manual_seed(branch.index)
    rows = [torch.randperm(branch.tokens, generator=generator)[:count] for _ in range(branch.rows)]
    return torch.stack(rows).to(device)


def _differs_by_token(value: Tensor, layout: TokenLayout) -> bool:
    axes = [axis for dim in layout.dims for axis in dim]
    value = value.reshape([*(layout.sizes[axis] for axis in axes), -1])
    order = sorted(range(len(axes)), key=axes.__getitem__)
    rows = value.permute(*order, -1).reshape(layout.rows, layout.tokens, -1)
    return bool((rows != rows[:, :1]).any())


def _close(actual: Tensor, expected: Tensor) -> bool:
    error, size = (actual - expected).abs().max().float(), expected.abs().max().float()
    return bool(error <= _TOLERANCE.get(expected.dtype, 1e-4) * size)
