"""Other libraries' caches on the same models: cache-dit, and the hooks of diffusers.

Each works on a copy of the modules with the same weights. Hooks are applied by each library's own functions. Private
API is used in one place only, to set the schedule of a peer that has none.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from measure import sharing_weights
from torch import Tensor, nn

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
Mask = tuple[bool, ...]  # whether each step is computed


def periodic(steps: int, interval: int) -> Mask:
    """The mask of the first step and every ``interval``-th after it, as in duca_compile's policies."""
    return tuple(step % interval == 0 for step in range(steps))


@dataclass(frozen=True)
class Setting:
    """The settings of a peer's request; each peer reads those that it has.

    ``mask`` sets the schedule; without it, the peer decides by its ``threshold``.
    """

    mask: Mask | None = None
    threshold: float = 0.0
    steps: int = 50
    interval: int = 5
    warmup: int = 1  # computed steps at the start


class Peer(ABC):
    """A model with the cache of another library."""

    module = ""  # the package that must be installed

    def __init__(self, model: nn.Module) -> None:
        self.model = sharing_weights(model)

    @abstractmethod
    def start(self, setting: Setting) -> None:
        """Drops the state of the last request, and applies ``setting`` to the next."""

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.module) is not None


class CacheDit(Peer):
    """cache-dit's DBCache with one block before the decision, the minimum, and optionally one of its calibrators.

    ``calibrator`` is "taylorseer-1" for order 1, "foca" or "dmd".
    """

    module = "cache_dit"

    def __init__(self, model: nn.Module, calibrator: str = "", before: int = 1, after: int = 0) -> None:
        super().__init__(model)
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
        import cache_dit

        self._library, self._calibrator, self._blocks = cache_dit, calibrator, (before, after)
        known = cache_dit.BlockAdapterRegister.is_supported(self.model)
        cache_dit.enable_cache(self.model if known else self._adapter(), **self._configs(Setting()))

    def _adapter(self) -> Any:
        """The adapter; cache-dit knows SD3 only by the name of its pipeline."""
        from cache_dit import BlockAdapter, ForwardPattern

        blocks = self.model.transformer_blocks
        return BlockAdapter(transformer=self.model, blocks=blocks, forward_pattern=ForwardPattern.Pattern_1)

    def _configs(self, setting: Setting) -> dict[str, Any]:
        from cache_dit import DBCacheConfig

        before, after = self._blocks
        dynamic = setting.mask is None
        mask = setting.mask or tuple(step < setting.warmup for step in range(setting.steps))
        config = DBCacheConfig(
            Fn_compute_blocks=before,
            Bn_compute_blocks=after,
            max_warmup_steps=0,  # the mask already has the computed steps at the start
            residual_diff_threshold=setting.threshold,
            num_inference_steps=len(mask),
            steps_computation_mask=[int(computed) for computed in mask],
            steps_computation_policy="dynamic" if dynamic else "static",
        )
        return {"cache_config": config, "calibrator_config": self._calibration()}

    def _calibration(self) -> Any:
        from cache_dit.caching.cache_contexts.calibrators import (
            DMDCalibratorConfig,
            FoCaCalibratorConfig,
            TaylorSeerCalibratorConfig,
        )

        kind, _, order = self._calibrator.partition("-")
        if kind == "taylorseer":
            return TaylorSeerCalibratorConfig(taylorseer_order=int(order))
        return {"": lambda: None, "foca": FoCaCalibratorConfig, "dmd": DMDCalibratorConfig}[kind]()

    def start(self, setting: Setting) -> None:
        self._library.refresh_context(self.model, **self._configs(setting))


class _Hooks(Peer):
    """Common to diffusers' hooks: the cache context that they need, and resetting them."""

    module = "diffusers.hooks"

    def _begin(self) -> None:
        """Does what ``cache_context`` of diffusers' models does; DiT and PixArt lack that method."""
        from diffusers.hooks import HookRegistry
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        registry = HookRegistry.check_if_exists_or_initialize(self.model)
        registry.reset_stateful_hooks(recurse=True)
        _set_cache_context(self.model, CacheContext("request"))


class FirstBlockCache(_Hooks):
    """diffusers' FirstBlockCache.

    It has no schedule. With a mask, its decision is computed as usual, and then replaced by the mask's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
        from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

        apply_first_block_cache(self.model, FirstBlockCacheConfig(threshold=0.0))
        first = next(_blocks(self.model))
        self._head = first._diffusers_hook.hooks[_FBC_LEADER_BLOCK_HOOK]
        self._decide = self._head._should_compute_remaining_blocks
        self._mask: Iterator[bool] | None = None
        self._head._should_compute_remaining_blocks = torch.compiler.disable(self._decided)

    def _decided(self, residual: Tensor) -> bool:
        own = self._decide(residual)
        return bool(own if self._mask is None else next(self._mask))

    def start(self, setting: Setting) -> None:
        self._begin()
        self._head.threshold = setting.threshold
        self._mask = iter(setting.mask) if setting.mask else None


class TaylorSeerHooks(_Hooks):
    """diffusers' TaylorSeer: "lite" forecasts the last projection and runs no block, otherwise attention and MLPs.

    Its own patterns match nothing in DiT, and no MLP in any model, so the modules are named here.
    """

    def __init__(self, model: nn.Module, order: int = 1, lite: bool = True) -> None:
        super().__init__(model)
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache
        from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK

        forecast, skipped = (_lite if lite else _branches)(self.model)
        config = TaylorSeerCacheConfig(
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=forecast,
            skip_predict_identifiers=skipped or None,
        )
        apply_taylorseer_cache(self.model, config)
        registries = [vars(module).get("_diffusers_hook") for module in self.model.modules()]
        hooks = [registry.hooks.get(_TAYLORSEER_CACHE_HOOK) for registry in registries if registry is not None]
        self._hooks = [hook for hook in hooks if hook is not None]
        assert self._hooks, "diffusers' TaylorSeer matches no module"

    def start(self, setting: Setting) -> None:
        self._begin()
        for hook in self._hooks:
            hook.cache_interval, hook.disable_cache_before_step = setting.interval, setting.warmup


def _lite(model: nn.Module) -> tuple[list[str], list[str]]:
    """The modules for its lite mode, whose pattern is ``proj_out``; DiT's is called ``proj_out_2``.

    The last block of SD3 returns None for the text, which the hook cannot cache, so that block runs.
    """
    last = "proj_out" if hasattr(model, "proj_out") else "proj_out_2"
    whole = [
        f"{name}.{i}"
        for name in BLOCK_LISTS
        for i, block in enumerate(getattr(model, name, ()))
        if not getattr(block, "context_pre_only", False)
    ]
    return [last], [name.replace(".", r"\.") for name in whole]


def _branches(model: nn.Module) -> tuple[list[str], list[str]]:
    return [rf"({'|'.join(BLOCK_LISTS)})\.\d+\.(attn\d?|ff|ff_context|proj_mlp)"], []


def _blocks(model: nn.Module) -> Iterator[Any]:
    for name in BLOCK_LISTS:
        yield from getattr(model, name, ())


@contextmanager
def counted_blocks(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the blocks that are executed inside, by calls of the first projection of each block's attention."""
    runs = 0

    def ran(*_: Any) -> None:
        nonlocal runs
        runs += 1

    watched = [next(part for name, part in block.named_modules() if name.endswith("to_q")) for block in _blocks(model)]
    handles = [part.register_forward_pre_hook(ran) for part in watched]
    try:
        yield lambda: runs
    finally:
        for handle in handles:
            handle.remove()


def blocks(model: nn.Module) -> int:
    return sum(1 for _ in _blocks(model))
