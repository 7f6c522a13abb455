"""Plain torch forms of the recurrences of GLA, RWKV, Mamba, H3 and Hyena: parallel over chunks, exact, differentiable.

All accumulate in fp32, or in fp64 for fp64 inputs. The sequence comes first in `linear_scan` and `selective_scan`,
and second in `gated_linear_attention`, as in flash-linear-attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 16
# exp(±MIN_LOG_DECAY · CHUNK / 2) must stay inside fp32; what decays faster is forgotten within one token anyway.
MIN_LOG_DECAY = -10.0


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _LinearScan(torch.autograd.Function):
    """h_t = a_t·h_{t−1} + u_t, one fused operation a step; backward is the same scan in reverse."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor, initial: Tensor) -> Tensor:
        h = torch.empty_like(u)
        before = initial
        for t in range(u.shape[0]):
            before = torch.addcmul(u[t], a[t], before, out=h[t])
        ctx.save_for_backward(a, h, initial)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, initial = ctx.saved_tensors
        g = torch.empty_like(h)
        after = g[-1].copy_(grad[-1])
        for t in range(h.shape[0] - 2, -1, -1):
            after = torch.addcmul(grad[t], a[t + 1], after, out=g[t])
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        da[0] = (g[0] * initial).sum_to_size(a.shape[1:])
        da[1:] = (g[1:] * h[:-1]).sum_to_size((a.shape[0] - 1, *a.shape[1:]))
        return da, g, a[0] * g[0]


def linear_scan(a: Tensor, u: Tensor, initial: Tensor) -> Tensor:
    """h_t = a_t·h_{t−1} + u_t along dimension 0, h_{−1} = initial.

    u: [steps, …]; a: the same, or 1 where it broadcasts; initial: u's shape without dimension 0. Returns every h_t.
    """
    return _LinearScan.apply(a, u, initial)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float,
                           bonus: Tensor | None = None, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(log_decay_t)) S_{t−1} + k_t v_tᵀ; o_t = scale·q_tᵀ S_t (GLA, Yang et al. 2023, eq. 3).

    With `bonus` (RWKV-5, Peng et al. 2024, section 3): o_t = scale·q_tᵀ (S_{t−1} + diag(bonus) k_t v_tᵀ).
    q, k: [b, s, h, d_k]; v: [b, s, h, d_v]; log_decay: [b, s, h, d_k], ≤ 0, taken as at least MIN_LOG_DECAY;
    bonus: [h, d_k]; initial: [b, h, d_k, d_v]. Returns o [b, s, h, d_v] in v's dtype and the last S in fp32 (fp64).
    """
    b, s, h, dk = q.shape
    acc, dv = accumulation_dtype(q), v.shape[-1]
    size = min(CHUNK, s)
    count = -(-s // size)

    def chunks(x: Tensor) -> Tensor:                                          # [b, s, h, e] → [count, b, h, size, e]
        x = F.pad(x.to(acc), (0, 0, 0, 0, 0, count * size - s))
        return x.view(b, count, size, h, -1).permute(1, 0, 3, 2, 4)

    qc, kc, vc = chunks(q) * scale, chunks(k), chunks(v)
    g = chunks(log_decay.clamp(min=MIN_LOG_DECAY))
    inclusive = g.cumsum(-2)
    seen = inclusive if bonus is None else inclusive - g                      # what a query has decayed by
    middle = inclusive[..., max(size // 2 - 1, 0), None, :]                   # keeps both exponentials inside fp32
    last = inclusive[..., -1:, :]
    weight = (qc * (seen - middle).exp()) @ (kc * (middle - inclusive).exp()).transpose(-1, -2)
    weight = weight.tril(0 if bonus is None else -1)
    if initial is None:
        initial = q.new_zeros(b, h, dk, dv, dtype=acc)
    update = (kc * (last - inclusive).exp()).transpose(-1, -2) @ vc           # [count, b, h, dk, dv]
    states = linear_scan(last.exp().transpose(-1, -2), update, initial.to(acc))
    before = torch.cat([initial.to(acc)[None], states[:-1]])
    o = weight @ vc + (qc * seen.exp()) @ before
    if bonus is not None:
        o = o + (qc * kc * bonus.to(acc)[:, None]).sum(-1, keepdim=True) * vc
    return o.permute(1, 0, 3, 2, 4).reshape(b, count * size, h, dv)[:, :s].to(v.dtype), states[-1]


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor,
                   initial: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t a) h_{t−1} + Δ_t x_t b_tᵀ; y_t = h_t c_t (Mamba, Gu & Dao 2023, algorithm 2).

    x, delta: [s, batch, d]; a: [d, n], negative; b, c: [s, batch, n]; initial: [batch, d, n].
    Returns y [s, batch, d] and the last h, both in fp32 (fp64). Only the inputs are kept for the backward pass.
    """
    if torch.is_grad_enabled():
        return checkpoint(_selective_scan, x, delta, a, b, c, initial, use_reentrant=False, preserve_rng_state=False)
    return _selective_scan(x, delta, a, b, c, initial)


def _selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor,
                    initial: Tensor) -> tuple[Tensor, Tensor]:
    """Two scans of about √s steps: inside all chunks at once, then over the chunks."""
    s, acc = x.shape[0], accumulation_dtype(x)
    size = min(max(math.isqrt(s), 1), 32)
    count = -(-s // size)

    def chunks(t: Tensor) -> Tensor:                                          # [s, batch, e] → [size, count, batch, e]
        t = F.pad(t.to(acc), (0, 0, 0, 0, 0, count * size - s))
        return t.view(count, size, *t.shape[1:]).transpose(0, 1)

    x, delta, b, c = chunks(x), chunks(delta), chunks(b), chunks(c)
    log_decay = delta[..., None] * a.to(acc)                                  # [size, count, batch, d, n]
    inside = linear_scan(log_decay.exp(), (delta * x)[..., None] * b[..., None, :],
                         torch.zeros_like(log_decay[0]))
    decay = log_decay.cumsum(0).exp()
    initial = initial.to(acc)
    after = linear_scan(decay[-1], inside[-1], initial)
    h = torch.addcmul(inside, decay, torch.cat([initial[None], after[:-1]]))
    y = (h * c[..., None, :]).sum(-1)
    return y.transpose(0, 1).flatten(0, 1)[:s], after[-1]


def causal_conv(x: Tensor, weight: Tensor, carry: Tensor | None = None) -> Tensor:
    """Depthwise y_t = Σ_i weight[:, i]·x_{t−width+1+i}. x [s, b, c], weight [c, width], carry [b, width − 1, c]."""
    s, b, c = x.shape
    width = weight.shape[1]
    head = x.new_zeros(width - 1, b, c) if carry is None else carry.transpose(0, 1).to(x.dtype)
    padded = torch.cat([head, x])
    if width > 8:
        return long_conv(padded, weight.flip(1).T)[width - 1 :].to(x.dtype)
    return sum(padded[i : i + s] * weight[:, i] for i in range(width))


def next_carry(x: Tensor, carry: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The last inputs of every row after its first `lengths` (default: all) of x [s, b, c]; as `carry` [b, w, c]."""
    whole = torch.cat([carry.to(x.dtype), x.transpose(0, 1)], 1)
    width = carry.shape[1]
    if lengths is None:
        return whole[:, whole.shape[1] - width :].clone()
    index = lengths[:, None] + torch.arange(width, device=x.device)
    return whole.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def long_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution by FFT, for long filters. u [s, b, c], kernel [taps, c] → [s, b, c] in fp32 (fp64)."""
    s, acc = u.shape[0], accumulation_dtype(u)
    size = 1 << (2 * s - 1).bit_length()
    spectrum = torch.fft.rfft(u.to(acc), size, 0) * torch.fft.rfft(kernel[:s].to(acc), size, 0)[:, None]
    return torch.fft.irfft(spectrum, size, 0)[:s]
