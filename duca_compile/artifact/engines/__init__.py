"""The engines that run artifacts: a package for each format of graphs, which has a module for each engine.

The module has the name of the engine, and a function ``open_engine``. The modules are listed, not imported: an engine
is imported when it is asked for, since what it runs on may not be installed.
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


def open_engine(backend: str, folder: Path, manifest: Manifest, options: Options) -> Engine:
    """The engine named ``backend``, for the artifact in ``folder``.

    Raises:
        ArtifactError: the engine cannot run what is in the folder.
        UsageError: the engine is unknown, or does not support the format or the options.
        BackendError: a package that it needs is not installed.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r} is unknown; choose one of {BACKENDS}")
    engines = _ENGINES[manifest.format]
    if backend not in engines:
        raise UsageError(
            f"backend={backend!r} cannot run an artifact of format {manifest.format!r}; choose one of {engines}"
        )
    module = import_module(f"{_FORMATS[manifest.format].__name__}.{backend}")
    engine: Engine = module.open_engine(folder, manifest, options)
    return engine
