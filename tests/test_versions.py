"""What is promised was run, and each private name of torch that is used is checked and on the page.

``python -m tests.test_versions`` writes the list of private names.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import noxfile
from duca_compile import BackendError
from duca_compile.core.torch_api import OPTIONAL, PRIVATE, RUN_WITH, check_torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "duca_compile"
LIST = re.compile(r"(<!-- private -->\n).*?(<!-- end -->)", re.DOTALL)
SAY = "run python -m tests.test_versions to write the page anew"
CHECKED = {name.replace(":", ".") for names in (*PRIVATE.values(), OPTIONAL) for name in names}


def page() -> str:
    """The page with the names by part."""
    rows = [f"| {part} | {', '.join(f'`{name}`' for name in map(dotted, names))} |" for part, names in PRIVATE.items()]
    table = "\n".join(["| for | names |", "|---|---|", *rows])
    return LIST.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", noxfile.PAGE.read_text())


def dotted(name: str) -> str:
    return name.replace(":", ".")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_what_was_run_is_in_the_matrix_and_passed() -> None:
    matrix = {each.name: each for each in noxfile.MATRIX}
    for name, run in json.loads(noxfile.RESULTS.read_text()).items():
        each = matrix[name]
        installed = short(run["python"]), run["torch"].partition("+")[0], run["diffusers"]
        assert installed == (each.python, each.torch, each.diffusers)
        assert run["failed"] == 0
        assert run["passed"] > 400


def test_the_package_promises_the_matrix() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package, promise in (
        ("python", 'requires-python = ">={}"'),
        ("torch", '"torch>={}"'),
        ("diffusers", '"diffusers>={}"'),
    ):
        assert promise.format(short(min((getattr(each, package) for each in noxfile.MATRIX), key=numbers))) in text
    pythons = {each.python for each in noxfile.MATRIX}
    assert {*re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)} == pythons
    torches = sorted((each.torch for each in noxfile.MATRIX), key=numbers)
    assert (short(torches[0]), short(torches[-1])) == RUN_WITH


def test_the_page_says_what_was_run_and_is_used() -> None:
    assert noxfile.page() == noxfile.PAGE.read_text(), "run nox, or noxfile.page()"
    assert page() == noxfile.PAGE.read_text(), SAY


def private_names(path: Path) -> Iterator[str]:
    """The names of torch that a file imports or spells out, and that begin with an underscore somewhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
            yield from (f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_each_private_name_is_checked() -> None:
    """But for operators, which torch keeps for programs that were exported."""
    found = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in private_names(path)
        if re.match(r"torch\.(?!ops\.)([a-z]\w*\.)*_[A-Za-z]", name)
    }
    assert len(found) > 20
    unchecked = {
        name for name in found if not any(known.startswith(name) or name.startswith(known) for known in CHECKED)
    }
    assert not unchecked


def test_all_that_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    part = "backend='inductor'"
    monkeypatch.setitem(PRIVATE, part, (*PRIVATE[part], "torch._inductor:gone", "torch._gone.from_here:name"))
    message = (
        rf"^{part} needs private functions of torch that torch {re.escape(torch.__version__)} does not have: "
        r"torch\._inductor\.gone, torch\._gone\.from_here\.name; install one of .* torch 2\.\d+ to 2\.\d+$"
    )
    with pytest.raises(BackendError, match=message):
        check_torch.__wrapped__(part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "part", "eager"),
    [
        ("torch._inductor.compile_fx:compile_fx", "backend='inductor'", "works"),
        ("torch._subclasses:FakeTensorMode", "capturing a model", "BackendError"),
    ],
)
def test_a_part_is_refused_when_it_is_first_needed(missing: str, part: str, eager: str) -> None:
    module, _, name = missing.partition(":")
    code = (
        f"import torch, {module} as module\ndelattr(module, {name!r})\nimport duca_compile\n"
        "for backend in ('eager', 'inductor'):\n"
        "    try:\n        duca_compile.optimize(torch.nn.Identity().eval(), 'none', backend); print('works')\n"
        "    except duca_compile.DucaError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(eager)
    assert second.startswith(f"BackendError {part} needs private functions of torch")
    assert dotted(missing) in second


if __name__ == "__main__":
    noxfile.PAGE.write_text(page())
