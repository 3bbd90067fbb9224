"""Writes an optimized model as an artifact: a folder that runs without the model, its library or this compiler."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch.utils._pytree import MappingKey, SequenceKey, TreeSpec, tree_flatten_with_path

import duca_compile
from duca_compile.artifact import manifest
from duca_compile.artifact.decoding import ImpossibleError
from duca_compile.artifact.manifest import FILE, SCHEMA, Manifest
from duca_compile.core.ir import Branch
from duca_compile.core.outputs import OutputLayout
from duca_compile.core.ports import CACHES, argument_name, named_input
from duca_compile.errors import ExportError, UsageError, missing_package
from duca_compile.export.batch import BatchError, OpenGraph
from duca_compile.export.check import Written
from duca_compile.export.check import check as check_graphs
from duca_compile.export.trace import Traced
from duca_compile.runtime.planning import tokens_of

if TYPE_CHECKING:
    from duca_compile.export.onnx import Translation

OPSETS = range(18, 25)


def save(
    model: Any,
    path: str | os.PathLike[str],
    example: Mapping[str, Any],
    *,
    num_inference_steps: int | None = None,
    format: str = "onnx",
    opset: int = 20,
    dynamic_batch: bool | None = None,
    check: bool | str = True,
) -> Manifest:
    """Exports an optimized model to a new folder, which ``duca_compile.load`` runs.

    The folder holds a manifest, one graph for each variant that the policy's steps need, and one file with the weights
    that all graphs share. It is written atomically.

    Args:
        model: what ``duca_compile.optimize`` returned for a model, not for a pipeline. Its backend does not matter.
        path: the folder, which must not exist yet.
        example: the arguments of one call by name. The artifact takes these shapes only, but for the batch size.
        num_inference_steps: the number of steps of a request, if ``optimize`` was not given it.
        format: "onnx", a file for each graph, or "aoti", one package that AOTInductor compiles for this machine.
        opset: the version of ONNX's operators. From 23 on, attention and RMS norms are single operators.
        dynamic_batch: whether calls may have any batch size; otherwise only that of the example. None means any batch
            size where the model allows it, else that of the example, with a warning.
        check: whether to run each graph once on the example's values, in ONNX Runtime on the CPU or in AOTInductor's
            code, and to compare it with the eager graph; or the name of another engine that is to do so: "openvino".

    Returns:
        The manifest.

    Raises:
        UsageError: the model is not optimized, ``path`` exists, or an option is impossible.
        ExportError: the model or the policy cannot be exported, or a graph gives other values than the model; says
            which graph and why.
        BackendError: the engine that is to check is not installed.
        PolicyError: the policy cannot plan without ``num_inference_steps``.
    """
    target = Path(path)
    if target.exists():
        raise UsageError(f"there is something at {target}; name a folder that does not exist")
    if opset not in OPSETS:
        raise UsageError(f"opset={opset!r} is invalid: it must be from {OPSETS[0]} to {OPSETS[-1]}")
    if format not in WRITERS:
        raise UsageError(f"format={format!r} is unknown; choose one of {tuple(WRITERS)}")
    engine = _checking_engine(check, format)
    make = WRITERS[format]()

    def attempt(dynamic: bool) -> Manifest:
        traced = Traced(model, example, num_inference_steps, dynamic)
        with _new_folder(target) as temporary:
            written = _write(traced, make(temporary, opset), temporary)
            if engine is not None:
                check_graphs(written, traced.calls(), engine)
            (temporary / FILE).write_text(written.manifest.dumps(), "utf-8")
        return written.manifest

    try:
        return attempt(dynamic_batch is not False)
    except BatchError as error:
        if dynamic_batch is not None:
            raise ExportError(
                f"{error}. To export for the batch size of the example, leave dynamic_batch out"
            ) from error
        warnings.warn(f"the artifact takes the batch size of the example only: {error}", RuntimeWarning, stacklevel=2)
    return attempt(False)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``target`` at the end; an error leaves nothing."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checking_engine(check: bool | str, format: str) -> str | None:
    """The engine that is to check the graphs. Raises UsageError where there is none of this name."""
    if isinstance(check, bool):
        return CHECKED_BY[format][0] if check else None
    if check not in CHECKED_BY[format]:
        raise UsageError(
            f"check={check!r} is impossible: graphs of format {format!r} can be checked with {CHECKED_BY[format]}; "
            "TensorRT's engines are built later, of what was checked otherwise"
        )
    return check


class Writer(Protocol):
    """Writes the graphs of an artifact into its folder."""

    @property
    def format(self) -> Literal["onnx", "aoti"]:
        """The format of the graphs."""

    @property
    def opset(self) -> int | None:
        """The version of ONNX's operators; None in another format."""

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of the packages that write the graphs."""

    @property
    def translations(self) -> Mapping[str, Translation]:
        """What the graphs were translated from, by name, where files hold values that can be compared."""

    def add(self, graph: OpenGraph) -> None:
        """Writes a graph. Raises ExportError where it cannot be expressed in the format."""

    def close(self) -> tuple[dict[str, manifest.Graph], manifest.Pool]:
        """Ends writing; returns the graphs by name, and their weights."""


def _onnx() -> Callable[[Path, int], Writer]:
    with missing_package("export"):
        from duca_compile.export.onnx import OnnxWriter
    return OnnxWriter


def _aoti() -> Callable[[Path, int], Writer]:
    from duca_compile.export.aoti import AOTIWriter

    return lambda folder, opset: AOTIWriter(folder)


WRITERS = {"onnx": _onnx, "aoti": _aoti}
CHECKED_BY = {"onnx": ("onnxruntime", "openvino"), "aoti": ("aoti",)}  # the engines that run here; the first by default


def _write(traced: Traced, writer: Writer, folder: Path) -> Written:
    """Writes all graphs."""
    schedule = traced.schedule()
    prologue, rows = traced.prologue(), dict[frozenset[str], OpenGraph]()  # the latter by the values that they compute
    writer.add(prologue)
    variants: dict[str, manifest.Variant] = {}
    for name, variant in traced.variants.items():
        writer.add(variant.graph)
        pieces = variant.pieces
        if pieces and pieces not in rows:
            rows[pieces] = traced.rows(f"rows-{name}", pieces)
            writer.add(rows[pieces])
        variants[name] = variant.describe(traced.facts, rows[pieces].name if pieces else None)
    files, weights = writer.close()
    look = None if schedule.look is None else schedule.look.variant
    steps = sorted(traced.variants.values(), key=lambda variant: variant.name != look)
    graphs = [prologue, *rows.values(), *(variant.graph for variant in steps)]
    try:
        described = _describe(traced, writer, schedule, variants, files, weights)
        problem = next(manifest.problems(described), None)  # with which load would refuse it
    except ImpossibleError as error:
        problem = str(error)
    if problem is not None:
        raise ExportError(f"{type(traced.model).__name__} does not fit into an artifact: {problem}")
    return Written(folder, described, graphs, writer.translations)


def _describe(
    traced: Traced,
    writer: Writer,
    schedule: manifest.Schedule,
    variants: dict[str, manifest.Variant],
    graphs: dict[str, manifest.Graph],
    weights: manifest.Pool,
) -> Manifest:
    read = {spec.name: spec for graph in graphs.values() for spec in graph.inputs}
    arguments = set(map(argument_name, traced.one.graph.inputs))
    caches = [spec for name, spec in read.items() if name not in arguments and _is_cache(name)]
    return Manifest(
        schema=SCHEMA,
        source=_source(traced.model),
        versions={"duca_compile": duca_compile.__version__, "torch": torch.__version__, **writer.versions},
        format=writer.format,
        precision=_precision(traced),
        opset=writer.opset,
        inputs=tuple(spec for name, spec in read.items() if name in arguments),
        signature=_signature(traced),
        policy=manifest.Policy(
            traced.policy.name, traced.policy.caches, traced.policy.selection, traced.policy.forecast, traced.rule
        ),
        schedule=schedule,
        branches=_branches(traced),
        caches=tuple(caches),
        prologue="prologue",
        variants=variants,
        graphs=graphs,
        weights=weights,
    )


def _is_cache(name: str) -> bool:
    port = named_input(name)
    return port is not None and port.kind in CACHES


def _source(model: torch.nn.Module) -> manifest.Source:
    parameters = list(model.parameters())
    return manifest.Source(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        config=_json(dict(getattr(model, "config", {}))),
    )


def _signature(traced: Traced) -> manifest.Signature:
    """How the model is called: tensors by their paths in the arguments, everything else by value."""
    captured, call, facts = traced.one.graph, traced.call, traced.facts
    arguments, options = [], dict[str, Any]()
    names = map(argument_name, captured.inputs)
    for keys, leaf in tree_flatten_with_path(call.arguments)[0]:
        if isinstance(leaf, torch.Tensor):
            arguments.append(manifest.Argument(tuple(map(_key, keys)), next(names)))
        else:
            options[".".join(map(_option_key, keys))] = _json(leaf)
    return manifest.Signature(
        parameters=tuple(call.arguments),
        arguments=tuple(arguments),
        options=options,
        latent=argument_name(facts.latent),
        timestep=argument_name(facts.timestep),
        result=_result(captured.output),
        more_latents=tuple(map(argument_name, sorted(facts.changing - {facts.latent, facts.timestep}))),
        fixed=traced.fixed,
    )


def _key(key: Any) -> str | int:
    if isinstance(key, MappingKey) and isinstance(key.key, str):
        return key.key
    if isinstance(key, SequenceKey):
        return key.idx
    raise ExportError(
        f"the call has an argument at {key}; an artifact takes tensors in lists, tuples and dictionaries with names"
    )


def _option_key(key: Any) -> str:
    """Also a number that is a key of a dictionary."""
    if isinstance(key, MappingKey) and type(key.key) is int:
        return str(key.key)
    return str(_key(key))


def _result(output: OutputLayout) -> Any:
    """The structure of what the model returns; see ``manifest.Signature``.

    Items have names where their type has them: the keys of a dictionary, or the fields of a class.
    """
    tensors = iter(range(output.spec.num_leaves))
    leaves = iter(
        {"value": _json(output.constants[i])} if i in output.constants else {"output": next(tensors)}
        for i in range(output.spec.num_leaves)
    )

    def describe(spec: TreeSpec) -> Any:
        if spec.is_leaf():
            return next(leaves)
        items = [describe(child) for child in spec.children()]
        if spec.type in (tuple, list):
            return {"type": spec.type.__name__, "items": items}
        names = list(getattr(spec.context, "_fields", spec.context if isinstance(spec.context, list) else ()))
        if len(names) != len(items) or not all(isinstance(name, str) for name in names):
            raise ExportError(
                f"the model returns a {spec.type}, whose fields have no known names; return a tuple or a dict"
            )
        return {"type": spec.type.__name__, "names": names, "items": items}

    return describe(output.spec)


def _branches(traced: Traced) -> tuple[manifest.Branch, ...]:
    selection = traced.policy.selection

    def grid(branch: Branch) -> tuple[int, ...] | None:
        return None if selection is None else tokens_of(traced.facts, selection, branch).grid

    pairs = list(zip(traced.one.facts.branches, traced.other.facts.branches, strict=True))
    odd = next((one for one, other in pairs if one.pointwise and one.tokens != other.tokens), None)
    if odd is not None:
        raise BatchError(
            f"the tokens of {odd.path or 'the stream'}, {odd.layout}, are the batch's rows, so their number must be "
            "known"
        )
    return tuple(
        manifest.Branch(
            branch.index,
            traced.size(branch.rows, other.rows, f"branch {branch.index}"),
            branch.tokens,
            grid(branch),
        )
        for branch, other in pairs
        if branch.pointwise
    )


def _precision(traced: Traced) -> str:
    """The type of most of the weights' bytes."""
    sizes: dict[str, int] = {}
    for tensor in traced.one.graph.attributes.values():
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
    return max(sizes, key=lambda name: sizes[name])


def _json(value: Any) -> Any:
    """``value`` in JSON's types; whatever JSON cannot express becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
