"""Gradients that are added to the optimizer's fp32 sums (`main_grad`) by the kernels that make them."""

from __future__ import annotations

import torch
from torch import Tensor


def made(total: Tensor) -> None:
    """To be called when a gradient has been added to the optimizer's `total`, which may want to know (ZeRO-2)."""
    if hasattr(total, "made"):
        total.made()


class GradientSum:
    """What a parameter's gradient is added to: its `main_grad`, where the optimizer keeps one.

    Made in the forward pass: under ZeRO-3 the parameter may be cut again in the backward pass.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.dtype, self.kept = parameter.dtype, getattr(parameter, "main_grad", None)

    def total(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
        """fp32 of the parameter's shape, contiguous, zeros where the optimizer keeps no sum."""
        return torch.zeros(shape, dtype=torch.float32, device=device) if self.kept is None else self.kept

    def gradient(self, total: Tensor) -> Tensor | None:
        """For autograd, once the gradient is in `total`: None where that is the optimizer's."""
        if self.kept is None:
            return total.to(self.dtype)
        made(self.kept)
        return None
