"""Speed and fidelity on the trained model in the package: duca_compile's policies, other libraries, fewer steps.

    python benchmarks/pareto.py --out benchmarks/results/pareto.json

Speed is the wall-clock time of the plain model under ``torch.compile`` over that of the setting, in the same round.
Fidelity is the PSNR, over the pixel range, to that model's images from the same noise with all steps; it measures
change, not quality. Each round has a seed of its own and one image of each class. Other libraries run under
``torch.compile`` or, with --modes, also under eager; then the faster counts. A picture is written beside the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compare import EXACT, OK, frontier, matches, peers_of, speed, split
from measure import Model, Spread, message, of_pairs, surroundings, timed, write
from peers import CacheDit, FirstBlockCache, Peer, Setting, TaylorSeerHooks, periodic
from rich.console import Console
from rich.table import Table
from runners import MODES, configure
from suite import ABSENT, in_process
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, RFC, Calibration, DuCa, Policy, ResidualGate, TaylorSeer, Uncached, published
from duca_compile.app.demo import DemoModel
from duca_compile.errors import PolicyError

BASE_EVERY = 4
INTERVALS = (2, 3, 4, 5, 6, 7, 8)
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
CALIBRATED_FULL = (0.5, 0.46, 0.44, 0.4, 0.37, 0.34, 0.3, 0.26, 0.23, 0.2, 0.18, 0.16, 0.14, 0.12, 0.1)  # of all steps
CALIBRATION_SEED, CALIBRATION_LOOPS = 970_000, 2  # no round has this noise
PRESETS = ("slow", "medium", "fast", "ultra")
COLORS = {"duca_compile": "#c0392b", "cache-dit": "#2e86c1", "diffusers": "#28a745", "fewer steps": "#7f8c8d"}
Sample = Callable[[int], Tensor]  # returns the images of a seed


@dataclass(frozen=True)
class Way:
    """One way of making the images, in one mode."""

    method: str
    setting: str
    mode: str
    sample: Sample


# ---- duca_compile


def label(policy: Policy) -> str:
    if not isinstance(policy, DuCa) or policy.selection is None:
        return policy.name
    kind = policy.selection if isinstance(policy.selection, str) else policy.selection.kind
    return f"{policy.name} {kind}, ratio {policy.fresh_ratio:g}, {policy.first} first"


def policies(measured: Calibration) -> dict[str, Policy]:
    """The policies of the sweep, by label."""
    chosen: list[Policy] = [TaylorSeer(n, order, lite=True) for order in (1, 2, 3) for n in INTERVALS]
    chosen += [TaylorSeer(n, order) for order in (1, 2) for n in INTERVALS[1::2]]
    chosen += [RFC(threshold, max_order=order) for order in (1, 2) for threshold in THRESHOLDS]
    chosen += [ResidualGate(threshold) for threshold in THRESHOLDS]
    chosen += [FORA(interval) for interval in INTERVALS[1::2]]
    chosen += [DuCa(interval, fresh_ratio=0.1) for interval in INTERVALS]
    chosen += [DuCa(interval, fresh_ratio=0.1, first="skip") for interval in (3, 5)]
    chosen += [DuCa(interval, fresh_ratio=0.4, selection="v_norm") for interval in (3, 5)]
    found = {label(policy): policy for policy in [Uncached(), *chosen]}
    for count in CALIBRATED_FULL:
        policy = measured.policy(math.ceil(measured.steps * count))
        found[policy.name] = policy
    found |= {f"published DuCa-DiT (N={n})": published("duca", "dit", interval=n) for n in (3, 4)}
    return found | {f"published FORA-DiT (N={n})": published("fora", "dit", interval=n) for n in (3, 5)}


def own_ways(demo: DemoModel, steps: int, every: int, quick: bool, again: str | None) -> Iterator[Way]:
    def calibrating(drop_in: nn.Module, number: int) -> None:
        demo.sample(drop_in, steps, demo.noise(CALIBRATION_SEED + number), _ignore)

    chosen = policies(duca_compile.calibrate(demo.transformer, calibrating, loops=1 if quick else CALIBRATION_LOOPS))
    for name in [*chosen][::every] if again is None else [name for name in chosen if again in name]:
        policy, backend = chosen[name], "eager" if quick else "inductor"
        try:
            model = duca_compile.optimize(demo.transformer, policy, backend, strict=True)
        except PolicyError:  # its pattern depends on the number of steps
            model = duca_compile.optimize(demo.transformer, policy, backend, steps, strict=True)

        def sample(seed: int, model: Any = model) -> Tensor:
            model.reset()
            images = demo.sample(model, steps, demo.noise(seed), _ignore)
            model.reset()
            return images

        yield Way("duca_compile", name, "compile", sample)


def fewer_ways(demo: DemoModel, base: Model, steps: int, every: int) -> Iterator[Way]:
    counts = sorted({math.ceil(steps / share) for share in (1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)}, reverse=True)
    for count in counts[::every]:

        def sample(seed: int, count: int = count) -> Tensor:
            return demo.sample(base, count, demo.noise(seed), _ignore)

        yield Way("fewer steps", f"{count} steps", "compile", sample)


# ---- other libraries


def _masks(steps: int) -> dict[str, Setting]:
    return {f"N={n}": Setting(mask=periodic(steps, n)) for n in INTERVALS}


def _presets(steps: int) -> dict[str, Setting]:
    import cache_dit

    masks = {name: cache_dit.steps_mask(total_steps=steps, mask_policy=name) for name in PRESETS}
    return {f"mask {name}": Setting(mask=tuple(map(bool, mask))) for name, mask in masks.items()}


def _thresholds(steps: int, chosen: Iterable[float] = THRESHOLDS, warmup: int = 1) -> dict[str, Setting]:
    return {f"threshold {each:g}": Setting(threshold=each, steps=steps, warmup=warmup) for each in chosen}


def _intervals(steps: int) -> dict[str, Setting]:
    return {f"N={n}": Setting(interval=n) for n in INTERVALS}


@dataclass(frozen=True)
class Group:
    """The settings that share one copy of the model with hooks; ``settings`` is a function of the number of steps."""

    library: str
    method: str
    make: Callable[[nn.Module], Peer]
    settings: Callable[[int], dict[str, Setting]]
    available: Callable[[], bool]


def _cache_dit(calibrator: str, settings: Callable[[int], dict[str, Setting]]) -> Group:
    name = f"DBCache {calibrator}".strip()
    return Group("cache-dit", name, lambda model: CacheDit(model, calibrator), settings, CacheDit.installed)


def _seer(order: int, lite: bool) -> Group:
    name = f"TaylorSeer{' lite' if lite else ''}, order {order}"
    return Group("diffusers", name, lambda m: TaylorSeerHooks(m, order, lite), _intervals, TaylorSeerHooks.installed)


GROUPS = (
    _cache_dit("", lambda steps: _masks(steps) | _presets(steps) | _thresholds(steps)),
    _cache_dit("taylorseer-1", lambda steps: _masks(steps) | _presets(steps) | _thresholds(steps)),
    _cache_dit("taylorseer-2", lambda steps: _masks(steps) | _presets(steps)),
    _cache_dit("dmd", _masks),
    Group("diffusers", "FirstBlockCache", FirstBlockCache, _thresholds, FirstBlockCache.installed),
    *(_seer(order, lite) for lite in (True, False) for order in (1, 2)),
)


def peer_ways(
    demo: DemoModel, group: Group, steps: int, every: int, model: Peer, calls: dict[str, Model]
) -> Iterator[Way]:
    chosen = group.settings(steps)
    for name in [*chosen][::every]:
        for mode, call in calls.items():

            def sample(seed: int, call: Any = call, setting: Setting = chosen[name]) -> Tensor:
                model.start(setting)
                return demo.sample(call, steps, demo.noise(seed), _ignore)

            yield Way(group.method, name, mode, sample)


def _ignore(seconds: float) -> None:
    pass


# ---- measuring


def measure(base: Sample, ways: list[Way], seeds: int) -> list[dict[str, Any]]:
    """Runs each way once per seed, after a run that compiles; a failure becomes a point that says so.

    ``base`` runs again before every few ways, so that times are compared with a recent one.
    """
    status = dict.fromkeys(ways, OK)
    seconds: dict[Way, list[float]] = defaultdict(list)
    bases: dict[Way, list[float]] = defaultdict(list)
    errors: dict[Way, float] = defaultdict(float)
    base(0)
    for way in ways:
        _attempt(way, 0, status)
    for seed in range(seeds):
        for index, way in enumerate(ways):
            if index % BASE_EVERY == 0:
                taken, reference = _timed(base, seed)
            result = _attempt(way, seed, status)
            if result is not None:
                bases[way].append(taken)
                seconds[way].append(result[0])
                errors[way] += (result[1] - reference).square().mean().item() / seeds
    points = []
    for way in ways:
        point: dict[str, Any] = {"method": way.method, "setting": way.setting, "mode": way.mode, "status": status[way]}
        if status[way] == OK:
            point |= {
                "seconds": asdict(Spread.of(seconds[way])),
                "speedup": asdict(of_pairs(bases[way], seconds[way])),
                "psnr": 10 * math.log10(4 / max(errors[way], 1e-12)),
            }
        points.append(point)
    return points


def _timed(sample: Sample, seed: int) -> tuple[float, Tensor]:
    images: list[Tensor] = []
    return timed(lambda: images.append(sample(seed))).wall, images[0]


def _attempt(way: Way, seed: int, status: dict[Way, str]) -> tuple[float, Tensor] | None:
    if status[way] != OK:
        return None
    try:
        return _timed(way.sample, seed)
    except Exception as error:
        status[way] = message(error)
        return None


def perform(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of one group for all numbers of steps, measured in this process."""
    demo, quick, every = DemoModel.load(), task["quick"], task["every"]
    plain = demo.transformer if quick else torch.compile(demo.transformer, fullgraph=True)
    modes = ["eager"] if quick else task["modes"]
    group = None if task["group"] is None else GROUPS[task["group"]]
    peer = group.make(demo.transformer) if group else None
    calls: dict[str, Model] = {}
    if peer:
        calls = {mode: peer.model if mode == "eager" else torch.compile(peer.model) for mode in modes}
    points = []
    for steps in task["steps"]:
        if group and peer:
            ways = [*peer_ways(demo, group, steps, task["every_of_others"], peer, calls)]
        else:
            ways = [*own_ways(demo, steps, every, quick, task["again"])]
            ways += fewer_ways(demo, plain, steps, every) if task["again"] is None else ()

        def base(seed: int, steps: int = steps) -> Tensor:
            return demo.sample(plain, steps, demo.noise(seed), _ignore)

        library = {"library": group.library} if group else {}
        for point in measure(base, ways, task["seeds"]):
            points.append({"steps": steps, "library": point["method"], **library, **point})
    return points


# ---- tables and pictures


def table(points: list[dict[str, Any]], steps: int) -> Table:
    by_library = split(points, steps)
    title = f"DDIM-{steps}: the best of the others, and the fastest of ours at an equal or higher PSNR"
    result = Table("other", "mode", "speed-up", "PSNR", "ours", "speed-up", "PSNR", "ratio", title=title)
    for match in matches(by_library["duca_compile"], frontier(peers_of(by_library))):
        other, own = match.other, match.own
        name = f"{other['library']}, {other['method']}, {other['setting']}"
        cells = [name, other["mode"], f"{speed(other):.2f}x", f"{other['psnr']:.1f} dB"]
        cells += [own["setting"], f"{speed(own):.2f}x", f"{own['psnr']:.1f} dB"] if own else ["none", "", ""]
        result.add_row(*cells, f"{match.ratio:.2f}")
    return result


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws time against PSNR, a panel for each number of steps; lines join the best points of each library."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(6.5 * len(found["steps"]), 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for index, steps in enumerate(found["steps"]):
        axes = figure.add_subplot(1, len(found["steps"]), index + 1)
        for library, points in split(found["points"], steps).items():
            shown = [point for point in points if point["psnr"] < EXACT]
            if shown:
                times, psnrs = ([1 / speed(point) for point in shown], [point["psnr"] for point in shown])
                axes.scatter(times, psnrs, s=14, alpha=0.5, color=COLORS[library])
                edge = frontier(shown)
                line = ([1 / speed(point) for point in edge], [point["psnr"] for point in edge])
                axes.plot(*line, color=COLORS[library], label=library)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"DDIM, {steps} steps")
        axes.set_xlabel("time, of torch.compile of the plain model")
        axes.set_ylabel("PSNR to its images, dB")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, format="png")


def merged(known: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The points of ``known``, with those of ``new`` in place of points with the same name."""
    names = ("steps", "library", "method", "setting", "mode")
    points = {tuple(point[name] for name in names): point for point in (*known["points"], *new["points"])}
    return {**known, "points": [*points.values()], "again": new["surroundings"]["commit"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="JSON file for the results; a PNG of the same name is written beside it"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--seeds", type=int, default=3, help="rounds, each with one image of each class")
    parser.add_argument("--every", type=int, default=1, help="run only every n-th setting of ours")
    parser.add_argument("--every-of-others", type=int, help="the same for other libraries; by default, as --every")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["compile"], help="modes of other libraries")
    parser.add_argument(
        "--again", help="run only our settings whose name contains this, and keep the other points of --out"
    )
    parser.add_argument("--quick", action="store_true", help="a few points, under eager, one seed")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)  # for its own processes
    args = parser.parse_args()
    if args.task is not None:
        configure()
        print(json.dumps(perform(args.task)))
        return
    seeds, every = (1, 6) if args.quick else (args.seeds, args.every)
    every_of_others = args.every_of_others or every
    console = Console(width=170)
    found: dict[str, Any] = {
        "what": __doc__.splitlines()[0],
        "surroundings": surroundings(1),
        "load_average_at_start": os.getloadavg(),
        "steps": args.steps,
        "seeds": seeds,
        "every": every,
        "every_of_others": every_of_others,
        "modes": args.modes,
        "classes": len(DemoModel.load().class_names),
        "failed": {},
        "points": [],
    }
    with tempfile.TemporaryDirectory(prefix="duca_pareto_") as folder:
        for index in (None, *range(len(GROUPS))) if args.again is None else (None,):
            group = None if index is None else GROUPS[index]
            name = f"{group.library}, {group.method}" if group else "duca_compile and fewer steps"
            if group and not group.available():
                found["failed"][name] = ABSENT
                continue
            task = {"group": index, "steps": args.steps, "seeds": seeds, "quick": args.quick, "every": every}
            task |= {"every_of_others": every_of_others, "modes": args.modes, "again": args.again}
            done = in_process(task, Path(folder), Path(__file__))
            if done["status"] != OK:
                found["failed"][name] = done["status"]
            found["points"] += done.get("found", [])
            found["load_average_at_end"] = os.getloadavg()
            console.print(f"{name}: {done['status']}")
            if args.out and args.again is None:
                write(found, args.out)  # what is stopped later has these
    if args.again is not None:
        found = merged(json.loads(args.out.read_text()), found)
    for steps in args.steps:
        console.print(table(found["points"], steps))
    if args.out:
        write(found, args.out)
        draw(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
