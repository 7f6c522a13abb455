"""RoPE and causal sliding-window attention on a fused qkv projection, one kernel each way (csrc/window_attention_*.cu).

q and k are rotated on their way into shared memory, their gradients on their way out, so that neither the rotated heads
nor gradients in another layout exist in device memory. Scores are made again in the backward pass from the logarithms
of the softmax sums. Nothing is added atomically: the same input gives the same bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from based_mp.ops import backends
from based_mp.ops.fused.rotary_attention import rope_tables
from based_mp.ops.taylor_cuda import aligned


@functools.lru_cache(maxsize=4)
def rotation_table(seq: int, half: int, base: float, device: torch.device) -> Tensor:
    """cos and sin side by side, fp16 [seq, half, 2]: a quarter of the rounding of the bf16 heads that they turn."""
    return torch.stack(rope_tables(seq, half, base, device), -1).half()


def rotary_window_attention(qkv: Tensor, window: int, cu_seqlens: Tensor | None = None,
                            base: float = 10000.0) -> Tensor:
    """qkv: bf16 [seq, batch, heads, 3, head_dim]; window, cu_seqlens, base as in `rotary_attention`; any strides (a
    copy is made where the kernels cannot read them). Returns [seq, batch, heads, head_dim]."""
    cu = None if cu_seqlens is None else cu_seqlens.to(qkv.device, torch.int32).contiguous()
    return _forward(qkv, cu, window, base)[0]


def _launch(backward: bool, qkv: Tensor, cu_seqlens: Tensor | None, o: Tensor, lse: Tensor, grad_o: Tensor | None,
            dqkv: Tensor | None, window: int, base: float) -> None:
    seq, batch, heads, _, dim = qkv.shape
    if o.numel() == 0:
        return
    table = rotation_table(seq, dim // 2, base, qkv.device)
    pointers = [0 if t is None else t.data_ptr() for t in (qkv, table, cu_seqlens, o, lse, grad_o, dqkv)]
    strides = [*qkv.stride()[:4], *(o if grad_o is None else grad_o).stride()[:3]]
    docs = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    with torch.cuda.device(qkv.device):
        backends.extension().window_attention(backward, pointers, strides, [seq, batch, heads, dim, window, docs],
                                              dim ** -0.5, torch.cuda.current_stream().cuda_stream)


@torch.library.custom_op("based_mp::window_attention_forward", mutates_args=(), device_types="cuda")
def _forward(qkv: Tensor, cu_seqlens: Tensor | None, window: int, base: float) -> tuple[Tensor, Tensor]:
    """o [seq, batch, heads, head_dim], and log2 of Σ 2^(score · log2 e), fp32 [batch, heads, seq]."""
    seq, batch, heads, _, dim = qkv.shape
    o = torch.empty(seq, batch, heads, dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, seq, dtype=torch.float32, device=qkv.device)
    _launch(False, aligned(qkv), cu_seqlens, o, lse, None, None, window, base)
    return o, lse


@_forward.register_fake
def _(qkv, cu_seqlens, window, base):
    seq, batch, heads, _, dim = qkv.shape
    return qkv.new_empty(seq, batch, heads, dim), qkv.new_empty(batch, heads, seq, dtype=torch.float32)


@torch.library.custom_op("based_mp::window_attention_backward", mutates_args=(), device_types="cuda")
def _backward(grad_o: Tensor, qkv: Tensor, cu_seqlens: Tensor | None, o: Tensor, lse: Tensor, window: int,
              base: float) -> Tensor:
    """The gradient of qkv, contiguous."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _launch(True, aligned(qkv), cu_seqlens, o, lse, aligned(grad_o), dqkv, window, base)
    return dqkv


@_backward.register_fake
def _(grad_o, qkv, cu_seqlens, o, lse, window, base):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.window, ctx.base = inputs
    ctx.save_for_backward(qkv, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_o, _lse):
    return _backward(grad_o, *ctx.saved_tensors, ctx.window, ctx.base), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
