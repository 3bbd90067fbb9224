"""Inductor, the compiler of torch.compile, as a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from duca_compile.backends.base import CompilingBackend, Lifted
from duca_compile.backends.inductor.private import compile_graph, lacks_compiler


class InductorBackend(CompilingBackend):
    """Inductor, with one graph for each variant; other token counts do not recompile."""

    name = "inductor"
    label = "Inductor"
    advice = "Install a C++ compiler (Debian: apt-get install g++) or set CXX, or ask for backend='eager'."

    def makes_unusable(self, error: Exception) -> bool:
        """Whether no working C++ compiler is installed."""
        return lacks_compiler(error)

    def lower(self, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        return compile_graph(lifted, weights, tensors)
