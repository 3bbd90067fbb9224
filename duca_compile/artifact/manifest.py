"""The manifest of an artifact: what its folder holds, and all that a runtime must know to run it.

It is ``manifest.json`` in the folder. Reading it needs neither torch nor the compiler.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from msgspec import Meta

from duca_compile.artifact.decoding import SCHEMA, decode, parse, problem, read_text
from duca_compile.artifact.schema import (
    BATCH,
    DECIDING,
    FILE,
    ITEM_BYTES,
    Argument,
    Branch,
    Chunk,
    File,
    Flops,
    Graph,
    Look,
    Plan,
    Policy,
    Pool,
    Positive,
    Rule,
    Schedule,
    Signature,
    Size,
    Source,
    TensorSpec,
    Variant,
    plain,
)
from duca_compile.core.ports import FULL_ROWS, PROBE_CHANGE, VERIFY_ERROR, Port, PortKind, named_input, named_result
from duca_compile.core.steps import Probe
from duca_compile.errors import ArtifactError
from duca_compile.policies.adaptive import AdaptivePolicy

__all__ = [
    "BATCH",
    "DECIDING",
    "FILE",
    "ITEM_BYTES",
    "SCHEMA",
    "Argument",
    "Branch",
    "Chunk",
    "File",
    "Flops",
    "Graph",
    "Look",
    "Manifest",
    "Plan",
    "Policy",
    "Pool",
    "Rule",
    "Schedule",
    "Signature",
    "Size",
    "Source",
    "TensorSpec",
    "Variant",
    "inside",
    "problems",
    "read_manifest",
    "sha256",
]

_GRAPH_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # names of files are made of it


@dataclass(frozen=True)
class Manifest:
    """What an artifact's folder holds; see the module."""

    schema: Annotated[int, Meta(ge=1)]
    source: Source
    versions: dict[str, str]
    format: Literal["onnx", "aoti"]
    precision: str
    opset: Positive | None
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
        """The text of ``manifest.json``."""
        return json.dumps(plain(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def loads(text: str) -> Manifest:
        """Reads what ``dumps`` wrote.

        Raises:
            ArtifactError: this version cannot run it; says which field is wrong, what it must be and what it is.
        """
        value = parse(text, FILE)
        schema = value.get("schema") if isinstance(value, dict) else None
        if not isinstance(schema, int):
            raise ArtifactError(f"{FILE} has no schema number, so it is no artifact's manifest")
        if schema > SCHEMA:
            raise ArtifactError(
                f"{FILE} is of schema {schema}, and this version of duca_compile knows {SCHEMA} and older; update it"
            )
        manifest = decode(value, Manifest, FILE)
        first = next(problems(manifest), None)
        if first is not None:
            raise problem(FILE, first)
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder. Raises ArtifactError where there is none, or it is wrong."""
    path = inside(folder, FILE)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder} is no artifact: cannot read {path}: {error}") from error
    return Manifest.loads(text)


def inside(folder: Path, file: File | str, named_in: str = FILE) -> Path:
    """The path of a file of the artifact, which ``named_in`` names.

    Raises:
        ArtifactError: the path leaves the folder, by dots, as an absolute path or through a link.
    """
    name = file if isinstance(file, str) else file.path
    relative = PurePosixPath(name)
    try:
        path = folder / relative
        leaves = relative.is_absolute() or ".." in relative.parts or not relative.parts
        leaves = leaves or not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a name that no file can have
        leaves = True
    if leaves:
        raise ArtifactError(f"{named_in} names {name[:200]!r}, which is not in the folder {folder}")
    return path


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def problems(manifest: Manifest) -> Iterator[str]:
    """Contradictions between parts that are valid by themselves, in words that begin with the field.

    Later checks rely on earlier ones, so nothing behind the first problem is to be trusted.
    """
    yield from _names_without_graphs(manifest)
    yield from _problems_of_the_call(manifest)
    yield from _problems_of_branches(manifest)
    yield from _names_without_branches(manifest)
    for name, variant in manifest.variants.items():
        yield from _problems_of_variant(manifest, name, variant)
    yield from _problems_of_the_result(manifest)
    forecast = manifest.policy.forecast
    if forecast is not None and forecast.chebyshev is not None and manifest.schedule.num_inference_steps is None:
        yield "policy.forecast.chebyshev depends on schedule.num_inference_steps, and there is none"
    if manifest.policy.rule is not None:
        yield from _problems_of_rule(manifest, manifest.policy.rule.rebuilt())


def _names_without_graphs(manifest: Manifest) -> Iterator[str]:
    graphs, variants = manifest.graphs, manifest.variants
    for name in graphs:
        if not _GRAPH_NAME.fullmatch(name):
            yield f"graphs: {name!r} cannot be the name of a graph"
    if manifest.prologue not in graphs:
        yield f"prologue: there is no graph {manifest.prologue!r}"
    for name, variant in variants.items():
        for graph in (variant.graph, variant.rows):
            if graph is not None and graph not in graphs:
                yield f"variants.{name}: there is no graph {graph!r}"
    for run in manifest.schedule.runs:
        if run.variant not in variants:
            yield f"schedule: there is no variant {run.variant!r}"


def _problems_of_the_call(manifest: Manifest) -> Iterator[str]:
    inputs, signature = {spec.name: spec for spec in manifest.inputs}, manifest.signature
    if manifest.precision not in ITEM_BYTES:
        yield f"precision: {manifest.precision!r} is no type of tensors"
    for what, specs in (("inputs", manifest.inputs), ("caches", manifest.caches)):
        if len({spec.name for spec in specs}) < len(specs):
            yield f"{what}: two have the same name"
    more = (("more_latents", name) for name in signature.more_latents)
    for what, name in (("latent", signature.latent), ("timestep", signature.timestep), *more):
        if name not in inputs:
            yield f"signature.{what}: there is no input {name!r}"
    first = inputs[signature.latent].shape[:1]
    if first != (Size(BATCH),) and not (first and isinstance(first[0], int)):
        yield f"inputs: the first size of {signature.latent!r} must be a number or {BATCH!r}"
    for name in inputs.keys() - {argument.input for argument in signature.arguments}:
        yield f"signature.arguments: none is for the input {name!r}"


def _problems_of_branches(manifest: Manifest) -> Iterator[str]:
    if len({branch.index for branch in manifest.branches}) < len(manifest.branches):
        yield "branches: two have the same index"
    selection = manifest.policy.selection
    numbers = {port.of: prod(spec.at(1)) for spec in manifest.caches if (port := _branch_cache(spec.name)) is not None}
    for branch in manifest.branches:
        held = numbers.get(branch.index)
        if held is not None and held < branch.tokens:
            yield f"branches: branch {branch.index} has {branch.tokens} tokens, and its cache {held} numbers"
        if selection is None or not selection.patch_bonus or branch.grid is None:
            continue
        if any(size % selection.patch for size in branch.grid[-2:]):
            yield f"branches: patches of {selection.patch} do not tile the grid {branch.grid} of branch {branch.index}"


def _branch_cache(name: str) -> Port | None:
    port = named_input(name)
    return port if port is not None and port.kind is PortKind.BRANCH else None


def _names_without_branches(manifest: Manifest) -> Iterator[str]:
    tokens = {str(branch.index): branch.tokens for branch in manifest.branches}
    for i, plan in enumerate(manifest.schedule.plans):
        for index, count in plan.counts.items():
            if index not in tokens:
                yield f"schedule.plans[{i}].counts: there is no branch {index!r}"
            elif count > tokens[index]:
                yield f"schedule.plans[{i}].counts: branch {index} has {tokens[index]} tokens, not {count}"
    for name, variant in manifest.variants.items():
        for index in chain(map(str, variant.waiting), variant.computed):
            if index not in tokens:
                yield f"variants.{name}: there is no branch {index!r}"


def _problems_of_variant(manifest: Manifest, name: str, variant: Variant) -> Iterator[str]:
    graph = manifest.graphs[variant.graph]
    outputs = [spec.name for spec in graph.outputs]
    for score in variant.computed.values():
        if score is not None and score not in outputs:
            yield f"variants.{name}: its graph lacks the output {score!r}"
    sizes = {BATCH, *variant.tokens}
    for spec in graph.inputs:
        unknown = next((size for size in spec.shape if isinstance(size, Size) and size.name not in sizes), None)
        if unknown is not None:
            yield f"graphs.{variant.graph}: {str(unknown)!r} of {spec.name!r} is neither the batch nor a token count"


def _problems_of_the_result(manifest: Manifest) -> Iterator[str]:
    needed = manifest.signature.outputs
    for variant in dict.fromkeys(plan.variant for plan in manifest.schedule.plans):
        ports = [named_result(spec.name) for spec in _graph(manifest, variant).outputs]
        outputs = sum(port is not None and port.kind is PortKind.OUTPUT for port in ports)
        if outputs < needed:
            yield f"variants.{variant}: its graph has {outputs} outputs of the model, and signature.result {needed}"


def _problems_of_rule(manifest: Manifest, policy: AdaptivePolicy) -> Iterator[str]:
    """Whether the graphs are those that the decisions need: each step, what is measured, and rows on their own."""
    schedule, plans = manifest.schedule, {plan.step: plan for plan in manifest.schedule.plans}
    if policy.forecast != manifest.policy.forecast:
        yield "policy.forecast is not that of policy.rule"
    for step in policy.choices:
        if step not in plans:
            yield f"schedule.plans: policy.rule may choose {step}, which is not there"
    look, looks = schedule.look, isinstance(policy.measure, Probe)
    if looks != (look is not None):
        yield f"schedule.look must {'' if looks else 'not '}be there for {policy.name}"
    measures = {} if look is None else {look.variant: PROBE_CHANGE}
    measures |= {plans[step].variant: VERIFY_ERROR for step in policy.choices if step.verified}
    for variant, port in measures.items():
        measure = port.result_name
        if measure not in {spec.name for spec in _graph(manifest, variant).outputs}:
            yield f"variants.{variant}: its graph lacks the output {measure!r}, by which steps are decided"
    full = _graph(manifest, plans[policy.choices[0]].variant)
    if any(spec.name == FULL_ROWS.input_name for spec in full.inputs) != (policy.per != "batch"):
        yield f"policy.rule: the graphs are not for decide_per={policy.per!r}"


def _graph(manifest: Manifest, variant: str) -> Graph:
    return manifest.graphs[manifest.variants[variant].graph]
