"""What the benchmarks read from the GPU's clock (CUDA events)."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def elapsed_us(call: Callable[[], object]) -> float:
    """Microseconds from the GPU's start of what `call` launches to its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def median_us(call: Callable[[], object], repeats: int, calls: int = 1) -> float:
    """Median over `repeats` of the time of one call; `calls` in a row are timed together."""
    return statistics.median(elapsed_us(lambda: [call() for _ in range(calls)]) for _ in range(repeats)) / calls


def matmul_rate() -> float:
    """TFLOP/s of an 8192³ bf16 matrix product, the best of five times ten."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    us = [elapsed_us(lambda: [a @ b for _ in range(10)]) / 10 for _ in range(6)]
    return 2 * 8192**3 / min(us[1:]) / 1e6
