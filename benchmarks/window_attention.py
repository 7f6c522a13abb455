#!/usr/bin/env python3
"""RoPE and sliding-window attention as training calls them, beside what torch has, after a correctness gate.

python benchmarks/window_attention.py. Forward / backward in microseconds, medians; host time left out. From one
qkv buffer [seq, batch, heads, 3, head_dim] to [seq, batch, heads · head_dim] and back; "alone" and flex_attention leave
RoPE and the gradients' way into one buffer out. Floor: qkv and o (and their gradients) once at 3 TB/s, or the
visible products at the measured matrix-product rate, whichever is longer (forward 4·head_dim FLOPs a visible key,
backward 2.5 times as many). Below, full causal attention without RoPE: torch's flash kernel and cuDNN's.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from based_mp.ops.fused.rotary_attention import RotaryAttention  # noqa: E402
from based_mp.ops.reference import window_attention_naive  # noqa: E402
from based_mp.ops.window_attention import rope  # noqa: E402
from based_mp.ops.window_cuda import rotary_window_attention  # noqa: E402
from benchmarks.record import git_commit  # noqa: E402
from benchmarks.timing import elapsed_us, matmul_rate  # noqa: E402

Way = Callable[..., Tensor]               # of the qkv buffer, or of q, k, v [batch, seq, heads, head_dim], its views
SHAPES = [(8, 2048, 16, 64), (4, 2048, 16, 112)]
FULL = [(8, 2048, 16, 64), (1, 16384, 16, 64)]
CALLS = 10


def microseconds(call: Callable[[], object]) -> float:
    """Of one call on the GPU: it sleeps while the host queues the calls."""
    for _ in range(3):
        call()
    times = []
    for _ in range(15):
        torch.cuda._sleep(10_000_000)
        times.append(elapsed_us(lambda: [call() for _ in range(CALLS)]) / CALLS)
    return statistics.median(times)


def heads_of(x: Tensor) -> list[Tensor]:
    """q, k, v [batch, seq, heads, head_dim], views of [seq, batch, heads, 3, head_dim]."""
    return list(x.transpose(0, 1).unbind(-2))


def flash(window: int) -> Way:
    return lambda x: RotaryAttention.apply(x, window, None, 10000.0, 1.0).transpose(0, 1).flatten(2)


def flash_alone(window: int) -> Way:
    return lambda q, k, v: torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], q.shape[1], 0.0, False, False, scale=q.shape[-1] ** -0.5,
        window_size_left=window - 1, window_size_right=0)[0]


def flex(window: int, seq: int) -> Way:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._dynamo.reset()                                      # a shape of its own, not one recompilation too many
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, seq, seq, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda *qkv: compiled(*(x.transpose(1, 2) for x in qkv), block_mask=mask).transpose(1, 2)


def full(backend: SDPBackend) -> Way:
    def run(*qkv):
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), is_causal=True)
        return o.transpose(1, 2)
    return run


def expected(x: Tensor, grad: Tensor, window: int | None, rotated: bool) -> tuple[Tensor, Tensor]:
    """The first sequence's o [seq, 1, heads · head_dim] and gradient of x, float64."""
    x = x[:, :1].detach().double().requires_grad_()
    q, k, v = heads_of(x)
    if rotated:
        positions = torch.arange(x.shape[0], device=x.device)[None]
        q, k = rope(q, positions), rope(k, positions)
    o = window_attention_naive(q, k, v, window, x.shape[-1] ** -0.5).transpose(0, 1).flatten(2)
    return o, torch.autograd.grad(o, x, grad[:, :1].double())[0]


def measure(way: Way, inputs: list[Tensor], grad: Tensor, truth: tuple[Tensor, Tensor] | None) -> str:
    """grad: [seq, batch, heads · head_dim]; truth: see `expected`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    views = [x.view_as(x) for x in leaves] if len(leaves) > 1 else [leaves[0] * 1]      # which a way may overwrite
    o = way(*views)
    if len(leaves) > 1:
        grad = grad.unflatten(-1, o.shape[2:]).transpose(0, 1).contiguous()
    if truth is not None:
        got = torch.autograd.grad(o, views, grad, retain_graph=True)
        together = got[0] if len(got) == 1 else torch.stack(got, -2).transpose(0, 1)
        flat = o if len(got) == 1 else o.transpose(0, 1).flatten(2)
        errors = [((a[:, :1] - b).norm() / b.norm()).item() for a, b in zip((flat, together), truth, strict=True)]
        if not (errors[0] < 5e-3 and errors[1] < 1e-2):
            raise SystemExit(f"wrong result (relative errors {errors}), nothing timed")
    with torch.no_grad():
        forward = microseconds(lambda: way(*leaves))
    backward = microseconds(lambda: torch.autograd.grad(o, views, grad, retain_graph=True))
    return f"{forward:.0f} / {backward:.0f}"


def sample(b: int, s: int, h: int, d: int) -> tuple[Tensor, Tensor]:
    return (torch.randn(s, b, h, 3, d, device="cuda", dtype=torch.bfloat16),
            torch.randn(s, b, h * d, device="cuda", dtype=torch.bfloat16))


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: needs a GPU")
    rate = matmul_rate()
    print(f"{torch.cuda.get_device_name()}, commit {git_commit()}, matrix product {rate:.0f} TFLOP/s")
    print("| batch, seq, heads, head_dim | window | floor | own, RoPE inside | flash + Triton RoPE | flash alone "
          "| flex_attention alone |\n|---|---|---|---|---|---|---|")
    for b, s, h, d in SHAPES:
        for window in (64, 128, 256):
            x, grad = sample(b, s, h, d)
            plain, turned = (expected(x, grad, window, rotated) for rotated in (False, True))
            own = lambda x, w=window: rotary_window_attention(x, w).flatten(2)  # noqa: E731
            cells = [measure(own, [x], grad, turned), measure(flash(window), [x.clone()], grad, turned),
                     *(measure(way, heads_of(x), grad, plain) for way in (flash_alone(window), flex(window, s)))]
            bytes_ = b * s * h * d * 2
            flops = 4 * d * b * h * (s * window - window * (window - 1) / 2)
            floors = [max(n * bytes_ / 3e6, f * flops / rate / 1e6) for n, f in ((4, 1), (8, 2.5))]
            print(f"| {b},{s},{h},{d} | {window} | {floors[0]:.0f} / {floors[1]:.0f} | {' | '.join(cells)} |",
                  flush=True)
    print("\n| full causal | flash | cuDNN |\n|---|---|---|")
    for b, s, h, d in FULL:
        x, grad = sample(b, s, h, d)
        truth = expected(x, grad, None, False) if s <= 2048 else None
        cells = [measure(full(backend), heads_of(x), grad, truth)
                 for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)]
        print(f"| {b},{s},{h},{d} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
