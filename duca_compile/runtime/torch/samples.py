"""Samples of features on their device, and the few numbers that forecasts are fitted to and watched by."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from duca_compile.policies.fitting import Products

_CHUNK = 1 << 16  # values of each step in one product
_TINY = 1e-30  # replaces a zero divisor


class TorchSamples:
    """What ``runtime.learning`` asks of tensors."""

    def of(self, value: Tensor, most: int) -> Tensor:
        """A copy of at most ``most`` of its values, spread evenly over rows, tokens and channels."""
        flat = value.detach().reshape(-1)
        stride = -(-len(flat) // most)
        while stride > 1 and gcd(stride, len(flat)) > 1:  # one that divides a dimension would miss some of its entries
            stride += 1
        return flat[::stride].clone()

    def products(self, samples: Sequence[Tensor]) -> Products:
        """Those of the samples of all steps."""
        return products(samples)

    def error(self, terms: Sequence[tuple[float, Tensor]], found: Tensor) -> float:
        """The squared distance of a sum of samples, each times its factor, to what was found, relative to its square.

        Waits for the device.
        """
        wanted = found.float()
        apart = -wanted
        for factor, sample in terms:
            apart = apart + factor * sample.float()
        return float(apart.square().sum() / wanted.square().sum().clamp(min=_TINY))


def products(hidden: Sequence[Tensor]) -> Products:
    """The inner products of a feature at any two steps, one tensor for each; computed on its device."""
    steps = len(hidden)
    inner, squares = torch.zeros(steps, steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    flat = [state.flatten() for state in hidden]
    for start in range(0, len(flat[0]), _CHUNK):
        part = torch.stack([values[start : start + _CHUNK] for values in flat]).double()
        squares += part.square().sum(1).cpu()
        part -= part.mean(0)  # differences do not depend on the mean, and products round less without it
        inner += (part @ part.t()).cpu()
    return Products(inner.numpy(), squares.numpy())
