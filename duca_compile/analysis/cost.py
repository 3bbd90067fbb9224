"""FLOPs of each node, at two per multiply-add; elementwise operators count as zero.

Operators of other libraries are counted by the formulas that their authors register with torch's own counter
(``torch.utils.flop_counter.register_flop_formula``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from duca_compile.analysis.tokens import observed
from duca_compile.core.fx_utils import op_name, source_line
from duca_compile.errors import first_line
from duca_compile.frontend.opaque import opaque, site_flops
from duca_compile.frontend.operators import is_foreign, operator_call, operator_name, operator_of

# What FLOPs are counted of.
_COUNTED = {
    "_addmm_activation", "_int_mm", "_native_multi_head_attention", "_scaled_mm", "addmm", "baddbmm", "bilinear",
    "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "einsum", "linear", "matmul", "mm", "scaled_dot_product_attention",
}  # fmt: skip


def _int_mm_flops(left: tuple[int, int], right: tuple[int, int], out_shape: tuple[int, int]) -> int:
    return 2 * left[0] * left[1] * right[1]


def _addmm_activation_flops(
    bias: tuple[int], left: tuple[int, int], right: tuple[int, int], *_: Any, out_shape: tuple[int, int], **__: Any
) -> int:
    return _int_mm_flops(left, right, out_shape)


def _self_attention_flops(query: tuple[int, int, int], *_: Any, out_shape: Any, **__: Any) -> int:
    """Four projections, and two products of all tokens with all."""
    batch, tokens, channels = query
    return batch * (8 * tokens * channels**2 + 4 * tokens**2 * channels)


_UNKNOWN_TO_TORCH = {
    torch.ops.aten._int_mm: _int_mm_flops,
    torch.ops.aten._addmm_activation: _addmm_activation_flops,
    torch.ops.aten._native_multi_head_attention: _self_attention_flops,
}


def node_flops(graph: fx.Graph) -> tuple[dict[str, int], dict[fx.Node, str]]:
    """FLOPs of every node by name, from torch's own counter on meta tensors of the captured shapes.

    Returns:
        The FLOPs, and the nodes whose FLOPs are unknown and count as zero, each with the reason.
    """
    known: dict[str, int] = {}
    found: dict[str, int] = {}
    unknown: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.target is opaque:
            found[node.name] = site_flops(node)
        elif is_foreign(node):
            found[node.name] = _by_formula(node, unknown)
        elif op_name(node) not in _COUNTED:
            found[node.name] = 0
        else:
            args, kwargs = tree_map_only(fx.Node, _as_meta, (node.args, node.kwargs))
            key = f"{node.target}{tree_map_only(torch.Tensor, lambda t: (t.shape, t.dtype), (args, kwargs))}"
            if key not in known:
                known[key] = _count(node.target, args, kwargs)
            found[node.name] = known[key]
    return found, unknown


def uncounted_notes(unknown: dict[fx.Node, str]) -> tuple[str, ...]:
    """What to say of nodes whose FLOPs are unknown: one note for each operator and reason."""
    alike: dict[tuple[str, str], list[fx.Node]] = {}
    for node, reason in unknown.items():
        alike.setdefault((operator_name(node), reason), []).append(node)
    return tuple(
        f"FLOPs of {name} are unknown and count as none ({len(nodes)} calls, the first at {source_line(nodes[0])}): "
        f"{reason}"
        for (name, reason), nodes in alike.items()
    )


def _by_formula(node: fx.Node, unknown: dict[fx.Node, str]) -> int:
    """The FLOPs that the registered formula gives; 0 if there is none, or if it fails, which is noted."""
    operator = operator_of(node)
    formula: Callable[..., int] | None = None if operator is None else flop_registry.get(operator.overloadpacket)
    if formula is None:
        behaviour = observed(node)
        if behaviour is not None and not any(None in links for links in behaviour.links.values()):
            return 0  # elementwise
        path = operator_name(node).replace("::", ".")
        unknown[node] = f"register a formula, @torch.utils.flop_counter.register_flop_formula(torch.ops.{path})"
        return 0
    args, kwargs = tree_map_only(fx.Node, _as_meta, operator_call(node))
    try:
        return int(formula(*args, **kwargs, out_val=node.meta["val"]))
    except Exception as error:  # whatever its author's code raises
        unknown[node] = f"its formula fails ({first_line(error)})"
        return 0


def _as_meta(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _count(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        target(*args, **kwargs)
    return int(counter.get_total_flops())
