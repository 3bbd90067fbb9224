"""The engines that run artifacts: a package for each format of graphs, and in it a module for each engine.

A module has its engine's name, and a function ``open_engine``. Engines are found by these files, and each is imported
when it is asked for, since what it runs on may not be installed.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from duca_compile.artifact.engines import aoti, onnx
from duca_compile.artifact.engines.base import Engine, Options
from duca_compile.artifact.manifest import Manifest
from duca_compile.errors import UsageError

_FORMATS = {"onnx": onnx, "aoti": aoti}
_ENGINES = {
    format: tuple(module.name for module in iter_modules(package.__path__)) for format, package in _FORMATS.items()
}
BACKENDS = tuple(name for names in _ENGINES.values() for name in names)


def open_engine(backend: str, folder: Path, found: Manifest, options: Options) -> Engine:
    """The engine of this name, for the artifact in ``folder``.

    Raises:
        UsageError: it is unknown, or cannot run this format or with these options.
        BackendError: what it needs is not installed.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r} is unknown; choose one of {BACKENDS}")
    fitting = _ENGINES[found.format]
    if backend not in fitting:
        raise UsageError(f"backend={backend!r} cannot run an artifact of format {found.format!r}; choose of {fitting}")
    module = import_module(f"{_FORMATS[found.format].__name__}.{backend}")
    engine: Engine = module.open_engine(folder, found, options)
    return engine
