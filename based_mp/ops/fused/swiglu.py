"""SwiGLU's activation (Shazeer 2020): silu(first half) ∘ second half."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.ops import backends

BLOCK = 1024


def swiglu(x: Tensor) -> Tensor:
    """x: [..., 2·width] → [..., width]. Arithmetic in fp32; the backward pass keeps x alone."""
    if backends.fused_backend(x) == "triton":
        return _SwiGLU.apply(x)
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        from based_mp.ops.fused import kernels
        x = x.contiguous()
        width = x.shape[-1] // 2
        rows = x.numel() // (2 * width)
        y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        kernels.swiglu_forward[(rows, -(-width // BLOCK))](x, y, width, BLOCK=BLOCK, num_warps=4)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        from based_mp.ops.fused import kernels
        x, = ctx.saved_tensors
        width = x.shape[-1] // 2
        rows = x.numel() // (2 * width)
        dx = torch.empty_like(x)
        kernels.swiglu_backward[(rows, -(-width // BLOCK))](dy.contiguous(), x, dx, width, BLOCK=BLOCK, num_warps=4)
        return dx
