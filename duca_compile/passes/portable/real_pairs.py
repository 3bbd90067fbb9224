"""Computes with pairs of real numbers instead of complex ones, which rotary embeddings have and engines lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from duca_compile.core.fx_utils import op_name
from duca_compile.frontend.operators import argument
from duca_compile.passes.base import Draft, PortablePass

aten = torch.ops.aten

_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class RealPairs(PortablePass):
    """Replaces each real value that comes from a chain of complex ones by the same from pairs.

    A pair lies along one more dimension, the last, as in ``view_as_real``. Kernels may round the two products within a
    complex product once or twice, so the last bit can differ from theirs. A chain with an operator that has no rule
    here stays complex from there on.
    """

    def apply(self, draft: Draft) -> bool:
        pairs = _Pairs(draft.graph)
        changed = False
        for node in list(draft.graph.nodes):
            changed |= pairs.follow(node)
        pairs.erase_unread()
        return changed


@dataclass
class _Pairs:
    """The pairs of a graph's complex values."""

    graph: fx.Graph
    known: dict[fx.Node, fx.Node] = field(default_factory=dict)
    added: list[fx.Node] = field(default_factory=list)

    def follow(self, node: fx.Node) -> bool:
        """Adds the pair of a complex value, or replaces a real one; returns whether it replaced it."""
        name = op_name(node)
        with self.graph.inserting_before(node):
            if _is_complex(node):
                pair = _COMPLEX[name](_At(self, node)) if name in _COMPLEX else None
                if pair is not None:
                    self.known[node] = pair
            elif name in _REAL and node.args[0] in self.known:
                node.replace_all_uses_with(_REAL[name](_At(self, node)))
                self.graph.erase_node(node)
                return True
        return False

    def erase_unread(self) -> None:
        for node in reversed(self.added):
            if not node.users:
                self.graph.erase_node(node)


@dataclass(frozen=True)
class _At:
    """Adds nodes where ``node`` is, and from its line."""

    pairs: _Pairs
    node: fx.Node

    @property
    def rank(self) -> int:
        """The number of dimensions of the first operand, or of the first in it, without that of pairs."""
        first = self.node.args[0]
        source: Any = first if isinstance(first, fx.Node) else first[0]  # type: ignore[index]
        rank: int = source.meta["val"].dim()
        return rank

    def pair(self, value: Any) -> fx.Node:
        if value not in self.pairs.known:
            self.pairs.known[value] = self.add(aten.view_as_real.default, value)
        return self.pairs.known[value]

    def part(self, value: Any, which: int) -> fx.Node:
        """The real (0) or the imaginary part (1)."""
        return self.add(aten.select.int, self.pair(value), -1, which)

    def stack(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        return self.add(aten.stack.default, [real, imaginary], -1)

    def add(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.pairs.graph.call_function(target, args)
        node.meta = {key: self.node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.node.meta}
        node.meta["val"] = target(*map_arg(args, lambda operand: operand.meta["val"]))
        self.pairs.added.append(node)
        return node


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex())


# ---- complex values


def _view_as_complex(at: _At) -> fx.Node:
    (pair,) = at.node.args
    return pair  # type: ignore[return-value]


def _polar(at: _At) -> fx.Node:
    length, angle = at.node.args
    parts = [at.add(target, angle) for target in (aten.cos.default, aten.sin.default)]
    return at.stack(*[at.add(aten.mul.Tensor, length, part) for part in parts])


def _of_parts(at: _At) -> fx.Node:
    real, imaginary = at.node.args
    return at.add(aten.stack.default, [real, imaginary], -1)


def _product(at: _At) -> fx.Node | None:
    one, other = at.node.args
    if not (_is_complex(one) and _is_complex(other)):
        return _scaled(at) if _is_complex(one) else _scaled(at, *reversed(at.node.args))
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return None
    (a, b), (c, d) = ([at.part(value, which) for which in (0, 1)] for value in (one, other))

    def times(x: fx.Node, y: fx.Node) -> fx.Node:
        return at.add(aten.mul.Tensor, x, y)

    real = at.add(aten.sub.Tensor, times(a, c), times(b, d))
    return at.stack(real, at.add(aten.add.Tensor, times(a, d), times(b, c)))


def _scaled(at: _At, value: Any = None, by: Any = None) -> fx.Node | None:
    """A complex value times or divided by a real one."""
    value, by = (value, by) if value is not None else at.node.args
    if _is_complex(by) or not isinstance(value, fx.Node):
        return None
    if isinstance(by, fx.Node):
        by = at.add(aten.unsqueeze.default, by, -1)
    return at.add(at.node.target, at.pair(value), by)  # type: ignore[arg-type]


def _sum(at: _At) -> fx.Node | None:
    one, other = at.node.args
    if at.node.kwargs or not all(isinstance(each, fx.Node) and _is_complex(each) for each in (one, other)):
        return None
    return at.add(at.node.target, at.pair(one), at.pair(other))  # type: ignore[arg-type]


def _conjugate(at: _At) -> fx.Node:
    (value,) = at.node.args
    return at.stack(at.part(value, 0), at.add(aten.neg.default, at.part(value, 1)))


def _converted(at: _At) -> fx.Node | None:
    """A cast from one complex type to another."""
    value, dtype = at.node.args[0], at.node.kwargs.get("dtype", at.node.args[1] if len(at.node.args) > 1 else None)
    if not _is_complex(value) or dtype not in _PARTS:
        return None
    return at.add(aten.to.dtype, at.pair(value), _PARTS[dtype])  # type: ignore[index]


def _same(at: _At) -> fx.Node:
    return at.pair(at.node.args[0])


def _moved(*dims: int, more: int = 0) -> Callable[[_At], fx.Node]:
    """The rule of an operator that moves values.

    Args:
        dims: the positions of its arguments that are dimensions. They are counted from the front, since pairs have one
            more at the back.
        more: how many dimensions more its result has.
    """

    def rule(at: _At) -> fx.Node:
        args: list[Any] = list(at.node.args)
        for place in dims:
            if place < len(args):
                args[place] = _from_the_front(args[place], at.rank + more)
        first = args[0]
        args[0] = at.pair(first) if isinstance(first, fx.Node) else [at.pair(each) for each in first]
        return at.add(at.node.target, *args)  # type: ignore[arg-type]

    return rule


def _from_the_front(dims: Any, rank: int) -> Any:
    return [dim % rank for dim in dims] if isinstance(dims, list | tuple) else dims % rank


def _sized(last: int) -> Callable[[_At], fx.Node]:
    """The rule of an operator whose last argument lists sizes; ``last`` is what it lists for the dimension of pairs."""

    def rule(at: _At) -> fx.Node:
        value, sizes = at.node.args
        return at.add(at.node.target, at.pair(value), [*sizes, last])  # type: ignore[arg-type, misc]

    return rule


def _permuted(at: _At) -> fx.Node:
    value, dims = at.node.args
    return at.add(aten.permute.default, at.pair(value), [*_from_the_front(dims, at.rank), at.rank])


def _flattened(at: _At) -> fx.Node:
    value, first, last = at.node.args[0], argument(at.node, "start_dim"), argument(at.node, "end_dim")
    return at.add(aten.flatten.using_ints, at.pair(value), *_from_the_front([first, last], at.rank))


def _gathered(at: _At) -> fx.Node:
    value, dim, index = at.node.args[:3]
    pair = at.pair(value)
    indices = at.add(aten.unsqueeze.default, index, -1)
    both = at.add(aten.expand.default, indices, [*[-1] * at.rank, 2])
    return at.add(aten.gather.default, pair, _from_the_front(dim, at.rank), both)


def _created(at: _At) -> fx.Node:
    """Zeros."""
    value = at.node.meta["val"]
    zeros = at.pairs.graph.call_function(
        at.node.target,  # type: ignore[arg-type]
        ([*at.node.args[0], 2],),  # type: ignore[misc]
        {"dtype": _PARTS[value.dtype], "device": value.device},
    )
    zeros.meta = {**at.node.meta, "val": value.new_zeros((*value.shape, 2), dtype=_PARTS[value.dtype])}
    at.pairs.added.append(zeros)
    return zeros


def _written(at: _At) -> fx.Node | None:
    """What writes its second operand to its first one, or to a part of it along a dimension."""
    value, written, *place = at.node.args
    if not _is_complex(written) or at.node.kwargs:
        return None
    if place and isinstance(place[0], int):
        place[0] = _from_the_front(place[0], at.rank)
    return at.add(at.node.target, at.pair(value), at.pair(written), *place)  # type: ignore[arg-type]


def _written_to_indices(at: _At) -> fx.Node | None:
    value, indices, written, *more = at.node.args
    if not _is_complex(written):
        return None
    return at.add(at.node.target, at.pair(value), indices, at.pair(written), *more)  # type: ignore[arg-type]


def _chosen(at: _At) -> fx.Node | None:
    mask, one, other = at.node.args
    if not all(isinstance(each, fx.Node) and _is_complex(each) for each in (one, other)):
        return None
    return at.add(aten.where.self, at.add(aten.unsqueeze.default, mask, -1), at.pair(one), at.pair(other))


def _padded_sequences(at: _At) -> fx.Node | None:
    if at.node.kwargs or argument(at.node, "padding_value"):
        return None
    return _moved()(at)


_COMPLEX: dict[str, Callable[[_At], fx.Node | None]] = {
    "view_as_complex": _view_as_complex,
    "polar": _polar,
    "complex": _of_parts,
    "mul": _product,
    "div": _scaled,
    "add": _sum,
    "sub": _sum,
    "neg": _moved(),
    "conj": _conjugate,
    "_conj": _conjugate,
    "conj_physical": _conjugate,
    "resolve_conj": _same,
    "to": _converted,
    "_to_copy": _converted,
    "clone": _same,
    "contiguous": _same,
    "alias": _same,
    "detach": _same,
    "lift_fresh_copy": _same,
    "getitem": _moved(),
    "index": _moved(),
    "cat": _moved(1),
    "chunk": _moved(2),
    "copy": _written,
    "flatten": _flattened,
    "gather": _gathered,
    "index_put": _written_to_indices,
    "select_scatter": _written,
    "slice_scatter": _written,
    "where": _chosen,
    "zeros": _created,
    "index_select": _moved(1),
    "select": _moved(1),
    "slice": _moved(1),
    "split": _moved(2),
    "split_with_sizes": _moved(2),
    "squeeze": _moved(1),
    "stack": _moved(1, more=1),
    "t": lambda at: at.add(aten.transpose.int, at.pair(at.node.args[0]), 0, 1),
    "transpose": _moved(1, 2),
    "unbind": _moved(1),
    "unsqueeze": _moved(1, more=1),
    "expand": _sized(-1),
    "pad_sequence": _padded_sequences,
    "permute": _permuted,
    "repeat": _sized(1),
    "reshape": _sized(2),
    "view": _sized(2),
}

# ---- real values


def _part(which: int) -> Callable[[_At], fx.Node]:
    return lambda at: at.part(at.node.args[0], which)


def _length(at: _At) -> fx.Node:
    parts: Sequence[fx.Node] = [at.part(at.node.args[0], which) for which in (0, 1)]
    return at.add(aten.hypot.default, *parts)


_REAL: dict[str, Callable[[_At], fx.Node]] = {
    "view_as_real": _same,
    "real": _part(0),
    "imag": _part(1),
    "abs": _length,
}
