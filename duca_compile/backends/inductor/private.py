"""All private API of torch that compiling needs."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._higher_order_ops.utils import registered_hop_fake_fns
from torch._inductor import aot_compile
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.package.package import package_aoti
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, SymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._sympy.numbers import int_oo

from duca_compile.backends.base import Lifted
from duca_compile.passes.exact.outline import form_of, kind_of, outline

_REGION: Any = torch.ops.higher_order.invoke_subgraph
# Older versions of torch call it so; no code may depend on such a size in either.
_UNBACKED: DimDynamic = getattr(DimDynamic, "UNBACKED", None) or DimDynamic["SIZE_LIKE_UNBACKED"]


def compile_graph(lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Inductor's code for the graph.

    Dynamo is left out: the graph is one already, and the dispatcher calls it with nothing but tensors of the
    captured kinds, so there is nothing to guard. Token counts are unbacked: no code may depend on their values.
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    with shapes.ignore_fresh_unbacked_symbols():  # inputs have them: no operator is to account for them
        fakes = [_fake(mode, tensor, position in lifted.dynamic) for position, tensor in enumerate(tensors)]
    inputs = [*(_fake(mode, weight, False) for weight in weights), *fakes]
    module = fx.GraphModule({}, lifted.graph)
    _FakeValues(module, mode).propagate_dont_convert_inputs(*inputs)
    outline(module, lifted.cuts)
    context = torch._guards.tracing(torch._guards.TracingContext(mode))
    # The dispatcher gives only what it was compiled for, so each call need not check the sizes of every tensor.
    unchecked = inductor_config.patch(size_asserts=False, alignment_asserts=False)
    with context, unchecked, _without_hints(), _regions_evaluated_once(mode):
        return cast(Callable[..., Any], compile_fx(module, inputs))


def lacks_compiler(error: Exception) -> bool:
    """Whether compiling failed for want of a C++ compiler that works."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InvalidCxxCompiler | CppCompileError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None and not _compiles_anything()


def _compiles_anything() -> bool:
    try:
        command = [get_cpp_compiler(), "-x", "c++", "-c", "-o", os.devnull, "-"]
        done = subprocess.run(command, input=b"int one() { return 1; }", capture_output=True, check=False)
    except (InvalidCxxCompiler, OSError):
        return False
    return done.returncode == 0


@contextmanager
def _regions_evaluated_once(mode: FakeTensorMode) -> Iterator[None]:
    """torch evaluates a region whose sizes are symbols again at each call of it, for each time that it looks at all."""
    evaluate = registered_hop_fake_fns[_REGION]
    known: dict[Hashable, list[tuple[Any, ...]]] = {}
    held: list[Any] = []  # so that no other region has the identity of one of these

    def evaluated(region: Any, name: str, *operands: Any) -> Any:
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        if not all(isinstance(tensor, FakeTensor) and tensor.fake_mode is mode for tensor in tensors):
            return evaluate(region, name, *operands)  # of another thread
        body = getattr(region, "subgraph", region)
        key = id(body), *(kind_of(each) if isinstance(each, Tensor) else str(each) for each in operands)
        if key in known:
            return tuple(torch.empty_strided(size, stride, dtype=t, device=d) for size, stride, t, d in known[key])
        results = evaluate(region, name, *operands)
        memory = {tensor.untyped_storage()._cdata for tensor in tensors}
        if all(isinstance(each, FakeTensor) and each.untyped_storage()._cdata not in memory for each in results):
            known[key] = [(each.shape, each.stride(), each.dtype, each.device) for each in results]
            held.append(body)
        return results

    registered_hop_fake_fns[_REGION] = evaluated
    try:
        yield
    finally:
        registered_hop_fake_fns[_REGION] = evaluate


class _FakeValues(FakeTensorProp):
    """Notes each node's fake value; what was computed of operands of the same kinds is not computed again."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, mode)
        self._known: dict[Hashable, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        text = form_of([n]).text
        if text not in self._known:
            self._known[text] = super().run_node(n), n.meta["val"]
        result, n.meta["val"] = self._known[text]
        return result


@contextmanager
def _without_hints() -> Iterator[None]:
    """torch logs where a lowering asks for the value of a token count, and then does without it."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic: bool) -> Tensor:
    if not dynamic:
        return mode.from_tensor(tensor, static_shapes=True)
    sizes = [DimDynamic.STATIC] * tensor.dim()
    sizes[1] = _UNBACKED
    context: SymbolicContext = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * tensor.dim())
    fake = mode.from_tensor(tensor, static_shapes=False, symbolic_context=context)
    count: Any = fake.shape[1]
    # Else strides are those of max(1, count), and regions copy their operands from one form of that to the other.
    count.node.shape_env.constrain_symbol_range(count.node.expr, compiler_min=1, compiler_max=int_oo)
    return fake


def compile_ahead(module: fx.GraphModule, example: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """AOTInductor's code of an exported program's module: what ``package`` takes."""
    return aot_compile(module, example, options=options)


def package(path: str, code: dict[str, Any]) -> None:
    """Writes the code of several models, by name, as one package."""
    package_aoti(path, code)
