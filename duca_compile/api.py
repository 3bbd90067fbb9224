"""``optimize`` and ``restore``: the public entry points."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from duca_compile.backends.base import Backend
from duca_compile.backends.make import make_backend
from duca_compile.compiler.budget import CacheOptions
from duca_compile.drop_in import OptimizedModel, check_plain
from duca_compile.errors import UsageError
from duca_compile.integrations.diffusers import PipelineSchedule, is_pipeline, set_component, transformers
from duca_compile.policies import Policy
from duca_compile.policies.checks import check_whole
from duca_compile.policies.named import resolve_policy
from duca_compile.runtime.session import Requests

log = logging.getLogger("duca_compile")


def optimize(
    model: Any,
    policy: str | os.PathLike[str] | Policy = "duca",
    backend: str = "inductor",
    num_inference_steps: int | None = None,
    *,
    timestep: str | None = None,
    latent: str | None = None,
    strict: bool = False,
    mode: str = "default",
    cache_dtype: torch.dtype | None = None,
    cache_budget_bytes: int | None = None,
    method: str = "forward",
) -> Any:
    """A drop-in for ``model`` that reuses features from step to step of a denoising loop.

    The model is captured at its first call, from the actual arguments, and is never modified. A model's steps are
    recognised by the timestep argument; a timestep that jumps back starts a new request, and so does ``reset()``. For
    a pipeline, the scheduler says where a request starts and how many steps it has.

    Args:
        model: a Diffusion Transformer in eval mode, that is any nn.Module that takes a latent and a timestep; or a
            diffusers pipeline, whose components named ``transformer...`` are replaced.
        policy: "duca", which needs to know nothing of the model; "auto", which learns its schedule from the first
            request of each kind and then keeps a given error; "toca", "fora", "taylorseer", "rfc", "speca", "gate",
            "none"; or a Policy object such as ``DuCa(interval=5, fresh_ratio=0.1)``; or the path of a JSON file that
            ``tune`` or ``calibrate`` made, or ``learnt().save``.
        backend: "inductor" (the compiler of torch.compile), "openvino" (on a CPU) or "eager".
        num_inference_steps: the number of steps of a request, which some schedules need. Not for a pipeline.
        timestep: the name of the timestep argument, where the graph does not show it.
        latent: the name of the argument that is denoised, where the graph does not show it; ``"added.x"`` within a
            dictionary.
        strict: raise BackendError where the backend cannot compile, instead of falling back to eager with a warning.
        mode: "reduce-overhead" replays each step of the Inductor backend as a CUDA graph, from static buffers; on a CPU
            it is the same as "default".
        cache_dtype: the dtype of caches, such as ``torch.bfloat16``, where features are wider; rounds them.
        cache_budget_bytes: the most bytes that the caches of one guidance pass of one request may hold. Where the
            policy needs more, caches are kept in bfloat16; where that is still too much, steps that would read the
            branches' caches skip the blocks instead, which takes a single cached tensor. A warning says so, at the
            first call of each shape.
        method: name of the method that a sampler calls at each step. Methods that call forward need not be named.

    Returns:
        An ``OptimizedModel``: an nn.Module with the same call signature, outputs, config, dtype, device and
        state_dict keys. For a pipeline, that same pipeline.

    Raises:
        UsageError: ``model`` is neither an nn.Module nor a pipeline with a transformer, is in training mode or
            optimized already, the backend is unknown, or a file holds no policy.
        BackendError: the backend's package is not installed.
        PolicyError: the policy is unknown, or cannot plan without ``num_inference_steps``. At the first call: the
            policy does not fit the model, or the budget is too small; the message says what the smallest would be.
    """
    chosen, engine = resolve_policy(policy), make_backend(backend, strict, mode)
    if policy == "duca":
        log.info('policy "duca" knows nothing of the model; policy="auto" learns from its first request')
    options = CacheOptions(cache_dtype, cache_budget_bytes)
    if is_pipeline(model):
        return _optimize_pipeline(model, chosen, engine, num_inference_steps, timestep, latent, options, method)
    check_plain(model)
    if num_inference_steps is not None:
        check_whole("num_inference_steps", num_inference_steps, least=1)
    next(chosen.steps(num_inference_steps))  # a policy that cannot plan raises now, not at the first call
    return OptimizedModel(
        model, chosen, engine, Requests(chosen, num_inference_steps), timestep, options, method, latent
    )


def _optimize_pipeline(
    pipe: Any,
    policy: Policy,
    backend: Backend,
    num_inference_steps: int | None,
    timestep: str | None,
    latent: str | None,
    options: CacheOptions,
    method: str,
) -> Any:
    """Replaces the transformers of ``pipe``, which share their requests, since one loop calls all of them."""
    if num_inference_steps is not None:
        raise UsageError("a pipeline's scheduler says how many steps a request has; leave num_inference_steps out")
    found = transformers(pipe)
    for model in found.values():
        check_plain(model)
    requests = Requests(policy, None, PipelineSchedule(pipe))
    for name, model in found.items():
        set_component(pipe, name, OptimizedModel(model, policy, backend, requests, timestep, options, method, latent))
    return pipe


def restore(target: Any) -> Any:
    """Undoes ``optimize``: puts a pipeline's original transformers back, or returns an optimized model's source.

    Raises:
        UsageError: ``target`` is not optimized.
    """
    if isinstance(target, OptimizedModel):
        return target.source
    found = transformers(target) if is_pipeline(target) else {}
    optimized = {name: model for name, model in found.items() if isinstance(model, OptimizedModel)}
    if not optimized:
        raise UsageError(f"this {type(target).__name__} is not optimized, so there is nothing to restore")
    for name, model in optimized.items():
        set_component(target, name, model.source)
    return target
