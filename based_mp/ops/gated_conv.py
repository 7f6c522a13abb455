"""Gated short convolution: y = silu(causal_depthwise_conv(u1)) ∘ u2 (the BaseConv mixer without its projections).

It works on the input projection's output as it lies, u1 | u2 in the last dimension and without the projection's bias,
so that nothing is split, copied or read twice. CUDA (csrc/gated_conv_*.cu) where it can run, plain torch elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.ops import backends
from based_mp.ops.gradient_sum import GradientSum

STRIP = 128                   # tokens a part of the weight gradient (kStrip of csrc/gated_conv_backward.cu)
_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
               carry: Tensor | None = None, return_carry: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """silu(conv(u1)) ∘ u2 along the sequence with u1 | u2 = x + bias, any length ≥ 1.

    x: [seq, batch, 2·channels]; weight: [channels, width], the last tap on the own position; bias: [2·channels].
    cu_seqlens: int [docs + 1] with batch 1: the convolution does not look across document starts.
    carry: [rows, width − 1, channels], u1 before the first token of each row (or document); default zeros.
    Returns y [seq, batch, channels]; with return_carry also the carry of the next call.
    bf16, fp16 and fp32 (sums in fp32), fp64 in plain torch. Raises ValueError for shapes that do not fit together.
    The kernels add gradients of a weight or bias that has a `main_grad`, the optimizer's fp32 sum, to it alone.
    """
    channels, width = weight.shape
    if x.dim() != 3 or x.shape[-1] != 2 * channels or (cu_seqlens is not None and x.shape[1] != 1):
        raise ValueError(f"expected x [seq, batch, {2 * channels}], batch 1 with cu_seqlens, got {tuple(x.shape)}")
    expected = (_rows(x, cu_seqlens), width - 1, channels)
    if carry is not None and carry.shape != expected:
        raise ValueError(f"expected carry {expected}, got {tuple(carry.shape)}")
    if backends.gated_conv_backend(x, weight, carry) == "cuda":
        cu = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.int32).contiguous()
        y, out = _forward(x, weight, bias, cu, carry, return_carry)
        return (y, out) if return_carry else y
    return _torch(x, weight, bias, cu_seqlens, carry, return_carry)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, carry: Tensor | None,
           return_carry: bool) -> Tensor | tuple[Tensor, Tensor]:
    width = weight.shape[1]
    seq = x.shape[0]
    u1, u2 = (x if bias is None else x + bias).chunk(2, -1)
    if cu_seqlens is None:
        head = u1.new_zeros(width - 1, *u1.shape[1:]) if carry is None else carry.transpose(0, 1).to(u1.dtype)
        padded = torch.cat([head, u1])
        taps = [padded[i : i + seq] for i in range(width)]
    else:
        taps = _packed_taps(u1, width, cu_seqlens, carry)
    y = F.silu(sum(tap * weight[:, i] for i, tap in enumerate(taps))) * u2
    if not return_carry:
        return y
    if carry is None:
        carry = u1.new_zeros(_rows(x, cu_seqlens), width - 1, u1.shape[-1])
    return y, conv_carry(u1, width, cu_seqlens=cu_seqlens, carry=carry)


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


def _aligned(x: Tensor | None) -> Tensor | None:
    """As the kernels read it: contiguous, on a 16-byte boundary."""
    if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _launch(backward: bool, x: Tensor, *others: Tensor | None, docs: int) -> None:
    """others: in the order of GatedConvArgs."""
    pointers = [0 if t is None else t.data_ptr() for t in (x, *others)]
    seq, batch, width = x.shape
    with torch.cuda.device(x.device):
        backends.extension().gated_conv(backward, pointers, [seq, batch, width // 2, docs, _DTYPES.index(x.dtype)],
                                        torch.cuda.current_stream().cuda_stream)


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[1] if cu_seqlens is None else cu_seqlens.numel() - 1


@torch.library.custom_op("based_mp::gated_conv_forward", mutates_args=(), device_types="cuda")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, carry: Tensor | None,
             return_carry: bool) -> tuple[Tensor, Tensor]:
    """y, and the carry after the last token (empty unless asked for)."""
    before = None if carry is None else carry.to(x.dtype)
    x, weight, bias, before = (_aligned(t) for t in (x, weight, bias, before))
    rows, channels = _rows(x, cu_seqlens), weight.shape[0]
    y = torch.empty(*x.shape[:2], channels, dtype=x.dtype, device=x.device)
    after = x.new_empty(0)
    if return_carry:
        after = x.new_zeros(rows, 2, channels) if before is None else before.clone()
    _launch(False, x, weight, bias, cu_seqlens, before, after if return_carry else None, y, *[None] * 5, docs=rows)
    return y, after


@_forward.register_fake
def _(x, weight, bias, cu_seqlens, carry, return_carry):
    channels = weight.shape[0]
    return (x.new_empty(*x.shape[:2], channels),
            x.new_empty((_rows(x, cu_seqlens), 2, channels) if return_carry else (0,)))


@torch.library.custom_op("based_mp::gated_conv_backward", mutates_args=("dweight", "dbias"), device_types="cuda")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None,
              carry: Tensor | None, dweight: Tensor, dbias: Tensor | None) -> Tensor:
    """The gradient of x, in its layout; those of weight and bias are added to dweight and dbias, fp32."""
    before = None if carry is None else carry.to(x.dtype)
    dy, x, weight, bias, before = (_aligned(t) for t in (dy, x, weight, bias, before))
    seq, batch, _ = x.shape
    dx = torch.empty_like(x)
    partial = torch.empty(-(-seq // STRIP) * batch, 5, weight.shape[0], dtype=torch.float32, device=x.device)
    _launch(True, x, weight, bias, cu_seqlens, before, None, None, dy, dx, partial, dweight, dbias,
            docs=_rows(x, cu_seqlens))
    return dx


@_backward.register_fake
def _(dy, x, weight, bias, cu_seqlens, carry, dweight, dbias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, cu_seqlens, carry, _ = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens, carry)
    ctx.sums = [None if p is None else GradientSum(p) for p in (weight, bias)]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy, _carry):
    x, weight, bias, cu_seqlens, carry = ctx.saved_tensors
    totals = [s and s.total(p.shape, x.device) for s, p in zip(ctx.sums, (weight, bias), strict=True)]
    dx = _backward(dy, x, weight, bias, cu_seqlens, carry, *totals)
    return dx, *(s and s.gradient(t) for s, t in zip(ctx.sums, totals, strict=True)), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
