"""What a residual stream passes through from sum to sum: casts, scales, norms, and sums with other values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import takewhile

from torch import fx

from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import Variance

PASSTHROUGH = {"to", "_to_copy", "clone", "contiguous", "dropout", "alias", "detach", "clamp", "clip"}
SUMS = {"add", "sub", "rsub", "lerp", "addcmul", "addcdiv", "where"}
NORMS = {"layer_norm", "rms_norm"}
_FIRST = PASSTHROUGH | NORMS | {"neg", "type_as", "masked_fill", "nan_to_num", "div"}


@dataclass(frozen=True)
class Trails:
    """Follows streams back through a graph, whose nodes have these places and variances."""

    order: Mapping[fx.Node, int]
    variance: Mapping[str, Variance]

    def back(self, node: fx.Node, onwards: Mapping[fx.Node, fx.Node] | None = None) -> Iterator[fx.Node]:
        """``node`` and the earlier values that it carries on, latest first.

        ``onwards`` has the values that known sums carry on; nothing else of these sums is followed.
        """
        known, seen, heap = onwards or {}, {node}, [(-self.order[node], node)]
        while heap:
            _, current = heappop(heap)
            yield current
            for each in [known[current]] if current in known else self.carried_from(current):
                if each not in seen:
                    seen.add(each)
                    heappush(heap, (-self.order[each], each))

    def carries(self, node: fx.Node, earlier: fx.Node) -> bool:
        """Whether ``node`` carries on the value ``earlier``."""
        first = self.order[earlier]
        return earlier in takewhile(lambda each: self.order[each] >= first, self.back(node))

    def origin(self, node: fx.Node, sums: Collection[fx.Node]) -> fx.Node:
        """The nearest of ``sums`` that ``node`` carries on; if there is none, the earliest value that it carries on."""
        current = node
        for current in self.back(node):
            if current in sums:
                break
        return current

    def carried_from(self, node: fx.Node) -> list[fx.Node]:
        """The operands, of the same shape, whose tokens ``node`` carries on."""
        name, shape = op_name(node), value_shape(node)
        if name in SUMS:
            operands = self.summands(node)
        elif name in _FIRST:
            operands = [each for each in node.args[:1] if isinstance(each, fx.Node)]
        else:
            operands = node.all_input_nodes if name == "mul" else []
        kind = self.variance[node.name]
        carried = [each for each in operands if value_shape(each) == shape and self.variance[each.name] is kind]
        return [] if name == "mul" and len(carried) > 1 else carried

    def summands(self, node: fx.Node) -> list[fx.Node]:
        """The values that a sum adds, weighs or chooses from, without factors and masks; none for other operators.

        For ``addcmul``, x + gate * f(x), these are the stream and the gated value.
        """
        name, operands = op_name(node), [each for each in node.args if isinstance(each, fx.Node)]
        if name in ("add", "sub", "rsub"):
            return node.all_input_nodes
        if name in ("lerp", "addcdiv"):
            return operands[:2]
        if name == "where":
            return operands[1:]
        if name != "addcmul":
            return []
        stream, *factors = operands
        gated = [factor for factor in factors if self.variance[factor.name] is Variance.LATENT]
        return [stream, *gated] if len(factors) == 2 else []
