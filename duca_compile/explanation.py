"""``explain``: what the compiler finds in a model, and what a policy would do with it."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn

from duca_compile.compiler.analyze import analyze_call
from duca_compile.compiler.budget import cache_bytes, peak_of_request
from duca_compile.compiler.checks import check_model
from duca_compile.core.ir import Branch, CapturedGraph, Facts, Role, Variance
from duca_compile.core.tables import FigureTable, Items
from duca_compile.core.variants import Variant, VariantSpec
from duca_compile.drop_in import OptimizedModel, check_parts
from duca_compile.errors import UsageError
from duca_compile.frontend.binder import Binder
from duca_compile.integrations.diffusers import is_pipeline
from duca_compile.passes.caching.predict import predictor_bytes, with_predictor
from duca_compile.passes.exact.hoist import frontier
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies import AdaptivePolicy, Auto, Policy, Step, StepKind
from duca_compile.policies.named import resolve_policy
from duca_compile.runtime.planning import check_rows, check_selection, costly_partial, plan_step, probe_spec

_UNCACHED = {
    Role.TEXT: "only attention reads it, and attention is cached",
    Role.ENCODER: "it does not depend on the latent",
    Role.REFINER: "nothing reads it",
    Role.MAIN: "nothing reads it",
}
_WIDTH = 140  # of a report as text, without a terminal and COLUMNS
_INSTALLED = re.compile(r"[^\s\"(]*[/\\]site-packages[/\\]")
KIND_STYLES = {
    StepKind.FULL: "red",
    StepKind.PARTIAL: "yellow",
    StepKind.REUSE: "cyan",
    StepKind.SKIP: "green",
    StepKind.FORECAST: "magenta",
    StepKind.PREDICT: "blue",
}


@dataclass(frozen=True)
class PlannedStep:
    """One step of a schedule.

    Attributes:
        index: the step, counted from 0.
        kind: what the blocks do.
        flops: FLOPs of the step.
        fresh_share: mean share of tokens that its partial branches recompute.
    """

    index: int
    kind: StepKind
    flops: float
    fresh_share: float


@dataclass(frozen=True)
class ScheduleReport:
    """What a policy would run over one request. ``print`` shows it as a table.

    Attributes:
        policy: name of the policy.
        steps: the steps, in order.
        uncached_flops: FLOPs of one uncached step.
        cache_bytes: bytes of all caches of one guidance pass.
        adaptive: whether the policy decides at run time; ``steps`` are then the cheapest ones that it may choose.
        weight_bytes: bytes of a trained predictor's weights, which all requests share.
        learns: whether the policy learns its steps from requests; ``steps`` are then those of the first one.
    """

    policy: str
    steps: tuple[PlannedStep, ...]
    uncached_flops: float
    cache_bytes: int
    adaptive: bool = False
    weight_bytes: int = 0
    learns: bool = False

    @property
    def full_steps(self) -> int:
        """How many steps are full."""
        return sum(step.kind is StepKind.FULL for step in self.steps)

    @property
    def ideal_speedup(self) -> float:
        """FLOPs of the uncached loop over FLOPs of this one: the best speed-up that wall-clock time can reach."""
        return len(self.steps) * self.uncached_flops / sum(step.flops for step in self.steps)

    def _mean_share(self, kind: StepKind) -> float:
        """The FLOPs of steps of this kind, as a share of an uncached step's; 0 if there are none."""
        chosen = [step.flops for step in self.steps if step.kind is kind]
        return sum(chosen) / len(chosen) / self.uncached_flops if chosen else 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(f"{self.policy}, {len(self.steps)} steps: ")
        for step in self.steps:
            line.append(step.kind.letter, style=KIND_STYLES[step.kind])
        yield line
        table = FigureTable("kind", "steps", "FLOPs of a full step", "tokens recomputed")
        for kind in StepKind:
            chosen = [step for step in self.steps if step.kind is kind]
            if chosen:
                mean = self._mean_share(kind)
                fresh = sum(step.fresh_share for step in chosen) / len(chosen)
                tokens = f"{fresh:.1%} of each MLP" if kind is StepKind.PARTIAL else ""
                table.add_row(Text(kind.value, style=KIND_STYLES[kind]), str(len(chosen)), f"{mean:.2%}", tokens)
        yield table
        if self.adaptive:
            yield "decided at run time: these are the fewest full steps possible"
        if self.learns:
            yield "learnt at run time: these are the steps of the first request of its kind"
        if (costly := costly_partial(self._mean_share(StepKind.PARTIAL))) is not None:
            yield costly
        yield f"ideal speed-up {self.ideal_speedup:.2f}x (by FLOPs; elementwise work counts as none)"
        yield f"caches hold {_size(self.cache_bytes)}"
        if self.weight_bytes:
            yield f"the predictor's weights hold {_size(self.weight_bytes)}"

    def __str__(self) -> str:
        return _rendered(self)


@dataclass(frozen=True)
class Explanation:
    """What the compiler found in one model for one call. ``print`` shows it as a report.

    Attributes:
        model: class name of the model.
        captured: its graph.
        facts: what the analyses found.
        policy: the policy of the optimized model that was explained, or None. If it learns, what it knows is in it.
    """

    model: str
    captured: CapturedGraph
    facts: Facts
    policy: Policy | None
    _variants: dict[VariantSpec, Variant] = field(default_factory=dict, repr=False, compare=False)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The residual branches, in order."""
        return self.facts.branches

    @property
    def flops(self) -> int:
        """FLOPs of one uncached step; a multiply-add counts as two."""
        return sum(self.facts.flops.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of all branch caches and of the cached ends of the streams.

        For an optimized model, bytes of the caches that its policy keeps.
        """
        if self.policy is not None:
            return self.schedule(self.policy).cache_bytes
        restored = set(self.facts.ends.values())
        ends = [n.meta["val"] for n in self.captured.graph.nodes if n.name in restored]
        return sum(b.cache_bytes for b in self.branches) + sum(int(end.nbytes) for end in ends)

    @property
    def hoisted(self) -> tuple[str, ...]:
        """Names of the graph nodes whose loop-invariant values are computed once per request."""
        return tuple(n.name for n in frontier(self.captured.graph, self.facts))

    @property
    def not_understood(self) -> tuple[str, ...]:
        """Branches that partial steps compute in full, each with its source line and the reason."""
        return self.facts.notes

    def share(self, variance: Variance) -> float:
        """The share of a step's FLOPs that computes values of this variance, 0 to 1."""
        return sum(f for name, f in self.facts.flops.items() if self.facts.variance[name] is variance) / self.flops

    def schedule(self, policy: str | Policy | None = None, num_inference_steps: int = 50) -> ScheduleReport:
        """The steps that a policy would run, with their FLOPs.

        Args:
            policy: a name or a Policy object; by default that of the optimized model, else "duca".
            num_inference_steps: the number of steps of the loop.

        Returns:
            The schedule.

        Raises:
            PolicyError: the policy is unknown, or does not work with this model.
        """
        chosen = self._chosen(policy, num_inference_steps)
        check_selection(self.facts, chosen)
        check_rows(self.facts, chosen)
        captured = with_predictor(self.captured, self.facts, chosen.predictor)
        variants: dict[VariantSpec, Variant] = {}
        known = self._variants if chosen.predictor is None else variants  # a predictor changes the graph

        def variant(spec: VariantSpec) -> Variant:
            if spec not in known:
                known[spec] = build_variant(captured, self.facts, spec)
            variants[spec] = known[spec]
            return known[spec]

        probe = probe_spec(chosen)
        probe_flops = 0.0 if probe is None else variant(probe).flops({})

        def planned(index: int, step: Step) -> PlannedStep:
            spec, counts = plan_step(self.facts, chosen, step)
            shares = [counts[i] / self.branches[i].tokens for i in counts]
            fresh = sum(shares) / len(shares) if shares else 0.0
            return PlannedStep(index, step.kind, probe_flops + variant(spec).flops(counts), fresh)

        steps = tuple(planned(i, step) for i, step in enumerate(chosen.planned(num_inference_steps)))
        kept = cache_bytes(self.facts, chosen, variants.values())
        adaptive, weights = isinstance(chosen, AdaptivePolicy), predictor_bytes(captured)
        return ScheduleReport(chosen.name, steps, self.flops, kept, adaptive, weights, isinstance(chosen, Auto))

    def _chosen(self, policy: str | Policy | None, total: int) -> Policy:
        """The policy; where it has learnt how to run the call, what it learnt."""
        chosen = resolve_policy(policy if policy is not None else self.policy or "duca")
        if not isinstance(chosen, Auto):
            return chosen
        latent = next(n for n in self.captured.graph.find_nodes(op="placeholder") if n.name == self.facts.latent)
        found = chosen.known_of(total, tuple(map(int, latent.meta["val"].shape)))
        return found[-1].policy if found else chosen

    def peak_bytes(self, policy: str | Policy | None = None, num_inference_steps: int = 50) -> int:
        """The most bytes that one guidance pass of a request allocates at once under the eager backend.

        These are caches, loop-invariant and timestep-only values, and the activations of a step, but neither the
        model's weights nor the arguments of the call. Compiled steps have fewer activations.

        Args:
            policy: a name or a Policy object; by default that of the optimized model, else "duca".
            num_inference_steps: the number of steps of the loop.

        Raises:
            PolicyError: the policy is unknown, or does not work with this model.
        """
        chosen = self._chosen(policy, num_inference_steps)
        check_selection(self.facts, chosen)
        check_rows(self.facts, chosen)
        return peak_of_request(self.captured, self.facts, chosen, num_inference_steps)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = self.facts
        yield Text(f"{self.model}: {len(self.branches)} branches in {facts.blocks} blocks", style="bold")
        first = self.branches[0]
        yield f"latent: {facts.latent}; timestep: {facts.timestep}; stream: {_shape(first)} {first.dtype}"
        yield from self._streams()
        for embedding in facts.embeddings:
            yield f"embedding: the convolution of {_shown(embedding)} is computed in every step, and is no branch"
        yield from self._traced()
        yield f"{self.flops / 1e9:.3f} GFLOPs per step; caches hold {_size(self.cache_bytes)}"
        yield from map(_shown, facts.uncounted)
        yield (
            f"loop-invariant: {len(self.hoisted)} values hoisted, {self.share(Variance.INVARIANT):.2%} of FLOPs; "
            f"timestep-only: {self.share(Variance.TIMESTEP):.2%}; latent-dependent: {self.share(Variance.LATENT):.2%}"
        )
        names = ("blocks", "path", "stream", "kind", "gate", "FLOPs", "cache", "pointwise")
        table = FigureTable(*names, wrapped={"path"})
        mixing: list[str] = []
        for group in _alike(self.branches):
            branch, last = group[0], group[-1]
            blocks = str(branch.block) if branch is last else f"{branch.block} to {last.block}"
            path = branch.path if branch is last else f"{branch.path} to {last.path}"
            flops = sum(b.flops for b in group) / self.flops
            size = sum(b.cache_bytes for b in group)
            cells = (
                path or "-",
                branch.role.value,
                branch.kind,
                "yes" if branch.gated else "no",
                f"{flops:.2%}",
                _size(size),
            )
            table.add_row(blocks, *cells, "yes" if branch.pointwise else "no")
            if not branch.pointwise:
                where = f"blocks {blocks}, {branch.role.value} stream, {branch.kind}"
                mixing.append(f"{where}: no, {_shown(str(branch.mixing_reason))}")
        yield table
        if mixing:
            yield Text("pointwise along tokens?", style="bold")
            yield Items(mixing)
        if self.not_understood:
            yield Text("not understood, so computed in full in partial steps:", style="bold")
            yield Items(map(_shown, self.not_understood))
        else:
            yield "every branch is understood"

    def _streams(self) -> Iterator[str]:
        """A line for each role: the number of branches and of their tokens."""
        for role in Role:
            streams = [stream for stream in self.facts.streams if stream.role is role]
            if streams:
                sizes = sorted({stream.grid for stream in streams})
                tokens = " or ".join(map(_by, sizes))
                cached = "" if any(stream.cached for stream in streams) else f", not cached: {_UNCACHED[role]}"
                branches = sum(stream.branches for stream in streams)
                yield f"{role.value} stream: {branches} branches, {tokens} tokens{cached}"

    def _traced(self) -> Iterator[str]:
        """The values that the capture is specialized to, the modules that run untraced, and weights that hooks load."""
        for name, read in self.captured.guarded_inputs.items():
            source = _shown(read.source)
            yield f"specialized to what forward reads of {name} ({source}): other values are captured again"
        operators = {site.path: site.reason for site in self.captured.opaque}
        for reason, (first, *more) in _grouped(operators).items():
            like = f", and so does each of {len(more)} like it" if more else ""
            yield f"{first} {_shown(reason)}: it runs as one opaque operator{like}"
        hooks = Counter(" and ".join(hook.name for hook in weight.hooks) for weight in self.captured.fetched)
        for names, count in hooks.items():
            yield f"{count} weights that {names} load are read where they are stored, whenever a step needs them"

    def __str__(self) -> str:
        return _rendered(self)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """What the compiler finds in a model, for one example call.

    The model is captured and analysed, but not changed, and nothing is compiled.

    Args:
        model: a Diffusion Transformer in eval mode; or an optimized one, whose policy is then the default of
            ``Explanation.schedule``.
        args: positional arguments of the example call.
        kwargs: keyword arguments of the example call.

    Returns:
        A report; print it, or ask it for schedules.

    Raises:
        UsageError: ``model`` is not an nn.Module or is in training mode, or the arguments do not fit its forward.
        CaptureError: forward cannot be captured; the message names the source line.
        StructureError: there is nothing to cache: the graph has no residual stream, no timestep or no latent.
    """
    policy = timestep = latent = None
    source, exact = model, False
    if isinstance(model, OptimizedModel):
        policy, timestep, latent = model.policy, model.timestep_name, model.latent_name
        policy = model.learnt() if isinstance(policy, Auto) else policy
        source, exact = model.callee, model._backend.exact
    if is_pipeline(source):
        raise UsageError("explain takes one model of a pipeline and a call of it: explain(pipe.transformer, ...)")
    check_model(source)
    check_parts(source)
    captured, facts, _ = analyze_call(source, Binder(source, timestep)(args, kwargs), timestep, latent, exact=exact)
    return Explanation(type(source).__name__, captured, facts, policy)


def _alike(branches: tuple[Branch, ...]) -> list[list[Branch]]:
    """Groups of branches that differ only in their block, one group for each run of consecutive blocks."""
    groups: dict[Hashable, list[list[Branch]]] = {}
    for b in branches:
        key = (b.role, b.kind, b.gated, b.shape, b.flops, b.mixing_reason)
        runs = groups.setdefault(key, [])
        if runs and b.block - runs[-1][-1].block == 1:
            runs[-1].append(b)
        else:
            runs.append([b])
    return sorted((run for runs in groups.values() for run in runs), key=lambda run: run[0].index)


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The paths that have each reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path)
    return paths


def _shape(branch: Branch) -> str:
    """The sizes of its stream, with what they are numbers of: (2 rows, 8 x 8 tokens, 64 channels)."""
    names = [" x ".join("tokens" if axis else "rows" for axis in axes) or "channels" for axes in branch.layout.dims]
    parts = groupby(zip(names, branch.shape, strict=True), key=itemgetter(0))
    return f"({', '.join(f'{_by(size for _, size in sizes)} {name}' for name, sizes in parts)})"


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _shown(text: str) -> str:
    """The text with paths of installed packages shortened to start with the package's folder."""
    return _INSTALLED.sub("", text)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _rendered(report: Explanation | ScheduleReport) -> str:
    columns = shutil.get_terminal_size((_WIDTH, 0)).columns
    console = Console(width=columns, force_terminal=False)
    with console.capture() as text:
        console.print(report)
    return text.get()
