"""Measures how the residual of all blocks changes from step to step, for MagCache (arXiv 2506.09045)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor, nn

from duca_compile.methods.recording import Recorder, SampleLoop
from duca_compile.policies.checks import check_whole

_TINY = 1e-30  # replaces a zero divisor


def residual_ratios(
    model: nn.Module, sample: SampleLoop, *, loops: int = 1, timestep: str | None = None, latent: str | None = None
) -> tuple[float, ...]:
    """The ratios for ``MagCache``, from the model's own uncached denoising loop.

    The residual is what all blocks add to a stream. The ratio of a step is the mean, over all tokens of all streams, of
    its length over that at the step before; the first ratio is 1. Guidance passes and loops are averaged.

    Args:
        model: a Diffusion Transformer in eval mode. It is not changed.
        sample: ``sample(drop_in, number)`` runs one denoising loop with ``drop_in`` in place of the model.
        loops: how many loops to measure.
        timestep: name of the timestep argument; needed only if the graph does not show it.
        latent: name of the argument that is denoised; needed only if the graph does not show it.

    Returns:
        One ratio for each step of a loop.

    Raises:
        UsageError: ``sample`` does not run one loop of at least two steps, its loops differ in length, or no guidance
            pass runs at every step.
        PolicyError: the number of loops is invalid.
    """
    check_whole("loops", loops, least=1)
    return ratios_of(Recorder(model, sample, timestep, whole=False, latent=latent, keeps="changes"), loops)


def ratios_of(recorder: Recorder, loops: int) -> tuple[float, ...]:
    """The ratios of the first ``loops`` loops of a recorder of changes. Raises what ``residual_ratios`` raises."""
    measured = recorder.measured(loops, lambda each: _ratios([[*call.kept.values()] for call in each.calls]), "ratios")
    return tuple(np.mean(measured, axis=0).tolist())


def _ratios(changes: Sequence[Sequence[Tensor]]) -> list[float]:
    """Those of one pass, from what the blocks add to each stream (rows, tokens, channels) at each step."""
    norms = [np.concatenate([each.double().norm(dim=-1).flatten().cpu().numpy() for each in step]) for step in changes]
    ratios = [float((now / before.clip(_TINY)).mean()) for before, now in pairwise(norms)]
    return [1.0, *ratios]
