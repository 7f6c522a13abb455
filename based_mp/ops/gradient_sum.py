"""Gradients that are added to the optimizer's fp32 sums (`main_grad`) by the kernels that make them."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientSum:
    """What a parameter's gradient is added to: its `main_grad`, where the optimizer keeps one.

    Where that has a function `made` (ZeRO-2) it holds one backward pass's gradient, which that takes away.
    Made in the forward pass: under ZeRO-3 the parameter may be cut again in the backward pass.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.dtype, self.kept = parameter.dtype, getattr(parameter, "main_grad", None)

    def total(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
        """fp32 of the parameter's shape, contiguous, zeros where the optimizer keeps no sum."""
        if self.kept is None:
            return torch.zeros(shape, dtype=torch.float32, device=device)
        return self.kept.zero_() if hasattr(self.kept, "made") else self.kept

    def made(self) -> None:
        """To be called when the gradient is in `total`."""
        if hasattr(self.kept, "made"):
            self.kept.made()

    def gradient(self, total: Tensor) -> Tensor | None:
        """The same, for autograd: None where `total` is the optimizer's."""
        self.made()
        return total.to(self.dtype) if self.kept is None else None
