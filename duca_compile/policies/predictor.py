"""The weights of a trained predictor, and the file that holds them (DisCa, arXiv 2602.05449)."""

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
_KEY = "duca_compile"  # of the JSON in the file's metadata


@dataclass(frozen=True)
class PredictorConfig:
    """The model that a predictor was trained for, and its training.

    Attributes:
        model: class name of the model.
        width: channels C of its stream.
        blocks: number of its blocks; the predictor copies the last two, with weights of its own.
        updates: gradient steps so far.
        losses: for each loop, the mean squared error of its updates relative to the mean square of the outputs.
        format: version of the file format.
    """

    model: str
    width: int
    blocks: int
    updates: int = 0
    losses: tuple[float, ...] = ()
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network that computes the current hidden state from a cached one and the current tokens.

    Source: DisCa, arXiv 2602.05449.

    Attributes:
        config: the model that it belongs to, and its training.
        weights: by name. The fusion has four tensors: ``fuse.0.weight`` (2C inputs, shape (C, 2C)), ``fuse.2.weight``
            (C, C) and their biases (C,). Each weight of the model's last two blocks has one of the same name and shape.
    """

    config: PredictorConfig
    weights: Mapping[str, Tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the config as JSON in its metadata, atomically.

        Raises:
            UsageError: the file cannot be written.
        """
        write(path, dict(self.weights), {_KEY: json.dumps(asdict(self.config))})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Predictor:
        """Reads a file that ``save`` wrote; tensors are on the CPU.

        Raises:
            UsageError: there is no such file, or it does not hold a predictor of this version.
        """
        weights, metadata = read(path)
        try:
            values = json.loads(metadata[_KEY])
            config = PredictorConfig(**{**values, "losses": tuple(values["losses"])})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UsageError(
                f"{path} does not hold a predictor: train one with duca-compile train-predictor"
            ) from error
        if config.format != FORMAT or not set(FUSE) <= weights.keys():
            raise UsageError(
                f"{path} holds a predictor of format {config.format}, and this version reads format {FORMAT}"
            )
        return Predictor(config, weights)


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with atomic_write(Path(path)) as temporary:
            save_file(plain, temporary, metadata)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        UsageError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
