"""Taylor linear attention: the public op. Kernels where they can run, chunked torch elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from based_mp.ops import backends, taylor_cuda
from based_mp.ops.reference import TaylorState, taylor_chunked

__all__ = ["TaylorState", "log_decay", "taylor_linear_attention", "taylor_linear_attention_qkv"]


def log_decay(exponent: int, first: int, heads: int) -> list[float]:
    """log(1 − 2^(exponent − h)) of heads first … first + heads − 1 (the decayed variant of the 1.3b run)."""
    return [math.log1p(-(2.0 ** (exponent - h))) for h in range(first, first + heads)]


def taylor_linear_attention(q: Tensor, k: Tensor, v: Tensor,
                            **options: Any) -> Tensor | tuple[Tensor, TaylorState]:
    """`taylor_linear_attention_qkv` of q, k [batch, seq, heads, feature_dim] and v [batch, seq, heads, head_dim]."""
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or q.shape[:3] != v.shape[:3]:
        raise ValueError("expected q, k [batch, seq, heads, feature_dim] and v [batch, seq, heads, head_dim], got "
                         f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    return taylor_linear_attention_qkv(torch.cat((q, k, v), -1), q.shape[-1], **options)


def taylor_linear_attention_qkv(
    qkv: Tensor, feature_dim: int, *, scale: float | None = None, initial_state: TaylorState | None = None,
    return_state: bool = False, cu_seqlens: Tensor | None = None, decay: Tensor | None = None,
) -> Tensor | tuple[Tensor, TaylorState]:
    """Causal linear attention with weights 1 + s + s²/2, s = scale·q·k, normalised (Arora et al. 2024, section 4.1).

    qkv: q | k | v side by side in [batch, seq, heads, 2·feature_dim + head_dim], as a projection leaves them; any
    strides with a contiguous last dimension; bf16, fp16, fp32 or fp64; sums in fp32 (fp64 for fp64 inputs).
    scale: default feature_dim^-½.
    initial_state: `TaylorState` carried in from earlier tokens (one row a batch entry, or a document).
    cu_seqlens: int32 [docs + 1] with batch 1: token boundaries of packed documents, state reset at each.
    decay: fp32 [heads], log decay per token (≤ 0).
    Returns o [batch, seq, heads, head_dim] in the input's dtype, and the final state when `return_state`. The kernels
    write o, and the gradient of qkv, in memory as [seq, batch, heads, …].
    Raises ValueError for shapes that do not fit together.
    """
    _check(qkv, feature_dim, initial_state, cu_seqlens, decay)
    q, k, v = taylor_cuda.parts(qkv, feature_dim)
    if backends.taylor_backend(q, k, v, decay=decay) == "cuda":
        o, state = taylor_cuda.forward(qkv, feature_dim, scale=feature_dim ** -0.5 if scale is None else scale,
                                       initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens)
    else:
        o, state = taylor_chunked(q, k, v, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, decay=decay)
    return (o, state) if return_state else o


def _check(qkv: Tensor, feature_dim: int, initial_state: TaylorState | None, cu_seqlens: Tensor | None,
           decay: Tensor | None) -> None:
    if qkv.dim() != 4 or qkv.shape[-1] <= 2 * feature_dim:
        raise ValueError("expected q | k | v [batch, seq, heads, 2·feature_dim + head_dim] with feature_dim "
                         f"{feature_dim}, got {tuple(qkv.shape)}")
    if cu_seqlens is not None and qkv.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs batch 1 (packed documents), got batch {qkv.shape[0]}")
    if decay is not None and decay.shape != (qkv.shape[2],):
        raise ValueError(f"decay must be [heads] = [{qkv.shape[2]}], got {tuple(decay.shape)}")
    rows = qkv.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None and initial_state.kv.shape[0] != rows:
        raise ValueError(f"initial_state has {initial_state.kv.shape[0]} rows for {rows} sequences")
