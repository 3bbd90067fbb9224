"""What is written is run once and compared with the model: what passes, what is refused, and what the refusal says."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxscript.optimizer
import pytest
import torch
from torch import Tensor, nn

from duca_compile import ExportError, UsageError
from duca_compile.core.fx_utils import to_module
from duca_compile.export import onnx as writing
from duca_compile.export.artifact import _checking_engine
from duca_compile.export.batch import OpenGraph, Seen, open_graph
from duca_compile.export.check import Written, check, distance
from duca_compile.export.reasons import plain
from duca_compile.frontend.binder import Binder
from duca_compile.frontend.capture import capture

NAN, INF = float("nan"), float("inf")
LOWEST = torch.finfo(torch.float32).min


class Tiny(nn.Module):
    """Has weights that are not folded into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1024, 3), requires_grad=False)

    def mean(self) -> Tensor:
        return self.weight.mean(0)


class LinearAttention(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        weights = x.relu() * self.mean()
        total = weights.sum(-1, keepdim=True)
        return weights / (total + 1e-15)


class Select(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.where(x > 0, x > self.mean(), x < -1)
        return chosen.to(x.dtype)


class Special(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x * self.mean())


class Sums(Tiny):
    """Overflows in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        products = x[:, :, None] * x[:, None, :] * self.mean()
        return products.sum(1).exp() * 5 - x.exp() * x.sum(-1, keepdim=True).exp()


def opened(model: nn.Module, x: Tensor) -> OpenGraph:
    """The graph of a model of ``x`` and of three times as many rows."""

    def seen(batch: int) -> Seen:
        captured = capture(model, Binder(model)((), {"x": rows(x, batch)}))
        return Seen(batch, to_module(captured, captured.graph), ("x",), ("output_0",))

    return open_graph("tiny", seen(2), seen(6))


def rows(x: Tensor, batch: int) -> Tensor:
    return x[torch.arange(batch) % len(x)]


def checked(model: nn.Module, x: Tensor, folder: Path, backend: str = "onnxruntime") -> None:
    graph = opened(model.eval(), x)
    writer = writing.OnnxWriter(folder, 20)
    writer.add(graph)
    files, weights = writer.close()
    manifest: Any = SimpleNamespace(graphs=files, weights=weights, format="onnx")
    written = Written(folder, manifest, [graph], writer.translations)
    check(written, {batch: {"x": rows(x, batch)} for batch in (2, 6)}, backend)


def line(cls: type[nn.Module], text: str) -> str:
    """``file:line`` of the line of a class that holds ``text``."""
    source, first = inspect.getsourcelines(cls)
    return f"{inspect.getsourcefile(cls)}:{first + next(i for i, each in enumerate(source) if text in each)}"


ONE_EMPTY_ROW = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_tiny_number_that_prevents_a_division_by_zero_is_kept(backend: str, tmp_path: Path) -> None:
    checked(LinearAttention(), ONE_EMPTY_ROW, tmp_path, backend)


def test_values_that_are_not_the_models_are_refused_by_operator_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter's own rules take 1e-15 for 0."""
    monkeypatch.setattr(writing, "_simplify", onnxscript.optimizer.optimize_ir)
    with pytest.raises(ExportError) as error:
        checked(LinearAttention(), ONE_EMPTY_ROW, tmp_path)
    message = str(error.value)
    assert "graph 'tiny': under onnxruntime, 'output_0' is NaN or infinite in 3 of 6 places" in message
    assert f"it begins at aten.div.Tensor at {line(LinearAttention, '1e-15')}, whose result is NaN" in message
    assert "check=False" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.onnx", "weights.bin"]


def test_what_the_engine_has_no_kernel_for_is_refused_by_operator_and_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as error:
        checked(Select(), ONE_EMPTY_ROW, tmp_path)
    message = str(error.value)
    assert "graph 'tiny' does not run here under onnxruntime" in message
    assert f"(aten.where.self at {line(Select, 'torch.where')})" in message
    assert "Where(16)" in message


def test_what_has_no_onnx_form_is_refused_by_operator_and_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as error:
        checked(Special(), ONE_EMPTY_ROW, tmp_path)
    message = str(error.value)
    place = line(Special, "bessel")
    assert f"graph 'tiny' has no ONNX form: prims.bessel_j0.default at {place}: No ONNX function" in message
    assert "\x1b" not in message


def test_rounding_and_overflow_in_half_precision_are_no_fault(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 2.0, 2.9], [0.1, -1.3, 0.7]]).half()
    assert not Sums().half()(x).isfinite().all()
    checked(Sums().half(), x, tmp_path)


@pytest.mark.parametrize(
    ("found", "expected", "distant"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.2 / 5**0.5),
        ([0.1, 0.0], [0.0, 0.0], 0.1),
        ([-INF, 1.0], [-INF, 1.0], 0.0),
        ([LOWEST, 1.1], [LOWEST, 1.0], 0.1),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([NAN, 1.0], [0.0, 1.0], INF),
        ([0.0, 1.0], [NAN, 1.0], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([0.0, 1.0], [LOWEST, 1.0], INF),
    ],
)
def test_distance(found: list[float], expected: list[float], distant: float) -> None:
    assert distance(torch.tensor(found), torch.tensor(expected)) == pytest.approx(distant, rel=1e-6)


def test_other_shapes_are_infinitely_distant() -> None:
    assert distance(torch.zeros(2), torch.zeros(2, 1)) == INF


def test_the_engine_that_checks() -> None:
    assert _checking_engine(True, "onnx") == "onnxruntime"
    assert _checking_engine("openvino", "onnx") == "openvino"
    assert _checking_engine(True, "aoti") == "aoti"
    assert _checking_engine(False, "onnx") is None
    with pytest.raises(UsageError, match="check='tensorrt' is impossible"):
        _checking_engine("tensorrt", "onnx")
    with pytest.raises(UsageError, match="check='openvino' is impossible: graphs of format 'aoti'"):
        _checking_engine("openvino", "aoti")


def test_reasons_are_whole_and_plain() -> None:
    assert plain("\x1b[31mNo function\nfor this.\x1b[0m\n\nNext steps: ...") == "No function for this."
