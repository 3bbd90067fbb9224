"""What an export contains of an optimized model: its graphs with dynamic sizes, and the policy's steps over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from duca_compile.artifact import manifest
from duca_compile.artifact.binder import content_hash
from duca_compile.compiler.analyze import analyze_call
from duca_compile.compiler.budget import CacheOptions
from duca_compile.compiler.checks import check_model
from duca_compile.compiler.precompute import make_rows
from duca_compile.core.fx_utils import source_line
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.ports import argument, argument_name
from duca_compile.core.steps import Step, StepKind
from duca_compile.core.variants import Action, Variant, VariantSpec
from duca_compile.drop_in import WARM_UP_HORIZON, OptimizedModel
from duca_compile.errors import CaptureError, ExportError, PolicyError, UsageError
from duca_compile.export.batch import BatchError, Fit, NoBatchError, OpenGraph, Seen, open_graph
from duca_compile.frontend.binder import Binder, Call
from duca_compile.frontend.opaque import opaque, site_of
from duca_compile.passes.caching.predict import with_predictor
from duca_compile.passes.pipeline import FOR_EXPORT, build_variant
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.auto import Auto
from duca_compile.policies.base import Policy
from duca_compile.policies.checks import check_whole
from duca_compile.runtime.planning import check_rows, check_selection, plan_step, probe_spec, score_output
from duca_compile.runtime.torch.prologue import Prologue


@dataclass(frozen=True)
class Capture:
    """The model captured at one batch size."""

    batch: int
    call: Call
    graph: CapturedGraph
    facts: Facts
    prologue: Prologue

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The call's tensors by their inputs."""
        return dict(zip(map(argument_name, self.graph.inputs), self.call.tensors, strict=True))

    def seen_prologue(self) -> Seen:
        inputs = tuple(map(argument, self.prologue.inputs))
        return Seen.of(self.batch, self.prologue.module, inputs, self.prologue.outputs)

    def seen_rows(self, pieces: frozenset[str]) -> Seen:
        rows = make_rows(self.graph, self.facts, pieces)
        return Seen.of(self.batch, rows.module, rows.inputs, rows.outputs)


class Traced:
    """An optimized model for one kind of call, with a dynamic batch size unless ``dynamic_batch`` is false.

    Captures the model for the call, and again at another batch size to see what depends on it.

    Attributes:
        model, policy: the source model, and the policy; what "auto" has learnt, frozen.
        rule: how the policy decides, if it does so while it runs; else None.
        call: the example call.
        variants: the variants that the policy's steps need, by name; filled by ``schedule``.

    Raises:
        UsageError: ``model`` is not an optimized model, is in training mode, or has cache options.
        BatchError: its graph is not valid for other batch sizes.
        ExportError: it cannot be exported, or the policy decides by a rule that no runtime knows.
        PolicyError: the policy cannot plan without ``num_inference_steps``, or the model cannot serve it.
    """

    def __init__(
        self, model: Any, example: Mapping[str, Any], num_inference_steps: int | None, dynamic_batch: bool = True
    ) -> None:
        if not isinstance(model, OptimizedModel):
            raise UsageError(f"expected a model from duca_compile.optimize, not {type(model).__name__}")
        check_model(model.source)
        if num_inference_steps is not None:
            check_whole("num_inference_steps", num_inference_steps, least=1)
        if model.cache_options != CacheOptions():
            raise UsageError(
                "an artifact supports neither cache_dtype nor cache_budget_bytes: optimize the model without them"
            )
        self.model: torch.nn.Module = model.callee
        self.policy: Policy = model.policy
        self._total = model._requests.total if num_inference_steps is None else num_inference_steps
        self._timestep, self._latent = model.timestep_name, model.latent_name
        self._bind = Binder(self.model, self._timestep)
        self.call = self._bind((), dict(example))
        capture = self._capture(self.call)
        self.one = self.other = capture
        if isinstance(self.policy, Auto):
            self.policy = _frozen(
                model.learnt(), self._total, tuple(capture.tensors[argument_name(capture.facts.latent)].shape)
            )
        if dynamic_batch:
            if capture.batch == 1:  # torch treats a size of 1 as a constant
                self.one = self._resized(capture.batch, 2)
            # An odd multiple, so that the same powers of two divide both sizes, and both pack values in the same order.
            self.other = self._resized(capture.batch, 3 * self.one.batch)
        check_selection(self.facts, self.policy)
        check_rows(self.facts, self.policy)
        self.rule = self._rule()
        self.variants: dict[str, TracedVariant] = {}
        self._names: dict[VariantSpec, str] = {}

    def _rule(self) -> manifest.Rule | None:
        policy = self.policy
        if not isinstance(policy, AdaptivePolicy):
            return None
        if policy.per != "batch" and any(branch.dtype is torch.bfloat16 for branch in self.facts.branches):
            raise ExportError(
                f"with decide_per={policy.per!r} batch rows of two steps are merged in numpy, which lacks bfloat16; "
                "convert the model to another dtype, or use decide_per='batch'"
            )
        return manifest.Rule.of(policy)

    @property
    def facts(self) -> Facts:
        return self.one.facts

    def calls(self) -> dict[int, dict[str, Tensor]]:
        """The tensors of a call by input, for each batch size."""
        return {capture.batch: capture.tensors for capture in (self.one, self.other)}

    @property
    def fixed(self) -> dict[str, str]:
        """The hashes of the arguments that forward reads values of in Python, for which alone the graphs are valid."""
        captured = self.one.graph
        places = () if captured.guards is None else captured.guards.places
        names = [argument_name(captured.inputs[place]) for place in places]
        return {name: content_hash(self.one.tensors[name]) for name in names}

    def prologue(self) -> OpenGraph:
        """Computes the loop-invariant values, once per request."""
        one, other = self.one.seen_prologue(), self.other.seen_prologue()
        try:
            return open_graph("prologue", one, other)
        except NoBatchError:
            name = self._with_batch()
            if name is None:
                raise
            seen = [part.reading(name, at.tensors[name]) for part, at in ((one, self.one), (other, self.other))]
            return open_graph("prologue", *seen)

    def _with_batch(self) -> str | None:
        """A loop-invariant argument that has the batch size."""
        changing = set(map(argument_name, self.facts.changing))
        sizes = {name: tensor.shape[:1] for name, tensor in self.one.tensors.items() if name not in changing}
        return next((name for name, size in sizes.items() if self.other.tensors[name].shape[:1] != size), None)

    def rows(self, name: str, pieces: frozenset[str]) -> OpenGraph:
        """Computes these timestep-only values, packed as the variants read them."""
        return open_graph(name, self.one.seen_rows(pieces), self.other.seen_rows(pieces))

    def size(self, one: int, other: int, place: str) -> int | manifest.Size:
        """A number that is ``one`` and ``other`` at the two batch sizes, as an expression of the batch size."""
        return Fit("model", self.one.batch, self.other.batch).size(one, other, place)

    def schedule(self) -> manifest.Schedule:
        """The policy's steps; the variants that they need are in ``variants`` afterwards."""
        plans: dict[Step, manifest.Plan] = {}
        steps = list(islice(self.policy.planned(self._total), WARM_UP_HORIZON))
        full = Step(StepKind.FULL, kept=steps[0].kept)
        choices = self.policy.choices if isinstance(self.policy, AdaptivePolicy) else ()
        for step in (*steps, *choices, full):
            if step not in plans:
                plans[step] = self._plan(step)
        places = {step: place for place, step in enumerate(plans)}
        return manifest.Schedule(
            num_inference_steps=self._total,
            plans=tuple(plans.values()),
            steps=tuple(places[step] for step in steps),
            full=places[full],
            look=self._look(),
        )

    def _look(self) -> manifest.Look | None:
        spec = probe_spec(self.policy)
        if spec is None:
            return None
        name = self._variant(spec, "look")
        return manifest.Look(name, self.variants[name].flops({}))

    def _plan(self, step: Step) -> manifest.Plan:
        spec, counts = plan_step(self.facts, self.policy, step)
        name = self._variant(spec, step.kind.value)
        named = {str(index): count for index, count in counts.items()}
        return manifest.Plan(step, name, named, self.variants[name].flops(counts))

    def _variant(self, spec: VariantSpec, kind: str) -> str:
        """The name of the variant of a spec, which starts with ``kind``; each is traced once."""
        if spec not in self._names:
            same_kind = sum(name.split("-")[0] == kind for name in self.variants)
            name = f"{kind}-{same_kind + 1}" if same_kind else kind
            self.variants[name] = TracedVariant.of(name, self.one, self.other, spec)
            self._names[spec] = name
        return self._names[spec]

    def _capture(self, call: Call) -> Capture:
        graph, facts, prologue = analyze_call(
            self.model, call, self._timestep, self._latent, exact=False, passes=FOR_EXPORT
        )
        name = type(self.model).__name__
        for node in graph.graph.find_nodes(op="call_function", target=opaque):
            site = site_of(node)
            raise ExportError(
                f"{name}.{site.path}, called at {source_line(node)}, {site.reason}, so it runs outside of the graph; "
                "a model with such a submodule cannot be exported"
            )
        if graph.fetched:
            raise ExportError(
                f"{name}: hooks materialize weights for each call only ({graph.fetched[0]}); to export the model, "
                "remove these hooks, or load it without them"
            )
        if graph.writes:
            raise ExportError(
                f"{name}.forward writes to its argument, {graph.writes[0].label}, which an artifact does not do; "
                "export a call for which it does not, such as one with that container filled"
            )
        latent = next(n for n in graph.graph.find_nodes(op="placeholder") if n.name == facts.latent)
        graph = with_predictor(graph, facts, self.policy.predictor)
        return Capture(int(latent.meta["val"].shape[0]), call, graph, facts, prologue)

    def _resized(self, batch: int, rows: int) -> Capture:
        """The model captured with another number of batch rows. Raises BatchError."""
        name = type(self.model).__name__
        if reads := self.one.graph.guarded_inputs:
            argument, read = next(iter(reads.items()))
            raise BatchError(
                f"{name}.forward reads {argument!r} in Python at {read.source}, so its graph is valid for these values "
                "alone, and for no other batch size"
            )
        try:
            return self._capture(self._with_rows(batch, rows))
        except CaptureError as error:
            raise BatchError(f"{name} cannot be captured with {rows} batch rows: {error}") from error

    def _with_rows(self, batch: int, rows: int) -> Call:
        """The example call with ``rows`` batch rows in all tensors whose first dimension is ``batch``."""

        def resized(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != batch:
                return tensor
            return tensor[torch.arange(rows, device=tensor.device) % batch]

        return self._bind((), tree_map_only(Tensor, resized, self.call.arguments))


def _frozen(policy: Auto, total: int | None, latent: tuple[int, ...]) -> Policy:
    """What was learnt of one kind of request, as a policy that learns no more."""
    if total is None:
        raise PolicyError("what was learnt depends on the number of steps; pass save(..., num_inference_steps=50)")
    found = {each.policy: each for each in policy.known_of(total, latent)}
    wanted = f"requests of {total} steps with a latent of {'x'.join(map(str, latent))}"
    if not found:
        known = "; ".join(str(each.kind) for each in policy.known) or "nothing"
        raise ExportError(
            f'policy="auto" has learnt nothing of {wanted}: run one such request first, or optimize the model with '
            f"what another process has learnt and saved. Learnt so far: {known}"
        )
    if len(found) > 1:
        raise ExportError(
            f'policy="auto" has learnt {len(found)} schedules for {wanted}, and an artifact holds one: optimize the '
            "model with the policy of one of learnt().known. These are for "
            + "; ".join(str(each.kind) for each in found.values())
        )
    return next(iter(found))


@dataclass(frozen=True)
class TracedVariant:
    """A variant at both batch sizes, as one graph."""

    name: str
    spec: VariantSpec
    graph: OpenGraph
    pieces: frozenset[str]  # the timestep-only values that it reads
    _by_batch: tuple[tuple[int, Variant], tuple[int, Variant]]  # at each of the two batch sizes

    @staticmethod
    def of(name: str, one: Capture, other: Capture, spec: VariantSpec) -> TracedVariant:
        variants = [(capture.batch, build_variant(capture.graph, capture.facts, spec)) for capture in (one, other)]
        seen = [Seen.of(n, v.module, v.inputs, v.outputs, v.dynamic_inputs) for n, v in variants]
        return TracedVariant(name, spec, open_graph(name, *seen), variants[0][1].pieces, (variants[0], variants[1]))

    def flops(self, counts: Mapping[int, int]) -> manifest.Flops:
        (rows, one), (more, other) = self._by_batch
        first = one.flops(counts)
        per_row = (other.flops(counts) - first) / (more - rows) if more > rows else 0.0
        return manifest.Flops(first - per_row * rows, per_row)

    def describe(self, facts: Facts, rows: str | None) -> manifest.Variant:
        """The manifest's entry; ``rows`` is the name of the graph that computes the timestep-only values it reads."""
        variant = self._by_batch[0][1]
        cached, computed = [], dict[str, str | None]()
        for branch in facts.branches:
            if not branch.pointwise:
                continue
            if self.spec.action(branch.index) is Action.COMPUTE:
                score = score_output(facts, branch, variant)
                computed[str(branch.index)] = None if score is None else score.result_name
            else:
                cached.append(branch.index)
        tokens = tuple(self.spec.tokens_input(index).input_name for index in cached)
        return manifest.Variant(self.name, rows, tuple(cached), tokens, computed)
