"""Whether a trace computes what the model computes, and if not, in which submodule it does not.

A kernel that reads or writes memory behind torch's back leaves too little in a trace. So a graph that is more than
torch.export's of PyTorch's own operators is run once on the values that it was traced with.
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

COMPILED = 0.05  # relative distance of results by which compiled code is another computation, in any type
ROUNDING = 16.0  # units in the last place by which results differ where an operator is not deterministic
_UNINITIALIZED = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip


def has_foreign_operators(graph: fx.Graph) -> bool:
    """Whether operators are among its nodes that are not PyTorch's own."""
    operators = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return any(each.namespace not in ("aten", "prims") for each in operators)


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in lists and dictionaries of their own: forward may take things out of these."""
    found: dict[str, Any] = tree_map(lambda leaf: leaf, arguments)
    return found


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, but for those that take no hooks."""
    return ((path, module) for path, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule))


class Ran(Protocol):
    """A call of the model that was run: the leaves of its results."""

    results: list[Any]

    def again(self) -> None:
        """Puts back what it changed on the model, so that the next call is like it."""


def differs(
    model: nn.Module,
    arguments: dict[str, Any],
    captured: CapturedGraph,
    ran: Ran,
    operators: Collection[str] = (),
    rounding: float = 0.0,
) -> str | None:
    """None where the graph gives the model's own results, those that it ``ran`` to, bit for bit.

    With ``rounding``, results may be so many units in the last place apart.

    Else the path of the smallest submodule, none of ``operators``, whose results it does not give; "" where that is the
    model itself.
    """
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return None
    ran.again()
    try:
        if apart(_Runner(captured).results(tensors), ran.results) <= rounding:
            return None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what was traced holds nowhere else, such as the inside of a function that vmap runs
        if (node := _failing(error)) is None:
            raise
        return module_path(node)
    ran.again()
    again, calls = _called(model, arguments)
    if apart(again, ran.results) > rounding:
        log.warning(
            "%s gives other results each time it is called, so its trace could not be compared with it: what makes the "
            "difference is not followed, unless it is a random operator of PyTorch",
            type(model).__name__,
        )
        return None
    seen: set[bytes] = set()
    ran.again()
    _Runner(captured, seen).results(tensors)
    traced = {str(path) for n in captured.graph.nodes for path, _ in (n.meta.get("nn_module_stack") or {}).values()}
    wrong = [each for each in calls if not each.results <= seen and each.path not in operators]
    wrong.sort(key=lambda each: each.path not in traced)  # what is in no trace may be idle
    path = next((each.path for each in wrong if each.given <= seen), wrong[0].path if wrong else "")
    while inner := next((each.path for each in wrong if each.path.startswith(f"{path}.")), ""):
        path = inner  # what it is given need not be in the graph, where nothing comes of it
    return path


def apart(some: Sequence[Any], others: Sequence[Any]) -> float:
    """How far results are apart, in units in the last place of the largest; 0.0 where they are equal."""
    return max((_distance(one, other) for one, other in zip(some, others, strict=True)), default=0.0)


def relative(some: Sequence[Any], others: Sequence[Any]) -> float:
    """The same by the norm of the difference over the norm; 0.0 where they are equal."""
    return max((_relative(one, other) for one, other in zip(some, others, strict=True)), default=0.0)


def _distance(one: Any, other: Any) -> float:
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
    """The node whose running raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "run_node"]
    return next((node for frame in frames if isinstance(node := frame.f_locals.get("n"), fx.Node)), None)


class _Runner(fx.Interpreter):
    """Runs a graph; memory that nothing was written to is not what it was before by luck. Notes values in ``seen``."""

    def __init__(self, captured: CapturedGraph, seen: set[bytes] | None = None) -> None:
        super().__init__(to_module(captured, captured.graph))
        self._captured, self._seen = captured, seen

    def results(self, tensors: list[Tensor]) -> list[Any]:
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(tensors)), casts.none_for(self._captured):
            return tree_leaves(self._captured.output.rebuild(self.run(*tensors)))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target in _UNINITIALIZED:
            value.fill_(torch.nan if value.is_floating_point() or value.is_complex() else 1)
        if self._seen is not None:
            self._seen.update(_marks(value))
        return value


class _Called(NamedTuple):
    """The tensors that a call of a submodule was given, and those that it returned."""

    path: str
    given: set[bytes]
    results: set[bytes]


def _called(model: nn.Module, arguments: dict[str, Any]) -> tuple[list[Any], list[_Called]]:
    """The model's results, and the calls of submodules that are not PyTorch's own, in the order in which they end."""
    calls: list[_Called] = []
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng(cuda_devices(tensors)):
        for path, module in hookable(model):
            if not path or (type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)):
                continue

            def leave(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                calls.append(_Called(path, _marks((args, kwargs)), _marks(output)))

            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        return tree_leaves(model(**copied(arguments))), calls


def _marks(value: Any) -> set[bytes]:
    """What tells each of these tensors from those with other values."""
    found = set()
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            data = (
                tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
            )
            found.add(hashlib.sha1(data.tobytes() + repr((tensor.dtype, *tensor.shape)).encode()).digest())
    return found


def cuda_devices(tensors: Sequence[Tensor]) -> list[torch.device]:
    """The devices whose random numbers a call may draw, besides the CPU's."""
    return [tensor.device for tensor in tensors if tensor.device.type == "cuda"]
