"""Softmax attention mixer with RoPE: sliding window, or full for the Transformer++ baseline; parallel over heads."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import Mixer
from based_mp.ops.window_attention import rotary_attention


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

    def mix(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return rotary_attention(x, self.heads, window=self.window, cu_seqlens=cu_seqlens, **self.rotary)
