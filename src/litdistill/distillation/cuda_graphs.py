"""Recorders of operations that run again on the same tensors: CUDA graphs, which are launched as one operation.

CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Recorder(Protocol):
    """Records the operations of a step, to run them again on the same tensors."""

    device: str  # the type of device that it records on

    def watch(self, step: Callable[[], T]) -> tuple[T, str | None]:
        """Takes a step as usual; returns what it returns, and in words what of it cannot be recorded."""

    def record(self, step: Callable[[], T]) -> tuple[T, Callable[[], Any]]:
        """Returns what a step returns, whose tensors each replay writes, and the function that replays it. Takes no step."""


class CudaGraphs:
    """Records on a CUDA device. Graphs are replayed one at a time, so that they share one pool of memory."""

    device = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None

    def watch(self, step: Callable[[], T]) -> tuple[T, str | None]:
        """See `Recorder`. What waits for the GPU reads a value on the host, and no graph can hold it."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                taken = step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for other in caught:
            if other not in waits:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        where = f"{Path(waits[0].filename).name}, line {waits[0].lineno}, reads a value from the GPU" if waits else None
        return taken, where

    def record(self, step: Callable[[], T]) -> tuple[T, Callable[[], Any]]:
        """See `Recorder`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
        graph, stream, current = torch.cuda.CUDAGraph(), self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                taken = step()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return taken, graph.replay


def random_states(device: torch.device) -> list[Tensor]:
    """Returns the states of the generators that operations on a device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
