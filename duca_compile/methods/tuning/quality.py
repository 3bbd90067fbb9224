"""How close a result is to the uncached one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duca_compile.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
REPEATS = 1e-3  # relative difference up to which two results of one call count as the same, as rounding may differ


def arrays(result: Any) -> list[Array]:
    """The numbers in what a call returned: tensors, arrays and pictures, in lists, dictionaries or outputs.

    Returns:
        Arrays of any shapes and real types.
    """
    return list(_leaves(result))


def _leaves(value: Any) -> Iterator[Array]:
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        yield (plain.float() if plain.is_floating_point() else plain).numpy()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, np.ndarray) or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        if np.issubdtype(array.dtype, np.number):
            yield array


def peak_of(results: Sequence[Sequence[Array]]) -> float:
    """The range of values that PSNR refers to: 255 for bytes; of floats, that of all results, or the usual one around.

    The usual ones are 1 for values in [0, 1], and 2 for values in [-1, 1].
    """
    found = [array for result in results for array in result if array.size]
    if all(array.dtype == np.uint8 for array in found):
        return 255.0
    low, high = min(float(array.min()) for array in found), max(float(array.max()) for array in found)
    if low >= -1 and high <= 1:
        return 1.0 if low >= 0 else 2.0
    return high - low


def psnr(found: Sequence[Array], wanted: Sequence[Array], peak: float) -> float:
    """Peak signal-to-noise ratio in dB, over all values; infinite for equal ones, minus infinity for none."""
    error = _squared(found, wanted) / sum(array.size for array in wanted)
    if error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / error) if math.isfinite(error) else -math.inf


def apart(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    """The norm of the difference, relative to that of ``wanted``."""
    size = sum(float(np.square(array.astype(np.float64)).sum()) for array in wanted)
    return math.sqrt(_squared(found, wanted) / size) if size else math.sqrt(_squared(found, wanted))


def _squared(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    pairs = zip(found, wanted, strict=True)
    return sum(float(np.square(a.astype(np.float64) - b.astype(np.float64)).sum()) for a, b in pairs)


def check_results(results: Sequence[Sequence[Array]]) -> None:
    """Raises UsageError unless all calls returned finite numbers in the same shapes."""
    shapes = [[array.shape for array in result] for result in results]
    for number, shape in enumerate(shapes):
        if not shape or not any(map(np.prod, shape)):
            raise UsageError(
                f"calls[{number}] returned no numbers to compare; let it return an image, an array or a tensor"
            )
        if shape != shapes[0]:
            raise UsageError(
                f"calls[{number}] returned {_listed(shape)}, and calls[0] {_listed(shapes[0])}: all calls must be of "
                "one kind; tune for each size separately"
            )
        if not all(np.isfinite(array).all() for array in results[number]):
            raise UsageError(f"calls[{number}] returned values that are not finite without any caching")


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "a number" for shape in shapes[:3])


def value_of(metric: Callable[[Any, Any], float], result: Any, uncached: Any) -> float:
    """The value of a metric of the user's own; minus infinity where it is not a number.

    Raises:
        UsageError: it returns no number.
    """
    value = metric(result, uncached)
    if isinstance(value, Tensor | np.ndarray) and value.size in (1, torch.Size([1])):
        value = value.item()
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, str) or not (isinstance(value, Real | Tensor | np.generic)):
        raise UsageError(f"metric returned {value!r}: it must return one number, larger for closer results")
    return -math.inf if math.isnan(number) else number
