"""Rows of an embedding, with a gradient that is as large as the rows that were read, not as the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from based_mp.ops.gradient_sum import GradientSum

TILE = 8192                                   # values that a program of the backward pass adds at a time
PIECE = 128                                   # sorted tokens; what one piece has of a token is the sum of one program


def embedding(tokens: Tensor, weight: Tensor, first: int) -> Tensor:
    """Rows of the tokens, zeros where other ranks have them, [seq, batch, width] (Triton alone).

    tokens: int64 [batch, seq]; weight: [rows, width], this rank's part of the vocabulary, from token `first` on. Its
    gradient is summed in fp32, in a fixed order, and added to its `main_grad`, the optimizer's fp32 sum, where it has
    one; autograd gets it elsewhere.
    """
    return _Embedding.apply(tokens.contiguous(), weight, first)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight, first):
        import triton

        from based_mp.ops.fused import kernels
        (batch, seq), (rows, width) = tokens.shape, weight.shape
        y = torch.empty(seq, batch, width, dtype=weight.dtype, device=weight.device)
        kernels.read_rows[(seq * batch,)](tokens, weight, y, first, batch, seq, rows, width,
                                          BLOCK=triton.next_power_of_2(width), num_warps=4)
        ctx.save_for_backward(tokens)
        ctx.sum, ctx.shape, ctx.first = GradientSum(weight), weight.shape, first
        return y

    @staticmethod
    def backward(ctx, dy):
        import triton

        from based_mp.ops.fused import kernels
        tokens, = ctx.saved_tensors
        rows, width = ctx.shape
        block = triton.next_power_of_2(width)
        tokens, places = tokens.t().to(torch.int32, memory_format=torch.contiguous_format).view(-1).sort(stable=True)
        total = ctx.sum.total(ctx.shape, dy.device)
        count = tokens.numel()
        pieces = triton.cdiv(count, PIECE)
        parts = torch.empty(pieces, 2, width, dtype=torch.float32, device=dy.device)
        kernels.add_rows[(count,)](dy.contiguous(), tokens, places, total, parts, ctx.first, count, rows, width,
                                   PIECE=PIECE, TILE=max(1, TILE // block), BLOCK=block, num_warps=4)
        kernels.add_long_rows[(pieces,)](parts, tokens, total, ctx.first, count, rows, width, PIECE=PIECE, BLOCK=block,
                                         num_warps=4)
        return None, ctx.sum.gradient(total), None
