"""What each pass does to the graph of one variant, as a readable diff."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text
from torch import fx

from duca_compile.core.fx_utils import module_path, op_name
from duca_compile.core.tables import FigureTable
from duca_compile.core.variants import VariantSpec
from duca_compile.errors import UsageError
from duca_compile.explanation import Explanation
from duca_compile.passes.base import VariantDraft
from duca_compile.passes.caching.predict import with_predictor
from duca_compile.passes.exact.dead_code import RemoveDeadCode
from duca_compile.passes.pipeline import REWRITE, build_variant, variant_flops
from duca_compile.policies import Policy, StepKind
from duca_compile.runtime.planning import check_rows, check_selection, plan_step, probe_spec

PROBE = "probe"  # names the variant that runs before an adaptive policy decides
_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@dataclass(frozen=True)
class Snapshot:
    """A graph between two passes.

    Attributes:
        lines: a line for each node and each result.
        nodes: number of nodes.
        flops: FLOPs of all nodes; values that a pass leaves unused count until they are removed.
    """

    lines: tuple[str, ...]
    nodes: int
    flops: float


@dataclass(frozen=True)
class PassChange:
    """The graph before and after the pass called ``name``."""

    name: str
    before: Snapshot
    after: Snapshot

    @property
    def changed(self) -> bool:
        return self.before.lines != self.after.lines

    def diff(self, context: int = 3) -> Iterator[str]:
        """The lines of a unified diff, with ``context`` unchanged lines around each change."""
        lines = difflib.unified_diff(self.before.lines, self.after.lines, n=context, lineterm="")
        return (line for line in lines if not line.startswith(("---", "+++")))


@dataclass(frozen=True)
class PassReport:
    """The passes of one variant, in order. It prints as one diff for each pass.

    Attributes:
        title: which variant of which model it is.
        changes: one for each pass.
        context: unchanged lines shown around each change.
    """

    title: str
    changes: tuple[PassChange, ...]
    context: int = 3

    def only(self, names: Collection[str]) -> PassReport:
        """The report of the passes called ``names`` only.

        Raises:
            UsageError: there is no such pass.
        """
        known = [change.name for change in self.changes]
        for name in names:
            if name not in known:
                raise UsageError(f"pass {name!r} is unknown; choose one of {', '.join(dict.fromkeys(known))}")
        chosen = tuple(change for change in self.changes if change.name in names)
        return PassReport(self.title, chosen, self.context)

    def stat(self) -> Group:
        """A table of the nodes before and after each pass, and of the FLOPs after it."""
        table = FigureTable("pass", "nodes before", "nodes after", "GFLOPs after")
        for change in self.changes:
            after = change.after
            table.add_row(change.name, str(change.before.nodes), str(after.nodes), f"{after.flops / 1e9:.4g}")
        unused = f"nodes that nothing reads are counted until {RemoveDeadCode.__name__} removes them"
        return Group(Text(self.title, style="bold"), table, unused)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        for change in self.changes:
            if not change.changed:
                yield Text(f"{change.name}: changes nothing")
                continue
            yield Text(f"{change.name}: {change.before.nodes} nodes before, {change.after.nodes} after", style="bold")
            for line in change.diff(self.context):
                yield Text(line, style=_STYLES.get(line[0], ""))


def pass_report(
    explanation: Explanation, policy: Policy, num_inference_steps: int, step: str | None = None, context: int = 3
) -> PassReport:
    """What each pass does to one variant of an explained model.

    Args:
        explanation: what ``explain`` returned.
        policy: the policy whose variant is shown.
        num_inference_steps: steps of a request.
        step: the step whose variant is shown: a kind such as "partial", a number, counted from 0, or "probe". None for
            the first step that is not full.
        context: unchanged lines shown around each change.

    Returns:
        The report.

    Raises:
        UsageError: the policy has no such step.
        PolicyError: the policy does not work with this model.
    """
    facts = explanation.facts
    check_selection(facts, policy)
    check_rows(facts, policy)
    name, spec, counts = _chosen(explanation, policy, num_inference_steps, step)
    captured = with_predictor(explanation.captured, facts, policy.predictor)
    snapshots: list[Snapshot] = []
    build_variant(captured, facts, spec, lambda draft: snapshots.append(_snapshot(draft, counts)))
    passes = zip(REWRITE, pairwise(snapshots), strict=True)
    changes = tuple(PassChange(type(each).__name__, before, after) for each, (before, after) in passes)
    return PassReport(f"{explanation.model}, {policy.name}: {name}", changes, context)


def _chosen(
    explanation: Explanation, policy: Policy, total: int, step: str | None
) -> tuple[str, VariantSpec, dict[int, int]]:
    """The name of the variant, its spec, and how many tokens its partial branches recompute."""
    if step == PROBE:
        spec = probe_spec(policy)
        if spec is None:
            raise UsageError(f"{policy.name} has no probe")
        return PROBE, spec, {}
    steps = list(policy.planned(total))
    kinds = [each.kind for each in steps]
    index = _index(kinds, step)
    if index is None:
        known = ", ".join(dict.fromkeys(kind.value for kind in kinds))
        raise UsageError(
            f"step={step!r} is not among the {total} steps of {policy.name}; name a kind of step ({known}), the number "
            f"of a step from 0 to {total - 1}, or {PROBE!r} for a policy that has one"
        )
    return f"step {index} of {total}, {kinds[index].value}", *plan_step(explanation.facts, policy, steps[index])


def _index(kinds: Sequence[StepKind], step: str | None) -> int | None:
    """The index of the step that ``step`` names; None if there is none."""
    if step is None:
        return next((i for i, kind in enumerate(kinds) if kind is not StepKind.FULL), 0)
    if step.isdecimal():
        return int(step) if int(step) < len(kinds) else None
    return next((i for i, kind in enumerate(kinds) if kind.value == step), None)


def _snapshot(draft: VariantDraft, counts: dict[int, int]) -> Snapshot:
    fixed, per_token = variant_flops(draft.graph, draft.facts)
    flops = fixed + sum(each * counts[index] for index, each in per_token.items())
    return Snapshot(tuple(_lines(draft)), len(draft.graph.nodes), flops)


def _lines(draft: VariantDraft) -> Iterator[str]:
    for node in draft.graph.nodes:
        if node.op == "output":
            for port, value in zip(draft.results, node.args[0], strict=True):
                yield f"return {port.result_name} = {value}"
        else:
            path = module_path(node)
            yield f"{node.name}: {_kind(node.meta.get('val'))} = {_expression(node)}" + (f"  # {path}" if path else "")


def _expression(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"weight {node.target}"
    arguments = [*map(repr, node.args), *(f"{name}={value!r}" for name, value in node.kwargs.items())]
    return f"{op_name(node)}({', '.join(arguments)})"


def _kind(value: Any) -> str:
    """Type and shape of a node's value, such as ``float32[2, 16, 64]``."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__
