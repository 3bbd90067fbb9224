"""Runs an artifact: a folder that ``duca_compile.save`` wrote. Needs neither torch nor the compiler."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from duca_compile.errors import ArtifactError, UsageError
from duca_compile.graph import FORECAST_GAP, FULL_ROWS, PROBE_CHANGE, VERIFY_ERROR, cache_input
from duca_compile.policies.base import Forecast as ForecastOptions
from duca_compile.policies.base import Policy, Selection, Step, StepKind
from duca_compile.runtime import manifest
from duca_compile.runtime.arrays import Array, NumpyArrays
from duca_compile.runtime.dispatcher import Dispatcher, Plan, Program
from duca_compile.runtime.forecasting import NUMBERS, ForecastInputs
from duca_compile.runtime.manifest import Manifest, Size, TensorSpec, inside, read_manifest
from duca_compile.runtime.planning import check_pairs
from duca_compile.runtime.selection import Tokens
from duca_compile.runtime.session import HasSessions, Requests, current_pass, named_pass

log = logging.getLogger("duca_compile")

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "aoti")
SCORE = "score_"
# Outputs that leave the engine; all others only go into later steps.
HOST = ("output_", SCORE, PROBE_CHANGE, VERIFY_ERROR)

# Flat values in the order of a graph's inputs to those of its outputs. Values are numpy arrays, torch tensors or what
# an earlier function of the same engine returned; what HOST names is returned as numpy arrays, or outputs as tensors.
GraphFunction = Callable[..., Sequence[Array]]


class Engine(Protocol):
    """Runs the graphs of an artifact."""

    def function(self, name: str, graph: manifest.Graph) -> GraphFunction:
        """What runs the graph of this name, in any number of threads. Raises BackendError where the engine cannot."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A value of the engine's own."""


class Recorded(Policy):
    """The policy of an artifact whose steps are known before: they are as they were when it was exported."""

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
        """They were recorded so."""
        return self.steps(total)


class _Rows:
    """Computes the timestep-only values of one call."""

    def __init__(self, graph: manifest.Graph, run: GraphFunction) -> None:
        self.outputs = tuple(spec.name for spec in graph.outputs)
        self._inputs, self._run = [spec.name for spec in graph.inputs], run

    def compute(self, call: Mapping[str, Array], hoisted: Mapping[str, Array]) -> Sequence[Array]:
        return self._run(*[hoisted[name] if name in hoisted else call[name] for name in self._inputs])

    def compute_all(
        self, call: Mapping[str, Array], hoisted: Mapping[str, Array], times: tuple[float, ...]
    ) -> Mapping[float, Sequence[Array]]:
        del call, hoisted, times
        return {}


class _Prologue:
    """Computes the loop-invariant values."""

    def __init__(self, graph: manifest.Graph, run: GraphFunction) -> None:
        self.inputs = tuple(spec.name for spec in graph.inputs)
        self._outputs, self._run = [spec.name for spec in graph.outputs], run

    def compute(self, call: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, self._run(*[call[name] for name in self.inputs]), strict=True))


class _Planner:
    """The plans of an artifact at one batch size."""

    def __init__(self, found: Manifest, batch: int, engine: Engine, functions: Mapping[str, GraphFunction]) -> None:
        self._manifest, self._batch, self._engine, self._functions = found, batch, engine, functions
        self._plans: dict[Step, Plan] = {}
        self._look: Plan | None = None
        self._recorded = {plan.step: plan for plan in found.schedule.plans}
        self._position = {branch.index: i for i, branch in enumerate(found.branches)}
        self._programs = {name: self._program(variant) for name, variant in found.variants.items()}
        used = {variant.rows for variant in found.variants.values()} - {None}
        self._rows = {name: _Rows(found.graphs[name], functions[name]) for name in used if name is not None}
        look = found.schedule.look
        if look is not None:
            self._look = Plan(Step(StepKind.FULL), self._programs[look.variant], (), look.flops.at(batch))

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def tokens(self) -> list[Tokens]:
        return [Tokens(_at(b.rows, self._batch), b.tokens, b.grid) for b in self._manifest.branches]

    def look(self) -> Plan | None:
        return self._look

    def arrays(self, like: Array) -> NumpyArrays:
        del like
        return NumpyArrays()

    def rows(self, needed: str) -> _Rows:
        return self._rows[needed]

    def plan(self, step: Step) -> Plan:
        plan = self._plans.get(step)
        if plan is None:
            recorded = self._recorded.get(step, self._manifest.schedule.plans[self._manifest.schedule.full])
            if recorded.step.kind is not step.kind:
                log.warning(
                    "the artifact has no graph of %s steps such as its policy %s decides on: they are computed in "
                    "full. Export the model again, with this version of duca_compile",
                    step.kind.value,
                    self._manifest.policy.name,
                )
            program = self._programs[recorded.variant]
            counts = tuple(recorded.counts.get(str(index), 0) for index in program.waiting)
            plan = self._plans[step] = Plan(recorded.step, program, counts, recorded.flops.at(self._batch))
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
            waiting=variant.waiting,
            rows=tuple(self._position[index] for index in variant.waiting),
            tokens=variant.tokens,
            computed={
                self._position[int(index)]: None if score is None else outputs.index(score)
                for index, score in variant.computed.items()
            },
        )
        program.loose = program.aliases = ()  # every output is memory of its own
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


class Config(dict[str, Any]):
    """A config whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Artifact(HasSessions):
    """A model that was exported: called like it, with numpy arrays or torch tensors, and returns what it is given.

    Steps, passes and requests are told apart as by an optimized model. Threads have requests of their own, and so have
    sessions. The result has the model's structure: fields by name and by place.

    Attributes:
        manifest: what the folder holds.
        policy: the steps, as they were recorded, or the policy itself, where it decides while it runs.
    """

    def __init__(self, found: Manifest, engine: Engine) -> None:
        self.manifest, self._engine = found, engine
        rule = found.policy.rule
        self.policy: Policy = Recorded(found.policy, found.schedule) if rule is None else rule.rebuilt()
        self._functions = {name: engine.function(name, graph) for name, graph in found.graphs.items()}
        self._prologue = _Prologue(found.graphs[found.prologue], self._functions[found.prologue])
        self._requests = Requests(self.policy, found.schedule.num_inference_steps)
        self._bind = _Binder(found)
        self._dispatchers: dict[int, Dispatcher] = {}  # by batch size
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model.

        Raises:
            UsageError: the arguments are not of the kinds that were exported; names the argument.
            PolicyError: pairs of rows are to decide together, and their number is odd.
        """
        call, batch = self._bind(args, kwargs)
        dispatcher, request, called = self._dispatcher(batch), self._requests.current(), current_pass(self)
        name, step = (None, None) if called is None else (called.name, called.step_index)
        try:
            tick = request.tick(self.manifest.signature, call, name, step)
            outputs = dispatcher(request, tick, call, name)
        except BaseException:
            request.reset()
            raise
        return _result(self.manifest.signature.result, [_like(output, call) for output in outputs])

    def _dispatcher(self, batch: int) -> Dispatcher:
        found = self._dispatchers.get(batch)
        if found is None:
            check_pairs(self.policy, batch)
            with self._lock:
                planner = _Planner(self.manifest, batch, self._engine, self._functions)
                made = Dispatcher(planner, self.policy, self._prologue, foresees=False)
                found = self._dispatchers.setdefault(batch, made)
        return found

    @property
    def config(self) -> Config:
        """The source model's config, as pipelines read it."""
        return Config(self.manifest.source.config)

    @property
    def dtype(self) -> Any:
        """The type of most weights: torch's, where torch is loaded, else its name."""
        return getattr(sys.modules.get("torch"), self.manifest.precision, self.manifest.precision)

    def cache_context(self, name: str, **options: Any) -> AbstractContextManager[None]:
        """Calls inside are of the pass called ``name``, with caches of its own, at the step ``step_index``, if given.

        Raises:
            UsageError: when it is entered, if ``step_index`` is neither None nor a whole number from 0 on.
        """
        return named_pass(self, name, options)


class _Binder:
    """Finds the tensors of a call by the names of the graphs' inputs, and checks their kinds."""

    def __init__(self, found: Manifest) -> None:
        self._signature = found.signature
        self._specs = {spec.name: spec for spec in found.inputs}
        self._arguments = [each for each in found.signature.arguments if each.input in self._specs]
        self._latent = self._specs[found.signature.latent]
        self._tensors = {each.path for each in found.signature.arguments}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Array], int]:
        """The tensors of one call, and its batch size. Raises UsageError where they are of other kinds."""
        parameters = self._signature.parameters
        if len(args) > len(parameters):
            raise UsageError(f"{len(args)} arguments are too many; the model takes {', '.join(parameters)}")
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs):
            raise UsageError("an argument is given twice, by place and by name")
        self._check_options(given)
        values = {each.input: _follow(given, each.path) for each in self._arguments}
        values[self._latent.name] = _contiguous(values[self._latent.name])
        batch = self._batch(values[self._latent.name])
        return {name: _checked(self._specs[name], value, batch) for name, value in values.items()}, batch

    def _batch(self, latent: Array) -> int:
        first = self._latent.shape[0]
        if not isinstance(first, Size):
            return first
        if not latent.ndim:
            raise UsageError(f"{self._latent.name} has no rows")
        return int(latent.shape[0])

    def _check_options(self, given: Mapping[str, Any]) -> None:
        for path, value in _leaves(given):
            if path in self._tensors:
                continue
            name = ".".join(map(str, path))
            if name not in self._signature.options:
                raise UsageError(f"unknown argument {name!r}; the model takes {', '.join(self._signature.parameters)}")
            built_in = self._signature.options[name]
            if value != built_in:
                raise UsageError(f"{name}={value!r}: the artifact was exported with {built_in!r}, which is built in")


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """What is in dictionaries, lists and tuples, with the way to it."""
    if isinstance(value, Mapping | list | tuple):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(each, (*path, key))
    else:
        yield path, value


def _follow(given: Mapping[str, Any], path: tuple[str | int, ...]) -> Any:
    found: Any = given
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            raise UsageError(f"the argument {'.'.join(map(str, path))} is missing") from None
    return found


def _contiguous(value: Any) -> Array:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                "an argument requires a gradient, and an artifact is for inference only: call the model itself for the "
                "gradient pass, or else call it under torch.no_grad() or detach() the argument"
            )
        return value.detach().contiguous()
    return value if isinstance(value, np.ndarray) and value.flags.c_contiguous else np.array(value)


def _checked(spec: TensorSpec, value: Any, batch: int) -> Array:
    """``value`` as a contiguous array of the kind of ``spec``; a number stands for an array of it."""
    shape = spec.at(batch)
    if isinstance(value, Real) and not isinstance(value, bool | np.generic):
        if isinstance(value, Integral) or spec.dtype.startswith("float"):
            return np.full(shape, value, spec.dtype)
        raise UsageError(f"{spec.name} must be of type {spec.dtype}, not the number {value!r}")
    array = _contiguous(value)
    dtype = str(array.dtype).removeprefix("torch.")
    if array.ndim == 0 and shape and dtype == spec.dtype:  # one timestep for all rows
        array = np.full(shape, array.item(), dtype)
    if dtype != spec.dtype or tuple(array.shape) != shape:
        wanted = f"{spec.dtype} of shape ({', '.join(map(str, spec.shape))})"
        raise UsageError(
            f"{spec.name} must be {wanted}, which is {shape} for a batch of {batch}, not {dtype} of shape "
            f"{tuple(array.shape)}"
        )
    return array


def _like(output: Array, call: Mapping[str, Array]) -> Array:
    """The output as a torch tensor where the call's values are such, on their device; else as a numpy array."""
    torch = sys.modules.get("torch")
    if torch is None:
        return output
    given = next((value for value in call.values() if isinstance(value, torch.Tensor)), None)
    if given is not None:
        return torch.from_dlpack(output).to(given.device)
    return output.cpu().numpy() if isinstance(output, torch.Tensor) else output


_TYPES: dict[tuple[str, tuple[str, ...]], Any] = {}


def _result(structure: Mapping[str, Any], outputs: Sequence[Array]) -> Any:
    """Outputs in the structure that the manifest describes."""
    if "output" in structure:
        return outputs[structure["output"]]
    if "value" in structure:
        return structure["value"]
    items = [_result(item, outputs) for item in structure["items"]]
    kind = structure["type"]
    if "names" not in structure:
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return dict(zip(structure["names"], items, strict=True))
    key = kind, tuple(structure["names"])
    if key not in _TYPES:
        _TYPES[key] = namedtuple(*key)
    return _TYPES[key](*items)


def load(
    path: str | os.PathLike[str],
    backend: str = "onnxruntime",
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    share_weights: bool = True,
    verify: bool = True,
) -> Artifact:
    """An artifact that was written by ``duca_compile.save``, ready to be called like the model.

    Args:
        path: the folder.
        backend: "onnxruntime", "openvino" for a CPU, "tensorrt" for the engines that ``duca-compile build`` made,
            or "aoti" for an artifact of that format.
        providers: of ONNX Runtime, the first choice first; the CPU where it is None. One that cannot be used is an
            error, never a silent fall-back.
        threads: that one operator may use in ONNX Runtime and OpenVINO; as many as they take where it is None.
        share_weights: hold the weights once, mapped from the file, for all graphs. Else each graph rearranges copies of
            its own, which can be faster for wide models. Engines of TensorRT and code of AOTInductor always share them.
        verify: compare each file with its hash. This reads all of them.

    Raises:
        ArtifactError: it is no artifact, is damaged, or is of a later version; says what is wrong.
        BackendError: a package or a provider is missing.
        UsageError: an unknown backend or provider.
    """
    folder = Path(path)
    found = read_manifest(folder)
    check_files(folder, found, verify)
    return Artifact(found, _engine(backend, folder, found, providers, threads, share_weights))


def _engine(
    backend: str,
    folder: Path,
    found: Manifest,
    providers: Sequence[str] | None,
    threads: int | None,
    share_weights: bool,
) -> Engine:
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r} is unknown; choose one of {BACKENDS}")
    if (found.format == "aoti") != (backend == "aoti"):
        fitting = ("aoti",) if found.format == "aoti" else BACKENDS[:-1]
        raise UsageError(f"backend={backend!r} cannot run an artifact of format {found.format!r}; choose of {fitting}")
    if backend == "onnxruntime":
        from duca_compile.runtime.onnx import OnnxEngine

        return OnnxEngine(folder, providers, threads, share_weights)
    if providers is not None:
        raise UsageError(f"providers are ONNX Runtime's; leave them out with backend={backend!r}")
    if backend == "openvino":
        from duca_compile.runtime.openvino import OpenVINOEngine

        return OpenVINOEngine(folder, found.weights.file, threads, share_weights)
    if threads is not None:
        raise UsageError(
            f"threads are ONNX Runtime's and OpenVINO's; with {backend!r} set torch.set_num_threads instead"
        )
    if backend == "tensorrt":
        from duca_compile.runtime.tensorrt import TensorRTEngine

        return TensorRTEngine(folder, found)
    from duca_compile.runtime.aoti import AOTIEngine

    return AOTIEngine(folder, found)


def check_files(folder: Path, found: Manifest, verify: bool = True) -> None:
    """Raises ArtifactError where a file is missing, leaves the folder, or, with ``verify``, is not what was written."""
    for file in dict.fromkeys((found.weights.file, *(graph.file for graph in found.graphs.values()))):
        path = inside(folder, file)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ArtifactError(f"{path} is missing: {error.strerror}; export the model again") from error
        if size != file.bytes:
            state = "truncated" if size < file.bytes else "too long"
            raise ArtifactError(f"{path} is {state}: it has {size} bytes, not {file.bytes}; copy the artifact again")
        if verify and manifest.sha256(path) != file.sha256:
            raise ArtifactError(f"{path} was changed: its SHA-256 is not that of the manifest; copy the artifact again")
