"""The eager backend, the reference for all others."""

from __future__ import annotations

from duca_compile.core.variants import Variant, VariantFunction


class EagerBackend:
    """Runs the graph operator by operator, with the model's own results in full steps."""

    name = "eager"
    exact = True

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        del cuts
        return variant.module.forward
