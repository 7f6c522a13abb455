"""Mamba's selective scan: Triton where it runs, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from based_mp.ops import backends, recurrences

TIME, CHANNELS = 16, 8


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor, *,
                   kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """As `recurrences.selective_scan`: x, delta [s, batch, d]; a [d, n]; b, c [s, batch, n]; initial [batch, d, n].

    Returns y [s, batch, d] and the last state, fp32. kernels: "torch" for the plain form. The kernels take n = 2, 4, 8
    … 64, keep the inputs and one state every 16 tokens for the backward pass, and are compiled for every number of such
    tiles.
    """
    n = a.shape[1]
    if kernels == "torch" or backends.fused_backend(x) != "triton" or n & (n - 1) or not 2 <= n <= 64:
        return recurrences.selective_scan(x, delta, a, b, c, initial)
    return _SelectiveScan.apply(x, delta, a, b, c, initial)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor,
                initial: Tensor) -> tuple[Tensor, Tensor]:
        from based_mp.ops.fused import scan_kernels
        x, delta, b, c = (t.contiguous() for t in (x, delta, b, c))
        a, initial = a.float().contiguous(), initial.float().contiguous()
        steps, batch, width = x.shape
        n = a.shape[1]
        y = torch.empty(steps, batch, width, dtype=torch.float32, device=x.device)
        starts = torch.empty(-(-steps // TIME), batch, width, n, dtype=torch.float32, device=x.device)
        last = torch.empty_like(initial)
        scan_kernels.scan_forward[(batch, -(-width // CHANNELS))](
            x, delta, a, b, c, initial, y, starts, last, steps, batch, width, TILES=starts.shape[0], TIME=TIME,
            CHANNELS=CHANNELS, N=n, num_warps=4)
        ctx.save_for_backward(x, delta, a, b, c, starts)
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        from based_mp.ops.fused import scan_kernels
        x, delta, a, b, c, starts = ctx.saved_tensors
        steps, batch, width = x.shape
        n, blocks = a.shape[1], -(-width // CHANNELS)

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=x.device)

        dx, ddelta = empty(steps, batch, width), empty(steps, batch, width)
        da, dinitial = empty(batch, width, n), empty(batch, width, n)
        db, dc = empty(blocks, steps, batch, n), empty(blocks, steps, batch, n)
        scan_kernels.scan_backward[(batch, blocks)](
            x, delta, a, b, c, starts, dy.contiguous(), dlast.contiguous(), dx, ddelta, da, db, dc, dinitial, steps,
            batch, width, TILES=starts.shape[0], TIME=TIME, CHANNELS=CHANNELS, N=n, num_warps=4)
        return dx.to(x.dtype), ddelta.to(delta.dtype), da.sum(0), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype), dinitial
