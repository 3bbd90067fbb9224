"""The settings that each method was published with, for each family of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from duca_compile.errors import PolicyError
from duca_compile.policies.base import Policy, Selection, SelectionKind
from duca_compile.policies.duca import DuCa
from duca_compile.policies.easycache import EasyCache
from duca_compile.policies.fora import FORA
from duca_compile.policies.freqca import FreqCa
from duca_compile.policies.hicache import HiCache
from duca_compile.policies.magcache import MagCache
from duca_compile.policies.schedule import Interval, Linear
from duca_compile.policies.seacache import SeaCache
from duca_compile.policies.speca import SpeCa
from duca_compile.policies.spectrum import Spectrum
from duca_compile.policies.taylorseer import TaylorSeer
from duca_compile.policies.toca import ToCa


def published(method: str, family: str, **settings: Any) -> Policy:
    """The policy of a method with the settings that its authors released for a family of models.

    For example ``published("duca", "dit", interval=3, fresh_ratio=0.05)``, ``published("fora", "dit", interval=3)`` or
    ``published("speca", "flux", max_taylor_steps=8)``. docs/methods lists the families and settings of each method.

    Args:
        method: "fora", "toca", "duca", "taylorseer", "hicache", "spectrum", "freqca", "speca", "magcache",
            "seacache" or "easycache".
        family: such as "dit", "pixart", "flux" or "hunyuanvideo".
        settings: parameters that differ from the released ones; which are accepted depends on the method.

    Returns:
        The policy.

    Raises:
        PolicyError: there is no such method, family or setting; the message lists the known ones.
    """
    try:
        build = _PUBLISHED[method.lower(), family.lower()]
    except KeyError:
        known = sorted(f"{m}/{f}" for m, f in _PUBLISHED)
        raise PolicyError(f"there are no published settings for {method}/{family}, only for {known}") from None
    try:
        return build(**settings)
    except TypeError as error:
        raise PolicyError(f"published({method!r}, {family!r}): {error}") from error


def _fora_dit(*, interval: int = 3) -> FORA:
    """FORA on DiT: full at the first step, and where the number of later steps is a multiple of the interval."""
    return FORA(Interval(interval, descending=True))


def _fora_flux(*, interval: int = 3) -> FORA:
    """FORA on FLUX: full at every ``interval``-th step, counted from the first."""
    return FORA(interval)


def _dit_interval(interval: int) -> Interval:
    """ToCa and DuCa on DiT: full steps are denser towards the end, and every second step where s/T is in [0.2, 0.4)."""
    return Interval(interval, factor=Linear(1.4, -0.8), forced=(0.2, 0.4, 2), descending=True)


def _toca_dit(
    *, interval: int = 3, fresh_ratio: float = 0.07, selection: SelectionKind = "attention", latched: bool = True
) -> ToCa:
    """ToCa on DiT with DDIM: more fresh tokens towards the end and in deeper blocks, with a bonus for 2x2 patches."""
    return ToCa(
        interval=_dit_interval(interval),
        fresh_ratio=fresh_ratio,
        selection=Selection(selection, staleness=0.25, patch_bonus=0.6, patch=2),
        step_factor=Linear(3.0, -4.0),
        block_factor=Linear(0.8, 0.4),
        kind_factor={"mlp": 2.5},
        latched=latched,
    )


def _toca_dit_ddpm(
    *, interval: int = 4, fresh_ratio: float = 0.07, selection: SelectionKind = "attention", latched: bool = True
) -> ToCa:
    """ToCa on DiT with DDPM, 250 steps: more fresh tokens towards the end and in earlier blocks."""
    return ToCa(
        interval=_dit_interval(interval),
        fresh_ratio=fresh_ratio,
        selection=Selection(selection, staleness=0.25, patch_bonus=0.6, patch=2),
        step_factor=Linear(1.4, -0.8),
        block_factor=Linear(1.8, -1.6),
        kind_factor={"mlp": 2.5},
        latched=latched,
    )


def _toca_pixart(
    *,
    interval: int = 3,
    fresh_ratio: float = 0.3,
    selection: SelectionKind = "entropy",
    paired: bool = True,
    latched: bool = True,
) -> ToCa:
    """ToCa on PixArt-alpha with DPM-Solver, 20 steps: tokens chosen by the cross-attention of both guidance halves."""
    return ToCa(
        interval=Interval(interval, factor=Linear(0.8, 0.4)),
        fresh_ratio=fresh_ratio,
        selection=Selection(selection, staleness=0.25, patch_bonus=0.4, patch=4, paired=paired),
        step_factor=Linear(1.9, -1.8),
        block_factor=Linear(1.6, -1.2),
        kind_factor={"mlp": 1.6, "cross_attention": 0.6},
        latched=latched,
    )


def _toca_flux(*, interval: int = 4, fresh_ratio: float = 0.1) -> ToCa:
    """ToCa on FLUX: three full steps at the start. Single blocks are reused; the released code recomputes a part."""
    return ToCa(
        interval=Interval(interval, first_full=3),
        fresh_ratio=fresh_ratio,
        selection=Selection("attention", staleness=0.25),
        block_factor=Linear(1.5, -1.0),
        kind_factor={"mlp": 0.4},
    )


def _duca_dit(
    *, interval: int = 3, fresh_ratio: float = 0.05, selection: SelectionKind = "attention", latched: bool = True
) -> DuCa:
    """DuCa on DiT with DDIM: more full steps and fresh tokens towards the end, with a bonus for 2x2 patches."""
    return DuCa(
        interval=_dit_interval(interval),
        fresh_ratio=fresh_ratio,
        selection=Selection(selection, staleness=0.25, patch_bonus=0.8, patch=2),
        step_factor=Linear(3.0, -4.0),
        block_factor=Linear(0.8, 0.4),
        kind_factor={"mlp": 2.5},
        latched=latched,
    )


def _duca_pixart(
    *, interval: int = 3, fresh_ratio: float = 0.75, selection: SelectionKind = "v_norm", paired: bool = True
) -> DuCa:
    """DuCa on PixArt-alpha: a constant interval, value norms averaged over both halves of guidance."""
    return DuCa(
        interval=interval,
        fresh_ratio=fresh_ratio,
        selection=Selection(selection, staleness=0.25, patch_bonus=0.4, patch=4, paired=paired),
        step_factor=Linear(1.9, -1.8),
        block_factor=Linear(1.6, -1.2),
        kind_factor={"mlp": 1.6, "cross_attention": 0.6},
    )


def _duca_hunyuan_video(*, interval: int = 5, fresh_ratio: float = 0.1) -> DuCa:
    """DuCa on HunyuanVideo, from the TaylorSeer repository: random tokens, no staleness."""
    return DuCa(interval, fresh_ratio, "random")


def _taylorseer(first_full_steps: int, interval: int, max_order: int) -> Callable[..., TaylorSeer]:
    def build(*, interval: int = interval, max_order: int = max_order) -> TaylorSeer:
        return TaylorSeer(interval, max_order, first_full_steps)

    return build


def _speca(released: SpeCa) -> Callable[..., SpeCa]:
    """The released parameters, each of which an argument can replace; ``compat="paper"`` gives the paper's rule."""

    def build(**settings: Any) -> SpeCa:
        return replace(released, **settings)

    return build


def _hicache_flux(*, interval: int = 7, scale: float = 0.5) -> HiCache:
    """HiCache on FLUX: three full steps at the start, second order."""
    return HiCache(interval, 2, scale, 3)


def _spectrum(*, growth: float = 0.75, share: float = 1.0) -> Spectrum:
    """Spectrum: the same for FLUX, SD3.5, Wan2.1 and HunyuanVideo; a growth of 3 for more speed."""
    return Spectrum(growth, share=share)


def _freqca_flux(*, interval: int = 6, grid: tuple[int, int] | None = None) -> FreqCa:
    """FreqCa on FLUX: a DCT over the grid of image tokens, which FLUX's graph does not show; 64 x 64 at 1024 pixels."""
    return FreqCa(interval, grid=grid)


def _freqca_qwen_image(*, interval: int = 6) -> FreqCa:
    """FreqCa on Qwen-Image: an FFT over the tokens in a row."""
    return FreqCa(interval, transform="fft")


def _seacache_flux(*, threshold: float = 0.3, grid: tuple[int, int] | None = None) -> SeaCache:
    """SeaCache on FLUX: a threshold of 0.3, about twice as fast, or 0.6, about three times."""
    return SeaCache(threshold, pure_noise=1.0, grid=grid)


def _seacache_video(*, threshold: float = 0.2, first_full_steps: int = 1) -> SeaCache:
    """SeaCache on Wan2.1 and HunyuanVideo: 0.2; for more speed 0.35 (Wan 1.3B) or 0.4 (Wan 14B, HunyuanVideo)."""
    return SeaCache(threshold, exponent=3.0, first_full_steps=first_full_steps)


def _easycache(released: EasyCache) -> Callable[..., EasyCache]:
    def build(**settings: Any) -> EasyCache:
        return replace(released, **settings)

    return build


def _magcache_flux(
    *,
    threshold: float = 0.24,
    max_cached_steps: int = 5,
    first_share: float = 0.1,
    always_full: tuple[int, ...] = (11,),
) -> MagCache:
    """MagCache on FLUX, from 28 steps with a guidance of 3.5; the released code computes step 11 of 28 in any case."""
    return MagCache(_MAGCACHE_FLUX, threshold, max_cached_steps, first_share, always_full)


_MAGCACHE_FLUX = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)


_PUBLISHED: dict[tuple[str, str], Callable[..., Policy]] = {
    ("fora", "dit"): _fora_dit,
    ("fora", "flux"): _fora_flux,
    ("toca", "dit"): _toca_dit,
    ("toca", "dit-ddpm"): _toca_dit_ddpm,
    ("toca", "pixart"): _toca_pixart,
    ("toca", "flux"): _toca_flux,
    ("duca", "dit"): _duca_dit,
    ("duca", "pixart"): _duca_pixart,
    ("duca", "hunyuanvideo"): _duca_hunyuan_video,
    ("taylorseer", "dit"): _taylorseer(first_full_steps=2, interval=4, max_order=4),
    ("taylorseer", "flux"): _taylorseer(first_full_steps=3, interval=6, max_order=1),
    **{("spectrum", family): _spectrum for family in ("flux", "sd3", "wan", "hunyuanvideo")},
    ("hicache", "flux"): _hicache_flux,
    ("freqca", "flux"): _freqca_flux,
    ("freqca", "qwen-image"): _freqca_qwen_image,
    ("seacache", "flux"): _seacache_flux,
    ("seacache", "wan"): _seacache_video,
    ("seacache", "hunyuanvideo"): _seacache_video,
    ("easycache", "wan"): _easycache(EasyCache(0.05, 10)),
    ("easycache", "hunyuanvideo"): _easycache(EasyCache(0.025, 5)),
    ("magcache", "flux"): _magcache_flux,
    ("taylorseer", "hunyuanvideo"): _taylorseer(first_full_steps=1, interval=5, max_order=1),
    ("speca", "dit"): _speca(SpeCa(4, 0.1, 0.01, 0.01, 2, 5, 3, "released")),
    ("speca", "flux"): _speca(SpeCa(2, 7.0, 0.3, 0.1, 2, 8, 3, "released", "branch")),
    ("speca", "hunyuanvideo"): _speca(SpeCa(1, 1.0, 0.1, 0.1, 4, 12, 1, "released", "branch")),
}
