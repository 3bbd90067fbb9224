"""Read-only analyses of a captured graph; ``analyze`` runs them all."""

from duca_compile.analysis.facts import analyze

__all__ = ["analyze"]
