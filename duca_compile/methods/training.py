"""Trains the predictor of DisCa (arXiv 2602.05449) on a model's own denoising loops."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, fx, nn

from duca_compile.compiler.compiled import Compiled
from duca_compile.core.ports import STREAM_END
from duca_compile.core.variants import PredictVariant, Variant
from duca_compile.errors import UsageError, not_none
from duca_compile.methods.recording import RecordedCall, RecordedPass, Recorder, SampleLoop
from duca_compile.passes.caching.predict import last_products, named, trained_weights, with_predictor
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies.checks import check_number, check_whole
from duca_compile.policies.predictor import FUSE, Predictor, PredictorConfig, read, write

aten = torch.ops.aten

_BEND = 2.3994  # where SiLU's second derivative is zero, so that SiLU is closest to linear
_SLOPE = 1.0998  # SiLU's derivative there
_SPREAD = 0.25  # the distance from there that one standard deviation of the hidden state is scaled to
_STATE = "training"  # the key of the JSON in a checkpoint's metadata


@dataclass(frozen=True)
class TrainingSettings:
    """How a predictor is trained.

    Attributes:
        loops: how many denoising loops of the model to train on, one after the other. Memory holds one of them.
        updates: gradient steps for each loop.
        reach: how far back the full step that a prediction starts from may be, as a share of the loop; 0.2 in the
            paper.
        learning_rate: initial learning rate of AdamW; it falls to zero along a cosine.
        seed: seed of the choice of steps.

    Raises:
        PolicyError: an invalid parameter.
    """

    loops: int = 50
    updates: int = 20
    reach: float = 0.2
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("loops", self.loops, least=1)
        check_whole("updates", self.updates, least=1)
        check_number("reach", self.reach, least=0, most=1)
        check_number("learning_rate", self.learning_rate, least=0)
        check_whole("seed", self.seed, least=0)


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """The path of the checkpoint of a training that writes its predictor to ``path``."""
    return Path(path).with_suffix(".checkpoint.safetensors")


def train_predictor(
    model: nn.Module,
    sample: SampleLoop,
    path: str | os.PathLike[str],
    settings: TrainingSettings | None = None,
    *,
    resume: bool = False,
    timestep: str | None = None,
    latent: str | None = None,
    progress: Progress | None = None,
) -> Predictor:
    """Trains a predictor for ``DisCa`` and writes it to ``path``, with a checkpoint beside it, after each loop.

    A prediction starts from the hidden state of an earlier step of the same guidance pass. The loss is the mean squared
    error to the model's own output. Source: DisCa, arXiv 2602.05449; the adversarial stage of the paper is not
    implemented.

    Args:
        model: a Diffusion Transformer in eval mode. It is not changed.
        sample: ``sample(drop_in, number)`` runs one denoising loop with ``drop_in`` in place of the model. Another
            number must give another loop, and the same number the same loop.
        path: the file to write; its name ends in ``.safetensors``.
        settings: how long to train, and at which rate; the defaults of ``TrainingSettings`` for None.
        resume: continue from the checkpoint, if there is one. The result equals that of an uninterrupted training.
        timestep: name of the timestep argument; needed only if the graph does not show it.
        latent: name of the argument that is denoised; needed only if the graph does not show it.
        progress: an open rich display to show the progress in; None to open one.

    Returns:
        The predictor, with float32 weights.

    Raises:
        UsageError: ``sample`` does not run one loop of at least two steps, the path cannot be written, or the
            checkpoint belongs to another training.
        PolicyError: the model has too few blocks for a predictor, or its last blocks read more from the others than the
            stream.
    """
    chosen = TrainingSettings() if settings is None else settings
    trainer = _Trainer(Recorder(model, sample, timestep, latent=latent), Path(path), chosen)
    if resume and checkpoint_path(path).exists():
        trainer.resume()
    if progress is not None:
        return trainer.run(progress)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as new_progress:
        return trainer.run(new_progress)


class _Graphs:
    """Variants with the predictor, one for each captured graph that it is trained or measured on."""

    def __init__(self, config: PredictorConfig) -> None:
        self._config = config
        self._variants: dict[int, tuple[Compiled, Variant]] = {}  # by the identity of the capture, which is referenced

    def predict(
        self, compiled: Compiled, weights: Mapping[str, Tensor], start: RecordedCall, end: RecordedCall
    ) -> tuple[Tensor, ...]:
        """The predicted outputs of the call ``end``, from the hidden state of the call ``start``."""
        variant = self._variant(compiled, weights)
        values = {**end.inputs, STREAM_END: start.hidden}
        typed = {n: w.to(_at(variant.module, n).dtype) for n, w in named(weights).items()}
        inputs = tuple(values[port] for port in variant.inputs)
        return torch.func.functional_call(variant.module, typed, inputs)  # type: ignore[no-any-return]

    def _variant(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> Variant:
        if id(compiled) not in self._variants:
            captured, facts = compiled.captured, compiled.facts
            plain = {name: weight.detach() for name, weight in weights.items()}
            spliced = with_predictor(captured, facts, Predictor(self._config, plain))
            variant = build_variant(spliced, facts, PredictVariant(frozenset(weights)))
            _make_differentiable(variant.module)
            self._variants[id(compiled)] = compiled, variant
        return self._variants[id(compiled)][1]


def _make_differentiable(module: fx.GraphModule) -> None:
    """Replaces ``copy``, which traces have for assignments to a slice and PyTorch cannot differentiate."""
    for node in module.graph.find_nodes(op="call_function", target=aten.copy.default):
        target, value = node.args[:2]
        like = target.meta["val"]
        with module.graph.inserting_before(node):
            value = module.graph.call_function(aten.expand.default, (value, list(like.shape)))
            value = module.graph.call_function(aten.to.dtype, (value, like.dtype))
        node.replace_all_uses_with(value)
        module.graph.erase_node(node)
    module.recompile()


def _at(module: fx.GraphModule, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), leaf)
    return tensor


def prediction_error(
    model: nn.Module,
    sample: SampleLoop,
    predictor: Predictor,
    distance: int,
    number: int,
    timestep: str | None = None,
    latent: str | None = None,
) -> float:
    """The relative error of predictions made ``distance`` steps after a full step.

    Args:
        model: the model that the predictor was trained for.
        sample: ``sample(drop_in, number)`` runs one denoising loop with ``drop_in`` in place of the model.
        predictor: the trained network.
        distance: steps from the full step to the predicted one.
        number: of the loop to measure.
        timestep: name of the timestep argument; needed only if the graph does not show it.
        latent: name of the argument that is denoised; needed only if the graph does not show it.

    Returns:
        The norm of the differences to the model's own outputs over the norm of these outputs, over the whole loop.

    Raises:
        UsageError: ``sample`` does not run one loop of at least two steps.
        PolicyError: the predictor belongs to another model.
    """
    graphs, error, size = _Graphs(predictor.config), 0.0, 0.0
    with torch.no_grad():
        for recorded in Recorder(model, sample, timestep, latent=latent).passes(number):
            for start, end in zip(recorded.calls, recorded.calls[distance:], strict=False):
                predicted = graphs.predict(recorded.compiled, predictor.weights, start, end)
                error += float(_squared_error(predicted, end.outputs))
                size += sum(float(output.float().square().sum()) for output in end.outputs)
    return math.sqrt(error / size)


def _squared_error(predicted: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a - b).float().square().sum() for a, b in zip(predicted, expected, strict=True)]).sum()


def initial_weights(compiled: Compiled, hidden: Tensor) -> dict[str, Tensor]:
    """Initial weights, whose prediction is close to reuse of the hidden state.

    The fusion passes each channel of the hidden state through the part of SiLU that is closest to linear, scaled by the
    mean and standard deviation of ``hidden``, (values, C). The blocks start from the model's weights, except that the
    last product of each branch is zero.
    """
    weights = {n: w.detach().float().clone() for n, w in trained_weights(compiled.captured, compiled.facts).items()}
    for names in last_products(compiled.captured, compiled.facts):
        for name in names:
            weights[name].zero_()
    mean, spread = hidden.float().mean(0), hidden.float().std(0).clamp_min(1e-3) / _SPREAD
    width = len(mean)
    first, second = torch.zeros(width, 2 * width), torch.diag(spread / _SLOPE).to(mean.device)
    first = first.to(mean.device)
    first[:, width:] = torch.diag(1 / spread)
    middle = nn.functional.silu(torch.tensor(_BEND))
    biases = _BEND - mean / spread, mean - spread * middle / _SLOPE
    return dict(zip(FUSE, (first, biases[0], second, biases[1]), strict=True)) | weights


class _Trainer:
    """The state of one training: weights, optimizer, and the number of loops so far."""

    def __init__(self, recorder: Recorder, path: Path, settings: TrainingSettings) -> None:
        if path.suffix != ".safetensors":
            raise UsageError(f"{path} must end in .safetensors, the format of the file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}; create it first")
        self._recorder, self._path, self._settings = recorder, path, settings
        self._seen, self._losses = 0, list[float]()
        self._first = recorder.passes(0)
        compiled = self._first[0].compiled
        hidden = torch.cat([call.hidden.flatten(0, -2) for call in self._first[0].calls])
        name = recorder.model_name
        self._config = PredictorConfig(name, hidden.shape[-1], compiled.facts.blocks)
        weights = initial_weights(compiled, hidden)
        self._weights = {name: nn.Parameter(weight) for name, weight in weights.items()}
        self._graphs = _Graphs(self._config)
        self._optimizer = torch.optim.AdamW(self._weights.values(), settings.learning_rate, weight_decay=0.0)

    @property
    def _identity(self) -> dict[str, Any]:
        """What must be the same for a training to continue from a checkpoint."""
        config = self._config
        return {**asdict(self._settings), "model": config.model, "width": config.width, "blocks": config.blocks}

    def resume(self) -> None:
        """Loads the state of the checkpoint.

        Raises:
            UsageError: it belongs to another training; the message names what differs.
        """
        tensors, metadata = read(checkpoint_path(self._path))
        saved = json.loads(metadata.get(_STATE, "{}"))
        for name, value in self._identity.items():
            before = saved.get("of", {}).get(name)
            if before != value:
                raise UsageError(
                    f"{checkpoint_path(self._path)} belongs to a training with {name}={before!r}, and now it is "
                    f"{value!r}; continue with the same settings, or remove the checkpoint to start again"
                )
        self._seen, self._losses = saved["seen"], saved["losses"]
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(tensors[f"weight.{name}"])
        state = {i: {k: tensors[f"{k}.{name}"] for k in saved["moments"]} for i, name in enumerate(self._weights)}
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})

    def _save(self) -> Predictor:
        updates = self._seen * self._settings.updates
        weights = {name: weight.detach().cpu().clone() for name, weight in self._weights.items()}
        predictor = Predictor(replace(self._config, updates=updates, losses=tuple(self._losses)), weights)
        state = self._optimizer.state_dict()["state"]
        moments = sorted(state[0])
        tensors = {f"weight.{name}": weight for name, weight in weights.items()}
        tensors |= {f"{k}.{name}": state[i][k] for i, name in enumerate(weights) for k in moments}
        saved = {"of": self._identity, "moments": moments, "seen": self._seen, "losses": self._losses}
        write(checkpoint_path(self._path), tensors, {_STATE: json.dumps(saved)})
        predictor.save(self._path)
        return predictor

    def run(self, progress: Progress) -> Predictor:
        settings = self._settings
        total = settings.loops * settings.updates
        bar = progress.add_task("predictor", total=total, completed=self._seen * settings.updates)
        predictor = self._save() if self._seen == settings.loops else None
        while self._seen < settings.loops:
            passes = self._first if self._seen == 0 else self._recorder.passes(self._seen)
            choice = random.Random(f"{settings.seed} {self._seen}")
            losses = []
            for update in range(settings.updates):
                done = (self._seen * settings.updates + update) / total
                self._optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * done)) / 2
                losses.append(self._update(choice.choice(passes), choice))
                progress.update(bar, advance=1, description=f"relative error {losses[-1] ** 0.5:.4f}")
            self._first = []
            self._losses.append(sum(losses) / len(losses))
            self._seen += 1
            predictor = self._save()
        return not_none(predictor, "the predictor")

    def _update(self, recorded: RecordedPass, choice: random.Random) -> float:
        """Makes one gradient step.

        Returns:
            The squared error relative to the square of the outputs.
        """
        calls = recorded.calls
        reach = max(1, round(self._settings.reach * len(calls)))
        end = choice.randrange(1, len(calls))
        start = choice.randrange(max(0, end - reach), end)
        expected = calls[end].outputs
        with torch.enable_grad():
            predicted = self._graphs.predict(recorded.compiled, self._weights, calls[start], calls[end])
            error = _squared_error(predicted, expected)
            loss = error / sum(output.numel() for output in expected)
            gradients = torch.autograd.grad(loss, list(self._weights.values()))
        for weight, gradient in zip(self._weights.values(), gradients, strict=True):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        size = sum(float(output.float().square().sum()) for output in expected)
        return float(error.detach()) / size
