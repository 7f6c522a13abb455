"""Tensor-parallel linear layers whose communication runs beside their products, for sequence parallelism.

Between the layers every rank has a part of the sequence, in them all of it (Korthikanti et al. 2022, section 4.2). What
a product needs of other ranks travels while the rank's own part is multiplied, and what it makes for them leaves in
pieces, each while the next is multiplied. Without sequence parallelism the layers are megatron-core's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor

PIECES, PIECE_ROWS = 4, 2048     # of what a rank keeps of a sum: at most so many pieces, of so many rows at least

Operand = tuple[Tensor, ...]     # what a product takes, in tensors with a row for each token


class Products:
    """The products of a linear layer with its weight [out, in], in the weight's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def operand(self, x: Tensor) -> Operand:
        """x [tokens, in or out] as a left operand."""
        return (x,)

    def forward(self, operand: Operand, out: Tensor) -> None:
        """out = x weightᵀ, [tokens, out]."""
        torch.mm(operand[0], self.weight.detach().t(), out=out)

    def backward(self, operand: Operand, out: Tensor) -> None:
        """out = dy weight, [tokens, in]."""
        torch.mm(operand[0], self.weight.detach(), out=out)


def gathered(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """x of every rank of the group, one after the other along the first dimension, and the handle to wait for."""
    whole = torch.empty(x.shape[0] * group.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
    as_bytes = x.dtype == torch.float8_e4m3fn                    # which no communication library knows
    parts = (t.view(torch.uint8) if as_bytes else t for t in (whole, x.contiguous()))
    return whole, dist.all_gather_into_tensor(*parts, group=group, async_op=True)


def _multiply_gathered(own: Operand, multiply: Callable[[Operand, Tensor], None], width: int, dtype: torch.dtype,
                       group: dist.ProcessGroup) -> tuple[Tensor, Operand]:
    """The product of all ranks' rows [ranks · rows, width], and these rows."""
    rows, rank = own[0].shape[0], group.rank()
    wholes, handles = zip(*(gathered(t, group) for t in own), strict=True)
    y = torch.empty(rows * group.size(), width, dtype=dtype, device=own[0].device)
    multiply(own, y[rank * rows : (rank + 1) * rows])
    for handle in handles:
        handle.wait()
    for part in (slice(0, rank * rows), slice((rank + 1) * rows, None)):
        if y[part].shape[0]:
            multiply(tuple(t[part] for t in wholes), y[part])
    return y, wholes


def _multiply_scattered(operand: Operand, multiply: Callable[[Operand, Tensor], None], width: int, dtype: torch.dtype,
                        group: dist.ProcessGroup) -> tuple[Tensor, list[Any]]:
    """This rank's rows of the ranks' products' sum [rows / ranks, width], and what to wait for before they are read."""
    operand = tuple(t.unflatten(0, (group.size(), -1)) for t in operand)
    ranks, rows = operand[0].shape[:2]
    own, handles = torch.empty(rows, width, dtype=dtype, device=operand[0].device), []
    pieces = max(1, min(PIECES, rows // PIECE_ROWS))
    for piece, *parts in zip(own.tensor_split(pieces), *(t.tensor_split(pieces, 1) for t in operand), strict=True):
        made = piece.new_empty(ranks, *piece.shape)
        for rank in range(ranks):
            multiply(tuple(t[rank] for t in parts), made[rank])
        handles.append(dist.reduce_scatter_tensor(piece, made.flatten(0, 1), group=group, async_op=True))
    return own, handles


def weight_gradient(x: Tensor, dy: Tensor, total: Tensor | None) -> Tensor | None:
    """dyᵀ x of x [tokens, in], dy [tokens, out]; None where it was added to `total`, the optimizer's sum."""
    if total is None:
        return dy.t() @ x
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, dy, total)
    return None


class _Column(torch.autograd.Function):
    """x [s / ranks, b, in] → [s, b, out / ranks]. Only x is kept, and gathered again for the weight's gradient."""

    @staticmethod
    def forward(ctx, x, weight, products, total, group):
        ctx.save_for_backward(x)
        ctx.products, ctx.total, ctx.group = products, total, group
        y, _ = _multiply_gathered(products.operand(x.flatten(0, 1)), products.forward, weight.shape[0], x.dtype, group)
        return y.unflatten(0, (-1, x.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        batch, products = x.shape[1], ctx.products
        x, dy = x.flatten(0, 1), dy.flatten(0, 1).contiguous()
        whole, there = gathered(x, ctx.group)
        dx, handles = _multiply_scattered(products.operand(dy), products.backward, x.shape[1], x.dtype, ctx.group)
        there.wait()
        dw = weight_gradient(whole, dy, ctx.total)
        for handle in handles:
            handle.wait()
        return dx.unflatten(0, (-1, batch)), dw, None, None, None


class _Row(torch.autograd.Function):
    """x [s, b, in / ranks] → [s / ranks, b, out]."""

    @staticmethod
    def forward(ctx, x, weight, products, total, group):
        ctx.save_for_backward(x)
        ctx.products, ctx.total, ctx.group = products, total, group
        y, handles = _multiply_scattered(products.operand(x.flatten(0, 1)), products.forward, weight.shape[0], x.dtype,
                                         group)
        for handle in handles:
            handle.wait()
        return y.unflatten(0, (-1, x.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        products = ctx.products
        dx, (whole,) = _multiply_gathered((dy.flatten(0, 1).contiguous(),), lambda own, out: products.backward(
            products.operand(own[0]), out), x.shape[2], x.dtype, ctx.group)
        dw = weight_gradient(x.flatten(0, 1), whole, ctx.total)
        return dx.view_as(x), dw, None, None, None


class _SequenceParallel:
    """Of a linear layer of megatron-core: what it does with sequence parallelism. products: see `Products`."""

    function: type[torch.autograd.Function]
    products: Any = None

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
