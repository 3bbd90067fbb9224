"""The papers' FLOPs for DiT-XL/2 at 256x256 and 50 DDIM steps, from captured sizes and the policies' own steps.

``python -m tests.test_paper_flops`` writes the table of docs/flops.md anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import duca_compile
from duca_compile import Explanation, StructureError, Uncached, published
from duca_compile.app.cli import app
from duca_compile.app.paper_flops import METHODS, Blocks, explain_dit_xl, loop_flops, paper_flops, published_policies
from duca_compile.policies import Policy
from tests.test_optimize import LABELS, build, latent
from tests.zoo import ZOO

PAGE = Path(__file__).parents[1] / "docs" / "flops.md"
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
UNCACHED = 23.74
# TFLOPs by method and interval, from the tables of the papers and of arXiv 2602.19506.
PUBLISHED = {
    "fora": {3: 8.59, 4: 6.66, 5: 5.24, 6: 4.76},
    "toca": {3: 10.23, 4: 8.73, 5: 7.43, 6: 7.01, 7: 6.25},
    "duca": {4: 7.66, 5: 6.32, 6: 5.86, 7: 4.96},
    "taylorseer": {4: 6.66, 5: 5.24, 7: 3.82},
}
CASES = [(method, interval) for method, figures in PUBLISHED.items() for interval in figures]


def policy(method: str, interval: int) -> Policy:
    return published(method, "dit", interval=interval, **METHODS[method])


def page(found: Explanation) -> str:
    """docs/flops.md with its table written anew."""
    lines = ["| method | N | steps | published | papers' count | counted | speed-up, papers | speed-up, counted |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    names: list[tuple[str, int | None, Policy, float]] = [("uncached", None, Uncached(), UNCACHED)]
    names += [(method, n, policy(method, n), PUBLISHED[method][n]) for method, n in CASES]
    for name, interval, each, figure in names:
        row = loop_flops(found, each)
        cells = [name, str(interval or ""), f"`{row.letters}`", f"{figure:.2f}", f"{row.papers / 1e12:.2f}"]
        cells += [f"{row.counted / 1e12:.2f}", f"{row.papers_speedup:.2f}x", f"{row.counted_speedup:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return TABLE.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", PAGE.read_text())


@pytest.fixture(scope="module")
def dit() -> Explanation:
    return explain_dit_xl()


@pytest.fixture(scope="module")
def blocks(dit: Explanation) -> Blocks:
    return Blocks.of(dit.captured, dit.facts)


def test_sizes_come_from_the_graph(blocks: Blocks) -> None:
    assert blocks == Blocks(count=28, rows=2, tokens=256, width=1152, heads=16, hidden=4608)
    model = build(3)
    found = duca_compile.explain(model, latent(0), timestep=torch.full((4,), 5), class_labels=LABELS)
    assert Blocks.of(found.captured, found.facts) == Blocks(3, rows=4, tokens=16, width=32, heads=2, hidden=128)


def test_the_uncached_loop(blocks: Blocks) -> None:
    assert paper_flops(blocks, Uncached(), 50) / 1e12 == pytest.approx(UNCACHED, rel=5e-4)


@pytest.mark.parametrize(("method", "interval"), CASES)
def test_published_figures_are_reproduced(blocks: Blocks, method: str, interval: int) -> None:
    figure = paper_flops(blocks, policy(method, interval), 50) / 1e12
    assert figure == pytest.approx(PUBLISHED[method][interval], rel=5e-3)


def test_the_real_count_is_near_and_never_the_same(dit: Explanation) -> None:
    """It has embedders and head, and no elementwise work; for full steps the two differ by less than a thousandth."""
    full = loop_flops(dit, Uncached())
    assert full.counted == 50 * dit.flops
    assert 0 < abs(full.counted / full.papers - 1) < 1e-3
    cached = loop_flops(dit, policy("duca", 5))
    assert cached.counted > cached.papers, "skip steps are not free, and modulation is two per multiply-add"
    assert cached.counted_speedup == dit.schedule(policy("duca", 5)).ideal_speedup


def test_the_page_has_this_table(dit: Explanation) -> None:
    assert PAGE.read_text() == page(dit), "run python -m tests.test_paper_flops to write docs/flops.md anew"


def test_a_model_that_is_no_dit_is_refused() -> None:
    torch.manual_seed(0)
    model, arguments = ZOO["PixArt"].build(2)
    found = duca_compile.explain(model.eval(), **arguments)
    with pytest.raises(StructureError, match="the papers count FLOPs only for DiT"):
        loop_flops(found, Uncached(), 2)


def test_the_command_prints_both_counts() -> None:
    result = CliRunner().invoke(app, ["flops", "--interval", "5"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for word in ("23.74", "DuCa (N=5)", "6.32", "5.24", "4.53x"):
        assert word in result.output
    own = CliRunner().invoke(app, ["flops", "tests.test_explain:example", "--interval", "2", "--steps", "4"])
    assert own.exit_code == 0, own.output
    assert len(list(published_policies((2,)))) == len(METHODS)


if __name__ == "__main__":
    PAGE.write_text(page(explain_dit_xl()))
