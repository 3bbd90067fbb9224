"""Checks for mistakes of the caller, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from duca_compile.errors import UsageError

DIFFUSERS_HOOKS = "_diffusers_hook"  # the registry of diffusers' hooks
_transform = torch._C._functorch.peek_interpreter_stack


def check_no_gradients(tensors: Iterable[Tensor]) -> None:
    """Raises UsageError where one of the call's tensors requires a gradient."""
    if any(tensor.requires_grad for tensor in tensors):
        raise UsageError(
            "an argument requires a gradient, and an optimized model is for inference only: call "
            "duca_compile.restore(model) to compute gradients, or else call it under torch.no_grad() or detach() the "
            "argument"
        )


def check_no_transform() -> None:
    """Raises UsageError within a transform of torch.func or forward-mode AD, which caches cannot take part in."""
    if _transform() is not None or forward_ad._current_level >= 0:
        raise UsageError(
            "an optimized model cannot be differentiated or batched by torch.func (grad, jvp, vmap) or "
            "torch.autograd.forward_ad: call duca_compile.restore(model) for that, or call it outside of them"
        )


def check_model(model: Any, expected: str = "an nn.Module") -> None:
    """Raises UsageError for anything but an nn.Module in eval mode."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected {expected}, not {type(model).__name__}")
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode, where dropout is on; call .eval() first")


def check_caching(model: nn.Module) -> None:
    """Raises UsageError where a hook of diffusers reuses features already: no graph can hold its state."""
    for path, part in model.named_modules():
        hooks = getattr(vars(part).get(DIFFUSERS_HOOKS), "hooks", {})
        for name, hook in hooks.items():
            if getattr(hook, "_is_stateful", False):
                at = f" on {path}" if path else ""
                raise UsageError(
                    f"{type(model).__name__} already reuses features: {type(hook).__name__}{at}. Two caches cannot "
                    "be stacked: call disable_cache() first, or, where the hook was applied directly, diffusers' "
                    f"HookRegistry.check_if_exists_or_initialize(model).remove_hook({name!r}, recurse=True)"
                )
