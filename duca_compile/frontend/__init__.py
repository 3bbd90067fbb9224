"""From a module and one call to a graph: binding arguments, tracing, and the module's state and side effects."""

from duca_compile.core.torch_api import check_torch

check_torch("capturing a model")
