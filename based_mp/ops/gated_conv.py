"""Gated short convolution: y = silu(causal_depthwise_conv(u1)) ∘ u2 (the BaseConv mixer without its projections)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_conv(u1: Tensor, u2: Tensor, weight: Tensor, *, cu_seqlens: Tensor | None = None,
               carry: Tensor | None = None) -> Tensor:
    """silu(conv(u1)) ∘ u2 along the sequence, any length.

    u1, u2: [seq, batch, channels]; weight: [channels, width], the last tap on the own position.
    cu_seqlens: int [docs + 1] with batch 1: the convolution does not look across document starts.
    carry: [rows, width − 1, channels], the inputs before the first token of each row (or document); default zeros.
    Returns [seq, batch, channels].
    """
    width = weight.shape[1]
    seq, batch, channels = u1.shape
    if cu_seqlens is None:
        head = u1.new_zeros(width - 1, batch, channels) if carry is None else carry.transpose(0, 1).to(u1.dtype)
        padded = torch.cat([head, u1])
        taps = [padded[i : i + seq] for i in range(width)]
    else:
        taps = _packed_taps(u1, width, cu_seqlens, carry)
    mixed = sum(tap * weight[:, i] for i, tap in enumerate(taps))
    return F.silu(mixed) * u2


def _packed_taps(u1: Tensor, width: int, cu_seqlens: Tensor, carry: Tensor | None) -> list[Tensor]:
    """taps[i][t] = u1[t − (width − 1 − i)], or the document's carry (or zero) before its start."""
    seq = u1.shape[0]
    position = torch.arange(seq, device=u1.device)
    doc = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    offset = position - cu_seqlens[doc]
    taps = []
    for i in range(width):
        back = width - 1 - i
        inside = (offset >= back)[:, None, None]
        tap = u1.roll(back, 0) if back else u1
        if carry is None:
            outside = torch.zeros_like(u1)
        else:
            outside = carry[doc, (offset + i).clamp(max=width - 2)][:, None].to(u1.dtype)
        taps.append(torch.where(inside, tap, outside))
    return taps


def conv_carry(u1: Tensor, width: int, *, cu_seqlens: Tensor | None = None, carry: Tensor) -> Tensor:
    """The last width − 1 inputs of each row (or document) after u1: the next call's `carry`, same shape as `carry`."""
    if cu_seqlens is None:
        return torch.cat([carry.to(u1.dtype), u1.transpose(0, 1)], 1)[:, -(width - 1) :].clone()
    bounds = cu_seqlens.tolist()
    rows = [torch.cat([carry[d].to(u1.dtype), u1[a:e, 0]])[-(width - 1) :]
            for d, (a, e) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))]
    return torch.stack(rows)
