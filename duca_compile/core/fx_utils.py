"""What an FX graph and its nodes say of themselves."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, fx

from duca_compile.core.ir import CapturedGraph
from duca_compile.core.ports import Port, argument

PACKAGE = str(Path(__file__).parents[1])  # this package's folder


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names; get_attr nodes go on naming the same live weights."""
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


def value_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of the tensor a node yields, or None where it yields something else."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(shape)


def op_name(node: fx.Node) -> str:
    """The operator without namespace and overload: ``linear``, ``add``, ``getitem``."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the Python statement the node came from, or "" where the trace does not say."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in lines if line.startswith('File "') and not line.startswith(f'File "{PACKAGE}')]
    if not files:
        return ""
    path, number = files[-1].split('"')[1], files[-1].split("line ")[1].split(",")[0]
    return f"{path}:{number}"


def to_module(captured: CapturedGraph, graph: fx.Graph) -> fx.GraphModule:
    """A module over ``graph`` that shares every weight with the source model."""
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({name: captured.attributes[name] for name in used}, graph)
