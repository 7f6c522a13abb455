"""The operations of generation in plain torch, for every device and dtype: the truth `decode_cuda` is compared with.

Both modules have the same functions. States live in slots: the first dimension of every buffer. `slots` [rows] names
the slot of each row; buffers are changed in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.ops.gated_conv import gated_conv
from based_mp.ops.reference import TaylorState, taylor_step

PADS_ROWS = False                # `slots` holds −1 nowhere: any number of rows runs as it is
RESULTS_ON_HOST = False          # `sample` writes to the device's memory
RECENT = 0                       # tokens that a state has still to take in, at most


def embed(tokens: Tensor, table: Tensor, first: int) -> Tensor:
    """Rows of `table`, which holds the ids from `first` on; zeros for ids of other ranks. int [n] → [n, d_model]."""
    local = tokens.long() - first
    inside = (local >= 0) & (local < table.shape[0])
    return F.embedding(local.clamp(0, table.shape[0] - 1), table) * inside[:, None].to(table.dtype)


def embed_step(pool: Any, slots: Tensor, table: Tensor, first: int, residual_dtype: torch.dtype,
               frequency: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream of each slot's last token [n, d_model], and cos and sin of its rotation [n, 2, half]."""
    slots = slots.long()
    residual = embed(pool.tokens[slots], table, first).to(residual_dtype)
    return residual, rotations(pool.positions[slots], frequency)


def rotations(positions: Tensor, frequency: Tensor) -> Tensor:
    """cos and sin of int positions [n] × fp32 frequency [half]: fp32 [n, 2, half]."""
    angle = positions[:, None].float() * frequency
    return torch.stack([angle.cos(), angle.sin()], 1)


@dataclass
class Pending:
    """What the residual stream has still to take in: out [n, d_model] + bias."""

    out: Tensor
    bias: Tensor | None

    def __getitem__(self, rows: Tensor) -> Pending:
        return Pending(self.out[rows], self.bias)


def add_norm(residual: Tensor, pending: Pending | None, eps: float) -> Tensor:
    """The residual stream takes in what is pending; RMSNorm of it, whose weights are in the product that follows."""
    if pending is not None:
        residual += pending.out if pending.bias is None else pending.out + pending.bias
    return F.rms_norm(residual, residual.shape[-1:], eps=eps)


def norm_linear(residual: Tensor, pending: Pending | None, eps: float, weight: Tensor, *,
                swiglu: bool = False) -> Tensor:
    """`add_norm`, times weightᵀ. swiglu: weight is [gate; value], and silu(gate) ∘ value."""
    y = F.linear(add_norm(residual, pending, eps).to(weight.dtype), weight)
    if not swiglu:
        return y
    gate, value = y.chunk(2, -1)
    return F.silu(gate) * value


def norm_conv_step(residual: Tensor, pending: Pending | None, eps: float, weight: Tensor, bias: Tensor, conv: Tensor,
                   out_bias: Tensor, slots: Tensor, carry: Tensor) -> tuple[Tensor, Tensor | None]:
    """`norm_linear`, then `conv_step` on its result, and out_bias; None where the residual stream has that already."""
    return conv_step(norm_linear(residual, pending, eps, weight), bias, conv, slots, carry), out_bias


def norm_taylor_step_(residual: Tensor, pending: Pending | None, eps: float, weight: Tensor, *arguments: Any) -> Tensor:
    """`norm_linear`, then `taylor_step_` on its result."""
    return taylor_step_(norm_linear(residual, pending, eps, weight), *arguments)


def norm_attention_step(residual: Tensor, pending: Pending | None, eps: float, weight: Tensor,
                        *arguments: Any) -> Tensor:
    """`norm_linear`, then `attention_step` on its result."""
    return attention_step(norm_linear(residual, pending, eps, weight), *arguments)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Pending:
    """x weightᵀ + bias on its way into the residual stream.

    Returns what the next norm has to be given as `pending`: nothing where it is there already.
    """
    return Pending(F.linear(x, weight), bias)


def conv_step(x: Tensor, bias: Tensor, weight: Tensor, slots: Tensor, carry: Tensor) -> Tensor:
    """One token a row. x [n, 2·channels] without its bias; carry [slots, taps − 1, channels] → [n, channels]."""
    slots = slots.long()
    y, carry[slots] = gated_conv(x[None], weight, bias, carry=carry[slots], return_carry=True)
    return y[0]


def conv_run(x: Tensor, bias: Tensor, weight: Tensor, bounds: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Packs: x [tokens, 2·channels], bounds int32 [docs + 1], carry [docs, taps − 1, channels] → y, carry."""
    y, carry = gated_conv(x[:, None], weight, bias, cu_seqlens=bounds, carry=carry, return_carry=True)
    return y[:, 0], carry


def taylor_step_(x: Tensor, slots: Tensor, pool: Any, kv: Tensor, z: Tensor, recent: Tensor | None,
                 decay: Tensor | None, feature_dim: int) -> Tensor:
    """One token a row. x [n, heads, q | k | v]; kv [slots, heads, D, head_dim], z [slots, heads, D].

    recent: [slots, heads, RECENT, k | v], the last of the tokens from pool.starts to pool.positions, where kv and z
    take them in late (not here). decay: fp32 [heads], log decay a token. Returns [n, heads·head_dim].
    """
    slots, f = slots.long(), feature_dim
    heads = x.unflatten(-1, (kv.shape[1], -1))
    o, new = taylor_step(heads[..., :f], heads[..., f : 2 * f], heads[..., 2 * f :], TaylorState(kv[slots], z[slots]),
                         decay=decay)
    kv[slots], z[slots] = new.kv, new.z
    return o.flatten(1)


def settled(pool: Any, slots: Tensor, kv: Tensor, z: Tensor, recent: Tensor | None, decay: Tensor | None,
            feature_dim: int) -> TaylorState:
    """The states of these slots after all tokens seen, with those that `taylor_step_` has left in `recent`."""
    return TaylorState(kv[slots.long()], z[slots.long()])


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [n, heads, head_dim], rotation [n, 2, half]."""
    half = rotation.shape[-1]
    cos, sin = rotation[:, 0, None], rotation[:, 1, None]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., 2 * half :]], -1)


def attention_step(x: Tensor, slots: Tensor, positions: Tensor, rotation: Tensor, keys: Tensor, values: Tensor,
                   head_dim: int) -> Tensor:
    """One token a row. x [n, heads, q | k | v]; keys (rotated) and values are rings [slots, heads, capacity, padded].

    The token at position t goes to t mod capacity. Returns [n, heads·head_dim].
    """
    slots = slots.long()
    capacity, padded = keys.shape[2:]
    q, k, v = x.unflatten(-1, (keys.shape[1], 3, head_dim)).unbind(2)
    position = positions[slots].long()
    ring = position % capacity
    for buffer, new in ((keys, _rotate(k, rotation)), (values, v)):
        buffer[slots, :, ring] = F.pad(new, (0, padded - head_dim)).to(buffer.dtype)
    seen = torch.arange(capacity, device=x.device) <= position[:, None]
    k, v = (buffer[slots][..., :head_dim] for buffer in (keys, values))
    o = F.scaled_dot_product_attention(_rotate(q, rotation)[:, :, None], k, v, attn_mask=seen[:, None, None])
    return o.flatten(1)


def rope_run(x: Tensor, rotation: Tensor, heads: int, head_dim: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (rotated), v [tokens, heads, padded] of packed x [tokens, heads, q | k | v], rotation [tokens, 2, half].

    Padding is zero; q is multiplied so that attention's usual scale padded^-½ becomes head_dim^-½.
    """
    q, k, v = x.unflatten(-1, (heads, 3, head_dim)).unbind(2)
    q = _rotate(q, rotation)
    if padded != head_dim:
        q = q * math.sqrt(padded / head_dim)
    return tuple(F.pad(t, (0, padded - head_dim)) for t in (q, _rotate(k, rotation), v))


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, which wraps as uint64 does."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return z ^ ((z >> 31) & ((1 << 33) - 1))


GOLDEN = -7046029254386353131


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Gumbel noise fp32 [n, vocab], a hash of (seed, position, token)."""
    base = _mix(seeds ^ _mix(positions.long() + GOLDEN))
    hashed = _mix(base[:, None] + torch.arange(vocab, device=seeds.device) * GOLDEN)
    uniform = (((hashed >> 40) & ((1 << 24) - 1)).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log1p(-uniform))


def keep(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens top_k (0: all) and then top_p leave, bool [n, vocab]; equal logits stay or go together."""
    vocab = logits.shape[-1]
    values = logits.sort(-1, descending=True).values
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()
    kth = values.gather(-1, k[:, None] - 1)
    scaled = (values - values[:, :1]) / temperature.clamp(min=1e-30)[:, None]
    mass = torch.where(values >= kth, scaled.exp(), 0.0)
    enough = mass.cumsum(-1) >= (top_p * mass.sum(-1))[:, None]
    last = torch.where(enough.any(-1), enough.int().argmax(-1), vocab - 1)
    nucleus = torch.where(top_p < 1, values.gather(-1, last[:, None])[:, 0], -torch.inf)
    return logits >= torch.maximum(kth[:, 0], nucleus)[:, None]


def sample(logits: Tensor, pool: Any, slots: Tensor, advance: int) -> None:
    """The next token of each slot and its log probability (of the plain softmax), to pool.chosen and pool.logprobs.

    logits [n, ≥ vocab]. temperature 0 takes the largest logit; else the softmax of logits / temperature over the tokens
    that `keep` leaves is sampled by Gumbel noise. Also written to pool.tokens; pool.positions advances by `advance`.
    """
    slots = slots.long()
    logits = logits[:, : pool.vocab_size].float()
    pool.positions[slots] += advance
    temperature = pool.temperature[slots]
    token = logits.argmax(-1)
    if (temperature > 0).any():
        kept = keep(logits, temperature, pool.top_k[slots], pool.top_p[slots])
        noisy = logits / temperature.clamp(min=1e-30)[:, None] \
            + gumbel_noise(pool.seeds[slots], pool.positions[slots], pool.vocab_size)
        token = torch.where(temperature > 0, noisy.masked_fill(~kept, -torch.inf).argmax(-1), token)
    place = slots, pool.positions[slots] % pool.chosen.shape[1]
    pool.tokens[slots] = pool.chosen[place] = token.int()
    pool.logprobs[place] = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]

