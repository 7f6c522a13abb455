"""Selective recomputation: activations that are cheap to make again are not kept for the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


@contextlib.contextmanager
def recomputed(output: Tensor, again: Callable[[], Tensor], module: torch.nn.Module, config: TransformerConfig, *,
               part: str = "mlp") -> Iterator[None]:
    """While a linear layer runs on `output`, what it would keep of `output` for its weight's gradient is `again`.

    `again` must give bitwise the same tensor from tensors that are kept anyway. Does nothing unless `module` trains
    under training.recompute=selective, or =norms and `part` is "layernorm".
    """
    chosen = config.recompute_granularity == "selective" and part in config.recompute_modules
    if not (module.training and chosen and output.requires_grad):
        yield
        return
    address, size, dtype = output.data_ptr(), output.numel(), output.dtype

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        if tensor.data_ptr() != address or tensor.numel() != size or tensor.dtype != dtype:
            return tensor
        shape = tensor.shape
        return lambda: again().view(shape)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
