"""Checks whether a trace computes what the model computes, and finds the submodule in which it does not.

A kernel that reads or writes memory without torch's knowledge leaves too little in a trace. So a graph that is not
simply torch.export's of PyTorch's own operators is run once on the values that it was traced with.
"""

from __future__ import annotations

import hashlib
import logging
import math
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from duca_compile.core.fx_utils import module_path, to_module
from duca_compile.core.ir import CapturedGraph
from duca_compile.frontend import casts

log = logging.getLogger("duca_compile")
aten = torch.ops.aten

COMPILED_TOLERANCE = 0.05  # relative distance beyond which compiled code computes something else, in any dtype
MAX_ULPS = 16.0  # units in the last place by which results may differ where an operator is not deterministic
_UNINITIALIZED = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip


def has_foreign_operators(graph: fx.Graph) -> bool:
    """Whether any operator in the graph is not PyTorch's own."""
    operators = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return any(each.namespace not in ("aten", "prims") for each in operators)


def copy_containers(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in new lists and dictionaries, since forward may remove items from those it is given."""
    copied: dict[str, Any] = tree_map(lambda leaf: leaf, arguments)
    return copied


def hookable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, except those that accept no hooks, or that run otherwise with hooks."""
    without: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            without.append(f"{path}.")
        if not isinstance(module, torch.jit.ScriptModule) and not f"{path}.".startswith(tuple(without)):
            yield path, module


class ModelRun(Protocol):
    """A call of the model that was made, with the leaves of its results."""

    results: list[Any]

    def rewind(self) -> None:
        """Undoes what it changed on the model, so that the next call repeats it."""


def find_mismatch(
    model: nn.Module,
    arguments: dict[str, Any],
    captured: CapturedGraph,
    run: ModelRun,
    operators: Collection[str] = (),
    max_ulps: float = 0.0,
) -> str | None:
    """The path of the smallest submodule, none of ``operators``, whose results the graph does not give.

    That is "" for the model itself, and None where the graph gives the results of ``run``, the model's own, within
    ``max_ulps`` units in the last place.
    """
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return None
    run.rewind()
    try:
        if ulp_distance(_Runner(captured).results(tensors), run.results) <= max_ulps:
            return None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # some traces are valid only where they were made, such as inside of vmap
        if (node := _failing(error)) is None:
            raise
        return module_path(node)
    run.rewind()
    results, calls = _recorded_calls(model, arguments)
    if ulp_distance(results, run.results) > max_ulps:
        log.warning(
            "%s gives other results each time it is called, so its trace could not be compared with it: the cause is "
            "not followed, unless it is a random operator of PyTorch",
            type(model).__name__,
        )
        return None
    digests: set[bytes] = set()
    run.rewind()
    _Runner(captured, digests).results(tensors)
    return _first_wrong([call for call in calls if call.path not in operators], digests, captured)


def _first_wrong(calls: list[_RecordedCall], digests: set[bytes], captured: CapturedGraph) -> str:
    """The path of the innermost submodule whose results are not among the graph's values, given by ``digests``."""
    traced = {str(path) for n in captured.graph.nodes for path, _ in (n.meta.get("nn_module_stack") or {}).values()}
    wrong = [call for call in calls if not call.results <= digests]
    wrong.sort(key=lambda call: call.path not in traced)  # results of a module in no trace may be unused
    path = next((call.path for call in wrong if call.arguments <= digests), wrong[0].path if wrong else "")
    while inner := next((call.path for call in wrong if call.path.startswith(f"{path}.")), ""):
        path = inner  # its arguments may not be in the graph, if its results are unused
    return path


def ulp_distance(some: Sequence[Any], others: Sequence[Any]) -> float:
    """The largest relative distance between results, in units in the last place; 0.0 where they are equal."""
    return max((_ulps(one, other) for one, other in zip(some, others, strict=True)), default=0.0)


def relative_distance(some: Sequence[Any], others: Sequence[Any]) -> float:
    """The largest norm of a difference between results over the norm of the first; 0.0 where they are equal."""
    return max((_relative(one, other) for one, other in zip(some, others, strict=True)), default=0.0)


def _ulps(one: Any, other: Any) -> float:
    distance = _relative(one, other)
    return distance / torch.finfo(one.dtype).eps if 0 < distance < math.inf else distance


def _relative(one: Any, other: Any) -> float:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return 0.0 if type(one) is type(other) and (one is other or one == other or one != one) else math.inf
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if one.is_meta or torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all()):
        return 0.0
    if not one.is_floating_point():
        return math.inf
    distance = (one.double() - other.double()).norm() / one.double().norm()
    return float(distance) if bool(distance.isfinite()) else math.inf


def _failing(error: BaseException) -> fx.Node | None:
    """The node that raised the error when it ran."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "run_node"]
    return next((node for frame in frames if isinstance(node := frame.f_locals.get("n"), fx.Node)), None)


class _Runner(fx.Interpreter):
    """Runs a graph, fills uninitialized memory, which may hold the right values by chance, and collects digests."""

    def __init__(self, captured: CapturedGraph, digests: set[bytes] | None = None) -> None:
        super().__init__(to_module(captured, captured.graph))
        self._captured, self._digests = captured, digests

    def results(self, tensors: list[Tensor]) -> list[Any]:
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(tensors)), casts.without_autocast(self._captured):
            return tree_leaves(self._captured.output.rebuild(self.run(*tensors)))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target in _UNINITIALIZED:
            value.fill_(torch.nan if value.is_floating_point() or value.is_complex() else 1)
        if self._digests is not None:
            self._digests.update(_digests(value))
        return value


class _RecordedCall(NamedTuple):
    """The path of a submodule that was called, and digests of the tensors that it got and returned."""

    path: str
    arguments: set[bytes]
    results: set[bytes]


def _recorded_calls(model: nn.Module, arguments: dict[str, Any]) -> tuple[list[Any], list[_RecordedCall]]:
    """The model's results, and the calls of submodules that are not PyTorch's own, in the order in which they end."""
    calls: list[_RecordedCall] = []
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng(cuda_devices(tensors)):
        for path, module in hookable_modules(model):
            if not path or (type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)):
                continue

            def leave(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                calls.append(_RecordedCall(path, _digests((args, kwargs)), _digests(output)))

            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        return tree_leaves(model(**copy_containers(arguments))), calls


def _digests(value: Any) -> set[bytes]:
    """A hash of each tensor's values."""
    found = set()
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            data = (
                tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
            )
            found.add(hashlib.sha1(data.tobytes() + repr((tensor.dtype, *tensor.shape)).encode()).digest())
    return found


def cuda_devices(tensors: Sequence[Tensor]) -> list[torch.device]:
    """The devices, besides the CPU, whose random numbers a call may draw."""
    return [tensor.device for tensor in tensors if tensor.device.type == "cuda"]
