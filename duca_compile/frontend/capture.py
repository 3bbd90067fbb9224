"""nn.Module + one example call -> CapturedGraph, by torch.export and nothing model-specific."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from operator import itemgetter
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, NoReturn, TextIO

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map_only

from duca_compile import away, casts, concrete
from duca_compile.activations import Activations
from duca_compile.analysis.operators import is_random
from duca_compile.away import Brought
from duca_compile.concrete import Untraceable, failing_node, failing_path
from duca_compile.errors import CaptureError, UsageError, first_line
from duca_compile.graph import RESERVED, CapturedGraph, OutputLayout, module_path, source_line
from duca_compile.opaque import alike
from duca_compile.reproduce import ROUNDING, Ran, copied, cuda_devices, differs, has_foreign_operators

log = logging.getLogger("duca_compile")

_CLEAR, _VAGUE = ("timestep", "timesteps"), ("t", "time", "sigma")  # names of timesteps that may be given as numbers
_LEAVES = {Tensor, nn.Parameter, bool, int, float, str, type(None), torch.dtype, torch.device}
_TENSOR_GUARDS: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)  # without it each call is bound anew
_LIST_PLACE = re.compile(r"\[\d+\]$")
_METADATA_CHECK = torch.ops.aten._assert_tensor_metadata.default
_TORCH_PRINTS = "torch.export._trace"  # the module that prints a graph
_TRANSFORMS = "torch._functorch.predispatch"  # what leaves traces of vmap and the like, which hold within it alone
ROUNDS = 8  # kinds of submodules that may turn out to be in the way of a trace
_NONE: Mapping[str, str] = {}
_TORCH_ROOT = str(Path(torch.__file__).parent)


class Key:
    """What tells a call from calls of another kind; its hash is remembered, since every call looks itself up."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[Hashable, ...]) -> None:
        self._parts, self._hash = parts, hash(parts)

    @property
    def parts(self) -> tuple[Hashable, ...]:
        """The name of each argument, with what is built in of its leaves behind it; at the end, autocast's type."""
        return self._parts

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._parts == other._parts)


class Call(NamedTuple):
    """The arguments of one call by name, its tensors, and its kind."""

    defaults: Mapping[str, Any]  # of all arguments that have one
    given: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    key: Key

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.defaults, **self.given}

    def with_arguments(self, arguments: Mapping[str, Any]) -> Call:
        return self._replace(defaults={}, given=arguments)


class _Known(NamedTuple):
    """The last call, as far as the next is likely to be like it: plain values, and tensors within none of them."""

    names: tuple[str, ...]
    tensors: Callable[[Mapping[str, Any]], tuple[Tensor, ...]]  # those among the arguments, in the signature's order
    fit: Callable[..., bool]  # whether others are of the same kinds
    values: tuple[tuple[str, type, Any], ...]
    device: str
    autocast: Hashable
    key: Key


class Binder:
    """Makes a ``Call`` of the arguments of one model's forward. It runs at every step, so the common case is short."""

    def __init__(self, model: nn.Module, timestep: str | None = None) -> None:
        self.signature = inspect.signature(model.forward)
        kinds = {name: parameter.kind for name, parameter in self.signature.parameters.items()}
        self._by_place = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self._defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        }
        self._required = {name for name, value in self._defaults.items() if value is inspect.Parameter.empty}
        self._rest = inspect.Parameter.VAR_KEYWORD in kinds.values()
        self._plain = inspect.Parameter.POSITIONAL_ONLY not in kinds.values()
        self._timesteps = (*_CLEAR, *_VAGUE) if timestep is None else (timestep,)
        self._known: _Known | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Binds one call.

        Raises UsageError where the arguments do not fit the signature, with Python's own reason.
        """
        given = kwargs if not args else dict(zip(self._by_place, args, strict=False)) | kwargs
        whole = not args or len(given) == len(args) + len(kwargs)
        if whole and (call := self._again(given)) is not None:
            return call
        known = self._defaults.keys()
        fits = self._required <= given.keys() and (self._rest or given.keys() <= known)
        if not (fits and self._plain and whole):
            self._refuse(args, kwargs)
        arguments = {**self._defaults, **given}  # a default is the same call whether it is given or not
        converted = self._convert_timestep(arguments)
        tensors: list[Tensor] = []
        key: list[Hashable] = []
        for name, value in arguments.items():
            key.append(name)
            if type(value) in _LEAVES:
                _add(value, tensors, key)
            else:
                leaves, spec = tree_flatten(value)
                key.append(spec)
                for leaf in leaves:
                    _add(leaf, tensors, key)
        autocast = _autocast(tensors[0].device.type) if tensors else None
        call = Call({}, arguments, tuple(tensors), Key((*key, autocast)))
        self._known = None if converted else _known(given, call, autocast)
        return call

    def _again(self, given: dict[str, Any]) -> Call | None:
        """The call, if it is of the kind of the last one."""
        known = self._known
        if known is None or known.names != tuple(given):
            return None
        for name, cls, value in known.values:
            if type(given[name]) is not cls or given[name] != value:
                return None
        tensors = known.tensors(given)
        if not known.fit(*tensors):
            return None
        if known.autocast != _autocast(known.device):
            return None
        return Call(self._defaults, given, tensors, known.key)

    def _convert_timestep(self, arguments: dict[str, Any]) -> bool:
        """Makes a tensor of a timestep given as a number, Python's or numpy's, or every step would be another graph.

        Integers become int64 and others float32, for a model may look integers up in a table; so a loop that gives
        both makes two kinds of call. Next to a timestep that is a tensor, a number called ``t`` is an option.

        Returns whether there was one.
        """
        converted = False
        for name in self._timesteps:
            value = arguments.get(name)
            if not isinstance(value, Real) or isinstance(value, bool):
                continue
            if name in _VAGUE and any(isinstance(arguments.get(other), Tensor) for other in self._timesteps):
                continue
            arguments[name] = torch.tensor(int(value) if isinstance(value, Integral) else float(value))
            converted = True
        return converted

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"the call does not fit the model's forward{self.signature}: {error}") from error
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
        name = next(name for name, each in self.signature.parameters.items() if each.kind in positional)
        raise UsageError(f"forward takes {name!r} by position only; give it a name to optimize this model")


def _known(given: Mapping[str, Any], call: Call, autocast: Hashable) -> _Known | None:
    """None where a call cannot be told to be like it by a look at each argument."""
    tensors = tuple(name for name, value in call.arguments.items() if name in given and isinstance(value, Tensor))
    plain = all(type(value) in _LEAVES for value in given.values()) and 1 < len(tensors) == len(call.tensors)
    if not plain or _TENSOR_GUARDS is None:
        return None
    values = tuple((name, type(value), value) for name, value in given.items() if name not in tensors)
    any_strides = [[None] * tensor.dim() for tensor in call.tensors]
    shapes = [[*tensor.shape] for tensor in call.tensors]
    fit = _TENSOR_GUARDS(*call.tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=any_strides)
    device = call.tensors[0].device.type
    return _Known(tuple(given), itemgetter(*tensors), fit.check, values, device, autocast, call.key)


def _add(leaf: Any, tensors: list[Tensor], key: list[Hashable]) -> None:
    if isinstance(leaf, Tensor):
        tensors.append(leaf)
    key.append(_leaf_kind(leaf))


def _leaf_kind(leaf: Any) -> Hashable:
    """What is built into a capture of a value."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf).__name__, leaf if isinstance(leaf, Hashable) else repr(leaf)


def _autocast(device: str) -> Hashable:
    """Autocast changes what the same graph computes, so it is part of a call's identity."""
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def tensor_names(call: Call) -> tuple[str, ...]:
    """The argument path of each tensor leaf, such as ``hidden_states`` or ``extra['size']``."""
    found = tree_flatten_with_path(call.arguments)[0]
    return tuple(keystr(path[:1])[2:-2] + keystr(path[1:]) for path, leaf in found if isinstance(leaf, Tensor))


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
    other = next((leaf for leaf in own if type(leaf) not in _LEAVES and not isinstance(leaf, Tensor)), None)
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
    ours = str(Path(__file__).parent)
    frames = [f for f in frames if not f.filename.startswith((ours, "<"))]
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
    for node in program.graph.nodes:
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
            if node.name.startswith(RESERVED):
                mapping[node].name = mapping[node].target = f"given_{node.name}"
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
