"""The requests of any compiled OpenVINO model, and how OpenVINO is to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def cpu_options(threads: int | None) -> dict[str, Any]:
    """How OpenVINO is to compile: for one call at a time, in float32; with as many threads as it takes for None."""
    options = {"NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}
    return options if threads is None else options | {"INFERENCE_NUM_THREADS": threads}


class InferRequests:
    """The requests of one compiled model; any number of threads may run it.

    Each request has activations of its own. Inputs that stay where they are from call to call, the weights, are bound
    once: ``bind`` does that where ``address`` is not what the request was bound at.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._idle: list[tuple[Any, Any]] = []  # openvino.InferRequest, and the address

    def run(
        self,
        inputs: Iterable[tuple[int, Any]],
        outputs: Iterable[Any],
        address: Any = None,
        bind: Callable[[Any], None] = lambda request: None,
    ) -> None:
        """Reads the inputs, by their places, and writes all outputs; these are ``openvino.Tensor``."""
        try:
            request, bound = self._idle.pop()
        except IndexError:
            request, bound = self._model.create_infer_request(), None
        if bound != address:
            bind(request)
        for place, tensor in inputs:
            request.set_input_tensor(place, tensor)
        for place, tensor in enumerate(outputs):
            request.set_output_tensor(place, tensor)
        request.infer()
        self._idle.append((request, address))
