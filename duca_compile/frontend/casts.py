"""Makes explicit the casts of an autocast that forward sets for a part of itself.

torch.export keeps such a part as a region, whose borders are lost when the graph is flattened. So each operator gets
the casts that apply where it is, and the whole graph runs with autocast turned off.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._higher_order_ops.wrap import wrap_with_autocast
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from duca_compile.core.ir import CapturedGraph
from duca_compile.errors import InternalError
from duca_compile.frontend.operators import argument

aten = torch.ops.aten

_FAKES = logging.getLogger("torch._subclasses.fake_tensor")
_DEVICES = ("cpu", "cuda")
_NOTHING = nullcontext()
Setting = tuple[bool, torch.dtype]  # whether autocast is on, and the type that it casts to
Settings = Mapping[str, Setting]  # by type of device
_CAST = aten._to_copy.default
_REGION = wrap_with_autocast


def ambient() -> Settings:
    """Autocast as the caller has set it."""
    return {each: (torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in _DEVICES}


def off() -> Settings:
    return {device: (False, dtype) for device, (_, dtype) in ambient().items()}


@contextmanager
def autocast(settings: Settings) -> Iterator[None]:
    """Sets autocast while open, also for types of devices that this machine does not have."""
    before = ambient()
    try:
        _set(settings)
        yield
    finally:
        _set(before)


def _set(settings: Settings) -> None:
    for device, (enabled, dtype) in settings.items():
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def without_autocast(captured: CapturedGraph) -> AbstractContextManager[None]:
    """The context that a graph runs in: autocast is turned off if its casts are in the graph."""
    return autocast(off()) if captured.explicit_casts else _NOTHING


def has_regions(module: fx.GraphModule) -> bool:
    """Whether a part of forward sets autocast; False where autocast is off and all these parts turn it off."""
    regions = [
        node
        for each in module.modules()
        if isinstance(each, fx.GraphModule)
        for node in each.graph.find_nodes(op="call_function", target=_REGION)
    ]
    return any(node.args[2] for node in regions) or bool(regions and any(on for on, _ in ambient().values()))


def make_explicit(module: fx.GraphModule, settings: Settings) -> None:
    """Rewrites ``module``, which runs under ``settings``, to compute the same with autocast turned off.

    Every node must have its fake value in ``meta["val"]``.
    """
    for node in list(module.graph.nodes):
        if node.target is _REGION:
            device, dtype, enabled, _, part, *operands = node.args
            body = getattr(module, part.target)
            make_explicit(body, {**settings, device: (enabled, dtype or torch.get_autocast_dtype(device))})
            _inline(module, node, body, operands)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            for part in [n for n in node.all_input_nodes if n.op == "get_attr"]:
                make_explicit(getattr(module, str(part.target)), settings)
        elif isinstance(node.target, torch._ops.OpOverload):
            _cast_operands(module, node, settings)
    module.recompile()


def _cast_operands(module: fx.GraphModule, node: fx.Node, settings: Settings) -> None:
    expected = _Trace.of(node, settings)
    if _runs(node, expected.operators):
        return
    casts = expected.casts

    def cast(operand: fx.Node) -> fx.Node:
        dtype = casts.get(id(operand.meta["val"]))
        if dtype is None:
            return operand
        made = module.graph.call_function(aten.to.dtype, (operand, dtype))
        made.meta = {**operand.meta, "val": operand.meta["val"].to(dtype)}
        return made

    arguments = node.args, node.kwargs
    with module.graph.inserting_before(node), autocast(off()):
        node.args, node.kwargs = tree_map_only(fx.Node, cast, arguments)
    names = [each.name for each in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dtype" in names and argument(node, "dtype") is None and not _runs(node, ([], *expected.operators[1:])):
        node.kwargs = {**node.kwargs, "dtype": expected.dtype}  # autocast passes some operators their result's dtype
    if not _runs(node, ([], *expected.operators[1:])):
        node.args, node.kwargs = arguments
        _decompose(module, node, settings)


def _runs(node: fx.Node, operators: Any) -> bool:
    """Whether the node runs these operators with autocast turned off, under which it may fail for lack of casts."""
    _FAKES.disabled = True  # it would print the failure
    try:
        return bool(_Trace.of(node, off()).operators == operators)
    except RuntimeError:
        return False
    finally:
        _FAKES.disabled = False


def _decompose(module: fx.GraphModule, node: fx.Node, settings: Settings) -> None:
    """Replaces the operator by those that it consists of, since the casts are inside of it."""
    operands = node.all_input_nodes

    def call(*values: Tensor) -> Any:
        by_operand = dict(zip(operands, values, strict=True))
        args, kwargs = tree_map_only(fx.Node, by_operand.__getitem__, (node.args, node.kwargs))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with autocast(settings):
        body = make_fx(call)(*(operand.meta["val"] for operand in operands))
    for each in body.graph.nodes:
        each.meta = {**node.meta, **each.meta}
    _inline(module, node, body, operands)


def _inline(module: fx.GraphModule, node: fx.Node, body: fx.GraphModule, operands: Sequence[Any]) -> None:
    """Replaces ``node``, which calls ``body``, by the nodes of ``body``."""
    graph, mapping = module.graph, dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    for each in body.graph.find_nodes(op="get_attr"):
        name = f"{node.name}_{each.target}"
        setattr(module, name, getattr(body, str(each.target)))
        each.target = name
    with graph.inserting_before(node):
        result = graph.graph_copy(body.graph, mapping)
    for user in list(node.users) if isinstance(result, list | tuple) else ():
        if user.target is not operator.getitem:
            raise InternalError(f"{user.format_node()} uses a sequence as a whole")
        user.replace_all_uses_with(cast(Any, result)[user.args[1]])
        graph.erase_node(user)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    graph.erase_node(node)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that a node runs: casts of its operands, which autocast inserts first, and the rest."""

    def __init__(self, operands: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operands = set(map(id, operands))
        self.casts: dict[int, torch.dtype] = {}
        self.rest: list[Any] = []
        self.dtype: torch.dtype | None = None  # of its result

    @classmethod
    def of(cls, node: fx.Node, settings: Settings) -> _Trace:
        """The trace of ``node`` under ``settings``."""
        args, kwargs = tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        trace = cls(tree_leaves((args, kwargs)))
        with torch.no_grad(), autocast(settings), trace:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        trace.dtype = next((each.dtype for each in tree_leaves(result) if isinstance(each, Tensor)), None)
        return trace

    @property
    def operators(self) -> Any:
        return list(self.casts.values()), self.rest, self.dtype

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _CAST and not self.rest and id(args[0]) in self._operands:
            self.casts[id(args[0])] = result.dtype
        elif func.namespace != "prim":
            self.rest.append((func, *(each.dtype for each in tree_leaves(result) if isinstance(each, Tensor))))
        return result
