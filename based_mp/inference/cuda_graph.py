"""Decoding steps as CUDA graphs, one a batch size."""

from __future__ import annotations

import torch

from based_mp.inference.model import InferenceModel
from based_mp.inference.state import StatePool, to_device

# Batch sizes that graphs are captured for; a step runs in the smallest that holds its rows.
SIZES = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]


class Decoder:
    """One new token for every row: the model's step, then the choice of its token.

    Where the CUDA kernels run the model, batches are filled with idle rows up to the next of SIZES and, unless graphs
    are turned off, replayed from a graph that is captured at its first use. Otherwise the step just runs.
    """

    def __init__(self, model: InferenceModel, pool: StatePool, *, graphs: bool = True) -> None:
        self.model, self.pool = model, pool
        self.graphs = graphs and model.ops.PADS_ROWS
        self.slots = torch.full((pool.slots,), -1, dtype=torch.int32, device=model.device)
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if self.graphs else None

    def set_rows(self, slots: list[int]) -> None:
        """The slots that the following steps advance."""
        count = self.size = len(slots)
        if self.model.ops.PADS_ROWS:
            self.size = min(next((n for n in SIZES if n >= count), count), self.pool.slots)
        rows = torch.tensor(slots + [-1] * (self.size - count), dtype=torch.int32)
        self.slots[: self.size] = to_device(rows, self.slots.device)

    def step(self) -> None:
        """One token further: what is chosen goes to the pool."""
        if not self.graphs:
            return self._eager(self.size)
        if self.size not in self._captured:
            self._captured[self.size] = self._capture(self.size)
        self._captured[self.size].replay()

    @torch.no_grad()
    def _eager(self, size: int) -> None:
        slots = self.slots[:size]
        self.model.ops.sample(self.model.step(self.pool, slots), self.pool, slots, 1)

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Capture with idle rows, so that the warm-up advances no state."""
        slots, idle = self.slots[:size].clone(), torch.full_like(self.slots[:size], -1)
        self.slots[:size] = idle
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._eager(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._eager(size)
        self.slots[:size] = slots
        return graph
