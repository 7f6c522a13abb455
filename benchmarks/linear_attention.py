"""Speed of Taylor linear attention against flash-linear-attention's (where installed) and torch's flash attention.

A correctness gate comes first, and the error of every system against float64 is recorded beside its time.

python benchmarks/linear_attention.py [--json FILE] [--thunderkittens CHECKOUT]

Times are medians of CUDA-graph replays over rotating inputs, so that the inputs do not stay in the L2 cache;
microseconds. Backward is timed alone (flash-linear-attention's through autograd, outside a graph).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.ops import backends, taylor_cuda
from based_mp.ops.linear_attention import taylor_linear_attention, taylor_linear_attention_qkv
from based_mp.ops.reference import taylor_chunked, taylor_denominator
from benchmarks import thunderkittens
from benchmarks.record import append, git_commit
from benchmarks.timing import median_us

SHAPES = [(8, 16, 2048, 64), (4, 16, 2048, 112), (2, 16, 8192, 64), (1, 16, 32768, 64), (1, 16, 2048, 64),
          (8, 16, 1024, 64)]
GOALS = {(8, 16, 2048, 64): (56, 170), (4, 16, 2048, 112): (50, 150), (2, 16, 8192, 64): (56, 170),
         (1, 16, 32768, 64): (112, 340), (1, 16, 2048, 64): (20, 50)}


def rotated_us(calls: list[Callable[[], object]], repeats: int = 15, captured: bool = True) -> float:
    """Median time of one call; `calls` work on different inputs, in one graph where they can be captured."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    if not captured:
        return median_us(lambda: [call() for call in calls], repeats) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_us(graph.replay, repeats) / len(calls)


def gate(d: int, peer: Callable[..., torch.Tensor] | None) -> dict[str, list[float]]:
    """Relative errors of o, dq, dk, dv at a small size, ours and the peer's on the same inputs; raises where ours are
    over the limits or 1.3 times the peer's."""
    q, k, v, g = (torch.randn(2, 1000, 3, e, device="cuda").bfloat16().requires_grad_() for e in (16, 16, d, d))
    ref = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o_ref = taylor_chunked(*ref)[0]
    expected = [o_ref, *torch.autograd.grad(o_ref, ref, g.double())]
    errors = {}
    for name, op in {"ours": taylor_linear_attention, "fla": peer}.items():
        if op is not None:
            o = op(q, k, v)
            got = [o, *torch.autograd.grad(o, (q, k, v), g)]
            errors[name] = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    ours = errors["ours"]
    within = all(a <= 1.3 * b for a, b in zip(ours, errors.get("fla", [1.0] * 4), strict=True))
    if not (ours[0] <= 4e-3 and max(ours) <= 8e-3 and within):
        raise SystemExit(f"wrong results at head_dim {d}, nothing timed: {errors}")
    return errors


def fla_ops() -> dict[str, Callable[..., torch.Tensor]]:
    """flash-linear-attention's BASED kernels by name, none where it is not installed."""
    try:
        from fla.ops.based import fused_chunk_based, parallel_based
    except ImportError:
        return {}
    return {"fla parallel": parallel_based, "fla fused_chunk": fused_chunk_based}


def peer_times(op: Callable[..., torch.Tensor], b: int, h: int, n: int, d: int, copies: int) -> tuple[float, float]:
    sets = [[torch.randn(b, n, h, e, device="cuda", dtype=torch.bfloat16) for e in (16, 16, d, d)]
            for _ in range(copies)]
    forward = rotated_us([lambda x=x: op(*x[:3]) for x in sets], 5)
    leaves = [[t.requires_grad_() for t in x[:3]] for x in sets]
    outputs = [op(*x) for x in leaves]
    backward = rotated_us([lambda x=x, y=y, g=g: torch.autograd.grad(y, x, g[3], retain_graph=True)
                          for x, y, g in zip(leaves, outputs, sets, strict=True)], 5, captured=False)
    return forward, backward


def taylor_times(b: int, h: int, n: int, d: int, copies: int) -> tuple[float, float]:
    sets = [[torch.randn(n, b, h, e, device="cuda", dtype=torch.bfloat16).transpose(0, 1) for e in (16 + 16 + d, d)]
            for _ in range(copies)]
    forward = rotated_us([lambda x=x: taylor_linear_attention_qkv(x, 16) for x, _ in sets])
    saved = [taylor_cuda.taylor_forward(x, 16, None, None, None, 0.25, False)[1:3] for x, _ in sets]
    backward = rotated_us([
        lambda x=x, g=g, y=y: taylor_cuda.taylor_backward(g, *y, x, 16, None, None, None, 0.25, False)
        for (x, g), y in zip(sets, saved, strict=True)])
    return forward, backward


def thunderkittens_error(op: Callable[..., torch.Tensor]) -> float:
    """Relative error of the sums without their denominator, all that the kernel gives; raises where it is wrong."""
    q, k, v = (torch.randn(2, 3, 1024, e, device="cuda").bfloat16() for e in (16, 16, 64))
    ref = [x.transpose(1, 2).double() for x in (q, k, v)]
    expected = (taylor_chunked(*ref)[0] * taylor_denominator(*ref[:2])[..., None]).transpose(1, 2)
    error = ((op(q, k, v) - expected).norm() / expected.norm()).item()
    if not error <= 1e-2:
        raise SystemExit(f"ThunderKittens' kernel gives wrong results here, nothing timed: relative error {error}")
    return error


def thunderkittens_times(op: Callable[..., torch.Tensor], b: int, h: int, n: int, d: int,
                         copies: int) -> tuple[float, None]:
    sets = [[torch.randn(b, h, n, e, device="cuda", dtype=torch.bfloat16) for e in (16, 16, d)] for _ in range(copies)]
    return rotated_us([lambda x=x: op(*x) for x in sets]), None


def flash_times(b: int, h: int, n: int, d: int, copies: int) -> tuple[float, float]:
    """torch's flash attention with the same heads and head_dim."""
    ops = torch.ops.aten
    sets = [[torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)] for _ in range(copies)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        forward = rotated_us([lambda x=x: F.scaled_dot_product_attention(*x[:3], is_causal=True) for x in sets])
    saved = [ops._scaled_dot_product_flash_attention(*x[:3], 0.0, True) for x in sets] if d % 8 == 0 else []
    backward = rotated_us([
        lambda x=x, y=y: ops._scaled_dot_product_flash_attention_backward(
            x[3], *x[:3], y[0], y[1], y[2], y[3], y[4], y[5], 0.0, True, y[6], y[7])
        for x, y in zip(sets, saved, strict=True)])
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="append the record to this file, one line a run")
    parser.add_argument("--thunderkittens", metavar="CHECKOUT", help="time its forward kernel too, compiled from here")
    parser.add_argument("--commit", help="commit to record (default: git's)")
    args = parser.parse_args()
    if backends.extension() is None or not torch.cuda.is_available():
        raise SystemExit("error: needs a Hopper GPU and the compiled kernels (BASED_MP_CUDA=1 pip install -e .)")
    peers = fla_ops()
    errors = {d: gate(d, peers.get("fla parallel")) for d in backends.HEAD_DIMS}
    systems = {name: lambda *shape, op=op: peer_times(op, *shape) for name, op in peers.items()}
    if args.thunderkittens:
        kernel = thunderkittens.load(args.thunderkittens)
        errors[64]["thunderkittens"] = [thunderkittens_error(kernel)]
        systems["thunderkittens"] = lambda *shape: thunderkittens_times(kernel, *shape)
    systems["flash"] = flash_times
    commit = args.commit or git_commit()
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit,
              "errors_o_dq_dk_dv": errors, "rows": []}
    lines = ["| batch, heads, seq, head_dim | forward (goal) | backward (goal) | "
             + " | ".join(f"{name} fwd / bwd" for name in systems) + " |", "|---" * (3 + len(systems)) + "|"]
    for shape in SHAPES:
        b, h, n, d = shape
        copies = max(2, -(-150_000_000 // (b * h * n * (32 + 3 * d) * 2)))
        copies = min(copies, 16)
        forward, backward = taylor_times(b, h, n, d, copies)
        others = {}
        for name, times in systems.items():
            try:
                others[name] = times(*shape, 2)
            except (RuntimeError, TypeError, ValueError, AssertionError) as e:
                print(f"{name} could not be timed:", str(e)[:200])
                others[name] = (None, None)
        goal = GOALS.get(shape, ("-", "-"))
        record["rows"].append({"shape": shape, "forward_us": forward, "backward_us": backward, "peers_us": others})
        lines.append(f"| {b},{h},{n},{d} | {forward:.0f} ({goal[0]}) | {backward:.0f} ({goal[1]}) | "
                     + " | ".join(" / ".join("–" if us is None else f"{us:.0f}" for us in others[name])
                                  for name in systems) + " |")
    for d, found in errors.items():
        print(f"head_dim {d}, relative errors of o, dq, dk, dv:",
              {name: [f"{e:.1e}" for e in values] for name, values in found.items()})
    print(record["gpu"], commit)
    print("\n".join(lines))
    append(record, args.json)


if __name__ == "__main__":
    main()
