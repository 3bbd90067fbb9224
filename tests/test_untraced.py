"""What cannot be traced runs as it is, and weights that hooks move stay where these put them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import duca_compile
from duca_compile import CaptureError, DuCa, Uncached
from tests import models
from tests.models import WIDTH

POLICY = DuCa(interval=3, fresh_ratio=0.5)

torch.library.define("duca_tests::doubled", "(Tensor x) -> Tensor")
torch.library.impl("duca_tests::doubled", "CPU", lambda x: x * 2)


@torch.library.custom_op("duca_tests::halved", mutates_args=())
def _halved(x: Tensor) -> Tensor:
    return x / 2


@_halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 3


def by_address(x: Tensor) -> Tensor:
    """A kernel that gets addresses, as Triton's do."""
    x = x.contiguous()
    result = torch.empty_like(x)
    ctypes.memmove(result.data_ptr(), x.data_ptr(), x.numel() * x.element_size())
    return result


def by_rows(x: Tensor) -> Tensor:
    """Looks at each token in Python, one by one."""

    def found():
        for row in x.flatten(0, -2):
            yield row * 2 if row.sum() > 0 else row

    return torch.stack(list(found())).view(x.shape)


def by_diagonal(x: Tensor) -> Tensor:
    """In place, on a view of a view."""
    mask = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype)
    mask[:1].view(x.shape[1], x.shape[1]).fill_diagonal_(1)
    return x + mask @ x


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "operator without fake": torch.ops.duca_tests.doubled,
    "operator with fake": torch.ops.duca_tests.halved,
    "autograd function": Tripled.apply,
    "address": by_address,
    "numpy": lambda x: torch.from_numpy(np.tanh(x.numpy())),
    "dlpack": lambda x: torch.from_numpy(np.from_dlpack(x).copy()),
    "storage": lambda x: torch.tensor(list(x.contiguous().untyped_storage())[:1], dtype=torch.float32).sum() * 0 + x,
    "rows": by_rows,
    "diagonal": by_diagonal,
}


class KernelMLP(nn.Module):
    """An MLP with something in the middle that is not PyTorch's."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.up, self.down, self.kernel = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(KERNELS[self.kernel](self.up(x))))


class KernelBlock(models.Block):
    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.mlp = KernelMLP(kernel)


def build(kernel: str) -> nn.Module:
    return models.build(lambda: KernelBlock(kernel))


def kinds(optimized: nn.Module) -> str:
    return "".join(executed.kind.value[0] for executed in optimized.history)


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_followed_or_runs_as_it_is(kernel: str) -> None:
    model = build(kernel)
    optimized = duca_compile.optimize(model, POLICY, "eager")
    for step in range(6):
        arguments = models.example(step, 7.0 - step)
        assert torch.equal(optimized(**arguments), model(**arguments)) == (step % 3 == 0)
    assert kinds(optimized) == "fpsfps"
