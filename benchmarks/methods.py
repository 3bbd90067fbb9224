"""Every method at matched FLOPs on the trained model in the package, with fewer plain steps as the honest competitor.

    python benchmarks/methods.py --out benchmarks/results/methods.json

Writes JSON, CSV, Markdown and a picture of quality against time. Each round is one image of each class, made uncached
and then by every method from the same noise; all that is measured is against the uncached images of that round. What
each round found is kept in ``--state``, so the command can be stopped at any time (or by ``--minutes``), and goes on
where it was: with more images, levels or numbers of steps, too.

The features are those of the judge of ``examples/eval_demo.py``, a CNN that is trained on the real training images of
Fashion-MNIST. It is kept in ``--judge``, and trained from ``--data`` where there is none.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Spread, of_pairs, surroundings, timed, write
from rich.console import Console
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, RFC, DisCa, DuCa, Policy, ResidualGate, SpeCa, TaylorSeer, ToCa, Uncached
from duca_compile import predictor as files
from duca_compile.demo import DemoModel
from duca_compile.predictor import Predictor
from duca_compile.training import TrainingSettings, train_predictor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from eval_demo import Judge, frechet, load_judge

RESULTS = Path(__file__).parent / "results"
FEWER = "fewer steps"
SEED_STRIDE, SEARCH_SEED, TRAINING_SEED = 1000, 900_000, 950_000  # of the noise; no image of one is in another
TRIALS = 6  # loops of a search for a threshold
THRESHOLDS = (0.01, 30.0)
RESAMPLES = 200
QUALITIES = {"psnr": "PSNR, dB", "perceptual": "perceptual distance"}
KEY = "ways"  # of the JSON in a round's file
LOOPS, UPDATES = 10, 40  # of the training of DisCa's predictor, on loops of 20 steps
TRAINING_STEPS = 20

Found = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One setting of a method; ``plain`` steps of the model itself where there is no policy."""

    method: str
    setting: str
    level: int  # the FLOPs aimed at are those of the uncached loop over this
    policy: Policy | None
    plain: int = 0

    @property
    def key(self) -> str:
        return f"{self.method}, {self.setting}"


# ---- settings


def fixed(learned: Predictor, interval: int) -> dict[str, Policy]:
    """The methods whose schedule is known beforehand, by name."""
    return {
        "FORA": FORA(interval),
        "ToCa": ToCa(interval),
        "DuCa": DuCa(interval),
        "TaylorSeer": TaylorSeer(interval, first_full_steps=1),
        "TaylorSeer lite": TaylorSeer(interval, first_full_steps=1, lite=True),
        "TaylorSeer relational": TaylorSeer(interval, first_full_steps=1, relational=True),
        "DisCa": DisCa(learned, interval),
    }


def adaptive(steps: int) -> dict[str, Callable[[float], Policy]]:
    """Those that decide while they run, of a threshold."""
    return {
        "RFC": lambda threshold: RFC(threshold),
        "SpeCa": lambda threshold: SpeCa(base_threshold=threshold, first_full_steps=2, max_taylor_steps=steps),
        "ResidualGate": lambda threshold: ResidualGate(threshold),
    }


def plain_counts(steps: int, level: int) -> list[int]:
    """Numbers of plain steps from the level's FLOPs to a fifth more, which some methods take."""
    return sorted({steps // level, round(1.1 * steps / level), math.ceil(1.2 * steps / level)})


def nearest(explained: Any, method: str, learned: Predictor, steps: int, level: int) -> Way:
    """The interval whose FLOPs come nearest to the level's."""

    def distance(interval: int) -> float:
        report = explained.schedule(fixed(learned, interval)[method], steps)
        return abs(math.log(level / report.ideal_speedup))

    interval = min(range(2, steps // 2), key=distance)
    return Way(method, f"N={interval}", level, fixed(learned, interval)[method])


def searched(demo: DemoModel, flops: float, method: str, steps: int, level: int, backend: str) -> float:
    """The threshold whose FLOPs come nearest to the level's, by bisection on noise that is not measured later."""
    low, high = map(math.log, THRESHOLDS)
    tried: dict[float, float] = {}
    for _ in range(TRIALS):
        threshold = float(f"{math.exp((low + high) / 2):.4g}")
        model = duca_compile.optimize(demo.transformer, adaptive(steps)[method](threshold), backend, steps, strict=True)
        demo.sample(model, steps, demo.noise(SEARCH_SEED), ignore)
        share = sum(each.flops for each in model.history) / (steps * flops)
        tried[threshold] = abs(math.log(share * level))
        low, high = (math.log(threshold), high) if share * level > 1 else (low, math.log(threshold))
    return min(tried, key=lambda each: tried[each])


def thresholds(demo: DemoModel, flops: float, steps: int, level: int, backend: str, path: Path) -> dict[str, float]:
    """Of each adaptive method; those found before are in the file at ``path``."""
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    for method in adaptive(steps):
        name = f"{method}, {steps} steps, 1/{level}"
        if name not in known:
            known[name] = searched(demo, flops, method, steps, level, backend)
            write(known, path)
    return {method: known[f"{method}, {steps} steps, 1/{level}"] for method in adaptive(steps)}


def explain(demo: DemoModel) -> Any:
    """Of a round's call, both halves of guidance."""
    noise = demo.noise(0)
    labels = torch.arange(2 * len(noise)) % len(noise)
    timestep = torch.full((2 * len(noise),), 500)
    return duca_compile.explain(demo.transformer, torch.cat([noise, noise]), timestep=timestep, class_labels=labels)


def ways(demo: DemoModel, learned: Predictor, steps: int, levels: list[int], backend: str, state: Path) -> list[Way]:
    explained, found = explain(demo), list[Way]()
    for level in levels:
        found += [Way(FEWER, f"{n} steps", level, None, n) for n in plain_counts(steps, level)]
        found += [nearest(explained, method, learned, steps, level) for method in fixed(learned, 2)]
        chosen = thresholds(demo, explained.flops, steps, level, backend, state / "thresholds.json")
        make = adaptive(steps)
        found += [Way(name, f"threshold {each:g}", level, make[name](each)) for name, each in chosen.items()]
    return [*{way.key: way for way in reversed(found)}.values()][::-1]  # of two levels' the same, the first


def trained(demo: DemoModel, path: Path, settings: TrainingSettings, steps: int) -> Predictor:
    """DisCa's predictor; the training goes on where it was."""

    def sample(drop_in: nn.Module, number: int) -> None:
        demo.sample(drop_in, steps, demo.noise(TRAINING_SEED + number), ignore)

    return train_predictor(demo.transformer, sample, path, settings, resume=path.exists())


def ignore(seconds: float) -> None:
    pass


# ---- measuring


@torch.no_grad()
def perceptual(judge: Judge, images: Tensor, references: Tensor) -> Tensor:
    """Distance of each image (n, 1, size, size) to its reference, (n,).

    As in LPIPS (arXiv 1801.03924) without learned weights: behind each of the judge's three blocks of convolution,
    channels are brought to norm 1 at each place; the squared differences, summed over channels, are averaged over the
    places, and the three are added.
    """
    total = torch.zeros(len(images))
    for layer in list(judge.features)[:12]:
        images, references = layer(images), layer(references)
        if isinstance(layer, nn.MaxPool2d):
            one, other = (nn.functional.normalize(each, dim=1) for each in (images, references))
            total += (one - other).square().sum(1).mean((1, 2))
    return total


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """In dB, of each image; the peak is the pixel range of 2."""
    return 10 * torch.log10(4 / (images - references).square().mean((1, 2, 3)).clamp_min(1e-12))


def sampler(demo: DemoModel, way: Way, base: Any, steps: int, backend: str) -> Callable[[Tensor], tuple[Tensor, Found]]:
    """Makes images of a noise, and says what that took."""
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
    """The ways of one number of steps, compiled."""

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
        """One image of each class by every way that the round's file lacks, beside the uncached ones."""
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


# ---- what the rounds say


def with_error(values: np.ndarray[Any, Any]) -> Found:
    return {"mean": float(values.mean()), "error": float(values.std(ddof=1) / math.sqrt(len(values)))}


def paired_frechet(own: Tensor, references: Tensor) -> Found:
    """The Fréchet distance of two sets of features of the same noise; its error by drawing pairs with replacement."""
    generator = torch.Generator().manual_seed(0)
    own, references = own.double(), references.double()
    drawn = []
    for _ in range(RESAMPLES):
        pick = torch.randint(len(own), (len(own),), generator=generator)
        drawn.append(frechet(own[pick], references[pick]))
    return {"mean": frechet(own, references), "error": float(np.std(drawn, ddof=1))}


def collect(state: Path, steps: int) -> list[Found]:
    """A point for each way of which there are rounds."""
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
    """Of the PSNR, image by image, over the rounds that both have."""
    others = {name: tensors[f"psnr, {plain_key}"] for name, _, tensors in plain}
    both = [tensors[f"psnr, {key}"] - others[name] for name, _, tensors in own if name in others]
    return with_error(torch.cat(both).double().numpy())


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


# ---- tables and the picture

COLUMNS = ("method", "setting", "FLOPs", "mean steps", "PSNR, dB", "over plain steps, dB", "perceptual", "Fréchet")
COLUMNS = (*COLUMNS, "time, s", "speed-up", "caches, MiB", "images")


def pm(value: Found, digits: int) -> str:
    return f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}"


def cells(each: Found) -> list[str]:
    against = each.get("over_plain")
    plain = f"{against['mean']:+.2f} ± {against['error']:.2f} ({each['plain'].split(', ')[1]})" if against else ""
    return [
        each["method"],
        each["setting"],
        f"{each['flops']:.3f}",
        ", ".join(f"{count:g} {kind}" for kind, count in each["kinds"].items()),
        pm(each["psnr"], 2),
        plain,
        pm(each["perceptual"], 4),
        pm(each["frechet"], 3),
        f"{each['seconds']['median']:.2f}",
        f"{each['speedup']['median']:.2f}x",
        f"{each['cache_bytes'] / 2**20:.1f}",
        f"{each['images']}, {each['seeds']} seeds",
    ]


def markdown(found: Found) -> str:
    return "\n".join(lines(found)) + "\n"


def lines(found: Found) -> Iterator[str]:
    for steps in dict.fromkeys(each["steps"] for each in found["points"]):
        for level in sorted({each["level"] for each in found["points"] if each["steps"] == steps}):
            group = [each for each in found["points"] if (each["steps"], each["level"]) == (steps, level)]
            load = [each["load"]["median"] for each in group]
            base = group[0]["base_seconds"]["median"]
            yield f"\n### DDIM, {steps} steps, about 1/{level} of the FLOPs\n"
            yield f"Uncached: {base:.2f} s for a round of {found['classes']} images; load {min(load):.1f} to"
            yield f"{max(load):.1f}.\n"
            yield f"| {' | '.join(COLUMNS)} |"
            yield "|---" * len(COLUMNS) + "|"
            yield from (f"| {' | '.join(cells(each))} |" for each in group)


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
    """PSNR and perceptual distance against time; the line is fewer plain steps."""
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
                    fmt="-" if method == FEWER else "",
                    linestyle="-" if method == FEWER else ":",
                    marker="osD^v<>Ph*X"[index % 11],
                    color="black" if method == FEWER else f"C{index - 1}",
                    markersize=5,
                    label=method,
                )
            axes.set_title(f"DDIM, {steps} steps")
            axes.set_xlabel("time, of the uncached loop")
            axes.set_ylabel(f"{label}, to the uncached images")
            axes.grid(alpha=0.3)
        grid[1, column].set_yscale("log")
    grid[0, 0].legend(fontsize=8)
    figure.savefig(path, format="png")


def report(state: Path, steps: list[int], about: Found, out: Path) -> Found:
    points = [each for number in steps for each in collect(state, number)]
    found = {**about, "points": points}
    write(found, out)
    out.with_suffix(".md").write_text(markdown(found))
    out.with_suffix(".csv").write_text(table(points))
    draw(points, out.with_suffix(".png"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; .csv, .md and .png are written beside it")
    parser.add_argument("--state", type=Path, default=Path("runs/methods"), help="what the rounds found")
    parser.add_argument("--judge", type=Path, default=RESULTS / "judge.safetensors")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3, 5], help="the uncached FLOPs over this")
    parser.add_argument("--images", type=int, default=250, help="for each number of steps, a tenth of them in a round")
    parser.add_argument("--seeds", type=int, default=3, help="rounds take them in turn")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no round after so many")
    parser.add_argument("--quick", action="store_true", help="two rounds of 6 steps under eager, hardly any training")
    args = parser.parse_args()
    until, console = time.monotonic() + 60 * args.minutes, Console()
    torch.set_num_threads(1)
    demo = DemoModel.load()
    training = TrainingSettings(LOOPS, UPDATES)
    backend, learning_steps, rounds = "inductor", TRAINING_STEPS, math.ceil(args.images / len(demo.class_names))
    if args.quick:
        args.steps, args.levels, args.seeds = [6], [2], 2
        backend, learning_steps, rounds, training = "eager", 4, 2, replace(training, loops=1, updates=1)
    args.state.mkdir(parents=True, exist_ok=True)
    judge = load_judge(args.judge, args.data)
    learned = trained(demo, args.state / "predictor.safetensors", training, learning_steps)
    about = {
        "what": __doc__.splitlines()[0],
        "surroundings": surroundings(1),
        "backend": backend,
        "classes": len(demo.class_names),
        "predictor": {**asdict(training), "steps": learning_steps, "losses": learned.config.losses},
    }
    for steps in args.steps:
        bench = Bench(
            demo, judge, steps, ways(demo, learned, steps, args.levels, backend, args.state), backend, args.state
        )
        for index in range(rounds):
            if time.monotonic() > until:
                break
            bench.round(index % args.seeds, index // args.seeds)
            console.print(f"DDIM-{steps}: {index + 1} of {rounds} rounds")
    found = report(args.state, args.steps, about, args.out)
    console.print(markdown(found))


if __name__ == "__main__":
    main()
