"""The private API of torch that each part of this package needs, which may change with any version of torch.

A part calls ``check_torch`` when it is imported, so a torch without a name is refused at once, and by name.
"""

from __future__ import annotations

from functools import cache
from pkgutil import resolve_name

import torch

from duca_compile.errors import BackendError

RUN_WITH = ("2.9", "2.14")  # the oldest and the newest torch that the tests were run with

# By part, with the names that it needs: a module, and after the colon what is in it.
PRIVATE = {
    "capturing a model": (
        "torch:_addmm_activation",
        "torch:_native_multi_head_attention",
        "torch:_transformer_encoder_layer_fwd",
        "torch._C:_disabled_torch_function_impl",
        "torch._C:_functorch.peek_interpreter_stack",
        "torch._dynamo:OptimizedModule",
        "torch._dynamo:config",
        "torch._dynamo:eval_frame",
        "torch._higher_order_ops.wrap:wrap_with_autocast",
        "torch._ops:HigherOrderOperator",
        "torch._ops:OperatorBase",
        "torch._ops:OpOverload",
        "torch._subclasses:FakeTensor",
        "torch._subclasses:FakeTensorMode",
        "torch._subclasses.functional_tensor:FunctionalTensor",
        "torch.autograd.forward_ad:_current_level",
        "torch.fx.experimental.proxy_tensor:get_proxy_mode",
        "torch.fx.experimental.proxy_tensor:make_fx",
        "torch.utils._python_dispatch:TorchDispatchMode",
        "torch.utils._python_dispatch:is_traceable_wrapper_subclass",
        "torch.utils._pytree:MappingKey",
        "torch.utils._pytree:SUPPORTED_NODES",
        "torch.utils._pytree:SequenceKey",
        "torch.utils._pytree:TreeSpec",
        "torch.utils._pytree:keystr",
        "torch.utils._pytree:tree_flatten",
        "torch.utils._pytree:tree_flatten_with_path",
        "torch.utils._pytree:tree_leaves",
        "torch.utils._pytree:tree_map",
        "torch.utils._pytree:tree_map_only",
        "torch.utils._pytree:tree_unflatten",
    ),
    "backend='inductor'": (
        "torch:_foreach_copy_",
        "torch._guards:TracingContext",
        "torch._guards:tracing",
        "torch._higher_order_ops.utils:registered_hop_fake_fns",
        "torch._inductor:aot_compile",
        "torch._inductor.compile_fx:compile_fx",
        "torch._inductor.config:alignment_asserts",
        "torch._inductor.config:patch",
        "torch._inductor.config:size_asserts",
        "torch._inductor.cpp_builder:get_cpp_compiler",
        "torch._inductor.exc:CppCompileError",
        "torch._inductor.exc:InvalidCxxCompiler",
        "torch._inductor.package.package:package_aoti",
        "torch._ops:ops.higher_order.invoke_subgraph",
        "torch.fx.experimental.symbolic_shapes:DimDynamic",
        "torch.fx.experimental.symbolic_shapes:ShapeEnv.constrain_symbol_range",
        "torch.fx.experimental.symbolic_shapes:ShapeEnv.ignore_fresh_unbacked_symbols",
        "torch.fx.experimental.symbolic_shapes:StatelessSymbolicContext",
        "torch.fx.passes.fake_tensor_prop:FakeTensorProp.propagate_dont_convert_inputs",
        "torch.utils._sympy.numbers:int_oo",
    ),
    "artifacts of format 'aoti'": ("torch._C:_aoti.AOTIModelPackageLoader",),
}
# Used where they exist, and done without where they do not.
OPTIONAL = ("torch._C:_dynamo.guards.TensorGuards", "torch._C:_dynamo.guards.dict_version")


@cache
def check_torch(part: str) -> None:
    """Raises BackendError where torch lacks a name that this part of ``PRIVATE`` needs."""
    missing = [name.replace(":", ".") for name in PRIVATE[part] if not _exists(name)]
    if missing:
        raise BackendError(
            f"{part} needs private functions of torch that torch {torch.__version__} does not have: "
            f"{', '.join(missing)}; install one of the versions that duca_compile was run with, torch "
            f"{RUN_WITH[0]} to {RUN_WITH[1]}"
        )


def _exists(name: str) -> bool:
    try:
        resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True
