"""Plans steps for one captured graph; the variant of each is built when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from duca_compile.core.fx_utils import port_of
from duca_compile.core.ir import Facts, Variance
from duca_compile.core.lock import COMPILING
from duca_compile.core.once import Once
from duca_compile.core.ports import CACHES, NUMBERS
from duca_compile.core.steps import Step, StepKind
from duca_compile.core.variants import Action, Variant, VariantFunction, VariantSpec
from duca_compile.policies.base import Policy
from duca_compile.policies.end_only import EndOnly
from duca_compile.runtime.dispatcher import Program, StepPlan
from duca_compile.runtime.forecasting import ForecastInputs, compares_caches
from duca_compile.runtime.planning import (
    check_rows,
    check_selection,
    costly_partial,
    plan_step,
    probe_spec,
    score_output,
    tokens_of,
)
from duca_compile.runtime.selection import TokenSet
from duca_compile.runtime.torch.arrays import TorchArrays
from duca_compile.runtime.torch.rows import Rows

log = logging.getLogger("duca_compile")


class Builder(Protocol):
    """Builds what a dispatcher runs, from one captured graph."""

    def build(self, spec: VariantSpec) -> tuple[Variant, VariantFunction]:
        """The variant of a spec, and the function that runs it."""

    def build_rows(self, needed: frozenset[str] | None) -> Rows:
        """What computes the timestep-only values named in ``needed``, or all of them if it is None."""


class Programs:
    """The plans of a policy's steps for one captured graph. Each spec is built once.

    ``said`` remembers what was logged.

    Raises:
        PolicyError: this graph cannot serve the policy.
    """

    def __init__(self, facts: Facts, policy: Policy, builder: Builder, said: Once | None = None) -> None:
        check_selection(facts, policy)
        check_rows(facts, policy)
        self._facts, self._policy, self._builder = facts, policy, builder
        self._said = said or Once()
        self._rows: dict[frozenset[str] | None, Rows] = {}
        self._plans: dict[Step, StepPlan] = {}
        self._probe_plan: StepPlan | None = None
        self.by_spec: dict[VariantSpec, tuple[Variant, Program]] = {}
        self._selectable = [b for b in facts.branches if b.pointwise]
        self._position = {b.index: i for i, b in enumerate(self._selectable)}

    @property
    def batch(self) -> int:
        """The number of batch rows of the latent."""
        return self._facts.batch

    @property
    def tokens(self) -> list[TokenSet]:
        """The tokens of each branch whose tokens can be chosen."""
        selection = self._policy.selection
        return [] if selection is None else [tokens_of(self._facts, selection, b) for b in self._selectable]

    def arrays(self, like: Tensor) -> TorchArrays:
        return TorchArrays(like.device)

    def timestep_rows(self, needed: frozenset[str] | None) -> Rows:
        """What computes the timestep-only values named in ``needed``, or all of them if it is None."""
        if needed not in self._rows:
            with COMPILING:
                self._rows[needed] = self._builder.build_rows(needed)
        return self._rows[needed]

    def plan(self, step: Step) -> StepPlan:
        plan = self._plans.get(step)
        if plan is not None:
            return plan
        with COMPILING:
            run = self._policy.replacement_for(step) if isinstance(self._policy, EndOnly) else step
            spec, counts = plan_step(self._facts, self._policy, run)
            variant, program = self._program(spec)
            fresh = tuple(counts.get(index, 0) for index in program.cached_branches)
            plan = self._plans[step] = StepPlan(run, program, fresh, variant.flops(counts))
        if run.kind is StepKind.PARTIAL:
            self._say_if_costly(plan)
        return plan

    def _say_if_costly(self, plan: StepPlan) -> None:
        facts = self._facts
        full = sum(count for name, count in facts.flops.items() if facts.variance[name] is not Variance.INVARIANT)
        message = costly_partial(plan.flops / full if full else 0.0)
        if message is not None and self._said.first("costly partial steps"):
            log.warning("%s", message)

    def probe_plan(self) -> StepPlan | None:
        """The plan that measures before a step is decided; None if the policy has no probe."""
        spec = probe_spec(self._policy)
        if self._probe_plan is None and spec is not None:
            with COMPILING:
                variant, program = self._program(spec)
            self._probe_plan = StepPlan(Step(StepKind.FULL), program, (), variant.flops({}))
        return self._probe_plan

    def _program(self, spec: VariantSpec) -> tuple[Variant, Program]:
        if spec not in self.by_spec:
            variant, run = self._builder.build(spec)
            cached = tuple(b.index for b in self._selectable if spec.action(b.index) is not Action.COMPUTE)
            program = Program.of(
                run,
                variant.inputs,
                variant.outputs,
                variant.pieces,
                forecast=_forecast_inputs(variant),
                cached_branches=cached,
                selector_positions=tuple(self._position[index] for index in cached),
                tokens=tuple(map(spec.tokens_input, cached)),
                computed=self._computed(variant),
            )
            self.by_spec[spec] = variant, program
        return self.by_spec[spec]

    def _computed(self, variant: Variant) -> dict[int, int | None]:
        computed: dict[int, int | None] = {}
        for branch in self._selectable:
            if variant.spec.action(branch.index) is Action.COMPUTE:
                score = score_output(self._facts, branch, variant)
                computed[self._position[branch.index]] = None if score is None else variant.outputs.index(score)
        return computed


def _forecast_inputs(variant: Variant) -> ForecastInputs:
    kinds = {port_of(n): n.meta["val"] for n in variant.module.graph.find_nodes(op="placeholder")}
    numbers = {port: partial(_number, like) for port, like in kinds.items() if port.kind in NUMBERS}
    caches = {port: partial(_zeros, like) for port, like in kinds.items() if port.kind in CACHES}
    compares = compares_caches((*kinds, *variant.outputs))
    rows = max((kinds[port].numel() for port in numbers), default=1)
    return ForecastInputs(numbers, caches if compares else {}, rows)


def _number(like: Tensor, values: Sequence[float]) -> Tensor:
    """If all values are equal, filled on the device, since a copy from the host would wait for the device."""
    if len(set(values)) > 1:
        return torch.tensor(values, dtype=like.dtype).to(like.device)
    return torch.full(like.shape, values[0], dtype=like.dtype, device=like.device)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
