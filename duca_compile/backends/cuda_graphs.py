"""Replays a step as one CUDA graph, with static buffers for its inputs and outputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3  # runs before recording, in which libraries allocate their workspaces
Results = tuple[Tensor, ...]
# Records the kernels that a function launches. Returns a function that launches them again, and the tensors it fills.
Record = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]


def record_cuda_graph(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Records ``run`` as a CUDA graph.

    Returns:
        A function that replays it, and the tensors that a replay fills.

    Raises:
        RuntimeError: ``run`` does something that a CUDA graph cannot record, such as reading a value on the host.
    """
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
    """Runs ``run`` by copying the inputs into static buffers, replaying a recording, and copying the results out.

    There is one recording for each combination of input shapes, since token counts vary. An input that ``run`` writes
    in place changes only in its buffer, so ``run`` must return it, too. Threads take turns, and must use the same
    stream.

    Args:
        run: a function of tensors.
        record: records a call of ``run``.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], record: Record = record_cuda_graph) -> None:
        self._run, self._record = run, record
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self._lock = threading.Lock()

    def __call__(self, *tensors: Tensor) -> Results:
        with self._lock:
            recording = self._recording(tensors)
            torch._foreach_copy_(recording.buffers, tensors)
            recording.replay()
            return tuple(result.clone() for result in recording.results)

    def _recording(self, tensors: Results) -> _Recording:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._recordings:
            buffers = [tensor.clone() for tensor in tensors]
            replay, results = self._record(lambda: tuple(self._run(*buffers)))
            self._recordings[shapes] = _Recording(buffers, replay, results)
        return self._recordings[shapes]
