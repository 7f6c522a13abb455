"""Mamba mixer (Gu & Dao 2023, section 3.4), tensor parallel over channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import RowMixer, valid_mask
from based_mp.ops.fused.selective_scan import selective_scan
from based_mp.ops.recurrences import accumulation_dtype, causal_conv, next_carry
from based_mp.systems import MambaConfig


@dataclass
class MambaState:
    """carry: last inputs of the convolution [batch, kernel − 1, channels of this rank]; h: fp32 [batch, channels,
    d_state]."""

    carry: Tensor
    h: Tensor


class Mamba(RowMixer):
    """y = linear_out((scan(silu(conv(x))) + D·silu(conv(x))) ∘ silu(z)), [x, z] = linear_in(input), rows [channel][2].

    Δ, B and C of the scan are linear in silu(conv(x)); Δ through a low rank.
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, *, settings: MambaConfig, kernels: str,
                 **kwargs: Any) -> None:
        channels, n, kernel = settings.expand * config.hidden_size, settings.d_state, settings.conv_kernel
        super().__init__(config, submodules, width=2 * channels, out_width=channels, **kwargs)
        self.kernels = kernels
        self.channels, self.d_state, self.rank = channels // self.tp_size, n, settings.rank(config.hidden_size)
        g = self.generator()

        def uniform(*shape: int, bound: float) -> Tensor:
            return (torch.rand(*shape, generator=g) * 2 - 1) * bound

        self.conv_weight = self.shard(uniform(channels, kernel, bound=kernel ** -0.5))
        self.conv_bias = self.shard(uniform(channels, bound=kernel ** -0.5))
        self.scan_weight = self.shard(uniform(self.rank + 2 * n, channels, bound=channels ** -0.5), 1)
        self.delta_weight = self.shard(uniform(channels, self.rank, bound=self.rank ** -0.5))
        # Δ between 1e-3 and 1e-1 at the start: the bias is its inverse softplus.
        delta = torch.exp(torch.rand(channels, generator=g) * math.log(100) + math.log(1e-3)).clamp(min=1e-4)
        self.delta_bias = self.shard(delta + torch.log(-torch.expm1(-delta)))
        self.a_log = self.shard(torch.arange(1, n + 1).float().log().repeat(channels, 1), decay=False)
        self.skip = self.shard(torch.ones(channels))

    def run(self, x: Tensor, state: MambaState | None, lengths: Tensor | None) -> Tensor:
        u, z = x.unflatten(-1, (self.channels, 2)).unbind(-1)
        acc = accumulation_dtype(x)
        carry = None if state is None else state.carry
        conv = F.silu(causal_conv(u, self.conv_weight, carry) + self.conv_bias)
        scanned = reduce_from_tensor_model_parallel_region(F.linear(conv, self.scan_weight))
        scanned = copy_to_tensor_model_parallel_region(scanned)
        low, b, c = scanned.split([self.rank, self.d_state, self.d_state], -1)
        delta = F.softplus(F.linear(low, self.delta_weight).to(acc) + self.delta_bias.to(acc))
        mask = valid_mask(delta, lengths)
        if mask is not None:
            delta = delta * mask                                              # Δ = 0 leaves the state as it is
        initial = conv.new_zeros(*conv.shape[1:], self.d_state, dtype=acc) if state is None else state.h
        y, last = selective_scan(conv, delta, -self.a_log.to(acc).exp(), b, c, initial,
                                 kernels=self.kernels if state is None else "torch")
        if state is not None:
            state.carry, state.h = next_carry(u, state.carry, lengths), last
        return (y + self.skip.to(acc) * conv).to(x.dtype) * F.silu(z)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> MambaState:
        acc = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.conv_weight.shape[1] - 1, self.channels, device=device, dtype=dtype),
            torch.zeros(batch, self.channels, self.d_state, device=device, dtype=acc))
