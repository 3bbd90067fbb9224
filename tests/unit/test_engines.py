"""Engines are found by their files, and former paths of modules go on working."""

from importlib import import_module

import pytest

from duca_compile.artifact.engines import BACKENDS
from duca_compile.errors import BackendError


def test_each_engine_has_a_file_that_opens_it() -> None:
    assert BACKENDS == ("onnxruntime", "openvino", "tensorrt", "aoti")
    for name in BACKENDS:
        package = "aoti" if name == "aoti" else "onnx"
        try:
            module = import_module(f"duca_compile.artifact.engines.{package}.{name}")
        except BackendError:
            continue  # what it runs on is not installed
        assert callable(module.open_engine)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("demo", "DemoModel"),
        ("export.tensorrt", "build"),
        ("paper_flops", "loop_flops"),
        ("policies", "Policy"),
        ("runtime.session", "Session"),
    ],
)
def test_documented_paths_go_on_working(module: str, name: str) -> None:
    assert hasattr(import_module(f"duca_compile.{module}"), name)
