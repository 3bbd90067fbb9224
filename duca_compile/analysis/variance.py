"""Which input is the timestep, and how often each value changes in the denoising loop."""

from __future__ import annotations

from math import prod

from torch import fx

from duca_compile.analysis.closure import descendants
from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import Variance
from duca_compile.errors import StructureError, UsageError
from duca_compile.frontend.operators import is_random

_PERIODIC = {"sin", "cos"}


def timestep_input(graph: fx.Graph, names: tuple[str, ...], requested: str | None = None) -> str:
    """The name of the placeholder that carries the timestep.

    It has at most one element per batch row and reaches a sinusoidal embedding. Where several inputs do (a guidance
    scale, for example), one called ``t...`` or ``...time...`` wins, else the first. An input whose name clearly says
    that it is a timestep may have several elements per row, one for each token or frame; so may one of any name, if it
    is the only one that is embedded, and is not called positions or ids.

    Raises:
        UsageError: ``requested`` is not a tensor input.
        StructureError: no input looks like a timestep; the message lists all inputs.
    """
    if requested is not None:
        if requested not in names:
            raise UsageError(f"timestep={requested!r} is not a tensor argument of this call; it has {list(names)}")
        return requested
    placeholders = [n for n in graph.nodes if n.op == "placeholder" and n.name in names]
    small = [n for n in placeholders if _is_per_row(n)]
    periodic = [n for n in small if _reaches(n, _PERIODIC)]
    periodic += [n for n in placeholders if _is_per_token(n) and _is_called_time(n.name) and _reaches(n, _PERIODIC)]
    candidates = periodic or [n for n in small if _sounds_like_time(n.name)]
    if not candidates:
        embedded = [n for n in placeholders if _is_per_token(n) and _reaches(n, _PERIODIC)]
        candidates = embedded if len(embedded) == 1 and not _is_called_position(embedded[0].name) else []
    named = [n for n in candidates if _sounds_like_time(n.name)]
    if not candidates:
        raise StructureError(
            f"no timestep among the tensor inputs {list(names)}: none with one element per row, or called a "
            "timestep, is embedded by sin/cos. Name it: optimize(model, timestep='argument')."
        )
    return str((named or candidates)[0].name)


def variances(graph: fx.Graph, latents: set[str], timestep: str) -> dict[str, Variance]:
    """The variance of every node by name. Random operators count as latent-dependent, so they are never hoisted.

    ``latents`` are the inputs that carry the latent: one, or one for each image where the model takes a list.
    """
    kinds = dict.fromkeys(latents, Variance.LATENT) | {timestep: Variance.TIMESTEP}
    found: dict[str, Variance] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            least = kinds.get(node.name, Variance.INVARIANT)
        else:
            least = Variance.LATENT if is_random(node) else Variance.INVARIANT
        found[node.name] = max([least, *(found[n.name] for n in node.all_input_nodes)])
    return found


def _is_per_row(node: fx.Node) -> bool:
    """At most one element per batch row: (), (batch,) or (batch, 1)."""
    shape = value_shape(node)
    return shape is not None and prod(shape[1:]) == 1


def _reaches(node: fx.Node, ops: set[str]) -> bool:
    return any(op_name(n) in ops for n in descendants(node))


def _is_per_token(node: fx.Node) -> bool:
    """Several elements per batch row: (batch, tokens), or with further dimensions of size 1."""
    shape = value_shape(node)
    return shape is not None and len(shape) > 1 and 1 < prod(shape[1:]) == max(shape[1:])


def _is_called_time(name: str) -> bool:
    return name == "t" or "time" in name or "sigma" in name


def _is_called_position(name: str) -> bool:
    return any(part in name for part in ("pos", "ids", "idx", "grid"))


def _sounds_like_time(name: str) -> bool:
    return name.startswith("t") or "time" in name or "sigma" in name
