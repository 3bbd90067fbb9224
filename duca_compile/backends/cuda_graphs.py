"""Replays a step as one CUDA graph: its inputs and outputs lie in buffers that stay where they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3  # runs before recording, in which libraries allocate what they keep
Results = tuple[Tensor, ...]
# Records what a function launches, once; gives what launches it again, and the tensors that it then fills.
Record = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]


def record_cuda_graph(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Raises RuntimeError where ``run`` does what no CUDA graph can hold, such as reading a value on the host."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


@dataclass(frozen=True)
class _Recording:
    buffers: list[Tensor]
    replay: Callable[[], None]
    results: Results


class GraphReplay:
    """Runs ``run`` by copying inputs into buffers, replaying, and copying the results out.

    One recording serves each combination of shapes, as token counts differ. Inputs that ``run`` writes to are written
    in their buffers alone, so it has to return them too. Threads take turns, and have to use the same stream.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], record: Record = record_cuda_graph) -> None:
        self._run, self._record = run, record
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self._lock = threading.Lock()

    def __call__(self, *tensors: Tensor) -> Results:
        with self._lock:
            found = self._recording(tensors)
            torch._foreach_copy_(found.buffers, tensors)
            found.replay()
            return tuple(result.clone() for result in found.results)

    def _recording(self, tensors: Results) -> _Recording:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._recordings:
            buffers = [tensor.clone() for tensor in tensors]
            replay, results = self._record(lambda: tuple(self._run(*buffers)))
            self._recordings[shapes] = _Recording(buffers, replay, results)
        return self._recordings[shapes]
