"""The paths that PyTorch's own attention modules take in eager mode alone.

In eval mode ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call fused operators, which round differently
from what a trace of their Python shows. Here a trace takes the path that the model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules import activation

FAST_MODULES = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
_ENCODER_FORWARD = nn.TransformerEncoder.forward.__code__
_NO_OVERRIDE = torch._C._disabled_torch_function_impl

MAKES_NESTED = torch.ops.aten._nested_tensor_from_mask.default
NESTED = (
    "works on nested tensors, since it was given a padding mask (nn.TransformerEncoder(..., "
    "enable_nested_tensor=False) does not)"
)


def has_fast_paths(model: nn.Module) -> bool:
    """Whether any submodule may take another path in eager mode than in a trace."""
    return any(isinstance(module, FAST_MODULES) for module in model.modules())


def is_fused(node: fx.Node) -> bool:
    """Whether it is a fused operator that a trace took in place of the Python that it stands for."""
    return node.target is torch.ops.aten._native_multi_head_attention.default


@contextmanager
def traced() -> Iterator[None]:
    """While open, a trace takes the fused path wherever the model does, as one operator for each attention."""
    fused = torch._transformer_encoder_layer_fwd
    with (
        _replaced(torch, "_transformer_encoder_layer_fwd", _layer(fused)),
        _replaced(torch.overrides, "has_torch_function", _overridden),
        _replaced(activation, "_is_make_fx_tracing", lambda: False),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """While open, the model itself takes the path that a trace shows."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled and not has_fast_paths(model))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def nesting_encoder(frame: FrameType | None) -> nn.Module | None:
    """The ``nn.TransformerEncoder`` whose forward is running in ``frame`` or in one of its callers."""
    while frame is not None and frame.f_code is not _ENCODER_FORWARD:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _overridden(arguments: Sequence[Any]) -> bool:
    """Whether the type of an argument overrides torch's functions; unlike torch's, this knows no modes."""
    overrides = (getattr(type(each), "__torch_function__", _NO_OVERRIDE) for each in arguments)
    return any(each not in (_NO_OVERRIDE, Tensor.__torch_function__) for each in overrides)


def _layer(fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch._transformer_encoder_layer_fwd`` as the operators that it runs, in the same order and rounding."""

    def forward(
        src: Tensor,
        embed_dim: int,
        num_heads: int,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        use_gelu: bool,
        norm_first: bool,
        eps: float,
        *parameters: Any,
    ) -> Tensor:
        projections = qkv_weight, qkv_bias, proj_weight, proj_bias
        if src.is_nested or src.numel() == 0:
            return fused(src, embed_dim, num_heads, *projections, use_gelu, norm_first, eps, *parameters)
        norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, *products, mask, mask_type = parameters

        def attention(x: Tensor) -> Tensor:
            attended, _ = torch._native_multi_head_attention(
                x, x, x, embed_dim, num_heads, *projections, mask, False, True, mask_type
            )
            return attended

        def first_norm(x: Tensor) -> Tensor:
            return functional.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

        def second_norm(x: Tensor) -> Tensor:
            return functional.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

        if norm_first:
            x = src + attention(first_norm(src))
            return x + _feed_forward(second_norm(x), use_gelu, *products)
        x = first_norm(src + attention(src))
        return second_norm(x + _feed_forward(x, use_gelu, *products))

    return forward


def _feed_forward(
    x: Tensor, use_gelu: bool, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor
) -> Tensor:
    if x.device.type == "cpu":
        hidden = functional.linear(x, weight_1, bias_1)
        hidden = functional.gelu(hidden) if use_gelu else functional.relu(hidden)
    else:  # which fuses the activation into the product, with a rounding of its own
        flat = torch._addmm_activation(bias_1, x.flatten(0, 1), weight_1.t(), use_gelu=use_gelu)
        hidden = flat.reshape(*x.shape[:2], -1)
    return functional.linear(hidden, weight_2, bias_2)
