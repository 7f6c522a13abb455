"""Matrix products of fp8 operands (e4m3, Micikevicius et al. 2022) with a scale for each row.

The product is torch's (cuBLAS on a Hopper GPU). Scales are powers of two: rounding is then that of a shorter mantissa,
and a weight has the same values whether it is scaled along its rows or along its columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_mp.ops import backends

FP8 = torch.float8_e4m3fn
LARGEST = 448.0                  # of e4m3
WIDTH_MULTIPLE = 16              # of the summed dimension and of the result's columns


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x bf16 or fp32 [rows, width] → q e4m3 [rows, width], scale fp32 [rows, 1], x ≈ q · scale.

    The scale is the smallest power of two with which the row fits. A row that holds an infinity or NaN holds NaN.
    """
    if backends.fused_backend(x) == "triton":
        return _quantize_rows_triton(x)
    x = x.float()
    inverse = LARGEST / x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    inverse = (inverse.view(torch.int32) & 0x7F800000).view(torch.float32)             # without its mantissa
    return (x * inverse).to(FP8), 1 / inverse


def _quantize_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    import triton

    from based_mp.ops.fused import kernels
    x = x.contiguous()
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    q = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    kernels.quantize_row[(rows,)](x, q, scale, width, BLOCK=block, num_warps=4 if block <= 2048 else 8)
    return q, scale


def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
    """a [m, k] and b [n, k], each as `quantize_rows` returns it → a bᵀ in bf16 [m, n]; n, k multiples of 16."""
    return torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1].view(1, -1), out_dtype=torch.bfloat16,
                            use_fast_accum=True, out=out)
