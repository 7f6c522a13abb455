#!/usr/bin/env python3
"""Sliding-window attention: torch's flash kernel with window_size against flex_attention, after a correctness gate.

python benchmarks/window_attention.py. RoPE is not in the times; backward is timed alone. Microseconds, medians of CUDA
events. Floor: q, k, v, o (and their gradients) once at 3 TB/s, or the visible products at the measured matrix-product
rate, whichever is longer (forward 4·head_dim FLOPs a visible key, backward 2.5 times as many).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from based_mp.ops.reference import window_attention_naive  # noqa: E402
from based_mp.ops.window_attention import causal_attention  # noqa: E402
from benchmarks.timing import matmul_rate, median_us  # noqa: E402

SHAPES = [(8, 2048, 16, 64), (4, 2048, 16, 112)]


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    return median_us(call, 20, calls=5)


def dense_flash(window: int) -> Callable[..., torch.Tensor]:
    """As training calls it: views of one qkv buffer [seq, batch, heads, 3, head_dim], no packing."""
    def run(q, k, v):
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], q.shape[1], 0.0, False, False, scale=q.shape[-1] ** -0.5,
            window_size_left=window - 1, window_size_right=0)[0]
    return run


def flex(window: int, seq: int) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, seq, seq, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: needs a GPU")
    rate = matmul_rate()
    print(f"{torch.cuda.get_device_name()}, matrix product {rate:.0f} TFLOP/s")
    print("| batch, seq, heads, head_dim | window | floor | flash, strided | flash, packed | flex_attention |\n"
          "|---|---|---|---|---|---|")
    for b, s, h, d in SHAPES:
        for window in (64, 128, 256):
            qkv = torch.randn(s, b, h, 3, d, device="cuda", dtype=torch.bfloat16)
            q, k, v = (x.detach().requires_grad_() for x in qkv.transpose(0, 1).unbind(-2))
            grad = torch.randn(b, s, h, d, device="cuda", dtype=torch.bfloat16)
            expected = window_attention_naive(q[:1].double(), k[:1].double(), v[:1].double(), window, d ** -0.5)
            cells = []
            ways = [dense_flash(window), lambda *x, w=window: causal_attention(*x, window=w), flex(window, s)]
            for way in ways:
                o = way(q, k, v)
                error = ((o[:1] - expected).norm() / expected.norm()).item()
                if not error < 5e-3:
                    raise SystemExit(f"wrong result (relative error {error}), nothing timed")
                inputs = (q, k, v)
                with torch.no_grad():
                    forward = microseconds(lambda way=way, x=inputs: way(*x))
                backward = microseconds(
                    lambda o=o, x=inputs, g=grad: torch.autograd.grad(o, x, g, retain_graph=True))
                cells.append(f"{forward:.0f} / {backward:.0f}")
            bytes_ = b * s * h * d * 2
            flops = 4 * d * b * h * (s * window - window * (window - 1) / 2)
            floors = [max(n * bytes_ / 3e6, f * flops / rate / 1e6) for n, f in ((4, 1), (8, 2.5))]
            print(f"| {b},{s},{h},{d} | {window} | {floors[0]:.0f} / {floors[1]:.0f} | {' | '.join(cells)} |",
                  flush=True)


if __name__ == "__main__":
    main()
