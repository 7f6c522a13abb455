"""Softmax attention mixer with RoPE: sliding window, or full for the Transformer++ baseline; parallel over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import Mixer
from based_mp.ops.window_attention import causal_attention, rope, rotary_attention


@dataclass
class AttentionState:
    """Keys and values still visible, newest last.

    k, v: [batch, cached, heads of this rank, head_dim], rows with fewer tokens are filled on the left;
    length: int64 [batch], tokens seen so far (also the next token's position).
    """

    k: Tensor
    v: Tensor
    length: Tensor


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
        return rotary_attention(x, self.heads, window=self.window, cu_seqlens=cu_seqlens, **self.rotary)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        empty = torch.zeros(batch, 0, self.heads, self.head_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty, torch.zeros(batch, dtype=torch.int64, device=device))

    def extend_mix(self, x: Tensor, state: AttentionState, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return self._extend_rows(x, state)
        return self._extend_packed(x, state, cu_seqlens)

    def _extend_rows(self, x: Tensor, state: AttentionState) -> Tensor:
        """The same number of new tokens in every row."""
        s, b, _ = x.shape
        offsets = torch.arange(s, device=x.device)
        q, k, v = self._split(x, state.length[:, None] + offsets)
        if state.k.shape[1] == 0:
            o = causal_attention(q, k, v, window=self.window)
        else:
            k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
            o = self._attend_cached(q, k, v, state.length)
        self._keep(state, k, v, state.length + s)
        return o.transpose(0, 1).flatten(2)

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, before: Tensor) -> Tensor:
        """q: the newest positions of k; row i has `before[i]` cached tokens at most, right-aligned."""
        s, total = q.shape[1], k.shape[1]
        key = torch.arange(total, device=q.device)
        distance = torch.arange(total - s, total, device=q.device)[:, None] - key
        seen = (distance >= 0) & (key >= (total - s - before)[:, None, None])
        if self.window is not None:
            seen = seen & (distance < self.window)
        o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=seen[:, None])
        return o.transpose(1, 2)

    def _extend_packed(self, x: Tensor, state: AttentionState, cu_seqlens: Tensor) -> Tensor:
        """Sequences of different lengths end to end: a fresh prefill in one pass, a continued one row by row."""
        lengths = cu_seqlens.diff().long()
        rows = [slice(a, e) for a, e in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
        positions = torch.cat([n + torch.arange(r.stop - r.start, device=x.device)
                               for n, r in zip(state.length, rows, strict=True)])
        q, k, v = self._split(x, positions[None])
        if state.k.shape[1] == 0:
            o = causal_attention(q, k, v, window=self.window, cu_seqlens=cu_seqlens)
            keys, values = [k[0, r] for r in rows], [v[0, r] for r in rows]
        else:
            keys = [torch.cat([state.k[i], k[0, r]]) for i, r in enumerate(rows)]
            values = [torch.cat([state.v[i], v[0, r]]) for i, r in enumerate(rows)]
            o = torch.cat([self._attend_cached(q[:, r], keys[i][None], values[i][None], state.length[i : i + 1])
                           for i, r in enumerate(rows) if r.stop > r.start], 1)
        size = max(t.shape[0] for t in keys)
        self._keep(state, *(torch.stack([F.pad(t, (0, 0, 0, 0, size - t.shape[0], 0)) for t in ts])
                            for ts in (keys, values)), state.length + lengths)
        return o.transpose(0, 1).flatten(2)

    def _keep(self, state: AttentionState, k: Tensor, v: Tensor, length: Tensor) -> None:
        """Cache what the next token can see: window − 1 positions, or all of them."""
        if self.window is not None:
            first = max(k.shape[1] - (self.window - 1), 0)
            k, v = k[:, first:].clone(), v[:, first:].clone()
        state.k, state.v, state.length = k, v, length
