"""Forward and backward pass of a micro-batch, on a GPU as one CUDA graph.

A micro-batch is some two thousand kernels: started one by one they keep the host as busy as the GPU, and with tensor
parallelism longer than it. The graph starts them all at once. The first optimizer step runs without it, so that
everything is compiled, allocated and connected before it is recorded.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from based_mp.config import BASED_MIXERS, Config
from based_mp.model.based_model import token_losses
from based_mp.model.fp8 import fp8_copies
from based_mp.ops import backends
from based_mp.training.bf16_optimizer import FusedBF16Optimizer


def recordable(config: Config, engine: Any, device: torch.device) -> bool:
    """Whether micro-batches can be a CUDA graph."""
    return (device.type == "cuda" and config.training.cuda_graph
            and isinstance(engine.optimizer, FusedBF16Optimizer)  # elsewhere gradients do not stay in one place
            and config.training.recompute != "full"               # it restores the random state on the host
            and not config.data.reset_state_at_documents          # their number differs between micro-batches
            and set(config.model.mixers) <= set(BASED_MIXERS)
            and backends.extension() is not None and not backends.TORCH_ONLY)


class MicroBatch:
    """Adds the gradients of micro-batches to the engine's sums.

    Calls must alternate with `engine.step()`. Built before the engine runs anything: a graph has to be recorded on the
    stream that the engine's hooks were made on.
    """

    def __init__(self, engine: Any, config: Config, device: torch.device) -> None:
        self.engine, self.device = engine, device
        self.dp_size = engine.dp_world_size
        self.accumulation = engine.gradient_accumulation_steps()
        self.copies = fp8_copies(engine.module)
        self.eager_left = self.accumulation if recordable(config, engine, device) else math.inf
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: dict[str, Tensor], counted: Tensor | float) -> Tensor:
        """The sum of the losses of the tokens that count, over `counted` (of the whole step); overwritten by the next.

        batch: tokens, labels [b, s], loss_mask [b, s], where documents are separate cu_seqlens.
        """
        if self.eager_left > 0:
            self.eager_left -= 1
            share = self._share(self.engine, batch, counted)
            # DeepSpeed divides by the accumulation and averages over ranks.
            self.engine.backward(share * (self.accumulation * self.dp_size))
            return share.detach()
        for copies in self.copies:                                # before the graph is recorded or started
            copies.renew()
        if self.graph is None:
            self._record(batch)
        for name, value in self.inputs.items():
            value.copy_(batch[name])
        self.counted.fill_(counted)
        self.graph.replay()
        return self.share

    @staticmethod
    def _share(model: Any, batch: dict[str, Tensor], counted: Tensor | float) -> Tensor:
        return (token_losses(model, batch) * batch["loss_mask"]).sum() / counted

    def _record(self, batch: dict[str, Tensor]) -> None:
        self.inputs = {name: torch.empty_like(value) for name, value in batch.items()}
        self.counted = torch.ones((), device=self.device)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks for its events meanwhile. Nothing draws random numbers.
        with mock.patch.object(get_cuda_rng_tracker(), "fork", contextlib.nullcontext), torch.cuda.graph(
                self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            share = self._share(self.engine.module, self.inputs, self.counted)
            (share * self.dp_size).backward()
            self.share = share.detach()


def use_own_stream(device: torch.device) -> None:
    """Makes this thread's work run on a stream of its own: the default one cannot be recorded."""
    if device.type == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())
