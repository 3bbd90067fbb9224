"""nn.Module + one example call -> CapturedGraph, by torch.export and nothing model-specific."""

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
from torch.utils._pytree import tree_leaves, tree_map_only

from duca_compile.core.fx_utils import PACKAGE, module_path, source_line
from duca_compile.core.ir import CapturedGraph
from duca_compile.core.outputs import OutputLayout
from duca_compile.errors import CaptureError, first_line
from duca_compile.frontend import away, casts, concrete
from duca_compile.frontend.activations import Activations
from duca_compile.frontend.away import Brought
from duca_compile.frontend.binder import LEAVES, Call, tensor_names
from duca_compile.frontend.concrete import Untraceable, failing_node, failing_path
from duca_compile.frontend.opaque import alike
from duca_compile.frontend.operators import is_random
from duca_compile.frontend.reproduce import ROUNDING, Ran, copied, cuda_devices, differs, has_foreign_operators

log = logging.getLogger("duca_compile")

_LIST_PLACE = re.compile(r"\[\d+\]$")
_METADATA_CHECK = torch.ops.aten._assert_tensor_metadata.default
_TORCH_PRINTS = "torch.export._trace"  # the module that prints a graph
_TRANSFORMS = "torch._functorch.predispatch"  # what leaves traces of vmap and the like, which hold within it alone
ROUNDS = 8  # kinds of submodules that may turn out to be in the way of a trace
_NONE: Mapping[str, str] = {}
_TORCH_ROOT = str(Path(torch.__file__).parent)


def capture(
    model: nn.Module,
    call: Call,
    opaque: Mapping[str, str] = _NONE,
    ran: Ran | None = None,
    careful: bool = False,
) -> CapturedGraph:
    """Traces one call of ``model`` into a graph of ATen operators.

    The graph's get_attr nodes are the model's own parameters and buffers; what hooks bring for each call is the result
    of an operator. The submodules at ``opaque``, which gives the reasons, are one operator each. So are those that no
    trace can hold, with all of their kind. ``ran`` is this call of the model, if it was run. Where more than
    torch.export vouches for the graph, or ``careful``, it is run once and has to give the model's results.

    Raises:
        CaptureError: the forward cannot be traced, and what cannot is in no submodule; names the line.
    """
    ran = _Once(warm(model, call)) if ran is None else ran
    brought = away.brought(model)
    operators = {**brought.operators, **opaque}
    arguments = _without_aliases(copied(call.arguments))
    failed: Exception | None = None
    for _ in range(ROUNDS):
        try:
            captured = _traced(model, arguments, call, brought, operators)
            look = _needs_a_look(captured)
            rounding = 0.0 if look else ROUNDING
            path = differs(model, arguments, captured, ran, operators, rounding) if look or careful else None
            if path is None:
                return captured
            reason, failed = "does what its trace does not show", None
        except Untraceable as failure:
            path, reason, failed = failure.path, f"cannot be traced ({_gist(failure.error)})", failure.error
        path = _outside(path, operators)
        if not path:
            break
        log.info("%s %s: it runs as it is, as one operator, and so does all of its kind", path, reason)
        operators |= dict.fromkeys(alike(model, path), reason)
    raise _refusal(model, failed) from failed


@dataclass
class _Once:
    """A call that has changed nothing, as far as is known."""

    results: list[Any]

    def again(self) -> None:
        pass


def _traced(
    model: nn.Module, arguments: dict[str, Any], call: Call, brought: Brought, operators: Mapping[str, str]
) -> CapturedGraph:
    """Raises Untraceable."""
    random = torch.random.fork_rng(cuda_devices(call.tensors))  # each trace, and each run of it, draws the same
    with torch.no_grad(), random, away.reading(model, brought, operators):
        exported = None if operators else _exported(model, arguments)
        if exported is not None:
            return _lower(model, exported, call)
        traced = concrete.trace(model, arguments, operators, brought)
        try:
            exported = _export(traced.module, arguments)
        except (torch.OutOfMemoryError, CaptureError):
            raise
        except Exception as error:
            raise Untraceable(failing_path(error), error) from error
        _check_sizes(model, exported.program)
        return _lower(traced.module, exported, call, traced)


def _gist(error: Exception) -> str:
    """The first sentence of its message, which may be long."""
    return shorten(first_line(error).split(". ")[0], 120, placeholder=" ...")


def _needs_a_look(captured: CapturedGraph) -> bool:
    """Whether its values are to be the model's bit for bit: where more than torch.export vouches for it."""
    more = captured.readings is not None or captured.casts or has_foreign_operators(captured.graph)
    return more or any(is_random(node) for node in captured.graph.nodes)  # forward may set a seed


def _outside(path: str, operators: Collection[str]) -> str:
    """The innermost module around ``path`` that is no operator yet, nor within one."""
    while any(path == each or path.startswith(f"{each}.") for each in operators):
        path = path.rpartition(".")[0]
    return path


def _refusal(model: nn.Module, error: Exception | None) -> CaptureError:
    name = type(model).__name__
    if error is None:
        return CaptureError(
            f"the trace of {name}.forward gives other results than forward itself: something in it is not done by "
            "PyTorch's operators. Move that to a submodule, which then runs as it is, as one operator."
        )
    if isinstance(error, CaptureError):
        return error
    return CaptureError(
        f"{name} cannot be captured{_where(error)}: {first_line(error).rstrip('.')}. Move that line to a submodule, "
        "which then runs as it is, as one operator; or, if it depends on neither latent nor timestep, compute it "
        "before the loop."
    )


class _Exported(NamedTuple):
    program: torch.export.ExportedProgram
    casts: bool  # whether it does what autocast would do


def _exported(model: nn.Module, arguments: dict[str, Any]) -> _Exported | None:
    """The model as torch.export sees it; None where the forward reads values, or shapes depend on some."""
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
                "as it is, as one operator, or compute it before the loop."
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
        program = program.run_decompositions({})  # an empty table functionalizes and keeps operators whole
    return _Exported(program, False)


class _WithoutGraphs(io.TextIOBase):
    """A stream but for the graph so far, often thousands of lines, which torch.export prints where it fails.

    All else goes through: other threads print there too.
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
    """Drops checks of types that the trace leaves beside casts: within an autocast region they can be wrong."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=_METADATA_CHECK):
                module.graph.erase_node(node)
            module.recompile()


def warm(model: nn.Module, call: Call, noted: Activations | None = None) -> list[Any]:
    """Runs the model once, so that tables it makes at first use are real tensors and not the trace's fakes.

    It also tells a model that rejects these arguments from one that runs but cannot be traced. ``noted`` looks on.
    Returns the leaves of its results.
    """
    try:
        with torch.no_grad(), noted or contextlib.nullcontext(), torch.random.fork_rng(cuda_devices(call.tensors)):
            own = tree_leaves(model(**call.arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shapes = {n: tuple(t.shape) for n, t in zip(tensor_names(call), call.tensors, strict=False)}
        raise CaptureError(
            f"{type(model).__name__} itself fails on this call{_where(error)}: {first_line(error).rstrip('.')}. "
            f"Its tensors: {shapes}."
        ) from error
    other = next((leaf for leaf in own if type(leaf) not in LEAVES and not isinstance(leaf, Tensor)), None)
    if other is not None:
        raise CaptureError(
            f"{type(model).__name__}.forward returns a {type(other).__name__}, into which torch cannot look; call it "
            "so that it returns tensors, numbers, and lists, tuples or dictionaries of these"
        )
    return own


def _without_aliases(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies a tensor that is passed twice: the trace would take the two arguments for one."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) in seen:
            return tensor.clone()
        seen.add(id(tensor))
        return tensor

    copied: dict[str, Any] = tree_map_only(Tensor, own, arguments)
    return copied


def _needs_functionalizing(node: fx.Node) -> bool:
    """In-place operators, regions (autocast or gradient mode set in forward) that stand for a subgraph, and weights
    that hold several tensors, such as quantized ones: what such a weight does to an operator becomes plain operators.
    """
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) or is_traceable_wrapper_subclass(node.meta.get("val")):
        return True
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _where(error: Exception) -> str:
    """The innermost source line that is neither torch's nor ours."""
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
    signature = program.graph_signature
    live = live_tensors(model)
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    graph, mapping = fx.Graph(), dict[fx.Node, Any]()
    attributes: dict[str, Tensor] = {}
    inputs: list[str] = []
    arguments = {name for name, spec in specs.items() if spec.kind is InputKind.USER_INPUT}
    # The arguments come first, so that no weight takes the name of one.
    for node in sorted(program.graph.nodes, key=lambda node: node.name not in arguments):
        if getattr(node.target, "__module__", None) == _TRANSFORMS:
            raise Untraceable(
                module_path(node), RuntimeError(f"it transforms a function (vmap), at {source_line(node)}")
            )
        if node.op != "placeholder":
            if node.op != "output":
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            continue
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                mapping[node] = spec.arg.value
                continue
            mapping[node] = graph.node_copy(node)
            inputs.append(mapping[node].name)
            continue
        if not node.users:
            continue
        target = str(spec.target)
        value = live[target] if target in live else program.constants[target]
        if not isinstance(value, Tensor):
            kind, user = type(value).__name__, next(iter(node.users))
            error = RuntimeError(f"it uses a {kind} that it makes anew at each call, at {source_line(user)}")
            raise Untraceable(module_path(user), error)
        attributes[target] = value
        mapping[node] = graph.get_attr(target)
        mapping[node].meta = dict(node.meta)
    leaves = _outputs(program)
    constants = {i: leaf.value for i, leaf in enumerate(leaves) if isinstance(leaf, ConstantArgument)}
    produced = {node.name: node for node in program.graph.nodes}
    results = tuple(mapping[produced[leaf.name]] for leaf in leaves if isinstance(leaf, TensorArgument))
    graph.output(results)
    fetched = away.read_late(graph)
    graph.lint()
    readings = traced.readings if traced and traced.readings.values else None
    return CapturedGraph(
        graph=graph,
        attributes=attributes if readings is None else readings.attributes | attributes,
        inputs=tuple(inputs),
        output=OutputLayout(program.call_spec.out_spec, constants),
        lists=tuple(_LIST_PLACE.sub("", name) for name in tensor_names(call)),
        given={inputs[place]: read for place, read in traced.reads.items()} if traced else {},
        readings=readings,
        opaque=traced.opaque if traced else (),
        away=fetched,
        casts=exported.casts,
    )


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by the names that a trace gives them."""
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
    """The plain tensors that a tensor subclass such as a quantized weight holds; a plain one is its own."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


def _outputs(program: torch.export.ExportedProgram) -> list[Any]:
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
