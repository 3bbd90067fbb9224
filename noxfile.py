"""The versions that are promised: ``nox`` runs the core tests with each combination, and writes them to the docs.

One combination: ``nox -s "versions(oldest)"``. With ``-- tests/unit`` or the like, these tests run instead, and nothing
is written. Each combination is installed into an environment of its own, of several gigabytes where torch comes with
CUDA, which is deleted afterwards. A Python that is not installed is skipped. ``nox -s pipelines`` is short, and part of
``.ci/run``.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import nox

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "docs" / "reference" / "versions.json", ROOT / "docs" / "reference" / "versions.md"
TESTS = ("pytest", "pytest-xdist", "hypothesis")
# The compiler's stages by themselves, compiled variants, the public interface and its errors.
CORE = (
    "tests/unit",
    "tests/test_inductor.py::test_compiled_variants_agree_with_eager_ones_and_compile_once",
    "tests/test_optimize.py",
    "tests/test_errors.py",
)
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHOWN = ("torch", "diffusers", "numpy", "msgspec", "safetensors")  # packages whose versions are recorded
OLDEST_DIFFUSERS = "0.36.0"
OLD_PIPELINES = {"diffusers": OLDEST_DIFFUSERS, "transformers": "4.57.6"}  # with transformers 5, it cannot import some
UNPINNED = (*OLD_PIPELINES, "huggingface_hub", "tokenizers")  # what these need other versions of
TABLE = re.compile(r"(<!-- versions -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Versions:
    """One combination: a Python, a torch and a diffusers."""

    name: str
    python: str
    torch: str
    diffusers: str = "0.42.1"


MATRIX = (
    Versions("oldest", "3.10", "2.9.1", diffusers=OLDEST_DIFFUSERS),
    Versions("torch-2.10", "3.11", "2.10.0"),
    Versions("torch-2.11", "3.11", "2.11.0"),
    Versions("torch-2.12", "3.12", "2.12.1"),
    Versions("torch-2.13", "3.11", "2.13.0"),
    Versions("newest", "3.13", "2.14.1"),
    Versions("oldest-diffusers", "3.11", "2.13.0", diffusers=OLDEST_DIFFUSERS),
)


@nox.session(venv_backend="venv")
@nox.parametrize("python,each", [(each.python, each) for each in MATRIX], ids=[each.name for each in MATRIX])
def versions(session: nox.Session, each: Versions) -> None:
    """Runs the core tests with one combination."""
    report = ROOT / ".nox" / f"{each.name}.xml"
    try:
        wanted = (f"torch=={each.torch}", f"diffusers=={each.diffusers}")
        session.install("--quiet", "--no-compile", *wanted, *TESTS, "-e", ".[export]")
        installed = json.loads(str(session.run("python", "-c", _LIST, *SHOWN, silent=True)).splitlines()[-1])
        command = ("python", "-m", "pytest", "--quiet", f"--junitxml={report}", *(session.posargs or CORE))
        session.run(*command, success_codes=[0] if session.posargs else [0, 1], env=QUIET)
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
    failed = 0 if session.posargs else _record(each.name, installed, report)
    if failed:
        session.error(f"{failed} tests failed")


@nox.session(venv_backend="venv")
def pipelines(session: nox.Session) -> None:
    """Runs whole pipelines with the oldest diffusers; all else is as in ``constraints.txt``."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    others = Path(session.create_tmp()) / "constraints.txt"
    others.write_text("\n".join(line for line in pinned if not line.startswith(tuple(f"{n}==" for n in UNPINNED))))
    wanted = (f"{name}=={version}" for name, version in OLD_PIPELINES.items())
    try:
        session.install("--quiet", "--no-compile", "-c", str(others), *wanted, *TESTS, "-e", ".")
        session.run("python", "-m", "pytest", "--quiet", "tests/test_pipeline.py", env=QUIET)
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


_LIST = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


def _record(name: str, installed: dict[str, str], report: Path) -> int:
    """Writes what pytest reports into the results and the page; returns how many tests failed."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, skipped = int(suite.get("tests", "0")), int(suite.get("skipped", "0"))
    failed = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
    results = json.loads(RESULTS.read_text())
    results[name] = {**installed, "passed": total - failed - skipped, "failed": failed, "skipped": skipped}
    RESULTS.write_text(
        json.dumps({each.name: results[each.name] for each in MATRIX if each.name in results}, indent=1) + "\n"
    )
    PAGE.write_text(page())
    return failed


def page() -> str:
    """The page of versions with the table of the results; what was not run says so."""
    columns = ("python", *SHOWN, "passed", "failed", "skipped")
    rows, results = [columns, ("---",) * len(columns)], json.loads(RESULTS.read_text())
    for each in MATRIX:
        result = {"passed": "not run yet"} | asdict(each) | results.get(each.name, {})
        rows.append(tuple(str(result.get(column, "")) for column in columns))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return TABLE.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", PAGE.read_text())
