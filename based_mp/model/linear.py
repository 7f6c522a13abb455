"""megatron-core's tensor-parallel linear layers with products of our own (`Products`), and, for sequence parallelism,
with communication that runs beside them.

Under sequence parallelism every rank has a part of the sequence between the layers, in them all of it (Korthikanti et
al. 2022, section 4.2). What a product needs of other ranks travels while the rank's own part is multiplied; what it
makes for them is made first and travels while the rank makes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor

from based_mp.ops.products import multiply
from based_mp.parallel.exchange import Operand, sending


class Products:
    """The products of a linear layer with its weight [out, in], in the weight's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def operand(self, x: Tensor) -> Operand:
        """x [tokens, in or out] as a left operand."""
        return (x,)

    def forward(self, operand: Operand, out: Tensor) -> None:
        """out = x weightᵀ, [tokens, out]."""
        multiply(operand[0], self.weight.detach().t(), out)

    def backward(self, operand: Operand, out: Tensor) -> None:
        """out = dy weight, [tokens, in]."""
        multiply(operand[0], self.weight.detach(), out)


def _multiplied(multiply: Callable[[Operand, Tensor], None], operand: Operand, tokens: torch.Size, width: int,
                dtype: torch.dtype) -> Tensor:
    """A product [*tokens, width]."""
    out = torch.empty(*tokens, width, dtype=dtype, device=operand[0].device)
    multiply(operand, out.flatten(0, -2))
    return out


def _multiply_gathered(own: Operand, multiply: Callable[[Operand, Tensor], None], width: int, dtype: torch.dtype,
                       group: dist.ProcessGroup) -> tuple[Tensor, list[tuple[int, Operand]]]:
    """The product of all ranks' rows [ranks · rows, width], and each other rank with its rows."""
    out = torch.empty(group.size(), own[0].shape[0], width, dtype=dtype, device=own[0].device)
    others = sending(group, own[0].device)
    others.to_all(own)
    multiply(own, out[group.rank()])
    received = others.received()
    for rank, theirs in received:
        multiply(theirs, out[rank])
    return out.flatten(0, 1), received


def _multiply_scattered(operand: Operand, multiply: Callable[[Operand, Tensor], None], width: int, dtype: torch.dtype,
                        group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the ranks' products' sum [rows / ranks, width]."""
    parts = list(zip(*(t.unflatten(0, (group.size(), -1)) for t in operand), strict=True))

    def product(rank: int) -> Tensor:
        return _multiplied(multiply, parts[rank], parts[rank][0].shape[:1], width, dtype)

    others = sending(group, operand[0].device)
    for rank in others.targets:
        others.to(rank, (product(rank),))
    own = product(group.rank())
    for _, (theirs,) in others.received():
        own += theirs
    return own


def weight_gradient(x: Tensor, dy: Tensor, total: Tensor | None, *more: tuple[Tensor, Tensor]) -> Tensor | None:
    """dyᵀ x of x [tokens, in], dy [tokens, out], and of `more` such pairs, all summed; None where that was added to
    `total`, the optimizer's sum."""
    if total is None:
        return sum((dy.t() @ x for x, dy in more), dy.t() @ x)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, dy, total, *more)
    return None


class _Whole(torch.autograd.Function):
    """x [s, b, in] → [s, b, out]. group: over which the gradient of x is summed, beside the product of the weight's."""

    @staticmethod
    def forward(ctx, x, weight, products, total, group):
        ctx.save_for_backward(x)
        ctx.products, ctx.total, ctx.group = products, total, group
        return _multiplied(products.forward, products.operand(x.flatten(0, -2)), x.shape[:-1], weight.shape[0], x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        rows, summed = dy.flatten(0, -2).contiguous(), None
        dx = _multiplied(ctx.products.backward, ctx.products.operand(rows), x.shape[:-1], x.shape[-1], x.dtype)
        if ctx.group is not None:
            summed = dist.all_reduce(dx, group=ctx.group, async_op=True)
        dw = weight_gradient(x.flatten(0, -2), rows, ctx.total) if ctx.needs_input_grad[1] else None
        if summed is not None:
            summed.wait()
        return dx, dw, None, None, None


class _Column(torch.autograd.Function):
    """x [s / ranks, b, in] → [s, b, out / ranks]. Only x is kept, and gathered again for the weight's gradient."""

    @staticmethod
    def forward(ctx, x, weight, products, total, group):
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.products, ctx.total, ctx.group = products, total, group
        y, _ = _multiply_gathered(products.operand(x.flatten(0, 1)), products.forward, weight.shape[0], x.dtype, group)
        return y.unflatten(0, (-1, x.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        batch, products, group = x.shape[1], ctx.products, ctx.group
        x, dy = x.flatten(0, 1), dy.flatten(0, 1).contiguous()
        others = sending(group, x.device)
        others.to_all((x,))
        dx = _multiply_scattered(products.operand(dy), products.backward, x.shape[1], x.dtype, group)
        rows = dy.unflatten(0, (group.size(), -1))
        more = [(theirs, rows[rank]) for rank, (theirs,) in others.received()]
        return dx.unflatten(0, (-1, batch)), weight_gradient(x, rows[group.rank()], ctx.total, *more), None, None, None


class _Row(torch.autograd.Function):
    """x [s, b, in / ranks] → [s / ranks, b, out]."""

    @staticmethod
    def forward(ctx, x, weight, products, total, group):
        ctx.save_for_backward(x)
        ctx.products, ctx.total, ctx.group = products, total, group
        y = _multiply_scattered(products.operand(x.flatten(0, 1)), products.forward, weight.shape[0], x.dtype, group)
        return y.unflatten(0, (-1, x.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        products, group, dy = ctx.products, ctx.group, dy.flatten(0, 1).contiguous()
        dx, received = _multiply_gathered((dy,), lambda own, out: products.backward(products.operand(own[0]), out),
                                          x.shape[2], x.dtype, group)
        rows = x.flatten(0, 1).unflatten(0, (group.size(), -1))
        more = [(rows[rank], theirs) for rank, (theirs,) in received]
        return dx.view_as(x), weight_gradient(rows[group.rank()], dy, ctx.total, *more), None, None, None


class _Linear:
    """Of a linear layer of megatron-core: how it multiplies. products: see `Products`; None: those of the weight."""

    products: Products | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, *, gradient_accumulation_fusion: bool,
                      allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any, **more: Any) -> Tensor:
        """What megatron-core's layer calls with the input, where communication is its own."""
        if sequence_parallel:                                          # the LM head's
            return super()._forward_impl(input=input, weight=weight, bias=bias, tp_group=tp_group,
                                         gradient_accumulation_fusion=gradient_accumulation_fusion,
                                         allreduce_dgrad=allreduce_dgrad, sequence_parallel=True, **more)
        total = weight.main_grad if gradient_accumulation_fusion else None
        y = _Whole.apply(input, weight, self.products or Products(weight), total, tp_group if allreduce_dgrad else None)
        return y if bias is None else y + bias


class _SequenceParallel(_Linear):
    """The same, and what it does with sequence parallelism."""

    function: type[torch.autograd.Function]

    def forward(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if not self.sequence_parallel:
            return super().forward(x, *args, **options)
        total = self.weight.main_grad if self.gradient_accumulation_fusion else None
        return self.function.apply(x, self.weight, self.products or Products(self.weight), total,
                                   self.tp_group), self.bias


class ColumnParallelLinear(_SequenceParallel, layers.ColumnParallelLinear):
    """[s / ranks, b, in] → ([s, b, out / ranks], bias to be added)."""

    function = _Column


class RowParallelLinear(_SequenceParallel, layers.RowParallelLinear):
    """[s, b, in / ranks] → ([s / ranks, b, out], bias to be added)."""

    function = _Row


class Head(_Linear, layers.ColumnParallelLinear):
    """The LM head."""
