"""fp8 matrix products in the linear layers of the stack (training.fp8).

Of a linear layer's three products two take fp8 operands: y = x wᵀ and dx = dy w, each operand with a scale for every
slice along the summed dimension. The weight's gradient stays the bf16 product that adds to the fp32 sum: its operands
would have to be scaled and laid out once more, along the tokens. Embedding and LM head stay in bf16.
"""

from __future__ import annotations

import warnings

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from based_mp.model.linear import Operand, Products
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
        module.products = _Products(copies)
        optimizer.register_step_post_hook(copies.forget)
    if odd:
        warnings.warn(f"{len(odd)} linear layers stay in bf16 under training.fp8, because a width is not a multiple of "
                      f"{fp8.WIDTH_MULTIPLE}: {', '.join(odd[:3])}{', …' if len(odd) > 3 else ''}", stacklevel=2)
