"""Taylor linear attention mixer (Arora et al. 2024, section 4.1), tensor parallel over heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import Mixer
from based_mp.ops.linear_attention import log_decay, taylor_linear_attention_qkv
from based_mp.ops.reference import taylor_denominator
from based_mp.ops.taylor_cuda import parts


class LinearAttention(Mixer):
    """q, k: d_model → heads·feature_dim; v: d_model → heads·head_dim; out: heads·head_dim → d_model; no biases.

    The rows of `linear_in.weight` are [head][q | k | v], heads outermost, so that tensor parallelism cuts between
    heads.
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, *, feature_dim: int,
                 decay_exponent: int | None = None, **kwargs: Any) -> None:
        self.feature_dim, self.head_dim = feature_dim, config.kv_channels
        heads = config.num_attention_heads
        super().__init__(config, submodules, width=heads * (2 * feature_dim + self.head_dim),
                         out_width=heads * self.head_dim, **kwargs)
        self.heads = heads // self.tp_size
        self.decay = None
        if decay_exponent is not None:
            self.decay = log_decay(decay_exponent, self.tp_rank * self.heads, self.heads)
        self.collect_diagnostics = False
        self.diagnostics: dict[str, float] = {}

    def _decay(self, x: Tensor) -> Tensor | None:
        return None if self.decay is None else torch.tensor(self.decay, device=x.device)

    def mix(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        qkv = x.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        if self.collect_diagnostics:
            self._diagnose(qkv, cu_seqlens)
        o = taylor_linear_attention_qkv(qkv, self.feature_dim, cu_seqlens=cu_seqlens, decay=self._decay(x))
        return o.transpose(0, 1).flatten(2)

    @torch.no_grad()
    def _diagnose(self, qkv: Tensor, cu_seqlens: Tensor | None) -> None:
        """Smallest denominator and largest final state (Frobenius norm of a head's) of what is seen on this rank."""
        decay, (q, k, _) = self._decay(qkv), parts(qkv, self.feature_dim)
        denominator = taylor_denominator(q, k, cu_seqlens=cu_seqlens, decay=decay)
        _, state = taylor_linear_attention_qkv(qkv, self.feature_dim, cu_seqlens=cu_seqlens, decay=decay,
                                               return_state=True)
        seen = self.diagnostics or {"min_denominator": math.inf, "state_norm": 0.0}
        norm = torch.linalg.matrix_norm(state.kv).max().item()
        self.diagnostics = {"min_denominator": min(seen["min_denominator"], denominator.min().item()),
                            "state_norm": max(seen["state_norm"], norm)}
