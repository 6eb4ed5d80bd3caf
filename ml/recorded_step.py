"""A training step that a GPU replays by itself: one call from the host in place of some hundred."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Steps that run as they are first: they allocate what later steps find in place.
WARM_UP_STEPS = 3


class RecordedStep:
    """Run a step on batches of positions, on a CUDA device; full batches are recorded once and replayed ever after.

    The step must not look at a value on the host, and must read and write the same tensors every time. Short batches,
    such as an epoch's last, run as they are. The loss (a scalar on the device) is overwritten by the next full batch.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], size: int, generator: torch.Generator) -> None:
        self._step = step
        self._size = size
        self._generator = generator
        self._warm_ups = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._positions = torch.empty(0)
        self._loss = torch.empty(0)

    def __call__(self, positions: Tensor) -> Tensor:
        if len(positions) != self._size:
            return self._step(positions)
        if self._graph is None:
            if self._warm_ups < WARM_UP_STEPS:
                self._warm_ups += 1
                return self._beside(positions)
            self._record(positions)
        assert self._graph is not None
        self._positions.copy_(positions)
        self._graph.replay()
        return self._loss

    def _beside(self, positions: Tensor) -> Tensor:
        """Run a step on a stream of its own, as recording asks of the steps before it."""
        stream = torch.cuda.Stream(positions.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(positions.device))
        with torch.cuda.stream(stream):
            loss = self._step(positions)
        torch.cuda.current_stream(positions.device).wait_stream(stream)
        return loss

    def _record(self, positions: Tensor) -> None:
        self._positions = positions.clone()
        graph = torch.cuda.CUDAGraph()
        # Torch's own generator, which dropout draws from, is registered already.
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            self._loss = self._step(self._positions)
        self._graph = graph
