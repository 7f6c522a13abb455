"""RMSNorm (Zhang & Sennrich 2019) that is right under sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.ops.fused.norm import add_rms_norm


def replicated(parameter: Tensor, config: TransformerConfig) -> Tensor:
    """A replicated parameter as used inside the sequence-parallel region.

    Each tensor-parallel rank sees a slice of the sequence there, so its gradient is a partial sum; the copy region
    adds the parts inside autograd, which holds under every ZeRO stage.
    """
    return copy_to_tensor_model_parallel_region(parameter) if config.sequence_parallel else parameter


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) · weight over the last dimension, in the weight's dtype (an fp32 residual comes out as bf16)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))

    def forward(self, x: Tensor, delta: Tensor | None = None, bias: Tensor | None = None, *,
                return_sum: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of h = x + delta (+ bias), [..., hidden_size]; with return_sum (h in x's dtype, norm)."""
        h, y = add_rms_norm(x, delta, replicated(self.weight, self.config), bias=bias, eps=self.eps)
        return (h, y) if return_sum else y

    def again(self, h: Tensor) -> Callable[[], Tensor]:
        """A function that makes the norm of h once more."""
        h = h.detach()
        return lambda: add_rms_norm(h, None, self.weight, eps=self.eps)[1]
