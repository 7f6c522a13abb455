"""Taylor linear attention in plain torch: the truth every kernel is compared with.

With s = scale·q·k, the attention weight of key j for query t is 1 + s + s²/2 (second-order Taylor expansion of
exp(s)), normalised over j ≤ t (Arora et al. 2024, section 4.1). Three forms of the same function:

* `taylor_quadratic`: the definition, O(N²) memory;
* `taylor_chunked`: quadratic inside a chunk, state between chunks, O(N) memory; the default path without CUDA;
* `taylor_recurrent`: one token at a time with a constant-size state.

All accumulate in fp32, or in fp64 for fp64 inputs.

The feature map uses the symmetry of the second-order terms: x_i·x_j is kept once, so that the state has
D = 1 + f + f(f+1)/2 rows (153 for f = 16) instead of 1 + f + f² (273).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TaylorState(NamedTuple):
    """Running sums of one linear-attention layer.

    kv: Σ φ(k) vᵀ, [batch, heads, D, head_dim], fp32 (fp64 for fp64 inputs).
    z:  Σ φ(k),    [batch, heads, D], same dtype.
    """

    kv: Tensor
    z: Tensor


def taylor_feature_dim(feature_dim: int) -> int:
    """Number of distinct features D = 1 + f + f(f+1)/2 of the second-order Taylor map."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def taylor_features(x: Tensor, scale: float) -> Tensor:
    """φ(x) with φ(q)·φ(k) = 1 + s + s²/2, s = scale·q·k.

    x: [..., f]. Returns [..., D] in the order: 1; c·x_i; c²·x_i²/√2; then for r = 1, 2, … ≤ f/2 the products
    c²·x_i·x_{(i+r) mod f} (only i < f/2 for r = f/2, which would otherwise repeat), with c = √scale.
    """
    f = x.shape[-1]
    x = x * math.sqrt(scale)
    parts = [torch.ones_like(x[..., :1]), x, x * x * math.sqrt(0.5)]
    for r in range(1, f // 2 + 1):
        product = x * x.roll(-r, dims=-1)
        parts.append(product[..., : f // 2] if 2 * r == f else product)
    return torch.cat(parts, dim=-1)


def init_taylor_state(batch: int, heads: int, feature_dim: int, head_dim: int, device: torch.device | str = "cpu",
                      dtype: torch.dtype = torch.float32) -> TaylorState:
    """An empty state (all sums zero)."""
    d = taylor_feature_dim(feature_dim)
    return TaylorState(torch.zeros(batch, heads, d, head_dim, device=device, dtype=dtype),
                       torch.zeros(batch, heads, d, device=device, dtype=dtype))


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def taylor_quadratic(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
                     decay: Tensor | None = None) -> Tensor:
    """The definition, with the full [seq, seq] weight matrix. q, k [b, s, h, f], v [b, s, h, d] → o [b, s, h, d]."""
    acc = _accumulation_dtype(q)
    s = torch.einsum("bthf,bjhf->bhtj", q.to(acc), k.to(acc)) * _default_scale(q, scale)
    weight = (1 + s + s * s / 2).tril()
    if decay is not None:
        t = torch.arange(q.shape[1], device=q.device)
        weight = weight * torch.exp(decay.to(acc)[:, None, None] * (t[:, None] - t).clamp(min=0))
    weight = weight / weight.sum(-1, keepdim=True)
    return torch.einsum("bhtj,bjhd->bthd", weight, v.to(acc)).to(v.dtype)


def taylor_step(q: Tensor, k: Tensor, v: Tensor, state: TaylorState, *, scale: float | None = None,
                decay: Tensor | None = None) -> tuple[Tensor, TaylorState]:
    """One token. q, k [b, h, f], v [b, h, d] → (o [b, h, d], the state after the token)."""
    acc = state.kv.dtype
    scale = _default_scale(q, scale)
    phi_q, phi_k = taylor_features(q.to(acc), scale), taylor_features(k.to(acc), scale)
    kv, z = state
    if decay is not None:
        gamma = decay.to(acc).exp()
        kv, z = kv * gamma[:, None, None], z * gamma[:, None]
    kv = kv + phi_k[..., :, None] * v.to(acc)[..., None, :]
    z = z + phi_k
    numerator = torch.einsum("bhm,bhmd->bhd", phi_q, kv)
    denominator = (phi_q * z).sum(-1, keepdim=True)
    return (numerator / denominator).to(v.dtype), TaylorState(kv, z)


def taylor_recurrent(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
                     initial_state: TaylorState | None = None,
                     decay: Tensor | None = None) -> tuple[Tensor, TaylorState]:
    """Token by token. Shapes as `taylor_quadratic`; also returns the final state."""
    b, s, h, f = q.shape
    state = initial_state or init_taylor_state(b, h, f, v.shape[-1], q.device, _accumulation_dtype(q))
    out = []
    for t in range(s):
        o, state = taylor_step(q[:, t], k[:, t], v[:, t], state, scale=scale, decay=decay)
        out.append(o)
    return torch.stack(out, 1), state


def taylor_chunked(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
                   initial_state: TaylorState | None = None, cu_seqlens: Tensor | None = None,
                   decay: Tensor | None = None, chunk_size: int = 128) -> tuple[Tensor, TaylorState]:
    """Chunked form, differentiable, O(N) memory.

    q, k [b, s, h, f], v [b, s, h, d]. With `cu_seqlens` (int [docs + 1], b = 1) every document starts from its own
    row of `initial_state` (or from nothing) and the returned state has one row a document.
    """
    numerator, denominator, state = _chunked_sums(q, k, v, _default_scale(q, scale), initial_state, cu_seqlens,
                                                  decay, chunk_size)
    return (numerator / denominator).to(v.dtype), state


def taylor_denominator(q: Tensor, k: Tensor, *, scale: float | None = None, cu_seqlens: Tensor | None = None,
                       decay: Tensor | None = None) -> Tensor:
    """Σ_{j≤t} (1 + s + s²/2) for every position, [b, s, h]; without decay at least t/2 in exact arithmetic."""
    no_values = q.new_empty(*q.shape[:-1], 0)
    return _chunked_sums(q, k, no_values, _default_scale(q, scale), None, cu_seqlens, decay, 128)[1].squeeze(-1)


class _ChunkLayout(NamedTuple):
    """Documents cut into chunks of `size` positions; a document's last chunk may be padded."""

    index: Tensor         # [chunks, size] position in the flattened sequence (0 where padded)
    valid: Tensor         # [chunks, size] bool
    order: list[int]      # documents by falling number of chunks
    first: list[int]      # first chunk of each document
    count: list[int]      # chunks of each document


def _chunk_layout(starts: list[int], lengths: list[int], size: int, device: torch.device) -> _ChunkLayout:
    count = [-(-n // size) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda d: -count[d])
    first = [sum(count[:d]) for d in range(len(count))]
    begin = [s + i * size for s, c in zip(starts, count, strict=True) for i in range(c)]
    end = [s + n for s, n, c in zip(starts, lengths, count, strict=True) for _ in range(c)]
    index = torch.tensor(begin, device=device)[:, None] + torch.arange(size, device=device)
    valid = index < torch.tensor(end, device=device)[:, None]
    return _ChunkLayout(torch.where(valid, index, 0), valid, order, first, count)


def _documents(q: Tensor, cu_seqlens: Tensor | None) -> tuple[list[int], list[int]]:
    b, s = q.shape[:2]
    if cu_seqlens is None:
        return [i * s for i in range(b)], [s] * b
    bounds = cu_seqlens.tolist()
    return bounds[:-1], [e - a for a, e in zip(bounds[:-1], bounds[1:], strict=True)]


def _chunked_sums(q: Tensor, k: Tensor, v: Tensor, scale: float, initial_state: TaylorState | None,
                  cu_seqlens: Tensor | None, decay: Tensor | None,
                  chunk_size: int) -> tuple[Tensor, Tensor, TaylorState]:
    """Unnormalised numerator [b, s, h, d], denominator [b, s, h, 1] and the final state."""
    b, s, h, f = q.shape
    acc = _accumulation_dtype(q)
    starts, lengths = _documents(q, cu_seqlens)
    size = min(chunk_size, max(max(lengths, default=1), 1))
    layout = _chunk_layout(starts, lengths, size, q.device)

    def chunks(x: Tensor) -> Tensor:                                   # [b, s, h, e] → [chunks, h, size, e]
        return x.reshape(b * s, h, -1)[layout.index].to(acc).transpose(1, 2)

    qc, kc = chunks(q), chunks(k)
    mask = layout.valid[:, None, :, None].to(acc)
    values = torch.cat([chunks(v), torch.ones_like(qc[..., :1])], -1) * mask      # last column: the denominator

    # Inside a chunk: the quadratic form.
    scores = qc @ kc.transpose(-1, -2) * scale
    weight = (1 + scores + scores * scores / 2).tril()
    phi_q, phi_k = taylor_features(qc, scale), taylor_features(kc, scale)
    carry = None
    if decay is not None:
        g = decay.to(acc)[:, None]
        i = torch.arange(size, device=q.device, dtype=acc)
        used = layout.valid.sum(-1).to(acc)[:, None, None]             # real positions of each chunk
        weight = weight * torch.exp(g[..., None] * (i[:, None] - i).clamp(min=0))
        phi_q = phi_q * torch.exp(g * (i + 1))[..., None]
        phi_k = phi_k * torch.exp(g * (used - 1 - i).clamp(min=0))[..., None]
        carry = torch.exp(g * used)                                    # [chunks, h, 1]
    sums = weight @ values

    # Between chunks: the state.
    before, final = _scan(phi_k.transpose(-1, -2) @ values, carry, layout, initial_state)
    sums = sums + phi_q @ before
    flat = sums.transpose(1, 2)[layout.valid]                          # [tokens in order of documents, h, d + 1]
    if flat.shape[0] != b * s:
        raise ValueError(f"cu_seqlens covers {flat.shape[0]} of {b * s} tokens")
    out = flat.reshape(b, s, h, -1)
    return out[..., :-1], out[..., -1:], TaylorState(final[..., :-1], final[..., -1])


def _scan(update: Tensor, carry: Tensor | None, layout: _ChunkLayout,
          initial_state: TaylorState | None) -> tuple[Tensor, Tensor]:
    """State before every chunk [chunks, h, D, d+1] and after every document [docs, h, D, d+1]."""
    order, count, first = layout.order, layout.count, layout.first
    if initial_state is None:
        state = update.new_zeros(len(order), *update.shape[1:])
    else:
        state = torch.cat([initial_state.kv, initial_state.z[..., None]], -1).to(update.dtype)[order]
    before, chunk_ids, finished = [], [], []
    step = 0
    while True:
        active = sum(count[d] > step for d in order)
        if active < state.shape[0]:
            finished.append(state[active:])
            state = state[:active]
        if active == 0:
            break
        ids = [first[d] + step for d in order[:active]]
        before.append(state)
        chunk_ids += ids
        if carry is not None:
            state = state * carry[ids][..., None]
        state = state + update[ids]
        step += 1
    final = torch.cat(finished[::-1])[_inverse(order)]
    before_all = torch.cat(before)[_inverse(chunk_ids)] if before else torch.zeros_like(update)
    return before_all, final


def _inverse(permutation: list[int]) -> list[int]:
    inverse = [0] * len(permutation)
    for position, item in enumerate(permutation):
        inverse[item] = position
    return inverse


def causal_conv_naive(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution by its definition. x [b, s, c], weight [c, width] → [b, s, c]."""
    width = weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    return sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(width))


def window_attention_naive(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Softmax attention with the whole score matrix; query t of the last len(q) positions sees `window` keys.

    q [b, t, h, d], k, v [b, s ≥ t, h, d] → [b, t, h, d]; window None sees every key up to its own position.
    """
    t, s = q.shape[1], k.shape[1]
    distance = torch.arange(s - t, s, device=q.device)[:, None] - torch.arange(s, device=q.device)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
