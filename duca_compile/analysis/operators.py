"""What an operator's schema says: its arguments by name, and whether it draws random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def argument(node: fx.Node, name: str) -> Any:
    """The argument called ``name`` in the operator's schema, however it was passed; None where there is none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for place, each in enumerate(node.target._schema.arguments):
        if each.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, each.default_value)
    return None


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers; attention without dropout and eval-mode dropout do not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return argument(node, "dropout_p") != 0 and argument(node, "train") is not False
