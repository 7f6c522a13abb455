"""Matrix products of fp8 operands (e4m3, Micikevicius et al. 2022) with a scale for each row.

The product is torch's (cuBLAS on a Hopper GPU). Scales are powers of two, so that scaling rounds nothing but what is
very small beside the largest value under the same scale.
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


def transposed(operand: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """q [rows, width] with a scale a row → [width, rows] with the largest of them for all.

    Exact but for what falls below 2⁻⁶ under the largest scale, where e4m3 has steps of 2⁻⁹.
    """
    q, scale = operand
    rows, width = q.shape
    largest = scale.max()
    if backends.fused_backend(q) == "triton":
        from based_mp.ops.fused import kernels
        out = torch.empty(width, rows, dtype=FP8, device=q.device)
        tile = 64
        kernels.transpose_rescaled[(-(-rows // tile), -(-width // tile))](q, scale, largest, out, rows, width,
                                                                         TILE=tile, num_warps=4)
    else:
        out = (q.float() * (scale / largest)).to(FP8).t().contiguous()
    return out, largest.expand(width, 1).contiguous()


def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """a [m, k] and b [n, k], each with a scale a row → a bᵀ in bf16 [m, n]; n, k multiples of 16."""
    return torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1].view(1, -1), out_dtype=torch.bfloat16,
                            use_fast_accum=True)
