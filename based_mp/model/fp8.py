"""fp8 matrix products in the linear layers of the stack (training.fp8).

Of a linear layer's three products two take fp8 operands: y = x wᵀ and dx = dy w, each operand with a scale for every
slice along the summed dimension. The weight's gradient stays the bf16 product that adds to the fp32 sum: its operands
would have to be scaled and laid out once more, along the tokens. Embedding and LM head stay in bf16.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor

from based_mp.model.linear import Operand, Products, weight_gradient
from based_mp.ops import backends, fp8


class Copies:
    """fp8 copies of a weight [out, in], renewed in place when they are first needed after an optimizer step.

    rows: [out, in], a scale for each output; columns: [in, out], a scale for each input.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows: tuple[Tensor, Tensor] | None = None
        self.columns: tuple[Tensor, Tensor] | None = None
        self.current = False

    def forget(self, *_: object) -> None:
        """The weight has changed."""
        self.current = False

    def renew(self) -> None:
        """To be called before they are read."""
        if self.current:
            return
        weight = self.weight.detach()
        rows, columns = fp8.quantize_rows(weight), fp8.quantize_rows(weight.t())
        if self.rows is None:
            self.rows, self.columns = rows, columns
        else:                                     # where a CUDA graph reads them
            for kept, new in zip((*self.rows, *self.columns), (*rows, *columns), strict=True):
                kept.copy_(new)
        self.current = True


def fp8_copies(model: torch.nn.Module) -> list[Copies]:
    """Of the weights of every layer that `use_fp8` changed."""
    return [module.fp8_copies for module in model.modules() if hasattr(module, "fp8_copies")]


class _Products(Products):
    """Of fp8 operands. With sequence parallelism a column-parallel layer's input is gathered in fp8."""

    def __init__(self, copies: Copies) -> None:
        super().__init__(copies.weight)
        self.copies = copies

    def operand(self, x: Tensor) -> Operand:
        return fp8.quantize_rows(x)

    def forward(self, operand: Operand, out: Tensor) -> None:
        self.copies.renew()
        fp8.product(operand, self.copies.rows, out=out)

    def backward(self, operand: Operand, out: Tensor) -> None:
        fp8.product(operand, self.copies.columns, out=out)


class _Linear(torch.autograd.Function):
    """x [s, b, in] → [s, b, out], without sequence parallelism.

    As in megatron-core's linear layer, communication of the gradient of x runs beside the product of the weight's.
    """

    @staticmethod
    def forward(ctx, x, weight, copies, total, allreduce, group):
        ctx.save_for_backward(x)
        ctx.copies, ctx.total, ctx.allreduce, ctx.group = copies, total, allreduce, group
        copies.renew()
        return fp8.product(fp8.quantize_rows(x.flatten(0, 1)), copies.rows).unflatten(0, (-1, x.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        dy, handle = dy.flatten(0, 1).contiguous(), None
        dx = fp8.product(fp8.quantize_rows(dy), ctx.copies.columns)
        if ctx.allreduce:
            handle = dist.all_reduce(dx, group=ctx.group, async_op=True)
        dw = weight_gradient(x.flatten(0, 1), dy, ctx.total)
        if handle is not None:
            handle.wait()
        return dx.view_as(x), dw, None, None, None, None


def _forward(copies: Copies, *, input: Tensor, weight: Tensor, bias: Tensor | None, gradient_accumulation_fusion: bool,
             allreduce_dgrad: bool, tp_group: dist.ProcessGroup | None, **_: Any) -> Tensor:
    """What megatron-core's linear layers call with their input."""
    total = weight.main_grad if gradient_accumulation_fusion else None
    y = _Linear.apply(input, weight, copies, total, allreduce_dgrad, tp_group)
    return y if bias is None else y + bias


def use_fp8(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Lets the linear layers of the model's stack multiply in fp8; their weights are those of `optimizer`.

    A layer that cannot (of a rank, a width is not a multiple of 16) stays in bf16, with one warning.
    """
    backends.check_fp8(next(model.parameters()).device)
    odd = []
    for name, module in model.decoder.named_modules():
        if not isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            continue
        if any(width % fp8.WIDTH_MULTIPLE for width in module.weight.shape):
            odd.append(f"{name} {tuple(module.weight.shape)}")
            continue
        module.fp8_copies = copies = Copies(module.weight)
        module._forward_impl, module.products = partial(_forward, copies), _Products(copies)
        optimizer.register_step_post_hook(copies.forget)
    if odd:
        warnings.warn(f"{len(odd)} linear layers stay in bf16 under training.fp8, because a width is not a multiple of "
                      f"{fp8.WIDTH_MULTIPLE}: {', '.join(odd[:3])}{', …' if len(odd) > 3 else ''}", stacklevel=2)
