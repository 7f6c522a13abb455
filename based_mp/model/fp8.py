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


def _gathered(x: Tensor, group: dist.ProcessGroup, *, wait: bool = True) -> tuple[Tensor, Any]:
    """x of every rank of the group, one after the other along the first dimension, and the handle to wait for."""
    whole = torch.empty(x.shape[0] * group.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
    as_bytes = x.dtype == fp8.FP8                                # which no communication library knows
    parts = (t.view(torch.uint8) if as_bytes else t for t in (whole, x.contiguous()))
    return whole, dist.all_gather_into_tensor(*parts, group=group, async_op=not wait)


class _Linear(torch.autograd.Function):
    """x [s, b, in] → [s, b, out]. With sequence parallelism x is this rank's part of s, gathered in fp8.

    As in megatron-core's linear layer, communication of the gradient of x runs beside the product of the weight's.
    """

    @staticmethod
    def forward(ctx, x, weight, copies, add_to_sum, allreduce, sequence_parallel, group):
        ctx.save_for_backward(x)
        ctx.copies, ctx.group = copies, group
        ctx.sum = weight.main_grad if add_to_sum else None
        ctx.allreduce, ctx.sequence_parallel = allreduce, sequence_parallel
        copies.renew()
        operand = fp8.quantize_rows(x.flatten(0, 1))
        if sequence_parallel:
            operand = tuple(_gathered(t, group)[0] for t in operand)
        return fp8.product(operand, copies.rows).unflatten(0, (-1, x.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        batch, handle, dw = x.shape[1], None, None
        x, dy = x.flatten(0, 1), dy.flatten(0, 1).contiguous()
        if ctx.sequence_parallel:
            x, handle = _gathered(x, ctx.group, wait=False)
        dx = fp8.product(fp8.quantize_rows(dy), ctx.copies.columns)
        if ctx.sequence_parallel:
            handle.wait()
            whole, dx = dx, torch.empty(dx.shape[0] // ctx.group.size(), dx.shape[1], dtype=dx.dtype, device=dx.device)
            handle = dist.reduce_scatter_tensor(dx, whole, group=ctx.group, async_op=True)
        elif ctx.allreduce:
            handle = dist.all_reduce(dx, group=ctx.group, async_op=True)
        if ctx.sum is None:
            dw = dy.t() @ x
        else:
            layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, dy, ctx.sum)
        if handle is not None:
            handle.wait()
        return dx.unflatten(0, (-1, batch)), dw, None, None, None, None, None


def _forward(copies: Copies, *, input: Tensor, weight: Tensor, bias: Tensor | None, gradient_accumulation_fusion: bool,
             allreduce_dgrad: bool, sequence_parallel: bool, tp_group: dist.ProcessGroup | None, **_: Any) -> Tensor:
    """What megatron-core's linear layers call with their input."""
    y = _Linear.apply(input, weight, copies, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, tp_group)
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
        module._forward_impl = partial(_forward, copies)
        optimizer.register_step_post_hook(copies.forget)
    if odd:
        warnings.warn(f"{len(odd)} linear layers stay in bf16 under training.fp8, because a width is not a multiple of "
                      f"{fp8.WIDTH_MULTIPLE}: {', '.join(odd[:3])}{', …' if len(odd) > 3 else ''}", stacklevel=2)
