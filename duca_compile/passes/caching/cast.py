"""Keeps caches in a narrower dtype than the features that they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.core.fx_utils import port_of
from duca_compile.core.ports import FEATURES
from duca_compile.passes.base import CachingPass, VariantDraft, returned

aten = torch.ops.aten


@dataclass(frozen=True)
class CastCaches(CachingPass):
    """Cached features are read, written in place and returned in the draft's ``cache_dtype``.

    Everything else keeps its dtype, including the numbers that decisions and forecasts are computed from.
    """

    def apply(self, draft: VariantDraft) -> bool:
        dtype = draft.cache_dtype
        if dtype is None:
            return False
        features = [n for n in draft.graph.find_nodes(op="placeholder") if port_of(n).kind in FEATURES]
        wide = [node for node in features if _is_wider(node, dtype)]
        for node in wide:
            _read(draft.graph, node, dtype)
        return _return(draft, dtype) or bool(wide)


def _is_wider(node: fx.Node, dtype: torch.dtype) -> bool:
    held = node.meta["val"].dtype
    return bool(held.is_floating_point and held.itemsize > dtype.itemsize)


def _read(graph: fx.Graph, cache: fx.Node, dtype: torch.dtype) -> None:
    feature_dtype = cache.meta["val"].dtype
    writes = [user for user in cache.users if user.target is aten.index_put_.default and user.args[0] is cache]
    for write in writes:
        (tokens,) = [arg for arg in write.args[2:3] if isinstance(arg, fx.Node)]
        with graph.inserting_before(write):
            write.update_arg(2, graph.call_function(aten._to_copy.default, (tokens,), {"dtype": dtype}))
        _widen(graph, write, feature_dtype, keep={graph.output_node()})
        write.meta["val"] = write.meta["val"].to(dtype)
    _widen(graph, cache, feature_dtype, keep=set(writes))
    cache.meta["val"] = cache.meta["val"].to(dtype)


def _widen(graph: fx.Graph, node: fx.Node, feature_dtype: torch.dtype, keep: set[fx.Node]) -> None:
    """Casts ``node`` back to ``feature_dtype`` for all of its users but ``keep``."""
    readers = [user for user in node.users if user not in keep]
    if not readers:
        return
    with graph.inserting_after(node):
        widened = graph.call_function(aten._to_copy.default, (node,), {"dtype": feature_dtype})
    widened.meta["val"] = node.meta["val"]
    for reader in readers:
        reader.replace_input_with(node, widened)


def _return(draft: VariantDraft, dtype: torch.dtype) -> bool:
    output = draft.graph.output_node()
    results = returned(draft.graph)
    narrow = list(results)
    for place, (port, node) in enumerate(zip(draft.results, results, strict=True)):
        if port.kind in FEATURES and _is_wider(node, dtype):
            with draft.graph.inserting_before(output):
                narrow[place] = draft.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
            narrow[place].meta["val"] = node.meta["val"].to(dtype)
    output.args = (tuple(narrow),)
    return narrow != list(results)
