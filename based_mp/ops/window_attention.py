"""Causal softmax attention, with or without a sliding window, and RoPE (Su et al. 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from based_mp.ops import backends
from based_mp.ops.fused.rotary_attention import RotaryAttention, heads_first, rope_frequency
from based_mp.ops.window_cuda import rotary_window_attention


def rope(x: Tensor, positions: Tensor, *, base: float = 10000.0, fraction: float = 1.0) -> Tensor:
    """Rotate the first fraction·head_dim dimensions (half-split layout).

    x: [batch, seq, heads, head_dim]; positions: int [batch or 1, seq]. Angles in fp32. Returns x's dtype.
    """
    rotary = int(x.shape[-1] * fraction) // 2 * 2
    half = rotary // 2
    angle = positions[..., None].float() * rope_frequency(half, base, x.device)      # [batch, seq, half]
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    acc = torch.promote_types(x.dtype, torch.float32)
    a, b = x[..., :half].to(acc), x[..., half:rotary].to(acc)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., rotary:]], -1)


def rotary_attention(x: Tensor, heads: int, *, window: int | None = None, cu_seqlens: Tensor | None = None,
                     base: float = 10000.0, fraction: float = 1.0) -> Tensor:
    """RoPE and causal attention on the output of a fused projection, which it may overwrite.

    x: [seq, batch, heads·3·head_dim], rows [head][q | k | v]; window, cu_seqlens as in `causal_attention` (a packed
    document keeps its positions in the pack: attention depends on distances alone); base, fraction as in `rope`.
    Returns [seq, batch, heads·head_dim].
    """
    qkv = x.unflatten(-1, (heads, 3, -1))
    backend = backends.window_backend(qkv, window, fraction)
    if backend == "cuda":
        return rotary_window_attention(qkv, window, cu_seqlens, base).flatten(2)
    if backend == "flash":
        o = RotaryAttention.apply(qkv, window, cu_seqlens, base, fraction)
    else:
        q, k, v = qkv.transpose(0, 1).unbind(-2)
        positions = torch.arange(x.shape[0], device=x.device)[None]
        q, k = (rope(t, positions, base=base, fraction=fraction) for t in (q, k))
        o = causal_attention(q, k, v, window=window, cu_seqlens=cu_seqlens)
    return o.transpose(0, 1).flatten(2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, cu_seqlens: Tensor | None = None,
                     cu_seqlens_k: Tensor | None = None, longest: tuple[int, int] | None = None) -> Tensor:
    """softmax(q·k/√head_dim) v over the last `window` positions, the own one included (None: all before it).

    q, k, v: [batch, seq, heads, head_dim]. cu_seqlens: int32 [docs + 1] with batch 1, attention stays inside a
    document. cu_seqlens_k: of k and v, where documents begin with keys of earlier tokens: the last query sees the last
    key. longest: (queries, keys) of the longest document, where it is known on the host, for speed. Memory
    O(seq·window) with a window. Returns [batch, seq, heads, head_dim].
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if window is None and cu_seqlens_k is None and q.shape[-1] % 8 == 0:
            count = _equal_sequences(q, cu_seqlens, longest)
            rows = heads_first(*(x.reshape(count, -1, *x.shape[2:]) for x in (q, k, v))) if count else None
            if rows and backends.cudnn_attention(*rows):
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    o = F.scaled_dot_product_attention(*rows, is_causal=True)
                return o.transpose(1, 2).reshape(q.shape)
        return _flash(q, k, v, window, cu_seqlens, cu_seqlens_k, longest)
    if cu_seqlens_k is not None:
        return _continued(q, k, v, window, cu_seqlens.tolist(), cu_seqlens_k.tolist())
    doc = None
    if cu_seqlens is not None:
        position = torch.arange(q.shape[1], device=q.device)
        doc = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    if window is None or window >= q.shape[1]:
        return _full(q, k, v, doc)
    return _blocked(q, k, v, window, doc)


def _equal_sequences(q: Tensor, cu_seqlens: Tensor | None, longest: tuple[int, int] | None) -> int:
    """How many sequences of one length q [batch, seq, …] holds, as a batch or as a pack of several; else 0. cuDNN takes
    them alone, and sets itself up for each length: not worth it for a pack of one."""
    if cu_seqlens is None:
        return q.shape[0]
    count = cu_seqlens.numel() - 1
    return count if longest and count > 1 and count * longest[0] == q.shape[1] else 0


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None,
           cu_seqlens_k: Tensor | None, longest: tuple[int, int] | None) -> Tensor:
    """torch's built-in flash kernel over packed sequences; a batch is a pack of equal lengths."""
    from torch.nn.attention.varlen import varlen_attn
    b, s = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=q.device)
    d = q.shape[-1]
    padded = -(-d // 8) * 8                       # the kernel takes multiples of 8, and scales by their root
    if padded != d:
        q, k, v = (F.pad(x, (0, padded - d)) for x in (q * math.sqrt(padded / d), k, v))
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    most_q, most_k = longest or (s, k.shape[1])
    left = -1 if window is None else window - 1
    o = varlen_attn(*flat, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, most_q, most_k,
                    window_size=(left, 0))
    return o.view_as(q)[..., :d]


def _continued(q: Tensor, k: Tensor, v: Tensor, window: int | None, bounds: list[int], bounds_k: list[int]) -> Tensor:
    """Document by document, every query's keys in a mask."""
    out = []
    for a, e, first, last in zip(bounds[:-1], bounds[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        distance = torch.arange(last - first - (e - a), last - first, device=q.device)[:, None] \
            - torch.arange(last - first, device=q.device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        rows = (x.transpose(1, 2) for x in (q[:, a:e], k[:, first:last], v[:, first:last]))
        out.append(F.scaled_dot_product_attention(*rows, attn_mask=seen).transpose(1, 2))
    return torch.cat(out, 1)


def _full(q: Tensor, k: Tensor, v: Tensor, doc: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if doc is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    same = (doc[:, None] == doc).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(1, 2)


def _blocked(q: Tensor, k: Tensor, v: Tensor, window: int, doc: Tensor | None) -> Tensor:
    """Blocks of `window` queries, each against its own block of keys and the one before."""
    b, s, h, d = q.shape
    blocks = -(-s // window)
    pad = blocks * window - s

    def cut(x: Tensor) -> Tensor:                                                      # [b, blocks, h, window, d]
        return F.pad(x, (0, 0, 0, 0, 0, pad)).view(b, blocks, window, h, d).transpose(2, 3)

    def with_previous(x: Tensor) -> Tensor:                                            # [b, blocks, h, 2·window, d]
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], 3)

    query = torch.arange(blocks * window, device=q.device).view(blocks, window)
    key = torch.cat([query - window, query], 1)
    distance = query[:, :, None] - key[:, None, :]
    seen = (distance >= 0) & (distance < window) & (key >= 0)[:, None, :]
    if doc is not None:
        doc = F.pad(doc, (0, pad), value=-1)
        seen &= doc[query][:, :, None] == doc[key.clamp(min=0)][:, None, :]
    o = F.scaled_dot_product_attention(cut(q), with_previous(cut(k)), with_previous(cut(v)),
                                       attn_mask=seen[None, :, None])
    return o.transpose(2, 3).reshape(b, blocks * window, h, d)[:, :s]
