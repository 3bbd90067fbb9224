"""Tensors that are computed from those of a call; one that is alive after the call was kept by something."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duca_compile.core.fx_utils import PACKAGE
from duca_compile.frontend.compiled_parts import compiled_function
from duca_compile.frontend.fast_paths import MAKES_NESTED, nesting_encoder

_ROOTS = (str(Path(torch.__file__).parent), PACKAGE, "<")
_LIBRARY: dict[str, bool] = {}  # by file name


def is_library(filename: str) -> bool:
    """Whether a file's code is torch's or this package's."""
    known = _LIBRARY.get(filename)
    if known is None:
        known = _LIBRARY[filename] = filename.startswith(_ROOTS)
    return known


def source_of(frame: FrameType | None) -> str:
    """The innermost line, from ``frame`` outwards, that is neither torch's nor this package's."""
    while frame is not None and frame.f_back is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return "?" if frame is None else line_of(frame.f_code.co_filename, frame.f_lineno)


def line_of(filename: str, line: int) -> str:
    """``file:line``, with the text of the line."""
    text = getline(filename, line).strip()
    return f"{filename}:{line}" + (f' ("{text}")' if text else "")


def storage_key(tensor: Tensor) -> int:
    """Identifies the memory of a tensor while that is allocated; 0 where the tensor has none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


class Activations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, notes which tensors are computed from ``tensors``, and at which line."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nesting: set[nn.Module] = set()  # encoders that made a nested tensor
        self.compiled: Callable[..., Any] | None = None  # the first function that torch.compile compiles
        self._given = {key for tensor in tensors if (key := storage_key(tensor))}
        self._found: dict[int, tuple[StorageWeakRef, str, int]] = {}  # a reference prevents reuse of its key

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        self.compiled = self.compiled or compiled_function(sys._getframe(1))
        if func is MAKES_NESTED and (encoder := nesting_encoder(sys._getframe(1))) is not None:
            self.nesting.add(encoder)
        if self._depends(args) or (kwargs and self._depends(kwargs.values())):
            self._note(results)
        return results

    def _depends(self, values: Iterable[Any]) -> bool:
        for value in values:
            if isinstance(value, Tensor):
                key = storage_key(value)
                if key in self._found or key in self._given:
                    return True
            elif isinstance(value, list | tuple) and self._depends(value):
                return True
        return False

    def _note(self, results: Any) -> None:
        for tensor in (results,) if isinstance(results, Tensor) else tree_leaves(results):
            if not isinstance(tensor, Tensor):
                continue
            key = storage_key(tensor)
            if key and key not in self._found and key not in self._given:
                frame = sys._getframe(1)
                while frame.f_back is not None and is_library(frame.f_code.co_filename):
                    frame = frame.f_back
                reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                self._found[key] = reference, frame.f_code.co_filename, frame.f_lineno

    def kept(self, results: Iterable[Any]) -> dict[int, str]:
        """The lines that made what is still alive, by its memory; without the results of the call."""
        returned = {storage_key(result) for result in results if isinstance(result, Tensor)}
        if self._alive(returned):
            gc.collect()
        return {key: self._where(key) for key in self._alive(returned)}

    def _alive(self, without: set[int]) -> list[int]:
        found = self._found.items()
        return [key for key, (storage, *_) in found if key not in without and not storage.expired()]  # type: ignore[no-untyped-call]

    def has(self, key: int) -> bool:
        """Whether this memory belongs to the call's tensors, or to what was computed from them."""
        return key in self._found or key in self._given

    def source(self, tensor: Tensor) -> str | None:
        """The line that made the tensor, if it depends on the call's tensors."""
        key = storage_key(tensor)
        return "the call itself" if key in self._given else self._where(key) if key in self._found else None

    def _where(self, key: int) -> str:
        _, filename, line = self._found[key]
        return line_of(filename, line)
