"""Writing files: a file is replaced as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duca_compile.errors import UsageError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside ``path``, which replaces it at the end; after an error it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, advice: str) -> None:
    """Raises UsageError, with ``advice``, if a file could not be written to ``path`` later, when the work is done."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file, such as {path / 'demo.png'}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; {advice}") from error
