"""A learned predictor's weights, and the file that holds them (DisCa, arXiv 2602.05449)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duca_compile.core.files import atomic_write
from duca_compile.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
FUSE = ("fuse.0.weight", "fuse.0.bias", "fuse.2.weight", "fuse.2.bias")  # Linear(2C, C), SiLU, Linear(C, C)
_KEY = "duca_compile"  # of the JSON among the file's metadata


@dataclass(frozen=True)
class PredictorConfig:
    """What a predictor was trained for.

    Attributes:
        model: class of the model.
        width: channels C of its stream.
        blocks: how many blocks it has; the predictor has the last two of them, with weights of its own.
        updates: gradient steps so far.
        losses: mean squared error of each loop's updates, relative to the mean square of the outputs.
        format: of the file.
    """

    model: str
    width: int
    blocks: int
    updates: int = 0
    losses: tuple[float, ...] = ()
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Predictor:
    """A small network that goes from a cached hidden state and the current tokens to the current hidden state.

    ``weights`` has the fusion's four tensors (``fuse.0.weight`` of shape (C, 2C), ``fuse.2.weight`` of (C, C), and
    their biases), and for each weight of the model's last two blocks one of the same name and shape.
    """

    config: PredictorConfig
    weights: Mapping[str, Tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the config as JSON in its metadata; whole or not at all.

        Raises:
            UsageError: the file cannot be written.
        """
        write(path, dict(self.weights), {_KEY: json.dumps(asdict(self.config))})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Predictor:
        """Reads what ``save`` wrote, onto the CPU.

        Raises:
            UsageError: there is no such file, or it is no predictor of this version.
        """
        weights, metadata = read(path)
        try:
            values = json.loads(metadata[_KEY])
            config = PredictorConfig(**{**values, "losses": tuple(values["losses"])})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UsageError(f"{path} holds no predictor: train one with duca-compile train-predictor") from error
        if config.format != FORMAT or not set(FUSE) <= weights.keys():
            raise UsageError(f"{path} is a predictor of format {config.format}, and this version reads {FORMAT}")
        return Predictor(config, weights)


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with atomic_write(Path(path)) as temporary:
            save_file(plain, temporary, metadata)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
