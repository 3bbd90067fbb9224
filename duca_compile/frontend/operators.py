"""What an operator's schema says: arguments by name, and whether it draws random numbers. Also casts of streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from duca_compile.core.fx_utils import op_name
from duca_compile.frontend.opaque import opaque, site_of

_CASTS = {"to", "_to_copy", "type_as"}


def argument(node: fx.Node, name: str) -> Any:
    """The argument called ``name`` in the operator's schema, however it was passed; None where the schema has none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for place, each in enumerate(node.target._schema.arguments):
        if each.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, each.default_value)
    return None


def operator_of(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that a node calls, also where its writes were made results; None if it calls none."""
    target = node.args[0] if isinstance(node.target, torch._ops.HigherOrderOperator) and node.args else node.target
    return target if isinstance(target, torch._ops.OpOverload) else None


def is_foreign(node: fx.Node) -> bool:
    """Whether a node calls an operator of another library."""
    operator = operator_of(node)
    return operator is not None and operator.namespace not in ("aten", "prims", "duca_compile")


def operator_call(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node's operator, by position and by name."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.args, dict(node.kwargs)
    bases: Any = node.kwargs.get("_all_bases", ())
    operator, given = operator_of(node), dict(node.kwargs)
    names = [] if operator is None else [each.name for each in operator._schema.arguments]
    written = {name: bases[place] for name in names if isinstance(place := given.get(f"_{name}_base_index"), int)}
    return (), {name: given[name] for name in names if name in given} | written


def operator_name(node: fx.Node) -> str:
    """The operator's name, with its namespace where it is not PyTorch's own."""
    operator = operator_of(node)
    if operator is None or not is_foreign(node):
        return op_name(node)
    return f"{operator.namespace}::{operator.overloadpacket.__name__}"


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers; attention without dropout and dropout in eval mode do not.

    An opaque submodule with a state of its own counts as well, since it too must run each time.
    """
    if node.target is opaque:
        return site_of(node).runs_each_step
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return argument(node, "dropout_p") != 0 and argument(node, "train") is not False


def carried_value(node: fx.Node) -> fx.Node:
    """The value of a stream in the dtype in which the model carries it: some models widen it for each addition.

    That is the value before it was widened, or the one that its only reader narrows it to. Either is what the model
    continues with, bit for bit.
    """
    if _width(node) > _width(source := _cast_from(node)) > 0:
        return source
    readers = list(node.users)
    narrowed = len(readers) == 1 and _cast_from(readers[0]) is node and 0 < _width(readers[0]) < _width(node)
    return readers[0] if narrowed else node


def _cast_from(node: fx.Node) -> fx.Node:
    """The operand of a cast; for any other node, the node itself."""
    return node.all_input_nodes[0] if op_name(node) in _CASTS and node.all_input_nodes else node


def _width(node: fx.Node) -> int:
    """Bytes of each element; 0 where the node yields no floating-point tensor."""
    value = node.meta.get("val")
    return value.element_size() if isinstance(value, torch.Tensor) and value.is_floating_point() else 0
