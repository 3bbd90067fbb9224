"""FLOPs of each node, at two per multiply-add; elementwise operators count as zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from duca_compile.core.fx_utils import op_name
from duca_compile.frontend.opaque import opaque, site_flops

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


def node_flops(graph: fx.Graph) -> dict[str, int]:
    """FLOPs of every node by name, from torch's own counter on meta tensors of the captured shapes."""
    known: dict[str, int] = {}
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.target is opaque:
            found[node.name] = site_flops(node)
            continue
        if op_name(node) not in _COUNTED:
            found[node.name] = 0
            continue
        args, kwargs = tree_map_only(fx.Node, _as_meta, (node.args, node.kwargs))
        key = f"{node.target}{tree_map_only(torch.Tensor, lambda t: (t.shape, t.dtype), (args, kwargs))}"
        if key not in known:
            known[key] = _count(node.target, args, kwargs)
        found[node.name] = known[key]
    return found


def _as_meta(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _count(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        target(*args, **kwargs)
    return int(counter.get_total_flops())
