"""RMSNorm (Zhang & Sennrich 2019) of a residual stream, with the addition before it, in one pass over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.ops import backends
from based_mp.ops.gradient_sum import GradientSum

WARPS = 132 * 32         # of the backward pass, what an H100 holds at once with 64 registers a thread
ROWS, COLUMNS = 512, 16                       # of the parts of the weight's gradient that a program adds at a time


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, *, bias: Tensor | None = None,
                 eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """h = x + delta (+ bias), y = h / rms(h) · weight over the last dimension.

    x: [..., width], fp32 for an fp32 residual; delta: the same shape or None (h = x); weight, bias: [width].
    Returns h in x's dtype, y in the weight's. Sums in fp32 (fp64 for fp64 inputs). On a GPU, gradients of a weight or
    bias that has a `main_grad`, the optimizer's fp32 sum, are added to it and not handed on.
    """
    if backends.fused_backend(x) == "triton":
        return _AddNorm.apply(x, delta, bias, weight, eps)
    if delta is not None:
        x = x + (delta if bias is None else delta + bias)
    return x, F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(weight.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, bias, weight, eps):
        import triton

        from based_mp.ops.fused import kernels
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        x = x.contiguous()
        delta = None if delta is None else delta.contiguous()
        rows = x.numel() // width
        h = x if delta is None else torch.empty_like(x)
        y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        kernels.norm_forward[(rows,)](x, delta, bias, weight, h, y, rstd, width, eps, HAS_DELTA=delta is not None,
                                      HAS_BIAS=bias is not None, BLOCK=block, num_warps=4 if block <= 2048 else 8)
        ctx.save_for_backward(h, weight, rstd)
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.sums = [GradientSum(p) for p in (weight, bias) if p is not None]
        ctx.set_materialize_grads(False)
        if delta is None:
            return x.view_as(x), y
        return h, y

    @staticmethod
    def backward(ctx, dh, dy):
        import triton

        from based_mp.ops.fused import kernels
        h, weight, rstd = ctx.saved_tensors
        width = h.shape[-1]
        block = triton.next_power_of_2(width)
        rows = h.numel() // width
        if dy is None:
            dy = torch.zeros(h.shape, dtype=weight.dtype, device=h.device)
        dh = None if dh is None else dh.contiguous()
        dx = torch.empty_like(h)
        two = ctx.delta_dtype not in (None, h.dtype)
        ddelta = torch.empty(h.shape, dtype=ctx.delta_dtype, device=h.device) if two else dx
        warps = max(4, min(16, block // 256))              # 8 values a thread, or they need more registers
        each = -(-rows // (WARPS // warps))
        programs = -(-rows // each)
        parts = torch.empty(len(ctx.sums), programs, width, dtype=torch.float32, device=h.device)
        biased = len(ctx.sums) == 2
        kernels.norm_backward[(programs,)](
            dy.contiguous(), dh, h, weight, rstd, dx, ddelta, parts[0], parts[-1], rows, width, ROWS_EACH=each,
            HAS_DH=dh is not None, TWO_TYPES=two, HAS_BIAS=biased, BLOCK=block, num_warps=warps)
        totals = [s.total((width,), h.device) for s in ctx.sums]
        kernels.add_sums[(triton.cdiv(width, COLUMNS), len(totals))](
            parts, totals[0], totals[-1], width, COUNT=programs, HAS_BIAS=biased, ROWS=ROWS, COLUMNS=COLUMNS,
            num_warps=8)
        dweight, dbias, *_ = [s.gradient(t) for s, t in zip(ctx.sums, totals, strict=True)] + [None]
        return dx, None if ctx.delta_dtype is None else ddelta, dbias, dweight, None
