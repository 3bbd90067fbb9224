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
from duca_compile.core.ports import FORECAST_GAP, FULL_ROWS, PROBE_CHANGE, cache_input
from duca_compile.core.steps import Step, StepKind
from duca_compile.core.tensors import Array
from duca_compile.policies.base import Forecast as ForecastOptions
from duca_compile.policies.base import Policy, Selection
from duca_compile.runtime.arrays import NumpyArrays
from duca_compile.runtime.dispatcher import Program, StepPlan
from duca_compile.runtime.forecasting import NUMBERS, ForecastInputs
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


class _TimestepValues:
    """Computes the timestep-only values of one call."""

    def __init__(self, graph: manifest.Graph, run: GraphFunction) -> None:
        self.outputs = tuple(spec.name for spec in graph.outputs)
        self._inputs, self._run = [spec.name for spec in graph.inputs], run

    def compute(self, call: Mapping[str, Array], hoisted: Mapping[str, Array]) -> Sequence[Array]:
        """The values in the order of ``outputs``."""
        return self._run(*[hoisted[name] if name in hoisted else call[name] for name in self._inputs])

    def compute_all(
        self, call: Mapping[str, Array], hoisted: Mapping[str, Array], times: tuple[float, ...]
    ) -> Mapping[float, Sequence[Array]]:
        """None: artifacts compute these values step by step."""
        del call, hoisted, times
        return {}


class Prologue:
    """Computes the loop-invariant values."""

    def __init__(self, graph: manifest.Graph, run: GraphFunction) -> None:
        self.inputs = tuple(spec.name for spec in graph.inputs)
        self._outputs, self._run = [spec.name for spec in graph.outputs], run

    def compute(self, call: Mapping[str, Array]) -> dict[str, Array]:
        """The values by name."""
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
        self._timestep_values = {name: _TimestepValues(recorded.graphs[name], functions[name]) for name in graphs}
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
        graph = self._manifest.graphs[variant.graph]
        outputs = tuple(spec.name for spec in graph.outputs)
        program = Program.of(
            self._functions[variant.graph],
            tuple(spec.name for spec in graph.inputs),
            outputs,
            variant.rows,
            forecast=self._forecast(graph),
            cached_branches=variant.waiting,
            selector_positions=tuple(self._position[index] for index in variant.waiting),
            tokens=variant.tokens,
            computed={
                self._position[int(index)]: None if score is None else outputs.index(score)
                for index, score in variant.computed.items()
            },
        )
        program.copied_caches = program.aliased_outputs = ()  # each output has its own memory
        return program

    def _forecast(self, graph: manifest.Graph) -> ForecastInputs:
        specs = {spec.name: spec for spec in graph.inputs}
        numbers = {name: partial(_number, specs[name]) for name in NUMBERS if name in specs}
        caches = {
            name: partial(self._engine.zeros, spec.at(self._batch), spec.dtype)
            for name, spec in specs.items()
            if name.startswith(cache_input(""))
        }
        looks = any(spec.name == PROBE_CHANGE for spec in graph.outputs)
        compares = looks or numbers.keys() & {FORECAST_GAP, FULL_ROWS}
        rows = max((prod(specs[name].at(self._batch)) for name in numbers), default=1)
        return ForecastInputs(numbers, caches if compares else {}, rows)


def _number(spec: TensorSpec, values: Sequence[float]) -> Array:
    return np.array(values if spec.shape else values[0], spec.dtype)


def _at(size: int | Size, batch: int) -> int:
    return size.at(batch) if isinstance(size, Size) else size
