"""The plans of an artifact at one batch size: what each step runs, as it was recorded at export."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod

import numpy as np

from duca_compile.artifact import manifest
from duca_compile.artifact.engines.base import Engine, GraphFunction
from duca_compile.artifact.manifest import Manifest, Size, TensorSpec
from duca_compile.core.ports import (
    CACHES,
    NUMBERS,
    Port,
    argument,
    named_input,
    named_result,
)
from duca_compile.core.steps import Step, StepKind
from duca_compile.core.tensors import Array
from duca_compile.errors import ArtifactError
from duca_compile.policies.base import Forecast as ForecastOptions
from duca_compile.policies.base import Policy, Selection
from duca_compile.runtime.arrays import NumpyArrays
from duca_compile.runtime.dispatcher import Program, StepPlan
from duca_compile.runtime.forecasting import ForecastInputs, compares_caches
from duca_compile.runtime.selection import TokenSet

log = logging.getLogger("duca_compile")


class Recorded(Policy):
    """The policy of an artifact whose steps were fixed when it was exported."""

    def __init__(self, recorded: manifest.Policy, schedule: manifest.Schedule) -> None:
        self._recorded, self._schedule = recorded, schedule

    @property
    def name(self) -> str:
        return self._recorded.name

    @property
    def caches(self) -> bool:
        return self._recorded.caches

    @property
    def selection(self) -> Selection | None:
        return self._recorded.selection

    @property
    def forecast(self) -> ForecastOptions | None:
        return self._recorded.forecast

    def steps(self, total: int | None) -> Iterator[Step]:
        del total
        for place in self._schedule.steps:
            yield self._schedule.plans[place].step

    def planned(self, total: int | None) -> Iterator[Step]:
        """The same as ``steps``, which were recorded as planned."""
        return self.steps(total)


def input_ports(recorded: Manifest, name: str) -> tuple[Port, ...]:
    """The ports of the inputs of the graph of this name. Raises ArtifactError where one is unknown."""
    arguments = {each.input for each in recorded.signature.arguments}

    def port(spec: TensorSpec) -> Port:
        known = argument(spec.name) if spec.name in arguments else named_input(spec.name)
        return _known(known, f"graphs.{name}.inputs", spec.name)

    return tuple(map(port, recorded.graphs[name].inputs))


def output_ports(recorded: Manifest, name: str) -> tuple[Port, ...]:
    """The ports of the results of the graph of this name. Raises ArtifactError where one is unknown."""
    outputs = recorded.graphs[name].outputs
    return tuple(_known(named_result(spec.name), f"graphs.{name}.outputs", spec.name) for spec in outputs)


def _known(port: Port | None, place: str, name: str) -> Port:
    if port is None:
        raise ArtifactError(f"{manifest.FILE}: {place}: the name {name!r} is unknown")
    return port


class _TimestepValues:
    """Computes the timestep-only values of one call."""

    def __init__(self, recorded: Manifest, name: str, run: GraphFunction) -> None:
        self.outputs, self._inputs, self._run = output_ports(recorded, name), input_ports(recorded, name), run

    def compute(self, call: Mapping[str, Array], hoisted: Mapping[Port, Array]) -> Sequence[Array]:
        """The values in the order of ``outputs``."""
        return self._run(*[hoisted[port] if port in hoisted else call[str(port.of)] for port in self._inputs])

    def compute_all(
        self, call: Mapping[str, Array], hoisted: Mapping[Port, Array], times: tuple[float, ...]
    ) -> Mapping[float, Sequence[Array]]:
        """None: artifacts compute these values step by step."""
        del call, hoisted, times
        return {}


class Prologue:
    """Computes the loop-invariant values."""

    def __init__(self, recorded: Manifest, run: GraphFunction) -> None:
        self.inputs = tuple(spec.name for spec in recorded.graphs[recorded.prologue].inputs)
        self._outputs, self._run = output_ports(recorded, recorded.prologue), run

    def compute(self, call: Mapping[str, Array]) -> dict[Port, Array]:
        """The values by port."""
        return dict(zip(self._outputs, self._run(*[call[name] for name in self.inputs]), strict=True))


class Planner:
    """The plans of an artifact at one batch size."""

    def __init__(self, recorded: Manifest, batch: int, engine: Engine, functions: Mapping[str, GraphFunction]) -> None:
        self._manifest, self._batch, self._engine, self._functions = recorded, batch, engine, functions
        self._plans: dict[Step, StepPlan] = {}
        self._probe_plan: StepPlan | None = None
        self._recorded = {plan.step: plan for plan in recorded.schedule.plans}
        self._position = {branch.index: i for i, branch in enumerate(recorded.branches)}
        self._programs = {name: self._program(variant) for name, variant in recorded.variants.items()}
        graphs = {variant.rows for variant in recorded.variants.values() if variant.rows is not None}
        self._timestep_values = {name: _TimestepValues(recorded, name, functions[name]) for name in graphs}
        look = recorded.schedule.look
        if look is not None:
            self._probe_plan = StepPlan(Step(StepKind.FULL), self._programs[look.variant], (), look.flops.at(batch))

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def tokens(self) -> list[TokenSet]:
        """The tokens of each selectable branch, in the order of the selector."""
        return [TokenSet(_at(b.rows, self._batch), b.tokens, b.grid) for b in self._manifest.branches]

    def probe_plan(self) -> StepPlan | None:
        """What measures before a step is decided; None where nothing does."""
        return self._probe_plan

    def arrays(self, like: Array) -> NumpyArrays:
        del like
        return NumpyArrays()

    def timestep_rows(self, needed: str) -> _TimestepValues:
        """What computes the timestep-only values that a program with these ``pieces`` reads."""
        return self._timestep_values[needed]

    def plan(self, step: Step) -> StepPlan:
        """The recorded plan of a step; that of a full step, with a warning, where there is none."""
        plan = self._plans.get(step)
        if plan is None:
            recorded = self._recorded.get(step, self._manifest.schedule.plans[self._manifest.schedule.full])
            if recorded.step.kind is not step.kind:
                log.warning(
                    "the artifact has no graph for the %s steps that its policy %s may choose: they are computed in "
                    "full. Export the model again with this version of duca_compile",
                    step.kind.value,
                    self._manifest.policy.name,
                )
            program = self._programs[recorded.variant]
            counts = tuple(recorded.counts.get(str(index), 0) for index in program.cached_branches)
            plan = self._plans[step] = StepPlan(recorded.step, program, counts, recorded.flops.at(self._batch))
        return plan

    def _program(self, variant: manifest.Variant) -> Program:
        found, outputs = self._manifest, output_ports(self._manifest, variant.graph)
        places = {port.result_name: place for place, port in enumerate(outputs)}
        program = Program.of(
            self._functions[variant.graph],
            input_ports(found, variant.graph),
            outputs,
            variant.rows,
            forecast=self._forecast(variant.graph),
            cached_branches=variant.waiting,
            selector_positions=tuple(self._position[index] for index in variant.waiting),
            tokens=tuple(
                _known(named_input(name), f"variants.{variant.graph}.tokens", name) for name in variant.tokens
            ),
            computed={
                self._position[int(index)]: None if score is None else places[score]
                for index, score in variant.computed.items()
            },
        )
        program.copied_caches = program.aliased_outputs = ()  # each output has its own memory
        return program

    def _forecast(self, graph: str) -> ForecastInputs:
        found = self._manifest
        specs = dict(zip(input_ports(found, graph), found.graphs[graph].inputs, strict=True))
        numbers = {port: partial(_number, spec) for port, spec in specs.items() if port.kind in NUMBERS}
        caches = {
            port: partial(self._engine.zeros, spec.at(self._batch), spec.dtype)
            for port, spec in specs.items()
            if port.kind in CACHES
        }
        compares = compares_caches((*specs, *output_ports(found, graph)))
        rows = max((prod(specs[port].at(self._batch)) for port in numbers), default=1)
        return ForecastInputs(numbers, caches if compares else {}, rows)


def _number(spec: TensorSpec, values: Sequence[float]) -> Array:
    return np.array(values if spec.shape else values[0], spec.dtype)


def _at(size: int | Size, batch: int) -> int:
    return size.at(batch) if isinstance(size, Size) else size
