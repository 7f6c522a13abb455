"""Softmax attention mixer with RoPE: sliding window, or full for the Transformer++ baseline; parallel over heads."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import Mixer
from based_mp.ops.window_attention import causal_attention, rope


class SoftmaxAttention(Mixer):
    """One fused qkv projection without biases, rows [head][q | k | v]; scale head_dim^-½.

    window: tokens a position sees, its own included; None for full causal attention.
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, *, window: int | None = None,
                 rotary_base: float = 10000.0, rotary_fraction: float = 1.0, **kwargs: Any) -> None:
        heads, self.head_dim = config.num_attention_heads, config.kv_channels
        super().__init__(config, submodules, width=3 * heads * self.head_dim, out_width=heads * self.head_dim,
                         **kwargs)
        self.heads, self.window = heads // self.tp_size, window
        self.rotary = {"base": rotary_base, "fraction": rotary_fraction}

    def _split(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, width] → q, k (rotated), v [b, s, h, d]."""
        q, k, v = x.unflatten(-1, (self.heads, 3, self.head_dim)).transpose(0, 1).unbind(-2)
        return rope(q, positions, **self.rotary), rope(k, positions, **self.rotary), v

    def mix(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        # Attention depends on distances alone, so a packed document may keep its position in the pack.
        positions = torch.arange(x.shape[0], device=x.device)[None]
        q, k, v = self._split(x, positions)
        return causal_attention(q, k, v, window=self.window, cu_seqlens=cu_seqlens).transpose(0, 1).flatten(2)
