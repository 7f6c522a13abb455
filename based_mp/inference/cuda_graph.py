"""Decoding steps and short prompts as CUDA graphs, one a size.

Started one by one, the few hundred kernels of a pass over little data take the host several times as long as the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from based_mp.inference.model import InferenceModel
from based_mp.inference.pack import FixedPack
from based_mp.inference.state import StatePool, to_device

# Batch sizes that graphs are captured for; a step runs in the smallest that holds its rows.
SIZES = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
# Sizes of passes over prompts. Longer ones keep the GPU busy as they are.
TOKENS = [16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192]
PIECES = [1, 2, 3, 5, 9, 17, 33, 65]


def _capture(run: Callable[[], Tensor | None], memory: object) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    """A graph of what `run`, which has run before, launches, and its result, which every replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        result = run()
    return graph, result


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
        graph, _ = _capture(lambda: self._eager(size), self._memory)
        self.slots[:size] = slots
        return graph


class Prefiller:
    """Puts prompts into slots, as `InferenceModel.prefill` does.

    Where the CUDA kernels run the model, few tokens are filled up to a pass of TOKENS × PIECES and, unless graphs are
    turned off, replayed from a graph that is captured when a size comes for the second time: one for passes whose
    pieces all start documents, one for others, which full attention does not have. No slot has generated anything yet.
    """

    def __init__(self, model: InferenceModel, pool: StatePool, *, graphs: bool = True) -> None:
        self.model, self.pool, self.graphs = model, pool, graphs
        self.fills = model.ops.PADS_ROWS and model.capturable
        self._packs: dict[tuple[int, int, bool], FixedPack] = {}
        self._captured: dict[tuple[int, int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if self.fills and graphs else None

    def run(self, tokens: list[list[int]], slots: list[int], starts: list[int]) -> Tensor:
        """Logits after each piece, as `InferenceModel.prefill` returns them; the next call may change them."""
        fresh = not any(starts)
        size = self._size(tokens) if self.fills and (fresh or self.model.continuable) else None
        if size is None:
            return self.model.prefill(self.pool, tokens, slots, starts)
        key = *size, fresh
        seen = key in self._packs
        if not seen:
            window = self.model.config.window if "sliding_attention" in self.model.config.mixers else None
            self._packs[key] = FixedPack(self.pool, *size, self.model.rotate, fresh=fresh, window=window)
        pack = self._packs[key]
        pack.load(tokens, slots, starts)
        if not (seen and self.graphs):
            return self.model.run(pack, pack.ids)[: len(tokens)]
        if key not in self._captured:
            self._captured[key] = _capture(lambda: self.model.run(pack, pack.ids), self._memory)
        graph, logits = self._captured[key]
        graph.replay()
        return logits[: len(tokens)]

    @staticmethod
    def _size(tokens: list[list[int]]) -> tuple[int, int] | None:
        """The pass that these pieces fill, or the smallest with idle pieces for the rest; None where there is none."""
        count, total = len(tokens), sum(map(len, tokens))
        if count in PIECES and total in TOKENS:
            return total, count
        pieces = next((n for n in PIECES if n > count), None)
        length = next((n for n in TOKENS if pieces and n >= total + pieces - count), None)
        return None if length is None else (length, pieces)
