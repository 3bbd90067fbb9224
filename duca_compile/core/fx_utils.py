"""Helpers for FX graphs: copies, and what a node says about itself."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, fx

from duca_compile.core.ir import CapturedGraph
from duca_compile.core.ports import Port, argument
from duca_compile.errors import InternalError

PACKAGE = str(Path(__file__).parents[1])  # this package's folder


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names; its get_attr nodes name the same live weights."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, lambda n: mapping[n])
        if mapping[node].name != node.name:
            mapping[node].name = node.name
    return copy


def add_placeholder(graph: fx.Graph, port: Port, value: Tensor) -> fx.Node:
    """A new placeholder of this port where the graph is inserted to; its name is not that of any other node."""
    node = graph.placeholder(port.input_name)
    node.target = node.name
    node.meta |= {"val": value, "port": port}
    return node


def port_of(placeholder: fx.Node) -> Port:
    """What comes in through a placeholder; those of a captured graph are the model's arguments."""
    port: Port = placeholder.meta.get("port") or argument(placeholder.name)
    return port


def node_operand(node: fx.Node, position: int) -> fx.Node:
    """The positional argument of ``node`` at ``position``, which must be a node."""
    argument = node.args[position]
    if not isinstance(argument, fx.Node):
        raise InternalError(f"argument {position} of {node.format_node()} is not a node")
    return argument


def int_operand(node: fx.Node, position: int) -> int:
    """The positional argument of ``node`` at ``position``, which must be a whole number."""
    argument = node.args[position]
    if not isinstance(argument, int):
        raise InternalError(f"argument {position} of {node.format_node()} is not a whole number")
    return argument


def value_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of the tensor that a node yields; None where it yields something else."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(shape)


def op_name(node: fx.Node) -> str:
    """The operator without namespace and overload: ``linear``, ``add``, ``getitem``."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def module_path(node: fx.Node) -> str:
    """The path of the innermost module in which the node was traced; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the Python statement that the node comes from; "" where the trace does not say."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in lines if line.startswith('File "') and not line.startswith(f'File "{PACKAGE}')]
    if not files:
        return ""
    path, number = files[-1].split('"')[1], files[-1].split("line ")[1].split(",")[0]
    return f"{path}:{number}"


def to_module(captured: CapturedGraph, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs ``graph`` and shares all weights with the source model."""
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({name: captured.attributes[name] for name in used}, graph)
