"""Captures one call of an nn.Module as a graph, by torch.export and without code for any particular model."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from duca_compile.core.fx_utils import PACKAGE, module_path, op_name, source_line
from duca_compile.core.ir import CapturedGraph
from duca_compile.core.outputs import OutputLayout
from duca_compile.errors import CaptureError, first_line
from duca_compile.frontend import casts, concrete, fast_paths, offloading
from duca_compile.frontend.activations import Activations
from duca_compile.frontend.binder import Call, tensor_names
from duca_compile.frontend.concrete import Untraceable, failing_node, failing_path
from duca_compile.frontend.objects import LEAVES, flatten
from duca_compile.frontend.offloading import Offloading
from duca_compile.frontend.opaque import modules_like
from duca_compile.frontend.operators import is_random
from duca_compile.frontend.trace_check import (
    MAX_ULPS,
    ModelRun,
    copy_containers,
    cuda_devices,
    find_mismatch,
    has_foreign_operators,
)

log = logging.getLogger("duca_compile")

_LIST_INDEX = re.compile(r"\[\d+\]$")
_METADATA_CHECK = torch.ops.aten._assert_tensor_metadata.default
_TORCH_PRINTS = "torch.export._trace"  # the module that prints the graph so far when a trace fails
_TRANSFORMS = "torch._functorch.predispatch"  # the module of nodes left by vmap and the like, invalid outside of it
ROUNDS = 8  # kinds of submodules that may have to become opaque before a trace succeeds
_NONE: Mapping[str, str] = {}
_TORCH_ROOT = str(Path(torch.__file__).parent)


def capture(
    model: nn.Module,
    call: Call,
    opaque: Mapping[str, str] = _NONE,
    run: ModelRun | None = None,
    careful: bool = False,
) -> CapturedGraph:
    """Traces one call of ``model`` into a graph of ATen operators.

    The graph's get_attr nodes are the model's own parameters and buffers; weights that hooks materialize for each call
    are results of ``fetch`` operators. Submodules that no trace can hold become one operator each, with all others of
    their kind.

    Args:
        opaque: the paths of submodules that must be one operator each, with the reasons.
        run: this call of the model, if it was made.
        careful: whether to run the graph and compare its results with the model's even where torch.export alone
            vouches for it. Other graphs are always compared.

    Raises:
        CaptureError: forward cannot be traced, and the cause is in no submodule; names the line.
    """
    run = _Run(warm(model, call)) if run is None else run
    offloaded = offloading.find_offloading(model)
    operators = {**offloaded.operators, **opaque}
    arguments = _without_aliases(copy_containers(call.arguments))
    failed: Exception | None = None
    for _ in range(ROUNDS):
        try:
            captured = _traced(model, arguments, call, offloaded, operators)
            exact = _must_be_exact(captured)
            max_ulps = 0.0 if exact else MAX_ULPS
            path = find_mismatch(model, arguments, captured, run, operators, max_ulps) if exact or careful else None
            if path is None:
                return captured
            reason, failed = "does what its trace does not show", None
        except Untraceable as failure:
            path, reason, failed = failure.path, f"cannot be traced ({_gist(failure.error)})", failure.error
        path = _enclosing(path, operators)
        if not path:
            break
        log.info("%s %s: it runs as one opaque operator, and so does all of its kind", path, reason)
        operators |= dict.fromkeys(modules_like(model, path), reason)
    raise _refusal(model, failed) from failed


@dataclass
class _Run:
    """A call that has changed nothing on the model, as far as is known."""

    results: list[Any]

    def rewind(self) -> None:
        pass


def _traced(
    model: nn.Module, arguments: dict[str, Any], call: Call, offloaded: Offloading, operators: Mapping[str, str]
) -> CapturedGraph:
    """The call as a graph, in which each of ``operators`` is one node. Raises Untraceable."""
    random = torch.random.fork_rng(cuda_devices(call.tensors))  # every trace, and every run of it, draws the same
    fast = fast_paths.traced() if fast_paths.has_fast_paths(model) else contextlib.nullcontext()
    with torch.no_grad(), random, fast, offloading.as_fetches(model, offloaded, operators):
        exported = None if operators else _exported(model, arguments)
        if exported is not None:
            return _lower(model, exported, call)
        traced = concrete.trace(model, arguments, operators, offloaded)
        try:
            exported = _export(traced.module, arguments)
        except (torch.OutOfMemoryError, CaptureError):
            raise
        except Exception as error:
            raise Untraceable(failing_path(error), error) from error
        _check_sizes(model, exported.program)
        return _lower(traced.module, exported, call, traced)


def _gist(error: Exception) -> str:
    """The first sentence of the error's message, which may be long."""
    return shorten(first_line(error).split(". ")[0], 120, placeholder=" ...")


def _must_be_exact(captured: CapturedGraph) -> bool:
    """Whether the graph must give the model's results bit for bit, since not torch.export alone vouches for it."""
    rewritten = captured.guards is not None or captured.explicit_casts or has_foreign_operators(captured.graph)
    nodes = captured.graph.nodes
    return rewritten or any(is_random(node) or fast_paths.is_fused(node) for node in nodes)  # forward may set a seed


def _enclosing(path: str, operators: Collection[str]) -> str:
    """The innermost module that contains ``path`` and is neither one of ``operators`` nor inside of one."""
    while any(path == each or path.startswith(f"{each}.") for each in operators):
        path = path.rpartition(".")[0]
    return path


def _refusal(model: nn.Module, error: Exception | None) -> CaptureError:
    name = type(model).__name__
    if error is None:
        return CaptureError(
            f"the trace of {name}.forward gives other results than forward itself: something in it is not computed by "
            "PyTorch's operators. Move that to a submodule, which then runs as one opaque operator."
        )
    if isinstance(error, CaptureError):
        return error
    return CaptureError(
        f"{name} cannot be captured{_where(error)}: {first_line(error).rstrip('.')}. Move that line to a submodule, "
        "which then runs as one opaque operator; or, if it depends on neither latent nor timestep, compute it "
        "before the loop."
    )


class _Exported(NamedTuple):
    program: torch.export.ExportedProgram
    explicit_casts: bool  # whether autocast's casts are in the graph


def _exported(model: nn.Module, arguments: dict[str, Any]) -> _Exported | None:
    """The model as torch.export traces it; None where that fails, or where shapes depend on values."""
    try:
        exported = _export(model, arguments)
    except (torch.OutOfMemoryError, CaptureError):
        raise
    except Exception as error:
        log.info("tracing %s with real values, since torch.export cannot: %s", type(model).__name__, first_line(error))
        return None
    return None if any(_is_symbolic(node.meta.get("val")) for node in exported.program.graph.nodes) else exported


def _check_sizes(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    for node in program.graph.nodes:
        if _is_symbolic(node.meta.get("val")):
            error = CaptureError(
                f"{type(model).__name__}.forward makes a tensor whose shape depends on values, by {node.target} at "
                f"{source_line(node)}, in a way that is not understood. Move that line to a submodule, which then runs "
                "as one opaque operator, or compute it before the loop."
            )
            raise Untraceable(module_path(node), error)


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat)


def _export(model: nn.Module, arguments: dict[str, Any]) -> _Exported:
    with concrete.DataAsDetach(), contextlib.redirect_stderr(_WithoutGraphs(sys.stderr)):
        program = torch.export.export(model, (), arguments, strict=False)
    if casts.has_regions(program.graph_module):
        _strip_checks(program)
        casts.make_explicit(program.graph_module, casts.ambient())
        with casts.autocast(casts.off()):
            return _Exported(program.run_decompositions({}), True)
    if any(_needs_functionalizing(node) for node in program.graph.nodes):
        _strip_checks(program)
        program = program.run_decompositions({})  # an empty table functionalizes, but decomposes no operator
    return _Exported(program, False)


class _WithoutGraphs(io.TextIOBase):
    """A stream without the graph so far, often thousands of lines, which torch.export prints when it fails.

    Everything else passes through, since other threads may print there too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        printed = sys._getframe(1).f_globals.get("__name__") == _TORCH_PRINTS
        return len(text) if printed else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _strip_checks(program: torch.export.ExportedProgram) -> None:
    """Drops the type checks that the trace puts beside casts: within an autocast region they can be wrong."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=_METADATA_CHECK):
                module.graph.erase_node(node)
            module.recompile()


def warm(model: nn.Module, call: Call, noted: Activations | None = None) -> list[Any]:
    """Runs the model once, and returns the leaves of its results.

    Tables that it makes at first use are then real tensors, and not the trace's fakes. It also tells a model that
    rejects these arguments from one that runs but cannot be traced. ``noted`` observes the run.

    Raises:
        CaptureError: the model fails, or returns an object that torch cannot flatten.
    """
    try:
        with torch.no_grad(), noted or contextlib.nullcontext(), torch.random.fork_rng(cuda_devices(call.tensors)):
            results, _ = flatten(model(**call.arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shapes = {n: tuple(t.shape) for n, t in zip(tensor_names(call), call.tensors, strict=False)}
        raise CaptureError(
            f"{type(model).__name__} itself fails on this call{_where(error)}: {first_line(error).rstrip('.')}. "
            f"Its tensors: {shapes}."
        ) from error
    other = next((leaf for leaf in results if type(leaf) not in LEAVES and not isinstance(leaf, Tensor)), None)
    if other is not None:
        raise CaptureError(
            f"{type(model).__name__}.forward returns a {type(other).__name__}, which torch cannot flatten; call it so "
            "that it returns tensors, numbers, and lists, tuples or dictionaries of these"
        )
    return results


def _without_aliases(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a copy of each tensor that is passed twice, which the trace would take for one argument."""
    seen: set[int] = set()

    def distinct(tensor: Tensor) -> Tensor:
        if id(tensor) in seen:
            return tensor.clone()
        seen.add(id(tensor))
        return tensor

    without: dict[str, Any] = tree_map_only(Tensor, distinct, arguments)
    return without


def _needs_functionalizing(node: fx.Node) -> bool:
    """Whether a node is an in-place operator, a region with a subgraph, or a weight that holds several tensors.

    Regions are parts of forward that set autocast or the gradient mode. Quantized weights, for example, hold several
    tensors: functionalizing turns what they make of an operator into plain operators.
    """
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) or is_traceable_wrapper_subclass(node.meta.get("val")):
        return True
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _where(error: Exception) -> str:
    """The innermost source line that is neither torch's nor this package's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_TORCH_ROOT)]
    frames = [f for f in frames if not f.filename.startswith((PACKAGE, "<"))]
    if frames:
        return f' at {frames[-1].filename}:{frames[-1].lineno} ("{frames[-1].line}")'
    node = failing_node(error)
    return "" if node is None else f" at {source_line(node)}"


def _lower(
    model: nn.Module,
    exported: _Exported,
    call: Call,
    traced: concrete.ConcreteTrace | None = None,
) -> CapturedGraph:
    """Turns lifted weights back into get_attr nodes on the model's live tensors."""
    program = exported.program
    lowering = _Lowering(program, live_tensors(model))
    lowering.copy_nodes()
    output = lowering.add_output()
    fetched = offloading.sink_fetches(lowering.graph)
    lowering.graph.lint()
    inputs, attributes = tuple(lowering.inputs), lowering.attributes
    guards = traced.guards if traced and traced.guards.values else None
    return CapturedGraph(
        graph=lowering.graph,
        attributes=attributes if guards is None else guards.attributes | attributes,
        inputs=inputs,
        output=output,
        argument_paths=tuple(_LIST_INDEX.sub("", name) for name in tensor_names(call)),
        guarded_inputs={inputs[place]: read for place, read in traced.reads.items()} if traced else {},
        guards=guards,
        opaque=traced.opaque if traced else (),
        fetched=fetched,
        explicit_casts=exported.explicit_casts,
    )


class _Lowering:
    """A copy of an exported program's graph that reads the model's live tensors, ``live``, by get_attr nodes."""

    def __init__(self, program: torch.export.ExportedProgram, live: Mapping[str, Tensor]) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        self.inputs: list[str] = []
        self._program, self._live = program, live
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self._mapping: dict[fx.Node, Any] = {}

    def copy_nodes(self) -> None:
        """Copies all nodes but the output. Raises Untraceable."""
        arguments = {name for name, spec in self._specs.items() if spec.kind is InputKind.USER_INPUT}
        # The arguments come first, so that no weight takes the name of one.
        for node in sorted(self._program.graph.nodes, key=lambda node: node.name not in arguments):
            if getattr(node.target, "__module__", None) == _TRANSFORMS:
                error = RuntimeError(f"it transforms a function (vmap), at {source_line(node)}")
                raise Untraceable(module_path(node), error)
            if node.op == "get_attr" and isinstance(getattr(self._program.graph_module, node.target), nn.Module):
                user = next(iter(node.users))
                called = TypeError(f"it calls {op_name(user)}, which runs a function, at {source_line(user)}")
                raise Untraceable(module_path(user), called)
            if node.op == "placeholder":
                self._copy_input(node)
            elif node.op != "output":
                self._mapping[node] = self.graph.node_copy(node, lambda n: self._mapping[n])

    def _copy_input(self, node: fx.Node) -> None:
        spec = self._specs[node.name]
        if spec.kind is not InputKind.USER_INPUT:
            if node.users:
                self._add_attribute(node, str(spec.target))
        elif isinstance(spec.arg, ConstantArgument):
            self._mapping[node] = spec.arg.value
        else:
            copy = self._mapping[node] = self.graph.node_copy(node)
            self.inputs.append(copy.name)

    def _add_attribute(self, node: fx.Node, target: str) -> None:
        value = self._live[target] if target in self._live else self._program.constants[target]
        if not isinstance(value, Tensor):
            kind, user = type(value).__name__, next(iter(node.users))
            error = RuntimeError(f"it uses a {kind} that it creates at each call, at {source_line(user)}")
            raise Untraceable(module_path(user), error)
        self.attributes[target] = value
        self._mapping[node] = self.graph.get_attr(target)
        self._mapping[node].meta = dict(node.meta)

    def add_output(self) -> OutputLayout:
        """Ends the graph with its results; returns how they become the model's output."""
        leaves = _outputs(self._program)
        constants = {i: leaf.value for i, leaf in enumerate(leaves) if isinstance(leaf, ConstantArgument)}
        nodes = {node.name: node for node in self._program.graph.nodes}
        self.graph.output(tuple(self._mapping[nodes[leaf.name]] for leaf in leaves if isinstance(leaf, TensorArgument)))
        return OutputLayout(self._program.call_spec.out_spec, constants)


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors, by the names that a trace gives them."""
    live: dict[str, Tensor] = {}
    for path, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        live[path] = tensor
        if is_traceable_wrapper_subclass(tensor):
            prefix, _, name = path.rpartition(".")
            place = f"{prefix}.parametrizations.{name}.original" if prefix else f"parametrizations.{name}.original"
            live |= {f"{place}{i}": inner for i, inner in enumerate(inner_tensors(tensor))}
    return live


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors inside of a tensor subclass such as a quantized weight; of a plain tensor, itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


def _outputs(program: torch.export.ExportedProgram) -> list[Any]:
    """The leaves of the results. Raises CaptureError where forward has other effects."""
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise CaptureError(f"forward writes to its argument {spec.target!r} in place; clone it there first.")
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"forward changes {spec.target!r} ({spec.kind.name}); a variant must have no side effects. "
                "Return the new value instead of storing it on the module."
            )
        if not isinstance(spec.arg, TensorArgument | ConstantArgument):
            raise CaptureError(f"forward returns {spec.arg}, which is neither a tensor nor a constant.")
    return [spec.arg for spec in program.graph_signature.output_specs]
