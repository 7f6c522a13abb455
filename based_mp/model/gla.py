"""Gated linear attention mixer (GLA, Yang et al. 2023, section 4.4), tensor parallel over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import RowMixer, valid_mask
from based_mp.ops.backends import gated_linear_attention
from based_mp.systems import GLAConfig


@dataclass
class MatrixState:
    """kv: the running sum of k vᵀ, fp32 [batch, heads of this rank, key_dim, value_dim]."""

    kv: Tensor


class GLA(RowMixer):
    """o = linear_out(RMSNorm(gla(q, k, v, decay)) ∘ silu(gate)), decay = sigmoid(low-rank(x))^(1/gate_normalizer).

    The rows of `linear_in.weight` are [head][q | k | v | gate].
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, *, settings: GLAConfig, kernels: str,
                 **kwargs: Any) -> None:
        heads = settings.num_heads
        self.sizes = [int(config.hidden_size * settings.expand_k) // heads] * 2 \
            + [int(config.hidden_size * settings.expand_v) // heads] * 2
        super().__init__(config, submodules, width=heads * sum(self.sizes), out_width=heads * self.sizes[2], **kwargs)
        self.settings, self.kernels, self.heads = settings, kernels, heads // self.tp_size
        rank = settings.gate_rank
        self.linear_gate = ColumnParallelLinear(
            config.hidden_size, rank, config=config, init_method=config.init_method, bias=False, gather_output=True,
            tp_group=self.linear_in.tp_group)
        keys = heads * self.sizes[0]
        self.decay_weight = self.shard(torch.randn(keys, rank, generator=self.generator()) * rank ** -0.5)
        self.decay_bias = self.shard(torch.zeros(keys))
        self.norm_weight = self.shard(torch.ones(self.sizes[2]), None)

    def project(self, hidden_states: Tensor) -> Tensor:
        # Every rank's heads use the whole low-rank vector: its gradient is the sum of the ranks'.
        low = copy_to_tensor_model_parallel_region(self.linear_gate(hidden_states)[0])
        return torch.cat([self.linear_in(hidden_states)[0], F.linear(low, self.decay_weight, self.decay_bias)], -1)

    def run(self, x: Tensor, state: MatrixState | None, lengths: Tensor | None) -> Tensor:
        keys = self.heads * self.sizes[0]
        qkvg, decay = x[..., :-keys], x[..., -keys:]
        log_decay = F.logsigmoid(decay.float() if x.dtype == torch.bfloat16 else decay) / self.settings.gate_normalizer
        mask = valid_mask(x, lengths)
        if mask is not None:
            qkvg, log_decay = qkvg * mask, log_decay * mask
        q, k, v, gate = qkvg.unflatten(-1, (self.heads, -1)).transpose(0, 1).split(self.sizes, -1)
        log_decay = log_decay.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        o, last = gated_linear_attention(q, k, v, log_decay, scale=self.sizes[0] ** -0.5, kernels=self.kernels,
                                         initial=None if state is None else state.kv)
        if state is not None:
            state.kv = last
        weight = copy_to_tensor_model_parallel_region(self.norm_weight)
        o = F.rms_norm(o, o.shape[-1:], weight.to(o.dtype), self.config.layernorm_epsilon) * F.silu(gate)
        return o.transpose(0, 1).flatten(2)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> MatrixState:
        acc = torch.promote_types(dtype, torch.float32)
        return MatrixState(torch.zeros(batch, self.heads, self.sizes[0], self.sizes[2], device=device, dtype=acc))
