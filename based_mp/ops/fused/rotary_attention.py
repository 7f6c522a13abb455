"""RoPE and torch's attention kernels on a fused qkv projection, without copies of q, k, v or of their gradients.

Full causal attention runs in cuDNN, windows and packed documents in the flash kernel; RoPE runs in Triton.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.ops import backends


def rope_frequency(half: int, base: float, device: torch.device) -> Tensor:
    """Angles a position, fp32 [half]."""
    return base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


@functools.lru_cache(maxsize=4)
def rope_tables(seq: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−i/half), fp32 [seq, half]."""
    angle = torch.arange(seq, device=device, dtype=torch.float32)[:, None] * rope_frequency(half, base, device)
    return angle.cos(), angle.sin()


class RotaryAttention(torch.autograd.Function):
    """qkv [seq, batch, heads, 3, head_dim] → [batch, seq, heads, head_dim]. Overwrites qkv with the rotated q and k:
    only for the output of a projection that nobody else reads."""

    @staticmethod
    def forward(ctx, qkv, window, cu_seqlens, base, fraction):
        seq, batch, heads, _, dim = qkv.shape
        half = int(dim * fraction) // 2
        tables = rope_tables(seq, half, base, qkv.device)
        rotate(qkv, *tables)
        qkv = _padded(qkv.detach())
        if cu_seqlens is None:
            q, k, v = qkv.transpose(0, 1).unbind(-2)
        else:
            q, k, v = qkv[:, 0].unbind(-2)
        ctx.options = {"scale": dim ** -0.5}
        ctx.causal = window is None
        ctx.cudnn = ctx.causal and cu_seqlens is None and backends.cudnn_attention(*heads_first(q, k, v))
        if ctx.cudnn:
            o, lse, _, _, _, _, rng, unused, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *heads_first(q, k, v), None, True, 0.0, True, False, **ctx.options)
            o = o.transpose(1, 2)
        else:
            ctx.options |= {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
            o, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, cu_seqlens, cu_seqlens, seq, seq, 0.0, ctx.causal, False, **ctx.options)
        ctx.save_for_backward(qkv, o, lse, rng, unused, cu_seqlens, *tables)
        ctx.dim = dim
        return (o if cu_seqlens is None else o[None])[..., :dim]

    @staticmethod
    def backward(ctx, do):
        qkv, o, lse, rng, unused, cu_seqlens, cos, sin = ctx.saved_tensors
        seq = qkv.shape[0]
        if cu_seqlens is None:
            q, k, v = qkv.transpose(0, 1).unbind(-2)
        else:
            q, k, v = qkv[:, 0].unbind(-2)
            do = do[0]
        do = _padded(do)
        if do.stride(-1) != 1:
            do = do.contiguous()
        if ctx.cudnn:
            grads = heads_first(*torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *heads_first(do, q, k, v, o), lse, rng, unused, None, None, None, seq, seq, 0.0, True, **ctx.options))
        else:
            grads = torch.ops.aten._flash_attention_backward(
                do, q, k, v, o, lse, cu_seqlens, cu_seqlens, seq, seq, 0.0, ctx.causal, rng, unused, **ctx.options)
        if cu_seqlens is None:
            grads = [g.transpose(0, 1)[..., : ctx.dim] for g in grads]
        else:
            grads = [g[:, None, :, : ctx.dim] for g in grads]
        return pack_gradients(*grads, cos, sin), None, None, None, None


def _padded(x: Tensor) -> Tensor:
    """x with a last dimension that torch's kernels take, a multiple of 8; x itself where it is (F.pad copies)."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[batch, seq, heads, head_dim] → [batch, heads, seq, head_dim], and back."""
    return [t.transpose(1, 2) for t in tensors]


def _blocks(heads: int, half: int, dim: int) -> dict[str, int]:
    import triton
    return {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(max(half, 1)),
            "DIM": triton.next_power_of_2(dim)}


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """q and k of qkv [seq, batch, heads, 3, head_dim] rotated in place by the tables' angles."""
    from based_mp.ops.fused import kernels
    seq, batch, heads, _, dim = qkv.shape
    half = cos.shape[1]
    if half == 0:
        return
    blocks = _blocks(heads, half, dim)
    kernels.rope_in_place[(seq * batch,)](qkv, cos, sin, batch, heads, dim, half, HEADS=blocks["HEADS"],
                                          HALF=blocks["HALF"], num_warps=4)


def pack_gradients(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of the unrotated qkv [seq, batch, heads, 3, head_dim] from those of rotated q, k and v [s, b, h, d]."""
    from based_mp.ops.fused import kernels
    seq, batch, heads, dim = dq.shape
    if dq.stride(-1) != 1 or not dq.stride() == dk.stride() == dv.stride():
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    dqkv = torch.empty(seq, batch, heads, 3, dim, dtype=dq.dtype, device=dq.device)
    kernels.rope_backward[(seq * batch,)](
        dq, dk, dv, dqkv, cos, sin, batch, heads, dim, cos.shape[1], *dq.stride()[:3],
        **_blocks(heads, cos.shape[1], dim), num_warps=4)
    return dqkv
