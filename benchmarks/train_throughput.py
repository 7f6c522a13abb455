#!/usr/bin/env python3
"""Tokens per second of whole models on one GPU, through launch/pretrain.py, after a check of the losses.

    python benchmarks/train_throughput.py                     # four configurations at 2048 tokens
    python benchmarks/train_throughput.py --quick             # 360m pair, 12 steps
    python benchmarks/train_throughput.py --config based_360m attention_360m --length 2048 16384
    python benchmarks/train_throughput.py --config based_360m --profile
    python benchmarks/train_throughput.py --largest           # micro-batch of every configuration
    python benchmarks/train_throughput.py --curve 300 --data PREFIX    # losses beside those of plain torch

Every row is a run of its own with full optimizer steps. Tokens/s: median over the steps after the first five. MFU:
tokens/s × training FLOPs per token (3 × (2 × matrix parameters + the mixers' own FLOPs), based_mp/estimate.py) over
the rate of an 8192³ bf16 matrix product measured in this run. First step: seconds from launch to the end of step 1.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from based_mp.config import load_config  # noqa: E402
from based_mp.estimate import GIB, flops_per_token, memory_per_gpu  # noqa: E402
from benchmarks.record import append, git_commit  # noqa: E402
from benchmarks.timing import matmul_rate  # noqa: E402
from data_prep.indexed import write_index  # noqa: E402

MICRO = {"based_360m": 8, "attention_360m": 8, "based_1.3b": 8, "attention_1.3b": 4}      # at 2048 tokens
LINE = re.compile(r"step +(\d+)/\d+ \| loss +(\S+) .*\| +([\d,]+) tok/s/rank \| MFU +(\S+)% \| mem +(\S+) GiB "
                  r"\| data wait +(\S+)%")
GROUPS = {                                              # the first that matches a kernel's name
    "Taylor linear attention": "TaylorArgs", "gated convolution": "GatedConvArgs",
    "softmax attention": "window_attention|flash|fmha", "RoPE": "rope_",
    "RMSNorm + add": "norm_forward|norm_backward|add_sums", "SwiGLU": "swiglu",
    "cross-entropy": "cross_entropy", "fp8 scaling": "quantize_row", "optimizer": "multi_tensor|adam",
    "matrix products": "gemm|nvjet|cutlass|xmma", "embedding": "read_rows|add_rows|add_long_rows|embedding|radix|sort",
    "communication": "nccl",
    "copies and fills": "Mem(cpy|set)|copy|fill",
    "element-wise": "elementwise|reduce"}


def synthetic(prefix: Path, tokens: int, vocab: int = 50257) -> None:
    """Zipf-distributed ids in documents of 1000 tokens: a .bin/.idx pair as data_prep.tokenize writes them."""
    rng = np.random.default_rng(0)
    documents = tokens // 1000
    ids = np.minimum(rng.zipf(1.2, documents * 1000) - 1, vocab - 1).astype(np.uint16)
    ids.tofile(prefix.with_suffix(".bin"))
    write_index(prefix.with_suffix(".idx"), [np.full(documents, 1000, np.int32)], np.dtype(np.uint16), documents)


def overrides(data: str, cache: str, steps: int, length: int, micro: int, accumulation: int,
              *more: str) -> list[str]:
    """Of a configuration: this data, this size, nothing written."""
    return [f"data.train=[{{path: {data}, name: benchmark}}]", "data.valid=[]", "data.test=[]",
            f"data.cache_dir={cache}", "data.tokenizer=null", "logging.sample_interval=0",
            "logging.tensorboard_dir=null", "logging.log_interval=1", "checkpoint.dir=null", "validation.interval=0",
            f"training.steps={steps}", "optimizer.warmup_steps=5", f"training.seq_length={length}",
            f"training.micro_batch_size={micro}", f"training.global_batch_size={micro * accumulation}", *more]


def train(config: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """A run of launch/pretrain.py: what its log lines say, and the seconds to the first."""
    command = [sys.executable, str(REPO / "launch/pretrain.py"), "--config", str(REPO / f"configs/{config}.yaml")]
    start, first, lines, tail = time.perf_counter(), None, [], []
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {})) as process:
        for text in process.stdout:
            tail = [*tail[-15:], text]
            if found := LINE.search(text):
                first = first or time.perf_counter() - start
                lines.append([float(x.replace(",", "")) for x in found.groups()])
    if process.returncode or not lines:
        return {"error": "out of memory" if "out of memory" in "".join(tail).lower() else "".join(tail)}
    settled = lines[5:] if len(lines) > 8 else lines[1:] or lines
    return {"losses": [x[1] for x in lines], "tokens_per_second": statistics.median(x[2] for x in settled),
            "memory_gib": max(x[4] for x in lines), "data_wait_percent": statistics.median(x[5] for x in settled),
            "first_step_seconds": first}


def losses(config: str, arguments: list[str], backend: str = "") -> list[float]:
    """Of every step of a run; backend "torch": in plain torch. Exits where it fails."""
    result = train(config, arguments, {"BASED_MP_BACKEND": backend})
    if "error" in result:
        raise SystemExit(f"the check of the losses failed, nothing timed:\n{result['error']}")
    return result["losses"]


def gate(data: str, cache: str) -> float:
    """Largest difference of ten steps' losses from plain torch's; exits where it is more than bf16 explains."""
    small = ["model.num_layers=6", "model.linear_attention_layers=[1]", "model.sliding_attention_layers=[2]"]
    arguments = overrides(data, cache, 10, 512, 2, 2, *small)
    ours, torchs = losses("based_360m", arguments), losses("based_360m", arguments, "torch")
    worst = max(abs(a - b) for a, b in zip(ours, torchs, strict=True))
    if not worst < 0.02 or len(ours) != 10:
        raise SystemExit(f"losses differ from plain torch's by {worst}, nothing timed:\n{ours}\n{torchs}")
    return worst


def profile(config: str, arguments: list[str]) -> str:
    """The GPU's time in one optimizer step by kernel group, as a table."""
    from torch.profiler import ProfilerActivity

    from based_mp.parallel import state
    settings = load_config(REPO / f"configs/{config}.yaml", arguments)
    ranks = state.initialize(device="cuda", seed=settings.training.seed)
    from based_mp.training.loop import Trainer
    trainer = Trainer(settings, ranks)
    trainer.run(stop_after=4)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        trainer.run(stop_after=6)
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / 2 * 1e3
    times: dict[str, float] = {}
    rest: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms = event.self_device_time_total / 2e3
            group = next((g for g, pattern in GROUPS.items() if re.search(pattern, event.key, re.IGNORECASE)), "other")
            times[group] = times.get(group, 0) + ms
            if group in ("other", "element-wise", "copies and fills"):
                rest[event.key[:110]] = ms
    state.destroy()
    total = sum(times.values())
    rows = [f"| {g} | {ms:.2f} | {ms / total:.1%} |" for g, ms in sorted(times.items(), key=lambda x: -x[1])]
    largest = [f"  {ms:.2f} ms  {name}" for name, ms in sorted(rest.items(), key=lambda x: -x[1])[:12]]
    return "\n".join([f"{config}: {wall:.1f} ms a step, kernels {total:.1f} ms", "| kernels | ms | share |",
                      "|---|---|---|", *rows, "largest of the element-wise, copies and other:", *largest])


def largest(fits: Callable[[int], bool], estimate: int) -> int:
    """The largest micro-batch that fits, looked for from two thirds of an estimate on; 0 where none does."""
    low, high, size = 0, None, max(1, estimate * 2 // 3)   # low fits, high does not
    while high is None or high - low > 1:
        if fits(size):
            low = size
        else:
            high = size
        size = max(estimate, low + 1) if high is None else (low + high) // 2
    return low


def print_largest(config: str, arguments: Callable[[int], list[str]]) -> None:
    """Of one configuration, beside the estimate of `launch/pretrain.py --dry-run` for this GPU's memory."""
    memory, peaks = torch.cuda.get_device_properties(0).total_memory, {}

    def bytes_of(size: int) -> float:
        return sum(memory_per_gpu(load_config(REPO / f"configs/{config}.yaml", arguments(size)), 1).values())

    def fits(size: int) -> bool:
        result = train(config, arguments(size))
        if "error" in result and result["error"] != "out of memory":
            raise SystemExit(f"micro-batch {size} of {config} failed:\n{result['error']}")
        peaks[size] = result.get("memory_gib")
        return peaks[size] is not None

    estimate = int((memory - bytes_of(1)) / (bytes_of(2) - bytes_of(1))) + 1
    found = largest(fits, estimate)
    peak, estimated = peaks.get(found) or 0, bytes_of(found or 1) / GIB
    print(f"| {config} | {estimate} | {found} | {peak:.1f} GiB | {estimated:.1f} GiB |", flush=True)


def curve(arguments: Callable[[int, int], list[str]], micro: int, accumulation: int, events: str | None) -> None:
    """Losses of based_360m with the kernels, in plain torch, with the kernels on the same batches in halves (as far as
    rounding alone goes), and with fp8 products: means of 50 steps, and the largest differences of means of ten."""
    found, fp8 = {}, "training.fp8=rowwise"
    for name, part, backend, *more in (("kernels", 1, ""), ("plain_torch", 1, "torch"), ("halves", 2, ""),
                                       ("fp8", 1, "", fp8)):
        written = [f"logging.tensorboard_dir={events}/{name}"] if events else []
        found[name] = losses("based_360m", [*arguments(micro // part, accumulation * part), *written, *more], backend)

    def means(steps: int) -> list[list[float]]:
        """Of each run, one after the other."""
        return [[statistics.mean(x[i : i + steps]) for i in range(0, len(x), steps)] for x in found.values()]

    first, *names = found
    print(f"| steps | {first} | {' | difference | '.join(names)} | difference |\n{'|---' * 2 * len(found)}|")
    for i, (ours, *others) in enumerate(zip(*means(50), strict=True)):
        cells = " | ".join(f"{x:.4f} | {x - ours:+.4f}" for x in others)
        print(f"| {50 * i + 1}–{min(50 * i + 50, len(found['kernels']))} | {ours:.4f} | {cells} |")
    ours, *others = means(10)
    worst = [max((b - a for a, b in zip(ours, x, strict=True)), key=abs) for x in others]
    print("largest difference of the means of ten steps: "
          + ", ".join(f"{name} {x:+.4f}" for name, x in zip(names, worst, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=list(MICRO), choices=list(MICRO))
    parser.add_argument("--length", nargs="+", type=int, default=[2048])
    parser.add_argument("--micro-batch", type=int, help="sequences; default 8 (attention_1.3b 4) at 2048")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches an optimizer step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--recompute", choices=["none", "norms", "selective", "full"],
                        help="default: the configuration's")
    parser.add_argument("--data", help="prefix of a .bin/.idx pair; default: synthetic")
    parser.add_argument("--quick", action="store_true", help="based_360m and attention_360m, 12 steps")
    parser.add_argument("--no-gate", action="store_true", help="the losses were checked at this commit already")
    parser.add_argument("--profile", action="store_true", help="GPU time by kernel group of the first configuration")
    parser.add_argument("--largest", action="store_true", help="only find the largest micro-batches")
    parser.add_argument("--curve", type=int, metavar="STEPS", help="losses of based_360m, also in plain torch and fp8")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="events of --curve's runs, for learning_curves.py")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="further overrides")
    parser.add_argument("--json", help="append the record to this file, one line a run")
    parser.add_argument("--commit", help="commit to record (default: git's)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: needs a GPU")
    if args.quick:
        args.config, args.steps = ["based_360m", "attention_360m"], 12
    with tempfile.TemporaryDirectory() as folder:
        data = args.data
        if data is None:
            data = f"{folder}/synthetic"
            synthetic(Path(data), 4_000_000)
        run(args, data, f"{folder}/cache")


def run(args: argparse.Namespace, data: str, cache: str) -> None:
    micro = lambda name, length: args.micro_batch or max(1, MICRO[name] * 2048 // length)  # noqa: E731
    more = [*([f"training.recompute={args.recompute}"] if args.recompute else []), *args.set]
    if args.profile:
        name, length = args.config[0], args.length[0]
        print(profile(name, overrides(data, cache, 8, length, micro(name, length), 1, "data.num_workers=0", *more)))
        return
    if args.largest:
        print("| configuration | micro-batch by the estimate | found | peak | estimated |\n|---|---|---|---|---|")
        for name in args.config:
            print_largest(name, lambda size: overrides(data, cache, 3, args.length[0], size, 1, *more))
        return
    if args.curve:
        curve(lambda *sizes: overrides(data, cache, args.curve, args.length[0], *sizes, *more), args.micro_batch or 8,
              args.accumulation, args.tensorboard)
        return
    commit = args.commit or git_commit()
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit,
                              "matmul_tflops": matmul_rate(), "rows": []}
    torch.cuda.empty_cache()
    if not args.no_gate:
        record["largest_loss_difference"] = gate(data, cache)
        print(f"ten steps' losses lie within {record['largest_loss_difference']:.4f} of plain torch's", flush=True)
    print(f"{record['gpu']}, {commit}, matrix product {record['matmul_tflops']:.0f} TFLOP/s, "
          f"recompute {args.recompute or 'as configured'}, {args.accumulation} micro-batches a step")
    print("| configuration | micro-batch × length | tokens/s | MFU | peak GiB | data wait | first step |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    for length in args.length:
        for name in args.config:
            arguments = overrides(data, cache, args.steps, length, micro(name, length), args.accumulation, *more)
            row = {"config": name, "length": length, "micro_batch": micro(name, length), **train(name, arguments)}
            record["rows"].append(row)
            if "error" in row:
                print(f"| {name} | {row['micro_batch']} × {length} | failed: {row['error'][-1500:]} |", flush=True)
                continue
            flops = flops_per_token(load_config(REPO / f"configs/{name}.yaml", arguments))
            row["mfu"] = row["tokens_per_second"] * flops / record["matmul_tflops"] / 1e12
            row["losses"] = [row["losses"][0], row["losses"][-1]]
            print(f"| {name} | {row['micro_batch']} × {length} | {row['tokens_per_second']:,.0f} | {row['mfu']:.3f} | "
                  f"{row['memory_gib']:.1f} | {row['data_wait_percent']:.2f}% | {row['first_step_seconds']:.0f} s |",
                  flush=True)
    append(record, args.json)


if __name__ == "__main__":
    main()
