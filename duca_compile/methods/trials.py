"""Runs a loop with one policy after another, on one capture of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duca_compile.backends.eager import EagerBackend
from duca_compile.compiler.budget import CacheOptions
from duca_compile.drop_in import OptimizedModel, sharing_captures
from duca_compile.errors import UsageError
from duca_compile.methods.recording import SampleLoop
from duca_compile.policies.base import Policy
from duca_compile.runtime.session import Requests


class Trials:
    """Measures how far policies lead from the uncached loop. All of them need the same variants.

    Args:
        model: the model. It is not changed.
        sample: runs one denoising loop, and returns its final latent.
        number: of the loop.
        steps: how many steps it has.
        timestep: name of the timestep argument; needed only if the graph does not show it.
        latent: name of the argument that is denoised; needed only if the graph does not show it.

    Raises:
        UsageError: ``sample`` returns no tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: SampleLoop,
        number: int,
        steps: int,
        timestep: str | None = None,
        latent: str | None = None,
    ) -> None:
        self._model, self._sample, self._number, self._steps = model, sample, number, steps
        self._timestep, self._latent = timestep, latent
        self._first: OptimizedModel | None = None  # whose captures all later ones use
        self._wanted = self._result(model)

    def loss(self, policy: Policy) -> float:
        """The mean squared difference of the final latents."""
        requests = Requests(policy, self._steps)
        if self._first is None:
            options = requests, self._timestep, CacheOptions()
            drop_in = self._first = OptimizedModel(self._model, policy, EagerBackend(), *options, latent=self._latent)
        else:
            drop_in = sharing_captures(self._first, policy, requests)
        found = self._result(drop_in)
        return float((found - self._wanted).square().mean())

    def _result(self, drop_in: nn.Module) -> Tensor:
        with torch.no_grad():
            result = self._sample(drop_in, self._number)
        if not isinstance(result, Tensor):
            raise UsageError(
                f"sample(model, {self._number}) must return the final latent, a tensor, for a search that runs loops; "
                f"it returned {type(result).__name__}"
            )
        return result.detach().double()
