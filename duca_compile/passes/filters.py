"""Linear filters over the grid of a value's tokens, as products with small matrices along each of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, prod, sqrt

import torch
from torch import Tensor, fx

from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import Branch
from duca_compile.core.steps import HighPass, NoiseFilter
from duca_compile.errors import PolicyError
from duca_compile.frontend.operators import argument
from duca_compile.passes.base import VariantDraft, check_one_end
from duca_compile.passes.numbers import precise, widened

aten = torch.ops.aten

_LEAST = 1e-16  # added to divisors, as released
_SMALLEST = 1e-6  # the noise level is at least this, and at most 1 less this, as released


def _check_layout(branch: Branch, what: str) -> None:
    """Raises PolicyError unless the stream of the branch is (rows, tokens, channels)."""
    if not branch.layout.is_sequence:
        raise PolicyError(
            f"{what} filters streams of (batch, tokens, channels), and that of {branch.path or 'the model'} is "
            f"{branch.layout}; use another policy"
        )


def grid_of(draft: VariantDraft, value: Tensor, given: tuple[int, ...] | None, what: str) -> tuple[int, ...]:
    """The grid of the tokens of a value such as ``value``.

    Raises:
        PolicyError: it is not known, or is not that of these tokens; ``what`` says who needs it.
    """
    tokens = value.shape[1] if value.dim() == 3 else None
    grid = given if given is not None else draft.facts.grids.get(tokens or 0)
    if grid is None:
        raise PolicyError(
            f"{what} needs the grid of the {tokens} tokens, which the graph does not show; pass grid=(height, width)"
        )
    if prod(grid) != tokens:
        raise PolicyError(
            f"grid={grid} has {prod(grid)} places, and there are {tokens} tokens; {what} needs one for each"
        )
    return grid


def along_axes(
    draft: VariantDraft, value: fx.Node, sizes: Sequence[int], matrices: Sequence[fx.Node], result: Sequence[int]
) -> fx.Node:
    """The product of each axis of the tokens' grid with its matrix, (rows or 1, 1, new size, size).

    ``value`` is (rows, tokens, channels), with a grid of ``sizes``; what is returned has one of ``result``.
    """
    call = draft.graph.call_function
    now, channels = list(sizes), value.meta["val"].shape[-1]
    for axis, (matrix, size) in enumerate(zip(matrices, result, strict=True)):
        shape = [-1, prod(now[:axis]), now[axis], prod(now[axis + 1 :]) * channels]
        rows, after = value.meta["val"].shape[0], [shape[1], size, shape[3]]
        flops = 2 * rows * prod(after) * now[axis]
        value = call(aten.matmul.default, (matrix, call(aten.reshape.default, (value, shape))))
        value.meta.update({"flops": flops, "val": matrix.meta["val"].new_empty((rows, *after))})
        now[axis] = size
    filtered = call(aten.reshape.default, (value, [-1, prod(now), channels]))
    filtered.meta["val"] = value.meta["val"].new_empty((value.meta["val"].shape[0], prod(now), channels))
    return filtered


def noise_filtered(draft: VariantDraft, value: fx.Node, chosen: NoiseFilter) -> fx.Node:
    """``value`` (rows, tokens, channels) through the filter, in float32 or wider.

    At noise level s, the gain of a frequency f along an axis is (1 - s) p / ((1 - s)^2 p + s^2), where p = 1 /
    f^exponent is the power of a clean latent. The gain over the grid is the product of those along its axes, divided by
    its mean. Each axis is multiplied by the matrix of its real Fourier series.

    Raises:
        PolicyError: the grid is not known, or timesteps differ by token.
    """
    _check_layout(draft.facts.first, "SeaCache")
    like = value.meta["val"]
    grid = grid_of(draft, like, chosen.grid, "SeaCache")
    level = _noise_level(draft, like, chosen.pure_noise)
    matrices = [_wiener(draft, level, size, chosen.exponent, like) for size in grid]
    return along_axes(draft, widened(draft, value), grid, matrices, grid)


def _noise_level(draft: VariantDraft, like: Tensor, pure_noise: float) -> fx.Node:
    """The noise level of each row, (rows or 1, 1, 1)."""
    time = draft.node(draft.facts.timestep)
    shape = time.meta["val"].shape
    if len(shape) > 1 or (len(shape) == 1 and shape[0] not in (1, like.shape[0])):
        raise PolicyError(
            f"SeaCache needs one timestep for each row, and {draft.facts.timestep} has the shape {tuple(shape)}; use "
            "ResidualGate"
        )
    call = draft.graph.call_function
    level = call(aten.div.Tensor, (call(aten.to.dtype, (time, precise(like))), pure_noise))
    level = call(aten.clamp.default, (level, _SMALLEST, 1 - _SMALLEST))
    level = call(aten.reshape.default, (level, [-1, 1, 1]))
    level.meta["val"] = like.new_empty((shape[0] if shape else 1, 1, 1), dtype=precise(like))
    return level


def _wiener(draft: VariantDraft, level: fx.Node, size: int, exponent: float, like: Tensor) -> fx.Node:
    """The filter along an axis of this size as a matrix, (rows or 1, 1, size, size)."""
    call, dtype = draft.graph.call_function, precise(like)
    index = call(aten.arange.default, (size,), {"device": like.device})
    folded = call(aten.minimum.default, (index, call(aten.rsub.Scalar, (index, size))))
    frequency = call(aten.div.Tensor, (call(aten.to.dtype, (folded, dtype)), float(size)))
    falling = call(aten.add.Tensor, (call(aten.pow.Tensor_Scalar, (frequency, exponent)), _LEAST))
    power = call(aten.reciprocal.default, (falling,))
    clean = call(aten.rsub.Scalar, (level, 1.0))
    under = call(aten.mul.Tensor, (call(aten.mul.Tensor, (clean, clean)), power))
    under = call(aten.add.Tensor, (under, call(aten.add.Tensor, (call(aten.mul.Tensor, (level, level)), _LEAST))))
    gain = call(aten.div.Tensor, (call(aten.mul.Tensor, (clean, power)), under))  # (rows or 1, 1, size)
    gain = call(aten.div.Tensor, (gain, call(aten.mean.dim, (gain, [-1], True))))
    waves = fourier(draft, index, index, size, dtype)
    sides = [call(aten.matmul.default, (call(aten.mul.Tensor, (wave, gain)), wave)) for wave in waves]
    matrix = call(aten.div.Tensor, (call(aten.add.Tensor, tuple(sides)), float(size)))
    matrix = call(aten.unsqueeze.default, (matrix, 1))
    matrix.meta["val"] = like.new_empty((level.meta["val"].shape[0], 1, size, size), dtype=dtype)
    return matrix


def fourier(
    draft: VariantDraft, places: fx.Node, frequencies: fx.Node, size: int, dtype: torch.dtype
) -> tuple[fx.Node, fx.Node]:
    """cos and sin of 2 pi k n / size, for n in ``places`` and k in ``frequencies`` (int64), (places, frequencies)."""
    call = draft.graph.call_function
    turns = call(aten.mul.Tensor, (call(aten.unsqueeze.default, (places, 1)), frequencies))
    turns = call(aten.remainder.Scalar, (turns, size))  # exact, where a large angle is not
    angle = call(aten.mul.Tensor, (call(aten.to.dtype, (turns, dtype)), 2 * pi / size))
    return call(aten.cos.default, (angle,)), call(aten.sin.default, (angle,))


def high_passed(draft: VariantDraft, value: fx.Node, chosen: HighPass) -> fx.Node:
    """``value``, such as the end of the stream, with the low frequencies of the latent's tokens taken out.

    Raises:
        PolicyError: it is not known which tokens are the latent's, or how they lie, or outputs read several streams.
    """
    _check_layout(draft.facts.branches[-1], "FreqCa")
    check_one_end(draft.facts, "FreqCa filters", ", such as HiCache(lite=True)")
    like, call = value.meta["val"], draft.graph.call_function
    start, count = _latent_tokens(draft)
    part = value
    if count < like.shape[1]:
        part = call(aten.slice.Tensor, (value, 1, start, start + count))
        part.meta["val"] = like[:, start : start + count]
    wide = widened(draft, part)
    low = _lowest_dct(draft, wide, chosen) if chosen.transform == "dct" else _lowest_fft(draft, wide, chosen.cutoff)
    high = call(aten.sub.Tensor, (wide, low))
    high = high if like.dtype is precise(like) else call(aten.to.dtype, (high, like.dtype))
    if part is not value:
        ends = [(0, start), (start + count, like.shape[1])]
        ahead, behind = ([call(aten.slice.Tensor, (value, 1, *end))] if end[0] < end[1] else [] for end in ends)
        high = call(aten.cat.default, ([*ahead, high, *behind], 1))
    high.meta["val"] = like
    return high


def _latent_tokens(draft: VariantDraft) -> tuple[int, int]:
    """Where the tokens of the latent begin at the end of the stream, and how many there are.

    In front of the head, models cut off other tokens: what is not read there is not the latent's.
    """
    end = draft.node(draft.facts.stream_end)
    readers = [n for n in end.users if n.op != "output" and n.name in draft.facts.variance]  # the model's own
    tokens = int(end.meta["val"].shape[1])
    if any(op_name(n) != "slice" or argument(n, "dim") != 1 for n in readers):
        return 0, tokens
    cuts = {(int(argument(n, "start") or 0), (value_shape(n) or (0, 0))[1]) for n in readers}
    return next(iter(cuts)) if len(cuts) == 1 else (0, tokens)


def _lowest_dct(draft: VariantDraft, value: fx.Node, chosen: HighPass) -> fx.Node:
    """The part of ``value`` whose two-dimensional DCT-2 is within a radius of the lowest frequency."""
    like, call = value.meta["val"], draft.graph.call_function
    grid = grid_of(draft, like, chosen.grid, "FreqCa")
    if len(grid) != 2:
        raise PolicyError(
            f"FreqCa's DCT is over the two axes of an image, and the tokens lie in {grid}; use transform='fft'"
        )
    radius = chosen.cutoff * sqrt(sum((size - 1) ** 2 for size in grid))
    kept = [min(size, int(radius) + 1) for size in grid]
    bases = [_cosines(draft, size, count, like) for size, count in zip(grid, kept, strict=True)]
    inverse = [_transposed(draft, basis) for basis in bases]
    spectrum = along_axes(draft, value, grid, bases, kept)
    indices = [call(aten.arange.default, (count,), {"device": like.device}) for count in kept]
    squares = [call(aten.mul.Tensor, (index, index)) for index in indices]
    distance = call(aten.add.Tensor, (call(aten.unsqueeze.default, (squares[0], 1)), squares[1]))
    inside = call(aten.reshape.default, (call(aten.le.Scalar, (distance, radius**2)), [1, prod(kept), 1]))
    masked = call(aten.where.ScalarOther, (inside, spectrum, 0.0))
    masked.meta["val"] = spectrum.meta["val"]
    return along_axes(draft, masked, kept, inverse, grid)


def _cosines(draft: VariantDraft, size: int, count: int, like: Tensor) -> fx.Node:
    """The first ``count`` rows of the orthonormal DCT-2, (1, 1, count, size)."""
    call = draft.graph.call_function
    places, rows = (call(aten.arange.default, (n,), {"device": like.device}) for n in (size, count))
    odd = call(aten.add.Tensor, (call(aten.mul.Tensor, (places, 2)), 1))
    wave, _ = fourier(draft, rows, odd, 4 * size, like.dtype)
    first = call(aten.eq.Scalar, (call(aten.unsqueeze.default, (rows, 1)), 0))
    basis = call(aten.mul.Tensor, (wave, sqrt(2 / size)))
    basis = call(aten.where.self, (first, call(aten.mul.Tensor, (basis, sqrt(0.5))), basis))
    basis = call(aten.reshape.default, (basis, [1, 1, count, size]))
    basis.meta["val"] = like.new_empty((1, 1, count, size))
    return basis


def _lowest_fft(draft: VariantDraft, value: fx.Node, cutoff: float) -> fx.Node:
    """The part of ``value`` whose Fourier transform along the tokens is at low frequencies."""
    like, call = value.meta["val"], draft.graph.call_function
    size = int(like.shape[1])
    count = int(cutoff * (size // 2)) + 1
    places, rows = (call(aten.arange.default, (n,), {"device": like.device}) for n in (size, count))
    paired = 2.0 / size  # each frequency but 0 and the highest stands for two
    parts = []
    for wave in fourier(draft, rows, places, size, like.dtype):
        shaped = call(aten.reshape.default, (wave, [1, 1, count, size]))
        shaped.meta["val"] = like.new_empty((1, 1, count, size))
        spectrum = along_axes(draft, value, (size,), [shaped], (count,))
        weight = call(aten.add.Tensor, (call(aten.eq.Scalar, (_doubled(draft, rows, size), 0)), 0.0))
        weight = call(aten.rsub.Scalar, (call(aten.mul.Tensor, (weight, paired / 2)), paired))
        weighted = call(aten.mul.Tensor, (spectrum, call(aten.reshape.default, (weight, [1, count, 1]))))
        weighted.meta["val"] = spectrum.meta["val"]
        parts.append(along_axes(draft, weighted, (count,), [_transposed(draft, shaped)], (size,)))
    low = call(aten.add.Tensor, tuple(parts))
    low.meta["val"] = like
    return low


def _doubled(draft: VariantDraft, rows: fx.Node, size: int) -> fx.Node:
    """Twice each frequency modulo the size: 0 where a frequency is its own counterpart."""
    call = draft.graph.call_function
    return call(aten.remainder.Scalar, (call(aten.mul.Tensor, (rows, 2)), size))


def _transposed(draft: VariantDraft, matrix: fx.Node) -> fx.Node:
    swapped = draft.graph.call_function(aten.transpose.int, (matrix, -1, -2))
    swapped.meta["val"] = matrix.meta["val"].transpose(-1, -2)
    return swapped
