"""The versions that are promised. ``nox`` runs the core tests with each of them, and writes docs/reference/versions.md.

One combination: ``nox -s "versions(oldest)"``. Each is installed into an environment of its own, of several gigabytes
where torch comes with CUDA, which is deleted afterwards. A Python that is not installed is skipped.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "docs" / "reference" / "versions.json", ROOT / "docs" / "reference" / "versions.md"
TESTS = ("pytest", "pytest-xdist", "hypothesis")
CORE = ("tests/unit", "tests/test_errors.py", "tests/test_optimize.py", "tests/test_inductor.py")
SHOWN = ("torch", "diffusers", "numpy", "msgspec", "safetensors")  # packages whose versions the page has
OLDEST, NEWEST = "0.36.0", "0.42.1"  # of diffusers


@dataclass(frozen=True)
class Versions:
    """One combination: a Python, a torch and a diffusers."""

    name: str
    python: str
    torch: str
    diffusers: str = NEWEST


MATRIX = (
    Versions("oldest", "3.10", "2.9.1"),
    Versions("torch-2.10", "3.11", "2.10.0"),
    Versions("torch-2.11", "3.11", "2.11.0"),
    Versions("torch-2.12", "3.12", "2.12.1"),
    Versions("torch-2.13", "3.11", "2.13.0"),
    Versions("newest", "3.13", "2.14.1"),
    Versions("oldest-diffusers", "3.11", "2.13.0", OLDEST),
)


@dataclass(frozen=True)
class Result:
    """What the core tests gave with one combination; ``versions`` are those that were installed."""

    versions: dict[str, str]
    passed: int
    failed: int
    skipped: int


@nox.session
@nox.parametrize("python,each", [(each.python, each) for each in MATRIX], ids=[each.name for each in MATRIX])
def versions(session: nox.Session, each: Versions) -> None:
    """Runs the core tests with one combination."""
    report = Path(session.create_tmp()) / "report.xml"
    environment = Path(session.virtualenv.location)
    try:
        wanted = (f"torch=={each.torch}", f"diffusers=={each.diffusers}")
        session.install("--quiet", "--no-compile", "-e", ".", *TESTS, *wanted)
        versions = {
            "python": session.run("python", "-c", "import platform; print(platform.python_version())", silent=True)
        }
        session.run(
            "python",
            "-m",
            "pytest",
            "--quiet",
            f"--junitxml={report}",
            *CORE,
            *session.posargs,
            env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            success_codes=[0, 1],
        )
    finally:
        shutil.rmtree(environment, ignore_errors=True)
