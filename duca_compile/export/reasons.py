"""Says in one plain sentence why a graph cannot be written: the innermost cause, the operator and its source line."""

from __future__ import annotations

import re
import traceback

from torch import fx

from duca_compile.core.fx_utils import source_line

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST = 600  # characters of a cause: some name every size of a graph
_FAR = 64  # nodes that are searched for a line
_NODE_NAMES = ("n", "node")  # of the node that runs or is translated, in the frames of torch's interpreters


def reason(error: BaseException) -> str:
    """The innermost cause of an error in a graph, whole and without terminal colours, after the operator it is of."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    nodes = filter(None, map(_failing_node, reversed(causes)))
    found = next(nodes, None)
    text = plain(str(causes[-1])) or type(causes[-1]).__name__
    return text if found is None else f"{describe(found)}: {text}"


def plain(text: str) -> str:
    """The first paragraph of a message as one line."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", _COLOURS.sub("", text))]
    first = next(filter(None, paragraphs), "")
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]} ..."


def describe(node: fx.Node) -> str:
    """An operator and the source line that it comes from, or the nearest one before it that has a line."""
    line = next(filter(None, map(source_line, _upwards(node))), "")
    return f"{node.target} at {line}" if line else f"{node.target}"


def _upwards(node: fx.Node) -> list[fx.Node]:
    """The node, and what it is computed from, the nearest first."""
    found = [node]
    for each in found:
        found += [source for source in each.all_input_nodes if source not in found]
        if len(found) > _FAR:
            break
    return found


def _failing_node(error: BaseException) -> fx.Node | None:
    """The innermost node that was run or translated when ``error`` was raised."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in _NODE_NAMES:
            value = frame.f_locals.get(name)
            found = value if isinstance(value, fx.Node) else found
    return found
