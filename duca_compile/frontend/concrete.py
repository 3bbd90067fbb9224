"""Traces a call with its real values, for models whose forward reads tensors in Python.

``torch.export`` traces without values, so it fails where forward needs one (``.item()``, ``.tolist()``, ``.numpy()``, a
boolean mask). Here Python gets the values of this call. The values that it reads become guards, with the graph that
computes them: the trace is valid for calls that read the same values.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.traceback import preserve_node_meta
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from duca_compile.core.fx_utils import module_path, source_line
from duca_compile.core.guards import ValueGuards, ValueRead
from duca_compile.frontend.offloading import Offloading
from duca_compile.frontend.opaque import CallSite, as_operators
from duca_compile.frontend.operators import is_random
from duca_compile.frontend.trace_check import hookable_modules

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
aten = torch.ops.aten

# Python functions that read values. A read in C++ (a size, a bound of a slice) leaves an operator of _READS in the
# trace, except where it reads a buffer, which leaves nothing.
_READERS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__bool__,
    torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.__complex__, torch.equal,
    torch.Tensor.equal, torch.allclose, torch.Tensor.allclose, torch.is_nonzero, torch.Tensor.is_nonzero,
    torch.Tensor.data_ptr, torch.Tensor.storage, torch.Tensor.untyped_storage, torch.Tensor.__dlpack__,
}  # fmt: skip
_TRACE = "trace"  # the attribute of _Replay with the graph
_UNTAGGED = {aten.where.default, aten.nonzero_numpy.default, aten.tensor_split.tensor_indices_or_sections}


@torch.library.custom_op("duca_compile::read", mutates_args=())
def _read_operator(x: Tensor) -> Tensor:
    return x.clone()


_read = torch.ops.duca_compile.read.default
_READS = {_read, aten.item.default, aten._local_scalar_dense.default}
fx.node.has_side_effect(_read)  # nothing uses its result, and it must not be dropped from the trace


@dataclass(frozen=True)
class ConcreteTrace:
    """A module without data-dependent control flow or shapes, specialized to the values that forward read.

    ``reads`` says where each argument whose values matter is read, by its position among the call's tensors.
    """

    module: nn.Module
    reads: dict[int, ValueRead]
    guards: ValueGuards
    opaque: tuple[CallSite, ...]


class Untraceable(Exception):  # noqa: N818 - not an error: the module becomes an operator
    """A trace failed; ``path`` is that of the innermost module in which it did."""

    def __init__(self, path: str, error: Exception) -> None:
        super().__init__(path)
        self.path, self.error = path, error


def trace(
    model: nn.Module, arguments: dict[str, Any], opaque: Mapping[str, str], offloaded: Offloading
) -> ConcreteTrace:
    """Traces ``model(**arguments)`` by running it, with the submodules at the paths ``opaque`` as one operator each.

    Raises Untraceable.
    """
    leaves, spec = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]
    output_specs: list[Any] = []

    def run(*traced: Tensor) -> list[Any]:
        replaced = list(leaves)
        for place, tensor in zip(places, traced, strict=True):
            replaced[place] = tensor
        results, output_spec = tree_flatten(model(**tree_unflatten(replaced, spec)))
        output_specs.append(output_spec)
        return results

    operators = as_operators(model, opaque, offloaded)
    with preserve_node_meta(), operators as sites, _module_paths(model) as paths, DataAsDetach(), _NoteReads():
        make = make_fx(run, pre_dispatch=True, _error_on_data_dependent_ops=False, record_stack_traces=True)
        try:
            graph = make(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Untraceable(paths[-1], error) from error
    try:
        _check_random(graph)
        _index_by_number(graph)
        reads, guards = _reads(graph), _guards(graph, tensors)
        _fold(graph, tensors)
    except (torch.OutOfMemoryError, Untraceable):
        raise
    except Exception as error:  # the trace fails on the values that it was made with
        raise Untraceable(failing_path(error), error) from error
    return ConcreteTrace(_Replay(graph, output_specs[0]), reads, guards, tuple(sites))


class DataAsDetach(TorchFunctionMode):
    """Replaces ``tensor.data``, an alias that no tracer sees, by ``detach()``, which makes the same alias."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _GET_DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


class _NoteReads(TorchFunctionMode):
    """Puts a node into the trace for each value that Python reads; refuses operators that run functions."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _runs_function(func, args, kwargs) and get_proxy_mode() is not None:  # and it is not within an operator
            raise TypeError(f"it calls {func.__name__}, which runs a function")
        if func in _READERS:
            for tensor in args:
                if isinstance(tensor, Tensor):
                    _read(tensor)
        return func(*args, **(kwargs or {}))


def _runs_function(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator is given functions of the model's, as flex_attention is."""
    if not isinstance(func, torch._ops.HigherOrderOperator):
        return False
    leaves = tree_leaves((args, kwargs))
    return any(callable(leaf) and not isinstance(leaf, torch._ops.OperatorBase) for leaf in leaves)


@contextmanager
def _module_paths(model: nn.Module) -> Iterator[list[str]]:
    """Notes in each traced node the path of its module; yields the paths of the modules that are running."""
    running = [""]
    stacks: list[dict[str, tuple[str, str]]] = [{}]
    with ExitStack() as hooks:
        for path, module in hookable_modules(model):
            entry = {path: (path, type(module).__qualname__)}

            def enter(_module: nn.Module, _args: Any, entry: dict[str, tuple[str, str]] = entry) -> None:
                stacks.append(stacks[-1] | entry)
                running.append(next(iter(entry)))
                torch.fx.traceback.current_meta["nn_module_stack"] = stacks[-1]

            def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
                stacks.pop()
                running.pop()
                torch.fx.traceback.current_meta["nn_module_stack"] = stacks[-1]

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield running


def _reads(graph: fx.GraphModule) -> dict[int, ValueRead]:
    """The arguments that determine a value that Python read, or a shape."""
    found: dict[int, ValueRead] = {}
    inputs = {node: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    sources: dict[fx.Node, set[int]] = {}
    for node in graph.graph.nodes:
        first = {inputs[node]} if node in inputs else set()
        sources[node] = first.union(*(sources[n] for n in node.all_input_nodes))
        if _is_reader(node):
            for index in sources[node]:
                known = found.get(index, ValueRead(source_line(node), frozenset()))
                found[index] = ValueRead(known.source, known.paths | {module_path(node)})
    return found


def _guards(graph: fx.GraphModule, tensors: list[Tensor]) -> ValueGuards:
    """The part of the graph that computes what Python read and what shapes depend on.

    Its weights have the names that they get in ``_Replay``, by which they can be replaced later.
    """
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op != "output":
            copies[node] = part.node_copy(node, lambda n: copies[n])
            if node.op == "get_attr":
                copies[node].target = f"{_TRACE}.{node.target}"
    part.output(tuple(copies[each] for node in graph.graph.nodes if _is_reader(node) for each in _values_read(node)))
    part.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    used = [i for i, node in enumerate(part.find_nodes(op="placeholder")) if node.users]
    for node in part.find_nodes(op="placeholder"):
        if not node.users:
            part.erase_node(node)
    names = {str(node.target) for node in part.find_nodes(op="get_attr")}
    module = fx.GraphModule({name: getattr(graph, name.removeprefix(f"{_TRACE}.")) for name in names}, part)
    values = tuple(value.clone() for value in module(*[tensors[i] for i in used]))  # a buffer may be written to later
    return ValueGuards(module, tuple(used), values)


def _check_random(graph: fx.GraphModule) -> None:
    """Raises Untraceable where Python reads a random number, since the arguments do not determine the next one."""
    drawn = set[fx.Node]()
    for node in graph.graph.nodes:
        if is_random(node) or not drawn.isdisjoint(node.all_input_nodes):
            if _is_reader(node):
                raise Untraceable(module_path(node), RuntimeError(f"it reads a random number at {source_line(node)}"))
            drawn.add(node)


def _is_reader(node: fx.Node) -> bool:
    return node.target in _READS or _has_dynamic_shape(node)


def _values_read(reader: fx.Node) -> list[fx.Node]:
    """The tensors that tell what was read: a result of dynamic shape if it is one tensor, else the operands."""
    one_result = _has_dynamic_shape(reader) and isinstance(reader.meta.get("val"), Tensor)
    return [reader] if one_result else reader.all_input_nodes


def _has_dynamic_shape(node: fx.Node) -> bool:
    """Whether the shape of the node's result depends on its operands' values."""
    if node.target in _UNTAGGED:
        return True
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    fixed = node.target is aten.index.Tensor or (node.target is aten.one_hot.default and len(node.args) > 1)
    return not fixed


def _index_by_number(graph: fx.GraphModule) -> None:
    """Turns selection by a mask into selection by index, so that the shape depends on the mask only.

    Does the same to repetition by counts, whose shape then depends on the counts only, not on what is repeated.
    """
    for node in graph.graph.find_nodes(op="call_function", target=aten.repeat_interleave.self_Tensor):
        source, counts, dim = (*node.args, None)[:3]
        size = source.meta["val"].numel() if dim is None else source.meta["val"].shape[dim]
        with graph.graph.inserting_before(node):
            if dim is None:
                source, dim = _traced(graph, node, aten.flatten.using_ints, source), 0
            if counts.meta["val"].numel() == 1:  # one count for all
                counts = _traced(graph, node, aten.reshape.default, counts, [1])
                counts = _traced(graph, node, aten.expand.default, counts, [size])
            places = _traced(graph, node, aten.repeat_interleave.Tensor, counts)
        node.target, node.args, node.kwargs = aten.index_select.default, (source, dim, places), {}
    for node in graph.graph.find_nodes(op="call_function", target=aten.masked_select.default):
        shapes = [n.meta["val"].shape for n in node.args]
        shape = list(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
        with graph.graph.inserting_before(node):
            source, mask = (_traced(graph, node, aten.expand.default, n, shape) for n in node.args)
            mask.meta["val"] = node.args[1].meta["val"].expand(shape)
        node.target, node.args = aten.index.Tensor, (source, [mask])
    for node in graph.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        numbers: list[Any] = []
        for index in node.args[1]:
            if index is None or index.meta["val"].dtype not in (torch.bool, torch.uint8):
                numbers.append(index)
                continue
            with graph.graph.inserting_before(node):
                places = _traced(graph, node, aten.nonzero.default, index)
                rank = index.meta["val"].dim()
                numbers += [_traced(graph, node, aten.select.int, places, 1, dim) for dim in range(rank)]
        node.args = (node.args[0], numbers)


def _traced(graph: fx.GraphModule, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = graph.graph.call_function(target, args)
    node.meta |= {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    return node


def _fold(graph: fx.GraphModule, tensors: list[Tensor]) -> None:
    """Replaces tensors of dynamic shape by their values in this call, which the guards protect."""
    recorder = _Recorder(graph)
    recorder.run(*tensors)
    for index, (node, value) in enumerate(recorder.values.items()):
        parts = [(node, value)] if isinstance(value, Tensor) else [(user, value[user.args[1]]) for user in node.users]
        for place, (part, tensor) in enumerate(parts):
            name = f"given_{index}_{place}"
            graph.register_buffer(name, tensor)
            with graph.graph.inserting_before(node):
                part.replace_all_uses_with(graph.graph.get_attr(name))
    for node in reversed(graph.graph.nodes):
        if node.target in _READS:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the tensors of dynamic shape."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if _has_dynamic_shape(n):
            self.values[n] = result
        return result


class _Replay(nn.Module):
    """Runs the trace node by node, so that tracing it again keeps each node's module and source line."""

    def __init__(self, graph: fx.GraphModule, output_spec: Any) -> None:
        super().__init__()
        setattr(self, _TRACE, graph)
        self._output_spec = output_spec

    def forward(self, **arguments: Any) -> Any:
        tensors = [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]
        with preserve_node_meta():
            return tree_unflatten(fx.Interpreter(getattr(self, _TRACE)).run(*tensors), self._output_spec)


def failing_path(error: BaseException) -> str:
    """The path of the innermost module that the failing node comes from; "" where no node failed."""
    node = failing_node(error)
    return "" if node is None else module_path(node)


def failing_node(error: BaseException) -> fx.Node | None:
    """The node that raised ``error`` when it ran, which says where in the model that was."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("n") if frame.f_code.co_name == "run_node" else None
        found = node if isinstance(node, fx.Node) and source_line(node) else found
    return found
