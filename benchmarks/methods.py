"""Compares all methods at matched FLOPs on the trained model in the package, with fewer plain steps as the baseline.

    python benchmarks/methods.py --out benchmarks/results/methods.json

Writes JSON, CSV, Markdown and a picture of quality against time. Each round makes one image of each class, uncached and
then by every method from the same noise; all measures are relative to the uncached images of that round. The results of
each round are kept in ``--state``, so the command can be stopped at any time (or by ``--minutes``), and continues where
it was, also with more images, levels or numbers of steps.

The features are those of the judge of ``examples/eval_demo.py``, a CNN trained on the real training images of
Fashion-MNIST. It is stored in ``--judge``, and trained from ``--data`` if it does not exist.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Spread, of_pairs, surroundings, timed, write
from report import methods_tables
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, RFC, Calibration, DisCa, DuCa, Policy, ResidualGate, SpeCa, TaylorSeer, ToCa, Uncached
from duca_compile.app.demo import DemoModel
from duca_compile.explanation import Explanation
from duca_compile.methods.training import TrainingSettings, train_predictor
from duca_compile.policies import predictor as files
from duca_compile.policies.predictor import Predictor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from eval_demo import Judge, frechet, load_judge

RESULTS = Path(__file__).parent / "results"
FEWER = "fewer steps"
SEED_STRIDE, SEARCH_SEED, TRAINING_SEED, CALIBRATION_SEED = 1000, 900_000, 950_000, 970_000  # disjoint
THRESHOLDS = (0.01, 30.0)
RESAMPLES = 200
QUALITIES = {"psnr": "PSNR, dB", "perceptual": "perceptual distance"}
SPECA_START = 1  # full steps, as TaylorSeer's
SPECA_DRAFTS = 2  # in a row at most, times the level
KEY = "ways"  # of the JSON in the file of a round
TRIALS, CLOSE = 6, 0.03  # the most loops of a search for a threshold, and the relative error in FLOPs that ends it
TRAINING = TrainingSettings(loops=10, updates=40)  # of DisCa's predictor
TRAINING_STEPS = 20
CALIBRATION_LOOPS = 2
ABOUT = "about.json"

Found = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One setting of a method; without a policy, ``plain`` steps of the model itself."""

    method: str
    setting: str
    level: int  # the target FLOPs are those of the uncached loop divided by this
    policy: Policy | None
    plain: int = 0

    @property
    def key(self) -> str:
        return f"{self.method}, {self.setting}"


# ---- settings


def fixed(learned: Predictor | None, interval: int) -> dict[str, Policy]:
    """The methods whose schedule is known in advance, by name; DisCa if there is a predictor."""
    found: dict[str, Policy] = {
        "FORA": FORA(interval),
        "ToCa": ToCa(interval),
        "DuCa": DuCa(interval),
        "TaylorSeer": TaylorSeer(interval, first_full_steps=1),
        "TaylorSeer lite": TaylorSeer(interval, first_full_steps=1, lite=True),
        "TaylorSeer relational": TaylorSeer(interval, first_full_steps=1, relational=True),
    }
    return found if learned is None else found | {"DisCa": DisCa(learned, interval)}


def speca(threshold: float, level: int, decay: float) -> Policy:
    """SpeCa, which starts as TaylorSeer does, with at least as many drafts in a row as the target FLOPs need.

    A verified draft costs a block, so these are more than the steps between TaylorSeer's full ones.
    """
    return SpeCa(
        base_threshold=threshold,
        decay_rate=decay,
        first_full_steps=SPECA_START,
        max_taylor_steps=SPECA_DRAFTS * level,
    )


# those that decide at run time, from a threshold and the level
ADAPTIVE: dict[str, Callable[[float, int], Policy]] = {
    "RFC": lambda threshold, level: RFC(threshold),
    "SpeCa": lambda threshold, level: speca(threshold, level, decay=0.01),
    "SpeCa constant": lambda threshold, level: speca(threshold, level, decay=1.0),
    "ResidualGate": lambda threshold, level: ResidualGate(threshold),
}
CALIBRATED = "Calibrated"
METHODS = [*fixed(None, 2), CALIBRATED, "DisCa", *ADAPTIVE]


def plain_counts(steps: int, level: int) -> list[int]:
    """Numbers of plain steps from the level's FLOPs up to 20 % more, which some methods take."""
    return sorted({steps // level, round(1.1 * steps / level), math.ceil(1.2 * steps / level)})


@dataclass(frozen=True)
class Settings:
    """Chooses the settings of all methods for one number of steps, so that their FLOPs match."""

    demo: DemoModel
    learned: Predictor | None
    steps: int
    backend: str
    known: Path  # file of the thresholds found so far
    trials: int

    def ways(self, levels: list[int], methods: list[str]) -> list[Way]:
        found: list[Way] = []
        for level in levels:
            found += [Way(FEWER, f"{n} steps", level, None, n) for n in plain_counts(self.steps, level)]
            for method in methods:
                made = self._adaptive if method in ADAPTIVE else self._fixed
                found.append(self._calibrated(level) if method == CALIBRATED else made(method, level))
        return [*{way.key: way for way in reversed(found)}.values()][::-1]  # the first of equal settings at two levels

    @cached_property
    def _explained(self) -> Explanation:
        noise = self.demo.noise(0)
        labels = torch.arange(2 * len(noise)) % len(noise)
        timestep = torch.full((2 * len(noise),), 500)
        both = torch.cat([noise, noise])
        return duca_compile.explain(self.demo.transformer, both, timestep=timestep, class_labels=labels)

    def _calibrated(self, level: int) -> Way:
        """As many full steps as the level allows; forecasts cost almost nothing."""
        count = max(1, round(self.steps / level))
        return Way(CALIBRATED, f"{count} full", level, self._measured.policy(count))

    @cached_property
    def _measured(self) -> Calibration:
        def sample(drop_in: nn.Module, number: int) -> None:
            self.demo.sample(drop_in, self.steps, self.demo.noise(CALIBRATION_SEED + number), ignore)

        return duca_compile.calibrate(self.demo.transformer, sample, loops=CALIBRATION_LOOPS)

    def _fixed(self, method: str, level: int) -> Way:
        """The interval with the FLOPs closest to the level's."""

        def distance(interval: int) -> float:
            report = self._explained.schedule(fixed(self.learned, interval)[method], self.steps)
            return abs(math.log(level / report.ideal_speedup))

        interval = min(range(2, max(3, self.steps // 2)), key=distance)
        return Way(method, f"N={interval}", level, fixed(self.learned, interval)[method])

    def _adaptive(self, method: str, level: int) -> Way:
        known: dict[str, float] = json.loads(self.known.read_text()) if self.known.exists() else {}
        name = f"{method}, {self.steps} steps, 1/{level}"
        if name not in known:
            known[name] = self._searched(method, level)
            write(known, self.known)
        return Way(method, f"threshold {known[name]:g}", level, ADAPTIVE[method](known[name], level))

    def _searched(self, method: str, level: int) -> float:
        """The threshold with the FLOPs closest to the level's, by bisection on noise that is not measured later."""
        low, high = map(math.log, THRESHOLDS)
        tried: dict[float, float] = {}
        for _ in range(self.trials):
            threshold = float(f"{math.exp((low + high) / 2):.4g}")
            policy = ADAPTIVE[method](threshold, level)
            model = duca_compile.optimize(self.demo.transformer, policy, self.backend, self.steps, strict=True)
            self.demo.sample(model, self.steps, self.demo.noise(SEARCH_SEED), ignore)
            share = sum(each.flops for each in model.history) / (self.steps * self._explained.flops)
            tried[threshold] = abs(math.log(share * level))
            if tried[threshold] < CLOSE:
                break
            low, high = (math.log(threshold), high) if share * level > 1 else (low, math.log(threshold))
        return min(tried, key=lambda each: tried[each])


def trained(demo: DemoModel, path: Path, settings: TrainingSettings, steps: int) -> Predictor:
    """DisCa's predictor; training continues where it was."""

    def sample(drop_in: nn.Module, number: int) -> None:
        demo.sample(drop_in, steps, demo.noise(TRAINING_SEED + number), ignore)

    return train_predictor(demo.transformer, sample, path, settings, resume=path.exists())


def ignore(seconds: float) -> None:
    pass


# ---- measuring


@torch.no_grad()
def perceptual(judge: Judge, images: Tensor, references: Tensor) -> Tensor:
    """Distance of each image (n, 1, size, size) to its reference, (n,).

    As in LPIPS (arXiv 1801.03924) without learned weights: after each of the judge's three convolution blocks, channels
    are normalized at each position; the squared differences are summed over channels and averaged over positions, and
    the three results are added.
    """
    total = torch.zeros(len(images))
    for layer in list(judge.features)[:12]:
        images, references = layer(images), layer(references)
        if isinstance(layer, nn.MaxPool2d):
            one, other = (nn.functional.normalize(each, dim=1) for each in (images, references))
            total += (one - other).square().sum(1).mean((1, 2))
    return total


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """The PSNR of each image in dB; the peak is the pixel range, 2."""
    return 10 * torch.log10(4 / (images - references).square().mean((1, 2, 3)).clamp_min(1e-12))


def sampler(demo: DemoModel, way: Way, base: Any, steps: int, backend: str) -> Callable[[Tensor], tuple[Tensor, Found]]:
    """Makes images from a noise, and measures what that takes."""
    model = (
        base if way.policy is None else duca_compile.optimize(demo.transformer, way.policy, backend, steps, strict=True)
    )

    def sample(noise: Tensor) -> tuple[Tensor, Found]:
        images: list[Tensor] = []
        model.reset()
        taken = timed(lambda: images.append(demo.sample(model, way.plain or steps, noise, ignore)))
        kinds = [each.kind.value for each in model.history]
        facts = {
            "wall": taken.wall,
            "cpu": taken.cpu,
            "flops": sum(each.flops for each in model.history),
            "cache_bytes": model.cache_bytes,
            "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        }
        model.reset()
        return images[0], facts

    return sample


def round_path(state: Path, steps: int, seed: int, batch: int) -> Path:
    return state / f"{steps}-steps" / f"seed-{seed}-batch-{batch:02d}.safetensors"


@dataclass
class Bench:
    """All ways for one number of steps, compiled."""

    demo: DemoModel
    judge: Judge
    steps: int
    ways: list[Way]
    backend: str
    state: Path

    def __post_init__(self) -> None:
        base = duca_compile.optimize(self.demo.transformer, Uncached(), self.backend, strict=True)
        make = partial(sampler, self.demo, base=base, steps=self.steps, backend=self.backend)
        self._base = make(Way("uncached", "", 1, None, self.steps))
        self._samplers = {way.key: make(way) for way in self.ways}
        for sample in (self._base, *self._samplers.values()):  # compiles
            sample(self.demo.noise(SEARCH_SEED))

    def round(self, seed: int, batch: int) -> None:
        """Makes one image of each class by every way that the round's file lacks, besides the uncached ones."""
        path = round_path(self.state, self.steps, seed, batch)
        tensors, metadata = files.read(path) if path.exists() else ({}, {})
        known: dict[str, Found] = json.loads(metadata.get(KEY, "{}"))
        missing = [way for way in self.ways if way.key not in known]
        if not missing:
            return
        noise = self.demo.noise(SEED_STRIDE * seed + batch)
        references, base = self._base(noise)
        with torch.no_grad():
            tensors["features"] = self.judge.features(references)
            for way in missing:
                images, facts = self._samplers[way.key](noise)
                tensors[f"features, {way.key}"] = self.judge.features(images)
                tensors[f"psnr, {way.key}"] = psnr(images, references)
                tensors[f"perceptual, {way.key}"] = perceptual(self.judge, images, references)
                about = {"method": way.method, "setting": way.setting, "level": way.level, "plain": way.plain}
                known[way.key] = {**about, **facts, "base": base, "load": os.getloadavg()[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, tensors, {KEY: json.dumps(known)})


# ---- results of the rounds


def with_error(values: np.ndarray[Any, Any]) -> Found:
    return {"mean": float(values.mean()), "error": float(values.std(ddof=1) / math.sqrt(len(values)))}


def paired_frechet(own: Tensor, references: Tensor) -> Found:
    """The Fréchet distance of two sets of features from the same noise, and its error by bootstrap over the pairs."""
    generator = torch.Generator().manual_seed(0)
    own, references = own.double(), references.double()
    drawn = []
    for _ in range(RESAMPLES):
        pick = torch.randint(len(own), (len(own),), generator=generator)
        drawn.append(frechet(own[pick], references[pick]))
    return {"mean": frechet(own, references), "error": float(np.std(drawn, ddof=1))}


def collect(state: Path, steps: int) -> list[Found]:
    """A point for each way that has rounds."""
    rounds: dict[str, list[tuple[str, Found, dict[str, Tensor]]]] = {}
    for path in sorted((state / f"{steps}-steps").glob("*.safetensors")):
        tensors, metadata = files.read(path)
        for key, facts in json.loads(metadata[KEY]).items():
            rounds.setdefault(key, []).append((path.stem, facts, tensors))
    points = {key: point(steps, key, each) for key, each in rounds.items()}
    plain = [key for key, each in points.items() if each["method"] == FEWER]
    for key, each in points.items():
        enough = [name for name in plain if points[name]["flops"] >= 0.995 * each["flops"]]
        if each["method"] != FEWER and enough:
            each["plain"] = min(enough, key=lambda name: points[name]["flops"])
            each["over_plain"] = difference(rounds[key], rounds[each["plain"]], key, each["plain"])
    return sorted(points.values(), key=lambda each: (each["level"], each["method"] != FEWER, -each["psnr"]["mean"]))


def difference(own: list[Any], plain: list[Any], key: str, plain_key: str) -> Found:
    """The difference in PSNR, image by image, over the rounds that both have."""
    others = {name: tensors[f"psnr, {plain_key}"].double() for name, _, tensors in plain}
    both = [tensors[f"psnr, {key}"].double() - others[name] for name, _, tensors in own if name in others]
    return with_error(torch.cat(both).numpy())


def point(steps: int, key: str, rounds: list[tuple[str, Found, dict[str, Tensor]]]) -> Found:
    def all_of(what: str) -> Tensor:
        return torch.cat([tensors[what] for _, _, tensors in rounds])

    facts = [each for _, each, _ in rounds]
    first, base = facts[0], sum(each["base"]["flops"] for each in facts)
    kinds = {kind: round(sum(f["kinds"].get(kind, 0) for f in facts) / len(facts), 2) for kind in kinds_of(facts)}
    own, references = all_of(f"features, {key}"), all_of("features")
    return {
        "steps": steps,
        "method": first["method"],
        "setting": first["setting"],
        "level": first["level"],
        "images": len(own),
        "seeds": len({name.split("-batch")[0] for name, _, _ in rounds}),
        "flops": sum(each["flops"] for each in facts) / base,
        "kinds": kinds,
        "psnr": with_error(all_of(f"psnr, {key}").double().numpy()),
        "perceptual": with_error(all_of(f"perceptual, {key}").double().numpy()),
        "frechet": paired_frechet(own, references),
        "seconds": asdict(Spread.of([each["wall"] for each in facts])),
        "speedup": asdict(of_pairs([each["base"]["wall"] for each in facts], [each["wall"] for each in facts])),
        "cpu_speedup": asdict(of_pairs([each["base"]["cpu"] for each in facts], [each["cpu"] for each in facts])),
        "base_seconds": asdict(Spread.of([each["base"]["wall"] for each in facts])),
        "cache_bytes": max(each["cache_bytes"] for each in facts),
        "load": asdict(Spread.of([each["load"] for each in facts])),
    }


def kinds_of(facts: list[Found]) -> list[str]:
    return [*dict.fromkeys(kind for each in facts for kind in each["kinds"])]


# ---- the table and the picture


def table(points: list[Found]) -> str:
    """As CSV, without rounding."""
    text = io.StringIO()
    rows = [flat(each) for each in points]
    writer = csv.DictWriter(text, [*dict.fromkeys(name for row in rows for name in row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def flat(each: Found) -> Found:
    found: Found = {}
    for name, value in each.items():
        if name == "kinds":
            found[name] = " ".join(f"{kind}:{count:g}" for kind, count in value.items())
        elif isinstance(value, dict):
            found |= {f"{name}_{part}": number for part, number in value.items()}
        else:
            found[name] = value
    return found


def draw(points: list[Found], path: Path) -> None:
    """Draws PSNR and perceptual distance against time, with fewer plain steps as a line."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    numbers = [*dict.fromkeys(each["steps"] for each in points)]
    methods = sorted({each["method"] for each in points} - {FEWER})
    figure = Figure(figsize=(6.5 * len(numbers), 9), dpi=110, layout="constrained")
    grid = figure.subplots(2, len(numbers), squeeze=False)
    for column, steps in enumerate(numbers):
        for axes, what, label in zip(grid[:, column], QUALITIES, QUALITIES.values(), strict=True):
            for index, method in enumerate([FEWER, *methods]):
                shown = [each for each in points if each["steps"] == steps and each["method"] == method]
                shown.sort(key=lambda each: each["speedup"]["median"])
                axes.errorbar(
                    [1 / each["speedup"]["median"] for each in shown],
                    [each[what]["mean"] for each in shown],
                    [each[what]["error"] for each in shown],
                    linestyle="-" if method == FEWER else ":",
                    marker="osD^v<>Ph*X"[index % 11],
                    color="black" if method == FEWER else colormaps["tab20"](index - 1),
                    markersize=5,
                    label=method,
                )
            axes.set_title(f"DDIM, {steps} steps")
            axes.set_xlabel("time, of the uncached loop")
            axes.set_ylabel(f"{label}, to the uncached images")
            axes.grid(alpha=0.3)
        grid[1, column].set_yscale("log")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, format="png")


def report(state: Path, out: Path) -> None:
    """Writes the results of the rounds so far."""
    numbers = sorted(int(path.name.split("-")[0]) for path in state.glob("*-steps"))
    points = [each for number in numbers for each in collect(state, number)]
    found = {**json.loads((state / ABOUT).read_text()), "points": points}
    write(found, out)
    out.with_suffix(".md").write_text("\n".join(methods_tables(found)) + "\n")
    out.with_suffix(".csv").write_text(table(points))
    draw(points, out.with_suffix(".png"))


def measure(args: argparse.Namespace) -> None:
    until = time.monotonic() + 60 * args.minutes
    demo, judge = DemoModel.load(), load_judge(args.judge, args.data)
    backend, trials, training, training_steps = "inductor", TRIALS, TRAINING, TRAINING_STEPS
    if args.quick:
        args.steps, args.levels, args.images, args.seeds = [4], [2], 4, 2
        demo = replace(demo, class_names=demo.class_names[:2])
        backend, trials, training, training_steps = "eager", 1, TrainingSettings(loops=1, updates=1), 2
    path, learned = args.state / ABOUT, None
    about: Found = json.loads(path.read_text()) if path.exists() else {}
    about |= {"what": __doc__.splitlines()[0], "surroundings": surroundings(1), "backend": backend}
    about["classes"] = len(demo.class_names)
    about["speca"] = {"start": SPECA_START, "drafts": SPECA_DRAFTS}
    if "DisCa" in args.methods:
        learned = trained(demo, args.state / "predictor.safetensors", training, training_steps)
        about["training"] = {**asdict(training), "steps": training_steps, "losses": learned.config.losses}
    write(about, path)
    rounds = math.ceil(args.images / len(demo.class_names))
    for steps in args.steps:
        settings = Settings(demo, learned, steps, backend, args.state / "thresholds.json", trials)
        bench = Bench(demo, judge, steps, settings.ways(args.levels, args.methods), backend, args.state)
        for index in track(range(rounds), f"DDIM-{steps}"):
            if time.monotonic() > until:
                break
            bench.round(index % args.seeds, index // args.seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; .csv, .md and .png files are written beside it"
    )
    parser.add_argument("--state", type=Path, default=Path("runs/methods"), help="folder of the results of rounds")
    parser.add_argument("--judge", type=Path, default=RESULTS / "judge.safetensors")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument(
        "--levels", type=int, nargs="+", default=[2, 3, 5], help="target FLOPs: the uncached FLOPs divided by this"
    )
    parser.add_argument(
        "--images", type=int, default=250, help="for each number of steps; a round has one of each class"
    )
    parser.add_argument("--seeds", type=int, default=3, help="rounds take them in turn")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no round after this many minutes")
    parser.add_argument("--report", action="store_true", help="only write the results of the rounds so far")
    parser.add_argument("--quick", action="store_true", help="4 images of 4 steps under eager, almost no training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.state.mkdir(parents=True, exist_ok=True)
    if not args.report:
        measure(args)
    report(args.state, args.out)
    Console().print(args.out.with_suffix(".md").read_text(), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
