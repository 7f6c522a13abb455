"""Speed of Taylor linear attention against torch's flash attention (and FLA where installed), after a correctness gate.

python benchmarks/linear_attention.py [--json FILE]. Times are medians of CUDA-graph replays over rotating inputs, so
that the inputs do not stay in the L2 cache; microseconds. Backward is timed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.ops import backends, taylor_cuda
from based_mp.ops.linear_attention import taylor_linear_attention
from based_mp.ops.reference import taylor_chunked

SHAPES = [(8, 16, 2048, 64), (4, 16, 2048, 112), (2, 16, 8192, 64), (1, 16, 32768, 64), (1, 16, 2048, 64),
          (8, 16, 1024, 64)]
GOALS = {(8, 16, 2048, 64): (56, 170), (4, 16, 2048, 112): (50, 150), (2, 16, 8192, 64): (56, 170),
         (1, 16, 32768, 64): (112, 340), (1, 16, 2048, 64): (20, 50)}


def median_us(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Median time of one call; `calls` work on different inputs and are captured together in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def gate(d: int) -> float:
    """Largest relative error of o, dq, dk, dv at a small size; raises where it is over the limit."""
    q, k, v, g = (torch.randn(2, 1000, 3, e, device="cuda").bfloat16().requires_grad_() for e in (16, 16, d, d))
    o = taylor_linear_attention(q, k, v)
    ref = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o_ref = taylor_chunked(*ref)[0]
    pairs = [(o, o_ref), *zip(torch.autograd.grad(o, (q, k, v), g), torch.autograd.grad(o_ref, ref, g.double()),
                              strict=True)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    if not (errors[0] <= 4e-3 and max(errors) <= 8e-3):
        raise SystemExit(f"wrong results at head_dim {d}, nothing timed: {errors}")
    return max(errors)


def taylor_times(b: int, h: int, n: int, d: int, copies: int) -> tuple[float, float]:
    sets = [[torch.randn(b, n, h, e, device="cuda", dtype=torch.bfloat16) for e in (16, 16, d, d)]
            for _ in range(copies)]
    forward = median_us([lambda x=x: taylor_linear_attention(*x[:3]) for x in sets])
    saved = [taylor_cuda.taylor_forward(*x[:3], None, None, None, 0.25, False) for x in sets]
    held = taylor_cuda.holds_states(*sets[0][1:3], None, False)
    backward = median_us([
        lambda x=x, y=y: taylor_cuda.taylor_backward(x[3], *y[:3], *x[:3], None, None, None, 0.25, False, held)
        for x, y in zip(sets, saved, strict=True)])
    return forward, backward


def flash_times(b: int, h: int, n: int, d: int, copies: int) -> tuple[float, float]:
    """torch's flash attention with the same heads and head_dim."""
    ops = torch.ops.aten
    sets = [[torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)] for _ in range(copies)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        forward = median_us([lambda x=x: F.scaled_dot_product_attention(*x[:3], is_causal=True) for x in sets])
    saved = [ops._scaled_dot_product_flash_attention(*x[:3], 0.0, True) for x in sets] if d % 8 == 0 else []
    backward = median_us([
        lambda x=x, y=y: ops._scaled_dot_product_flash_attention_backward(
            x[3], *x[:3], y[0], y[1], y[2], y[3], y[4], y[5], 0.0, True, y[6], y[7])
        for x, y in zip(sets, saved, strict=True)])
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="append the record to this file, one line a run")
    parser.add_argument("--commit", help="commit to record (default: git's)")
    args = parser.parse_args()
    if backends.extension() is None or not torch.cuda.is_available():
        raise SystemExit("error: needs a Hopper GPU and the compiled kernels (BASED_MP_CUDA=1 pip install -e .)")
    errors = {d: gate(d) for d in backends.HEAD_DIMS}
    commit = args.commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                           text=True).stdout.strip()
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit,
              "largest_error": errors, "rows": []}
    lines = ["| batch, heads, seq, head_dim | forward (goal) | backward (goal) | flash fwd / bwd |",
             "|---|---|---|---|"]
    for shape in SHAPES:
        b, h, n, d = shape
        copies = max(2, -(-150_000_000 // (b * h * n * (32 + 3 * d) * 2)))
        copies = min(copies, 16)
        forward, backward = taylor_times(b, h, n, d, copies)
        try:
            flash = flash_times(b, h, n, d, 2)
        except (RuntimeError, TypeError) as e:
            print("flash attention could not be timed:", str(e)[:200])
            flash = (float("nan"), float("nan"))
        goal = GOALS.get(shape, ("-", "-"))
        record["rows"].append({"shape": shape, "forward_us": forward, "backward_us": backward, "flash_us": flash})
        lines.append(f"| {b},{h},{n},{d} | {forward:.0f} ({goal[0]}) | {backward:.0f} ({goal[1]}) | "
                     f"{flash[0]:.0f} / {flash[1]:.0f} |")
    print("largest relative errors:", {d: f"{e:.1e}" for d, e in errors.items()})
    print(record["gpu"], commit)
    print("\n".join(lines))
    if args.json:
        with open(args.json, "a") as f:
            f.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
