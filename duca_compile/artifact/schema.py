"""The parts of a manifest. Each one checks itself when it is made, and raises ``ImpossibleError``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from keyword import iskeyword
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias
from unicodedata import normalize

import numpy as np
from msgspec import Meta

from duca_compile.artifact.decoding import ImpossibleError, decode, problem
from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import ExportError
from duca_compile.policies import RFC, EasyCache, ResidualGate, SeaCache, SpeCa
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.base import Forecast, Selection

FILE = "manifest.json"
BATCH = "batch"  # the name of the size that is the number of batch rows of one call
# The types of tensors by torch's names, with the bytes of one element.
ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint16": 2, "int16": 2, "float16": 2,
    "bfloat16": 2, "uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "float64": 8, "complex64": 8,
    "complex128": 16,
}  # fmt: skip
# Policies that decide while they run. An artifact holds the name of the class and the values of its fields.
DECIDING: dict[str, type[AdaptivePolicy]] = {
    policy.__name__: policy for policy in (EasyCache, RFC, ResidualGate, SeaCache, SpeCa)
}

_SIZE = re.compile(r"(?:([0-9]{1,10})\*)?([a-z_][a-z_0-9]*)(?:\+([0-9]{1,10}))?")
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_AXES = 64  # of a tensor, as in numpy
_MOST_ELEMENTS = 2**40  # of a tensor at a batch of one

# Numbers with bounds, which msgspec checks.
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Real = Annotated[float, Meta(ge=-1e30, le=1e30)]


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ImpossibleError(otherwise)


def _need_unique(values: Sequence[object], place: str) -> None:
    seen = set()
    for value in values:
        _need(value not in seen, f"{place}: {value!r} is there more than once")
        seen.add(value)


@dataclass(frozen=True)
class Size:
    """A size that only a call determines: ``factor * name + plus``, where ``name`` is the batch or a token count.

    In JSON it is a text such as ``batch``, ``2304*batch+64`` or ``tokens_3``.
    """

    name: str
    factor: int = 1
    plus: int = 0

    def __str__(self) -> str:
        return f"{self.factor}*" * (self.factor != 1) + self.name + f"+{self.plus}" * (self.plus != 0)

    @staticmethod
    def parse(text: str) -> Size:
        """Raises ValueError for another text, and for a factor of zero."""
        match = _SIZE.fullmatch(text)
        factor = 0 if match is None else int(match[1] or 1)
        if match is None or not factor:
            raise ValueError(f"must be a size such as 2*{BATCH}+1, not {text!r}")
        return Size(match[2], factor, int(match[3] or 0))

    def at(self, value: int) -> int:
        return self.factor * value + self.plus


if TYPE_CHECKING:
    Dimension: TypeAlias = int | Size
else:  # what msgspec reads: a union cannot hold a type that it does not know. _dimension turns text into a Size
    Dimension = Annotated[int, Meta(ge=0, le=2**31 - 1)] | str


def _dimension(read: Dimension | str, place: str) -> Dimension:
    if not isinstance(read, str):
        return read
    try:
        return Size.parse(read)
    except ValueError as error:
        raise ImpossibleError(f"{place} {error}") from None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a graph reads or returns; ``dtype`` is torch's name, such as ``float32``."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        _need(self.dtype in ITEM_BYTES, f"dtype: {self.dtype!r} is no type of tensors")
        _need(len(self.shape) <= _MOST_AXES, f"shape: {len(self.shape)} axes are too many")
        shape = tuple(_dimension(size, f"shape[{i}]") for i, size in enumerate(self.shape))
        object.__setattr__(self, "shape", shape)
        if prod(self.at(1)) > _MOST_ELEMENTS:
            raise ImpossibleError(f"shape: {tuple(map(str, shape))} is too large for a tensor")

    def at(self, batch: int) -> tuple[int, ...]:
        """The shape in a call with this many batch rows."""
        return tuple(size.at(batch) if isinstance(size, Size) else size for size in self.shape)


@dataclass(frozen=True)
class File:
    """A file of the folder, by its path relative to it."""

    path: str
    bytes: Count
    sha256: str

    def __post_init__(self) -> None:
        _need(self.path.isprintable(), f"path: {self.path!r} has characters that no file of an artifact has")
        _need(_HASH.fullmatch(self.sha256) is not None, f"sha256: {self.sha256!r} is no SHA-256")


@dataclass(frozen=True)
class Chunk:
    """The bytes of a tensor in the pool; ``sha256`` is the hash of these bytes, so equal tensors are one chunk."""

    sha256: str
    start: Count
    bytes: Count


@dataclass(frozen=True)
class Pool:
    """The weights of all graphs, without repetition. ``chunks`` are in the order of the file."""

    file: File
    alignment: Positive  # where chunks of at least ``aligned_from`` bytes start
    aligned_from: Count
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        for i, chunk in enumerate(self.chunks):
            inside = chunk.start + chunk.bytes <= self.file.bytes
            _need(inside, f"chunks[{i}] is out of range: the file has {self.file.bytes} bytes")


@dataclass(frozen=True)
class Graph:
    """One ONNX file, or one model of an AOTInductor package: flat tensors in, flat tensors out.

    Attributes:
        in_place: for each output that may take the memory of an input, that input; nothing else reads it.
        operators: the number of nodes of each operator.
    """

    file: File
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    in_place: dict[str, str]
    operators: dict[str, Count]

    def __post_init__(self) -> None:
        _need_unique([spec.name for spec in self.inputs], "inputs")
        _need_unique([spec.name for spec in self.outputs], "outputs")
        inputs, outputs = ({spec.name: spec for spec in specs} for specs in (self.inputs, self.outputs))
        for result, source in self.in_place.items():
            _need(result in outputs and source in inputs, f"in_place: there is no {result!r} or no {source!r}")
            one, other = outputs[result], inputs[source]
            same = (one.dtype, one.shape) == (other.dtype, other.shape)
            _need(same, f"in_place: {result!r} and {source!r} are of different types or shapes")

    def batch(self, shapes: Sequence[Sequence[int]]) -> int:
        """The number of batch rows of a call whose inputs have these shapes; 1 where no size depends on it."""
        for spec, shape in zip(self.inputs, shapes, strict=True):
            for size, value in zip(spec.shape, shape, strict=True):
                if isinstance(size, Size) and size.name == BATCH:
                    return (value - size.plus) // size.factor
        return 1


@dataclass(frozen=True)
class Flops:
    """FLOPs of one call: ``fixed + per_row * batch``."""

    fixed: Real
    per_row: Real

    def at(self, batch: int) -> float:
        return self.fixed + self.per_row * batch


@dataclass(frozen=True)
class Variant:
    """A graph that a step may run.

    Attributes:
        graph: the name of the graph.
        rows: the name of the graph that computes the timestep-only values that it reads; None where it reads none.
        waiting: selectable branches of which a partial step recomputes some tokens or none.
        tokens: for each of these branches, the name of the input that selects its tokens; branches may share one.
        computed: selectable branches that are computed in full, each with the output that holds its scores, or None.
    """

    graph: str
    rows: str | None
    waiting: tuple[Count, ...]
    tokens: tuple[str, ...]
    computed: dict[str, str | None]

    def __post_init__(self) -> None:
        _need(len(self.tokens) == len(self.waiting), "tokens: there must be one input for each branch in waiting")
        _need_unique(self.waiting, "waiting")


@dataclass(frozen=True)
class Plan:
    """What one step of the schedule runs; ``counts`` are the tokens to recompute, by branch."""

    step: Step
    variant: str
    counts: dict[str, Count]
    flops: Flops

    def __post_init__(self) -> None:
        step = self.step
        _need(1 <= step.interval < 2**31, f"step.interval: {step.interval} is no number of steps")
        _need(0 <= step.ratio < 2**31, f"step.ratio: {step.ratio} is no share of tokens")
        _need(0 <= step.leading_full < 2**31, f"step.leading_full: {step.leading_full} is no number of blocks")


@dataclass(frozen=True)
class Look:
    """The measurement at every step, before that step is decided."""

    variant: str
    flops: Flops


@dataclass(frozen=True)
class Schedule:
    """The steps of a request.

    Attributes:
        num_inference_steps: None where the policy has no end; then ``steps`` holds as many as were looked at.
        plans: all that a step may run.
        steps: for each step its index in ``plans``; where the policy decides while it runs, that of the cheapest plan
            that it may choose.
        full: the index of a full step in ``plans``.
        look: what measures before a step is decided; None where nothing does.
    """

    num_inference_steps: Positive | None
    plans: tuple[Plan, ...]
    steps: tuple[Count, ...]
    full: Count
    look: Look | None = None

    def __post_init__(self) -> None:
        _need(bool(self.steps), "steps: there are none")
        for name, place in (("full", self.full), *((f"steps[{i}]", place) for i, place in enumerate(self.steps))):
            _need(place < len(self.plans), f"{name}: {place} is a place that is not among the plans")
        total = self.num_inference_steps
        _need(total is None or len(self.steps) <= total, f"steps: there are {len(self.steps)}, of {total} at most")
        _need(self.plans[self.full].step.kind is StepKind.FULL, "full: the plan that it names is no full step")
        _need_unique([plan.step for plan in self.plans], "plans")

    @property
    def runs(self) -> tuple[Plan | Look, ...]:
        """All that a step may run: the plans, and the look."""
        return self.plans if self.look is None else (*self.plans, self.look)


@dataclass(frozen=True)
class Rule:
    """How a policy decides while it runs: the name of its class, and the values of its fields in JSON's types."""

    policy: str
    fields: dict[str, Any]

    @staticmethod
    def of(policy: AdaptivePolicy) -> Rule:
        """Raises ExportError for a policy that no runtime knows."""
        name = type(policy).__name__
        if DECIDING.get(name) is not type(policy):
            raise ExportError(
                f"{policy.name} decides its steps while it runs, by the code of {name}, which an artifact cannot hold; "
                f"of such policies it can be one of {sorted(DECIDING)}"
            )
        return Rule(name, {field.name: plain(getattr(policy, field.name)) for field in fields(policy)})  # type: ignore[arg-type]

    def rebuilt(self) -> AdaptivePolicy:
        """The policy. Raises ArtifactError where there is no such class here, or where it has no such fields."""
        kind = DECIDING.get(self.policy)
        if kind is None:
            raise problem(
                FILE,
                f"policy.rule.policy: {self.policy!r} decides its steps while it runs, and this version of "
                f"duca_compile knows only {sorted(DECIDING)}; update it",
            )
        return decode(self.fields, kind, FILE, "policy.rule.fields")


@dataclass(frozen=True)
class Policy:
    """What a runtime must know of the policy besides its steps; ``rule`` is None where these are fixed."""

    name: str
    caches: bool
    selection: Selection | None
    forecast: Forecast | None
    rule: Rule | None = None

    def __post_init__(self) -> None:
        if self.forecast is not None:
            _check_forecast(self.forecast)


def _check_forecast(forecast: Forecast) -> None:
    _need(0 <= forecast.order <= 4, f"forecast.order: {forecast.order} is not from 0 to 4")
    _need(0 <= forecast.first < 2**31, f"forecast.first: {forecast.first} is no step")
    _need(1 <= forecast.least < 2**31, f"forecast.least: {forecast.least} is no number of full steps")
    _need(forecast.high_pass is None or forecast.lite, "forecast.high_pass: the filter is of the stream's end alone")
    _need(forecast.chebyshev is None or forecast.lite, "forecast.chebyshev: the series is of the stream's end alone")
    _need(abs(forecast.hermite or 0) < 1e30, f"forecast.hermite: {forecast.hermite} is no scale")
    for i, measured in enumerate(forecast.measured):
        if measured is not None:
            place = f"forecast.measured[{i}]"
            _need(0 <= measured.last_full < i, f"{place}.last_full: {measured.last_full} is no earlier step")
            _need(len(measured.factors) <= forecast.order, f"{place}.factors: there are more than the order has")


@dataclass(frozen=True)
class Branch:
    """A residual branch whose tokens can be recomputed separately: ``rows`` batch rows of ``tokens`` tokens."""

    index: Count
    rows: Dimension
    tokens: Positive
    grid: tuple[Positive, ...] | None = None  # how the tokens are arranged, where a patch bonus needs it

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", _dimension(self.rows, "rows"))
        if self.grid is not None:
            fits = len(self.grid) in (2, 3) and prod(self.grid) == self.tokens
            _need(fits, f"grid: {self.grid} is no arrangement of {self.tokens} tokens")


@dataclass(frozen=True)
class Argument:
    """A tensor of the model's call: ``path`` leads to it from the arguments, ``input`` is its name in the graphs."""

    path: tuple[str | Count, ...]
    input: str

    def __post_init__(self) -> None:
        _need(bool(self.path) and isinstance(self.path[0], str), "path: it must begin with the name of an argument")

    @property
    def home(self) -> tuple[str | int, ...]:
        """The path of the list that holds the tensor, else the tensor's own path."""
        return self.path[:-1] if isinstance(self.path[-1], int) else self.path


@dataclass(frozen=True)
class Signature:
    """How the model is called, and what it returns.

    Attributes:
        parameters: the names of its arguments, in order.
        arguments: where the tensors are among them.
        options: the values of all other arguments, which are built into the graphs; text for what JSON cannot express.
        latent, timestep: the names of these inputs.
        result: the structure of what is returned: ``{"output": index of an output}``, ``{"value": constant}``, or
            ``{"type": name, "items": parts}``, with ``"names"`` of the parts where they have some.
        more_latents: further inputs that are denoised.
        fixed: the hashes of tensors, by input, whose values the graphs are built for; see ``binder.content_hash``.
    """

    parameters: tuple[str, ...]
    arguments: tuple[Argument, ...]
    options: dict[str, Any]
    latent: str
    timestep: str
    result: Any
    more_latents: tuple[str, ...] = ()
    fixed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, digest in self.fixed.items():
            _need(bool(_HASH.fullmatch(digest)), f"fixed.{name}: {digest!r} is no SHA-256")
        unknown = self.fixed.keys() - {argument.input for argument in self.arguments}
        _need(not unknown, f"fixed: there is no argument {min(unknown, default='')!r}")
        _need_unique(self.parameters, "parameters")
        _need_unique([argument.path for argument in self.arguments], "arguments")
        _need_unique([argument.input for argument in self.arguments], "arguments")
        _check_result(self.result)

    @cached_property
    def changing(self) -> frozenset[str]:
        """The inputs that change from step to step: the timestep, and the latents, which may be lists of tensors."""
        latent = next((argument.home for argument in self.arguments if argument.input == self.latent), None)
        in_latent = (argument.input for argument in self.arguments if argument.home == latent)
        return frozenset({self.latent, self.timestep, *in_latent, *self.more_latents})

    @property
    def outputs(self) -> int:
        """How many of the first outputs of a graph the result needs."""
        return max((index + 1 for index in _output_indices(self.result)), default=0)


def _check_result(structure: Any, place: str = "result") -> None:
    _need(isinstance(structure, dict), f"{place} must be an object")
    keys = structure.keys()
    if keys == {"value"}:
        return
    if keys == {"output"}:
        index = structure["output"]
        _need(type(index) is int and 0 <= index < 2**31, f"{place}.output: {index!r} is no index of an output")
        return
    _need({"type", "items"} <= keys <= {"type", "items", "names"}, f"{place} must have an output, a value or items")
    kind, items = structure["type"], structure["items"]
    _need(_is_name(kind), f"{place}.type: {kind!r} is no name of a class")
    _need(isinstance(items, list), f"{place}.items must be a list")
    if "names" in structure:
        _check_names(kind, structure["names"], len(items), place)
    for i, item in enumerate(items):
        _check_result(item, f"{place}.items[{i}]")


def _check_names(kind: str, names: Any, count: int, place: str) -> None:
    _need(isinstance(names, list) and len(names) == count, f"{place}.names must be a list of {count} names")
    for name in names:
        valid = isinstance(name, str) and (kind == "dict" or (_is_name(name) and not name.startswith("_")))
        _need(valid, f"{place}.names: {name!r} cannot be a name there")
    _need_unique(names, f"{place}.names")


def _is_name(value: Any) -> bool:
    """Whether Python takes it as a name, and as no other: it reads look-alikes of letters as the letters."""
    valid = isinstance(value, str) and value.isidentifier() and not iskeyword(value)
    return valid and normalize("NFKC", value) == value


def _output_indices(structure: Any) -> list[int]:
    if "output" in structure:
        return [structure["output"]]
    return [index for item in structure.get("items", ()) for index in _output_indices(item)]


@dataclass(frozen=True)
class Source:
    """The model that was exported."""

    model: str
    parameters: Count
    weight_bytes: Count
    config: dict[str, Any]


def _is_left_out(value: Any, each: Field[Any]) -> bool:
    """Whether a field has its default, and is one that older versions do not know."""
    return each.default_factory is dict and not getattr(value, each.name)


def plain(value: Any) -> Any:
    """``value`` in JSON's types."""
    if isinstance(value, Size):
        return str(value)
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value) if not _is_left_out(value, each)}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return value.item() if isinstance(value, np.generic) else value
