"""What operators of other libraries do with their operands: their values tell, since no rule knows them.

Each is run on random numbers, and again with single entries changed. What changes in its results shows along which
dimensions it mixes, and whether it is an attention.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from duca_compile.analysis.closure import ancestors
from duca_compile.analysis.tokens import tensor_operands
from duca_compile.core.ir import Behaviour, CapturedGraph
from duca_compile.errors import not_none
from duca_compile.frontend.operators import is_foreign

_TRIALS = 4  # entries of each operand that are changed, one after the other
_STEP = 3.0  # by how much
_MEAN_TOLERANCE = 0.05  # of a mean of ones: quantized attention rounds its weights


def observe(captured: CapturedGraph, values: Mapping[str, Tensor]) -> None:
    """Notes what the values of each operator of another library show of it, where graph analyses will look for it.

    ``values`` are the call's tensors by name; of those, the operators are given whole numbers and truth values alone.
    An operator that fails on random numbers, or that gives others each time, is left unknown.
    """
    nodes = [node for node in captured.graph.nodes if is_foreign(node)]
    if not nodes or any(value.is_meta for value in values.values()):
        return
    known: dict[Hashable, Behaviour | None] = {}
    given = _Given(captured, values)
    for node in nodes:
        key = _key(node)
        if key not in known:
            known[key] = _behaviour(node, given)
        if known[key] is not None:
            node.meta["behaviour"] = known[key]


def _is_continuous(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _key(node: fx.Node) -> Hashable:
    """Nodes with the same key behave alike: the same operator, shapes and options, and the same whole numbers."""

    def described(operand: fx.Node) -> Any:
        value = operand.meta["val"]
        kind = tuple(value.shape), value.stride(), value.dtype
        return repr(kind if _is_continuous(value) else (kind, operand.name))

    return repr((node.target, *tree_map_only(fx.Node, described, (node.args, node.kwargs))))


class _Given:
    """The values of a graph for one call, each computed when it is first needed."""

    def __init__(self, captured: CapturedGraph, values: Mapping[str, Tensor]) -> None:
        self._captured = captured
        self._known: dict[fx.Node, Any] = {}
        for node in captured.graph.find_nodes(op="placeholder"):
            self._known[node] = values[node.name]

    def __getitem__(self, node: fx.Node) -> Any:
        needed = {node, *ancestors(node)} - self._known.keys()
        for each in self._captured.graph.nodes:
            if each in needed:
                self._known[each] = self._run(each)
        return self._known[node]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._captured.attributes[str(node.target)]
        args, kwargs = tree_map_only(fx.Node, self._known.__getitem__, (node.args, node.kwargs))
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _behaviour(node: fx.Node, given: _Given) -> Behaviour | None:
    """What one operator does; None if that cannot be told."""
    generator = torch.Generator().manual_seed(0)
    try:
        operands = [_operand(each, given, generator) for each in tensor_operands(node)]
        operator = _Operator(node)
        results = operator(operands)
        again = operator(operands)
        if any(_changed(one, other).any() for one, other in zip(results, again, strict=True) if one is not None):
            return None
        links = dict(_links(operator, operands, results, generator))
        return Behaviour(links, _is_mean(operator, operands, results, links))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever an operator of another library raises
        return None


def _operand(node: fx.Node, given: _Given, generator: torch.Generator) -> Tensor:
    """Random numbers for what is continuous, else the operand's own value."""
    like = node.meta["val"]
    if not _is_continuous(like):
        value: Tensor = given[node]
        return value
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return made.copy_(torch.randn(like.shape, generator=generator))


class _Operator:
    """Runs a node's operator with other tensors; gives its results, and None for those that are no tensors."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor | None]:
        following = iter(operands)
        args, kwargs = tree_map_only(fx.Node, lambda _: next(following).clone(), (self._node.args, self._node.kwargs))
        value = self._node.target(*args, **kwargs)  # type: ignore[operator]
        results = value if isinstance(value, list | tuple) else [value]
        return [result if isinstance(result, Tensor) else None for result in results]


def _changed(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None or other is None:
        return torch.zeros(1, dtype=torch.bool)
    return (one != other) & ~((one != one) & (other != other))


def _links(
    operator: _Operator, operands: list[Tensor], results: list[Tensor | None], generator: torch.Generator
) -> Iterator[tuple[tuple[int, int], tuple[int | None, ...]]]:
    """For each operand and result, where an entry has effect, as in ``Behaviour``."""
    for i, operand in enumerate(operands):
        if not operand.numel() or not (_is_continuous(operand) or operand.dtype is torch.bool):
            continue
        effects: dict[int, list[tuple[tuple[int, ...], list[Tensor]]]] = {}
        for place in _places(operand, generator):
            changed = operator([*operands[:i], _with_change(operand, place), *operands[i + 1 :]])
            for j, (one, other) in enumerate(zip(results, changed, strict=True)):
                at = _changed(one, other).nonzero(as_tuple=True)
                if one is not None and len(at[0]):
                    effects.setdefault(j, []).append((place, list(at)))
        for j, result in enumerate(results):
            if result is not None and j in effects:
                yield (i, j), tuple(_link(dim, operand, result, effects[j]) for dim in range(operand.dim()))
            elif result is not None and result.shape == operand.shape:  # memory to write to
                yield (i, j), tuple(range(operand.dim()))


def _places(operand: Tensor, generator: torch.Generator) -> Iterator[tuple[int, ...]]:
    """Entries to change: the first, the last, and some between."""
    yield (0,) * operand.dim()
    yield tuple(size - 1 for size in operand.shape)
    for _ in range(_TRIALS - 2):
        yield tuple(int(torch.randint(size, (), generator=generator)) for size in operand.shape)


def _with_change(operand: Tensor, place: tuple[int, ...]) -> Tensor:
    changed = operand.clone()
    changed[place] = ~changed[place] if changed.dtype is torch.bool else changed[place] + _STEP
    return changed


def _link(dim: int, operand: Tensor, result: Tensor, effects: list[tuple[tuple[int, ...], list[Tensor]]]) -> int | None:
    """The dimension of the result in which an entry has effect at its own index along ``dim`` alone."""
    size = operand.shape[dim]
    if size == 1:
        return -1
    fits = [
        other
        for other in range(result.dim())
        if result.shape[other] == size and all(bool((at[other] == place[dim]).all()) for place, at in effects)
    ]
    return min(fits, key=lambda other: abs(other - dim), default=None)


def _is_mean(
    operator: _Operator,
    operands: list[Tensor],
    results: list[Tensor | None],
    links: Mapping[tuple[int, int], tuple[int | None, ...]],
) -> bool:
    """Whether the first result is a mean of one operand's entries, or of a part of it, weighted by other entries.

    That is where it is 1, or 0 if all entries are masked, as soon as that operand or part of it is.
    """
    first = min((j for _, j in links), default=0)
    able = [i for i, operand in enumerate(operands) if (i, first) in links and operand.is_floating_point()]
    if not able or _is_one(not_none(results[first], "a result on which operands have effect")):
        return False

    def is_mean_of(i: int, part: Any) -> bool:
        ones = operands[i].clone()
        ones[part] = 1
        return _is_one(not_none(operator([*operands[:i], ones, *operands[i + 1 :]])[first], "the same result"))

    mixed = [i for i in able if None in links[i, first][:-1]]
    return any(is_mean_of(i, part) for i in mixed for part in _parts(operands[i], alone=len(able) == 1))


def _parts(operand: Tensor, alone: bool) -> Iterator[Any]:
    """Indices of what may be the values of an attention: the operand, or a part where it is packed with others."""
    if not alone:
        yield ...
    for dim, size in enumerate(operand.shape):
        if size in (2, 3):  # keys and values, or queries too
            yield from ((slice(None),) * dim + (at,) for at in range(size))


def _is_one(result: Tensor) -> bool:
    near = (result.float() - 1).abs() <= _MEAN_TOLERANCE
    return bool(near.any()) and bool((near | (result == 0)).all())
