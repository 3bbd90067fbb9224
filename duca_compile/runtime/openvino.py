"""How OpenVINO compiles and runs a model, as a backend or as the engine of an artifact."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

_PLACES = re.compile(r"^(Exception from |FrontEnd API failed|Model wasn't fully|Summary:|-- Conversion is failed)")
_CHECKS = re.compile(r"Check '.*?' failed at \S+:\s*")  # in OpenVINO's own sources
_LONGEST = 400  # characters of a message


def reason(error: BaseException) -> str:
    """What a message of OpenVINO says, on one line, without the places in its sources that come first."""
    lines = [_CHECKS.sub("", line.strip()) for line in str(error).splitlines() if not _PLACES.match(line.strip())]
    text = " ".join(" ".join(lines).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def cpu_options(threads: int | None) -> dict[str, Any]:
    """OpenVINO's options for one call at a time, in float32; ``threads`` is None for OpenVINO's own choice."""
    options = {"NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}
    return options if threads is None else options | {"INFERENCE_NUM_THREADS": threads}


class InferRequests:
    """The inference requests of one compiled model; any number of threads may run it.

    Each request has activations of its own. Inputs whose memory stays the same from call to call, the weights, are
    bound once: ``run`` calls ``bind`` only if ``address`` has changed since the request was bound.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._idle: list[tuple[Any, Any]] = []  # openvino.InferRequest, and the address that it was bound at

    def run(
        self,
        inputs: Iterable[tuple[int, Any]],
        outputs: Iterable[Any],
        address: Any = None,
        bind: Callable[[Any], None] = lambda request: None,
    ) -> None:
        """Runs the model once.

        Args:
            inputs: the index and the ``openvino.Tensor`` of each input that is not bound.
            outputs: the ``openvino.Tensor`` that each output is written to.
            address: the address of what ``bind`` binds.
            bind: sets the inputs that stay the same.
        """
        try:
            request, bound = self._idle.pop()
        except IndexError:
            request, bound = self._model.create_infer_request(), None
        if bound != address:
            bind(request)
        for index, tensor in inputs:
            request.set_input_tensor(index, tensor)
        for index, tensor in enumerate(outputs):
            request.set_output_tensor(index, tensor)
        request.infer()
        self._idle.append((request, address))
