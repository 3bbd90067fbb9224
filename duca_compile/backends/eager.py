"""The reference that other backends are held to: the graph as it is."""

from __future__ import annotations

from duca_compile.core.variants import Variant, VariantFunction


class EagerBackend:
    """Runs the graph operator by operator: the reference that other backends are held to."""

    name = "eager"
    exact = True

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        del cuts
        return variant.module.forward
