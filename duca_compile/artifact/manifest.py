"""The manifest of an artifact: what its folder holds, and all that a runtime must know to run it.

It is ``manifest.json`` in the folder. Neither torch nor the compiler is needed to read it.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from duca_compile.core.ports import FULL_ROWS, PROBE_CHANGE, VERIFY_ERROR
from duca_compile.core.steps import Probe, Step
from duca_compile.errors import ArtifactError, ExportError, PolicyError
from duca_compile.policies import RFC, ResidualGate, SpeCa
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.base import Forecast, Selection

SCHEMA = 1
FILE = "manifest.json"
BATCH = "batch"  # the name of the size that is the number of rows of one call
_SIZE = re.compile(r"(?:(\d+)\*)?([a-z_][a-z_0-9]*)(?:\+(\d+))?")
_HASH = re.compile(r"[0-9a-f]{64}")
# Policies that decide while they run, of which an artifact holds the class and the fields.
DECIDING: dict[str, type[AdaptivePolicy]] = {each.__name__: each for each in (RFC, ResidualGate, SpeCa)}


@dataclass(frozen=True)
class Size:
    """A size that is known at each call only: ``factor * name + plus``, where ``name`` is the batch or a token count.

    In JSON it is a text such as ``batch``, ``2304*batch+64`` or ``tokens_3``.
    """

    name: str
    factor: int = 1
    plus: int = 0

    def __str__(self) -> str:
        return f"{self.factor}*" * (self.factor != 1) + self.name + f"+{self.plus}" * (self.plus != 0)

    @staticmethod
    def parse(text: str) -> Size:
        """Raises ValueError for another text."""
        found = _SIZE.fullmatch(text)
        if found is None:
            raise ValueError(text)
        return Size(found[2], int(found[1] or 1), int(found[3] or 0))

    def at(self, value: int) -> int:
        return self.factor * value + self.plus


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that goes into or comes out of a graph; ``dtype`` is torch's name, such as ``float32``."""

    name: str
    dtype: str
    shape: tuple[int | Size, ...]

    def at(self, batch: int) -> tuple[int, ...]:
        """The shape of a call with this many rows."""
        return tuple(size.at(batch) if isinstance(size, Size) else size for size in self.shape)


@dataclass(frozen=True)
class File:
    """A file of the folder, by its path relative to it."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """A tensor's bytes in the pool; ``sha256`` is of these bytes, so equal tensors are one chunk."""

    sha256: str
    start: int
    bytes: int


@dataclass(frozen=True)
class Pool:
    """The weights of all graphs, each once. ``chunks`` are in the order of the file."""

    file: File
    alignment: int  # where chunks of at least ``aligned_from`` bytes start
    aligned_from: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file, or one model of a package of AOTInductor: flat tensors in, flat tensors out.

    Attributes:
        in_place: outputs that may take the memory of an input, since nothing else reads that input.
        operators: how many nodes of each operator it has.
    """

    file: File
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    in_place: dict[str, str]
    operators: dict[str, int]

    def batch(self, shapes: Sequence[Sequence[int]]) -> int:
        """The number of rows of a call whose inputs have these shapes; 1 where no size depends on it."""
        for spec, shape in zip(self.inputs, shapes, strict=True):
            for size, found in zip(spec.shape, shape, strict=True):
                if isinstance(size, Size) and size.name == BATCH:
                    return (found - size.plus) // size.factor
        return 1


@dataclass(frozen=True)
class Flops:
    """FLOPs of one call: ``fixed + per_row * batch``."""

    fixed: float
    per_row: float

    def at(self, batch: int) -> float:
        return self.fixed + self.per_row * batch


@dataclass(frozen=True)
class Variant:
    """A graph that a step may run.

    Attributes:
        graph: its name among the graphs.
        rows: the graph that computes the timestep-only values that it reads, or None.
        waiting: selectable branches whose tokens a partial step chooses from, or leaves to grow stale.
        tokens: for each of these the name of the input that says which; branches may share one.
        computed: selectable branches that are computed in full, with the output that holds their scores, or None.
    """

    graph: str
    rows: str | None
    waiting: tuple[int, ...]
    tokens: tuple[str, ...]
    computed: dict[str, str | None]


@dataclass(frozen=True)
class Plan:
    """What one step of the schedule comes to; ``counts`` are the tokens to recompute, by branch."""

    step: Step
    variant: str
    counts: dict[str, int]
    flops: Flops


@dataclass(frozen=True)
class Look:
    """What measures at every step, before it is decided."""

    variant: str
    flops: Flops


@dataclass(frozen=True)
class Schedule:
    """The steps of a request: ``steps`` are places among ``plans``; ``full`` is the place of a full step.

    ``num_inference_steps`` is None where the policy has no end; then ``steps`` holds as many as were looked at. Where
    the policy decides while it runs, ``steps`` are the cheapest that it may choose, ``plans`` has all that it may, and
    ``look`` is what it asks to be looked at first, if it does.
    """

    num_inference_steps: int | None
    plans: tuple[Plan, ...]
    steps: tuple[int, ...]
    full: int
    look: Look | None = None

    @property
    def runs(self) -> tuple[Plan | Look, ...]:
        """All that a step may run: the plans, and the look."""
        return self.plans if self.look is None else (*self.plans, self.look)


@dataclass(frozen=True)
class Rule:
    """How a policy decides while it runs: the name of its class, and the values of its fields."""

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
        return Rule(name, {field.name: _plain(getattr(policy, field.name)) for field in fields(policy)})  # type: ignore[arg-type]

    def rebuilt(self) -> AdaptivePolicy:
        """The policy. Raises ArtifactError where there is no such class here, or where it has no such fields."""
        kind = DECIDING.get(self.policy)
        if kind is None:
            raise ArtifactError(
                f"{FILE}: policy.rule.policy: {self.policy!r} decides its steps while it runs, and this version of "
                f"duca_compile knows only {sorted(DECIDING)}; update it"
            )
        policy: AdaptivePolicy = _instance(self.fields, kind, "policy.rule.fields")
        return policy


@dataclass(frozen=True)
class Policy:
    """What a runtime must know of the policy beside its steps; ``rule`` is None where these were known before."""

    name: str
    caches: bool
    selection: Selection | None
    forecast: Forecast | None
    rule: Rule | None = None


@dataclass(frozen=True)
class Branch:
    """A residual branch whose tokens can be recomputed on their own: ``rows`` batch rows of ``tokens`` tokens."""

    index: int
    rows: int | Size
    tokens: int
    grid: tuple[int, ...] | None = None  # how they lie, where a patch bonus asks for it


@dataclass(frozen=True)
class Argument:
    """A tensor of the model's call: ``path`` leads to it from the arguments, ``input`` is its name in the graphs."""

    path: tuple[str | int, ...]
    input: str

    @property
    def home(self) -> tuple[str | int, ...]:
        """The path, of what is in a list that of the list."""
        return self.path[:-1] if isinstance(self.path[-1], int) else self.path


@dataclass(frozen=True)
class Signature:
    """How the model is called, and what it returns.

    Attributes:
        parameters: names of its arguments in order.
        arguments: where the tensors are among them.
        options: the values of the others, which are built into the graphs; those that JSON has no form for as text.
        latent, timestep: names of these inputs.
        result: the structure of what is returned: a number is the place of an output; see ``export.artifact``.
    """

    parameters: tuple[str, ...]
    arguments: tuple[Argument, ...]
    options: dict[str, Any]
    latent: str
    timestep: str
    result: Any

    @cached_property
    def changing(self) -> frozenset[str]:
        """The inputs that change from step to step: the timestep and the latent, all of it where it is a list."""
        own = next((each.home for each in self.arguments if each.input == self.latent), None)
        return frozenset({self.latent, self.timestep, *(each.input for each in self.arguments if each.home == own)})


@dataclass(frozen=True)
class Source:
    """The model that was exported."""

    model: str
    parameters: int
    weight_bytes: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """See the module."""

    schema: int
    source: Source
    versions: dict[str, str]
    format: Literal["onnx", "aoti"]
    precision: str
    opset: int | None
    inputs: tuple[TensorSpec, ...]
    signature: Signature
    policy: Policy
    schedule: Schedule
    branches: tuple[Branch, ...]
    caches: tuple[TensorSpec, ...]
    prologue: str
    variants: dict[str, Variant]
    graphs: dict[str, Graph]
    weights: Pool

    def dumps(self) -> str:
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def loads(text: str) -> Manifest:
        """Raises ArtifactError where the text is no manifest of this schema, and says where it is not."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{FILE} is not JSON: {error}") from error
        schema = found.get("schema") if isinstance(found, dict) else None
        if not isinstance(schema, int):
            raise ArtifactError(f"{FILE} has no schema number, so it is no artifact's manifest")
        if schema > SCHEMA:
            raise ArtifactError(
                f"{FILE} is of schema {schema}, and this version of duca_compile knows {SCHEMA} and older; update it"
            )
        manifest: Manifest = _typed(found, Manifest, "")
        _check(manifest)
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactError where there is none, or a wrong one."""
    path = folder / FILE
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder} is no artifact: cannot read {path}: {error}") from error
    return Manifest.loads(text)


def inside(folder: Path, file: File) -> Path:
    """The path of a file of the artifact.

    Raises ArtifactError where it leaves the folder, by dots, as an absolute path or through a link.
    """
    relative = PurePosixPath(file.path)
    path = folder / relative
    if relative.is_absolute() or ".." in relative.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{FILE} names {file.path!r}, which is not in the folder {folder}")
    return path


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check(manifest: Manifest) -> None:
    """What types cannot say: names that must be there, and places that must be in range."""
    schedule, graphs = manifest.schedule, manifest.graphs

    def need(found: bool, what: str) -> None:
        if not found:
            raise ArtifactError(f"{FILE}: {what}")

    need(manifest.prologue in graphs, f"prologue: there is no graph {manifest.prologue!r}")
    for name, variant in manifest.variants.items():
        for graph in (variant.graph, variant.rows):
            need(graph is None or graph in graphs, f"variants.{name}: there is no graph {graph!r}")
    for each in schedule.runs:
        need(each.variant in manifest.variants, f"schedule: there is no variant {each.variant!r}")
    places = range(len(schedule.plans))
    need({*schedule.steps, schedule.full} <= {*places}, "schedule.steps: a place that is not among the plans")
    if manifest.policy.rule is not None:
        _check_rule(manifest, manifest.policy.rule.rebuilt(), need)
    names = {spec.name for spec in manifest.inputs}
    for what in ("latent", "timestep"):
        name = getattr(manifest.signature, what)
        need(name in names, f"signature.{what}: there is no input {name!r}")
    for file in (manifest.weights.file, *(graph.file for graph in graphs.values())):
        need(_HASH.fullmatch(file.sha256) is not None, f"{file.path}: {file.sha256!r} is no SHA-256")
    end = manifest.weights.file.bytes
    for chunk in manifest.weights.chunks:
        need(0 <= chunk.start <= chunk.start + chunk.bytes <= end, f"weights.chunks: {chunk.sha256} is out of range")


def _check_rule(manifest: Manifest, policy: AdaptivePolicy, need: Callable[[bool, str], None]) -> None:
    """That the graphs are those that the decisions need: each step, what is measured, and rows on their own."""
    schedule, plans = manifest.schedule, {plan.step: plan for plan in manifest.schedule.plans}

    def graph(variant: str) -> Graph:
        return manifest.graphs[manifest.variants[variant].graph]

    need(policy.forecast == manifest.policy.forecast, "policy.forecast is not that of policy.rule")
    for step in policy.choices:
        need(step in plans, f"schedule.plans: policy.rule may choose {step}, which is not there")
    look, looks = schedule.look, isinstance(policy.measure, Probe)
    need(looks == (look is not None), f"schedule.look must {'' if looks else 'not '}be there for {policy.name}")
    measures = {} if look is None else {look.variant: PROBE_CHANGE}
    measures |= {plans[step].variant: VERIFY_ERROR for step in policy.choices if step.verified}
    for variant, port in measures.items():
        found = {spec.name for spec in graph(variant).outputs}
        need(
            port.result_name in found,
            f"variants.{variant}: its graph lacks the output {port.result_name!r}, by which steps are decided",
        )
    by_row = any(spec.name == FULL_ROWS.input_name for spec in graph(plans[policy.choices[0]].variant).inputs)
    need(by_row == (policy.per != "batch"), f"policy.rule: the graphs are not for decide_per={policy.per!r}")


def _plain(value: Any) -> Any:
    """JSON's own types; ``asdict`` has made dictionaries of sizes too."""
    if isinstance(value, Mapping):
        if value.keys() == {"name", "factor", "plus"}:
            return str(Size(**value))
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _typed(value: Any, kind: Any, place: str) -> Any:
    """``value``, as JSON has it, as an instance of the annotated type ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, place)
    if kind is Size and isinstance(value, str):
        try:
            return Size.parse(value)
        except ValueError:
            raise _wrong(value, "a size such as 2*batch+1", place) from None
    if is_dataclass(kind):
        return _instance(value, kind, place)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(each, arguments[0], f"{place}[{i}]") for i, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(each, arguments[1], f"{place}.{key}") for key, each in value.items()}
    if origin is Literal:
        if value in arguments:
            return value
        raise _wrong(value, f"one of {arguments}", place)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise _wrong(value, kind.__name__, place) from None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise _wrong(value, getattr(kind, "__name__", str(kind)), place)


def _one_of(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    for kind in rest[:-1]:
        if isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool):
            return value
    return _typed(value, rest[-1], place)


def _instance(value: Any, kind: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", place)
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    for name in value.keys() - known.keys():
        raise ArtifactError(f"{FILE}: {_at(place, name)} is unknown in schema {SCHEMA}")
    for name, field in known.items():
        if name not in value and field.default is MISSING:
            raise ArtifactError(f"{FILE}: {_at(place, name)} is missing")
    values = {name: _typed(each, hints[name], _at(place, name)) for name, each in value.items()}
    try:
        return kind(**values)
    except PolicyError as error:
        raise ArtifactError(f"{FILE}: {place}: {error}") from error


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _wrong(value: Any, wanted: str, place: str) -> ArtifactError:
    return ArtifactError(f"{FILE}: {place} must be {wanted}, not {value!r}")
