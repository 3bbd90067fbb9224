"""The table of what exports, made by exporting: ``python -m tests.exports [model ...]`` writes docs/exports.md.

With names of models, only their lines are written anew.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import duca_compile
from duca_compile import DuCa, ExportError
from tests.zoo import ZOO, Entry

PAGE = Path(__file__).parents[1] / "docs" / "exports.md"
ENGINES = ("onnxruntime", "openvino")
POLICY, STEPS, BLOCKS = DuCa(interval=3, fresh_ratio=0.5), 4, 1
CLOSE = 1e-4  # relative, of each step: what docs/how-to/deployment.md promises
HEAD = f"""# What exports

These models of [the test suite](models.md), with {BLOCKS} block of each kind, were exported with DuCa and loaded in two
engines; one that has no line was not tried. A loop of {STEPS} steps, with full, partial and skip steps, had to give in
each engine what the optimized model gives, to a relative error of {CLOSE:g} at each step. `python -m tests.exports`
writes this table, and the exhaustive tests compare it with what they see.

The test configurations of diffusers' own transformers were tried in the same way, in ONNX Runtime alone: the 66 of its
repository at commit 58eb52c that do not add quantization, with diffusers 0.42.1 and two batch rows where the
configuration allows it. **61 gave equal results, 5 were refused, and none differed.** 50 take any batch size, and 11
that of the example: their arguments have one row, or forward reads one of them in Python. Those that were refused:

- AnyFlow FAR cannot be captured: its mask is made by `torch.vmap`;
- HiDream reads the numbers of tokens of its experts in Python, at each step;
- Temporal embeds no timestep;
- Wan Animate needs `linalg_qr`, which ONNX lacks;
- Wan Animate 2 fills a cache that is an argument.

The columns of the table below:

- **batch**: whether calls of the artifact may have any number of rows, or only that of the example.
- **fixed values**: forward reads these arguments in Python (`.item()`, the length of a mask), so the artifact is for
  their values at export. A call with others is refused.
- **refused**: what `save` says, without the names of files.

| model | ONNX Runtime | OpenVINO | batch | fixed values | refused |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Found:
    """What became of one model."""

    name: str
    equal: tuple[bool, ...] = ()  # in each engine
    any_batch: bool = False
    fixed: Sequence[str] = ()
    refused: str = ""

    @property
    def row(self) -> str:
        engines = ["equal" if equal else "differs" for equal in self.equal] or ["", ""]
        batch = "" if self.refused else "any" if self.any_batch else "that of the example"
        cells = [self.name, *engines, batch, ", ".join(f"`{name}`" for name in self.fixed), self.refused]
        return "| " + " | ".join(cells) + " |\n"


def exported(entry: Entry, folder: Path) -> Found:
    """Exports a model to ``folder`` and runs it in each engine."""
    torch.manual_seed(0)
    model, arguments = entry.build(BLOCKS)
    optimized = duca_compile.optimize(model.eval(), POLICY, "eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # that only one batch size is possible, which the table says
            manifest = duca_compile.save(optimized, folder / "artifact", arguments, num_inference_steps=STEPS)
    except ExportError as error:
        return Found(entry.name, refused=_without_files(str(error)))
    calls = list(loop(entry, arguments))
    expected = run(optimized, calls)
    found = [run(duca_compile.load(folder / "artifact", engine, threads=1), calls) for engine in ENGINES]
    equal = tuple(all(map(close, each, expected)) for each in found)
    latent = next(spec for spec in manifest.inputs if spec.name == manifest.signature.latent)
    return Found(entry.name, equal, not isinstance(latent.shape[0], int), sorted(manifest.signature.fixed))


def loop(entry: Entry, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of each step: timesteps fall, and the latent changes."""
    for step in range(STEPS):
        torch.manual_seed(step)
        time = arguments[entry.timestep]
        time = time - step if time.max() > 1 else time * (1 - step / STEPS)
        latent = tree_map(lambda tensor: tensor + 0.1 * torch.randn_like(tensor), arguments[entry.latent])
        yield arguments | {entry.latent: latent, entry.timestep: time}


@torch.no_grad()
def run(model: Any, calls: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
    """The tensors that each call returns."""
    return [[leaf for leaf in tree_leaves(_plain(model(**call))) if isinstance(leaf, Tensor)] for call in calls]


def _plain(result: Any) -> Any:
    return dict(result) if isinstance(result, dict) else result


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(bool((a - b).norm() <= CLOSE * b.norm()) for a, b in pairs)


def _without_files(message: str) -> str:
    """The message with file names instead of paths."""
    return re.sub(r"/[\w./-]+/", "", message).replace("|", r"\|")


def rows() -> dict[str, str]:
    """The lines of the page by model."""
    lines = PAGE.read_text().splitlines(keepends=True) if PAGE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def write(names: Sequence[str]) -> None:
    known = rows()
    for name in track(names):
        with TemporaryDirectory() as folder:
            known[name] = exported(ZOO[name], Path(folder)).row
        PAGE.write_text(HEAD + "".join(known[each] for each in ZOO if each in known))


if __name__ == "__main__":
    write(sys.argv[1:] or list(ZOO))
