"""RWKV-5 time mixing (Peng et al. 2024, "Eagle and Finch", section 3), tensor parallel over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import RowMixer, valid_mask
from based_mp.ops.backends import gated_linear_attention
from based_mp.ops.recurrences import accumulation_dtype, next_carry
from based_mp.systems import RWKVConfig

NAMES = ("r", "k", "v", "g")


@dataclass
class RWKVState:
    """shift: the last input [batch, 1, d_model]; kv: fp32 [batch, heads of this rank, head_dim, head_dim]."""

    shift: Tensor
    kv: Tensor


class RWKV(RowMixer):
    """o = linear_out(GroupNorm(wkv(r, k, v)) ∘ silu(g)); r, k, v, g are linear in mixes of this and the last input.

    The decay exp(−exp(w)) and the bonus for the own position are learned per channel. Without sequence parallelism
    (the token shift crosses the ranks' borders; the configuration refuses it).
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, *, settings: RWKVConfig, kernels: str,
                 **kwargs: Any) -> None:
        d = config.hidden_size
        super().__init__(config, submodules, width=None, out_width=d, **kwargs)
        self.head_dim, self.kernels = settings.head_dim, kernels
        self.channels = d // self.tp_size
        self.linears = torch.nn.ModuleDict({name: ColumnParallelLinear(
            d, d, config=config, init_method=config.init_method, bias=False, gather_output=False,
            tp_group=self.linear_out.tp_group) for name in NAMES})
        depth = (self.layer_number - 1) / max(config.num_layers - 1, 1)
        rest = 1 - (self.layer_number - 1) / config.num_layers
        i = torch.arange(d) / d
        n = torch.arange(d) / max(d - 1, 1)
        mixes = {"r": i ** (0.5 * rest), "k": i ** rest, "v": i ** rest + 0.3 * depth, "g": i ** (0.5 * rest)}
        self.mixes = torch.nn.ParameterDict({name: self.shard(mixes[name], None) for name in NAMES})
        self.decay = self.shard(-6 + 5 * n ** (0.7 + 1.3 * depth))
        self.bonus = self.shard(depth * (1 - n) + 0.1 * ((torch.arange(d) + 1) % 3 - 1))
        self.norm_weight, self.norm_bias = self.shard(torch.ones(d)), self.shard(torch.zeros(d))

    def project(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def run(self, x: Tensor, state: RWKVState | None, lengths: Tensor | None) -> Tensor:
        first = torch.zeros_like(x[:1]) if state is None else state.shift.transpose(0, 1).to(x.dtype)
        last = torch.cat([first, x[:-1]])
        r, k, v, g = (self.linears[name](last + self.mixes[name] * (x - last))[0] for name in NAMES)
        acc = accumulation_dtype(x)
        mask = valid_mask(x, lengths)
        log_decay = (-self.decay.to(acc).exp()).expand(*x.shape[:2], -1)
        if mask is not None:
            k, log_decay = k * mask, log_decay * mask
        heads = [t.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for t in (r, k, v, log_decay)]
        o, kv = gated_linear_attention(*heads, scale=1.0, bonus=self.bonus.unflatten(0, (-1, self.head_dim)),
                                       kernels=self.kernels, initial=None if state is None else state.kv)
        if state is not None:
            state.shift, state.kv = next_carry(x, state.shift, lengths), kv
        o = o.transpose(0, 1)
        norm = F.group_norm(o.flatten(0, 1).flatten(1), o.shape[2], self.norm_weight, self.norm_bias,
                            eps=1e-5 * self.head_dim)              # 1e-5 on wkv / √head_dim, as published
        return norm.view(*x.shape[:2], -1) * F.silu(g)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> RWKVState:
        acc = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.channels // self.head_dim, self.head_dim, self.head_dim)
        return RWKVState(torch.zeros(batch, 1, self.config.hidden_size, device=device, dtype=dtype),
                         torch.zeros(*shape, device=device, dtype=acc))
