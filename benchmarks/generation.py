"""Speed of generation, BASED against softmax attention in the same engine, after a correctness gate.

    python benchmarks/generation.py [--quick] [--json FILE]

Random weights of the named configurations, bf16, one GPU. Decoding is timed over whole steps, with the choice of the
token; batch_128 and batch_1 run through the engine, host and prompts included, and their graph_ms and the sweep replay
graphs. The byte floor of a step is what it must move, weights and states once (states of linear attention written at
every sixteenth token), at the nominal 3.35 TB/s of an H100. Attention has its keys and values in static buffers, the
same kernels around it, and CUDA graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.config import ModelConfig, load_config
from based_mp.evaluation import speed
from based_mp.inference.cuda_graph import Decoder
from based_mp.inference.engine import Engine, Sequence
from based_mp.inference.model import InferenceModel
from based_mp.inference.sampling import Sampling
from based_mp.model.based_model import build_model
from based_mp.ops import backends
from based_mp.ops.decode_cuda import RECENT
from based_mp.ops.reference import taylor_feature_dim
from based_mp.parallel import state
from benchmarks.record import append, git_commit
from benchmarks.serving import LENGTH, request_of
from benchmarks.timing import median_us

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BANDWIDTH = 3.35e12              # bytes a second, nominal, H100 SXM
MEMORY_SHARE = 0.9               # of the GPU's memory for weights and states; the rest is work space
EOD = -1                         # no token ends a sequence here
BATCHES = {"based": [128, 256, 512, 1024, 2048, 4096], "attention": [8, 16, 32, 48, 64]}
QUICK = {"based": [128, 512], "attention": [8, 32]}
START = time.perf_counter()


def say(*words: object) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - START:5.1f}]", *words, flush=True)


def state_bytes(model: ModelConfig, position: int) -> tuple[float, float]:
    """Bytes of one sequence's states that a step at `position` reads, and that it writes, on average."""
    read = written = 0
    for kind in model.mixers:
        if kind == "linear_attention":
            own = model.num_heads * taylor_feature_dim(model.feature_dim) * (model.head_dim + 1) * 4
            token = model.num_heads * (model.feature_dim + model.head_dim) * 2        # k and v, kept until they are due
            read, written = read + own + token * (RECENT - 1) / 2, written + own / RECENT + token * (1 - 1 / RECENT)
        elif kind == "gated_conv":
            own = (model.conv_kernel - 1) * 2 * model.d_model * 2
            read, written = read + own, written + own
        else:
            seen = min(position, model.window - 1) if kind == "sliding_attention" else position
            read, written = read + seen * 2 * model.d_model * 2, written + 2 * model.d_model * 2
    return read, written


def floor_ms(model: InferenceModel, weights: int, batch: int, position: int) -> float:
    return (weights + batch * sum(state_bytes(model.config, position))) / BANDWIDTH * 1e3


def load(name: str) -> tuple[torch.nn.Module, InferenceModel, int]:
    """The training module, its inference model, and the bytes of the weights."""
    config = load_config(CONFIGS / f"{name}.yaml")
    module = build_model(config).eval()
    return module, InferenceModel(module, config.model), sum(p.numel() * 2 for p in module.parameters())


def gate(module: torch.nn.Module, model: InferenceModel, length: int = 384) -> dict[str, float]:
    """Prefill and decode against the full forward at every position; graph against eager, bitwise."""
    tokens = torch.randint(0, model.config.vocab_size, (2, length), device="cuda")
    with torch.no_grad():
        full = module(tokens, torch.zeros_like(tokens), None).float()
    pool, slots, cut = model.new_pool(4, 1024), [2, 0], length // 2
    rows = torch.tensor(slots, dtype=torch.int32, device="cuda")
    got = [model.prefill(pool, [t[:cut].tolist() for t in tokens], slots, [0, 0], every=True).view(2, cut, -1)]
    for t in range(cut, length):
        pool.tokens[rows.long()] = tokens[:, t].int()
        got.append(model.step(pool, rows)[:, None])
        pool.positions[rows.long()] += 1
    got = torch.cat(got, 1).float()[..., : model.config.vocab_size]
    full = full[..., : model.config.vocab_size]
    difference = (got - full).square().mean().sqrt()
    error = (difference / full.std()).item()
    best, choice = full.argmax(-1, keepdim=True), got.argmax(-1, keepdim=True)
    agreement = (best == choice).float().mean().item()
    # Random weights leave many near ties: a choice counts where the full forward prefers another by less than the
    # difference between two bf16 runs can be.
    near = (full.gather(-1, best) - full.gather(-1, choice) < 4 * difference).float().mean().item()
    runs = []
    for graphs in (False, True):
        engine = Engine(model, EOD, slots=4, length=1024, graphs=graphs)
        runs.append([Sequence([7 * i + 1] * (i + 3), Sampling(24, 0.8 * (i % 2), None, 0.9, i)) for i in range(4)])
        for sequence in runs[-1]:
            engine.submit(sequence)
        while not engine.idle:
            engine.step()
    bitwise = all(a.tokens == b.tokens and a.logprobs == b.logprobs for a, b in zip(*runs, strict=True))
    result = {"relative_error": error, "argmax_agreement": agreement, "agreement_beyond_noise": near,
              "graph_equals_eager": bitwise}
    say("gate:", result)
    # Two bf16 runs through 36 random layers differ by 4 to 5%; tests/gpu compares both with fp32.
    if not (error < 0.06 and near >= 0.995 and bitwise):
        raise SystemExit(f"wrong results, nothing timed: {result}")
    return result


def filled_pool(model: InferenceModel, batch: int, position: int, spare: int):
    """States of `batch` sequences as if they had seen `position` tokens (of which 16 are real)."""
    pool = model.new_pool(batch, position + spare)
    for first in range(0, batch, 512):
        slots = list(range(first, min(first + 512, batch)))
        model.prefill(pool, [[(s * 31 + i) % 50000 for i in range(16)] for s in slots], slots, [0] * len(slots))
    pool.positions.fill_(position)
    return pool


def step_ms(model: InferenceModel, batch: int, position: int, steps: int = 24) -> float:
    """Milliseconds of a decoding step as a graph, at about this position."""
    pool = filled_pool(model, batch, position, steps * 2 + 16)
    decoder = Decoder(model, pool)
    decoder.set_rows(list(range(batch)))
    for _ in range(3):
        decoder.step()
    return median_us(decoder.step, 3, calls=steps // 3) / 1e3


def seconds_of(engine: Engine, sequences: list[Sequence]) -> float:
    """Seconds from submitting these sequences until all have ended, when nothing else runs."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for sequence in sequences:
        engine.submit(sequence)
    while not engine.idle:
        engine.step()
    return time.perf_counter() - start


def engine_run(model: InferenceModel, batch: int, new: int) -> float:
    """Seconds for `new` tokens of each of `batch` short prompts through the engine."""
    engine = Engine(model, EOD, slots=batch, length=new + 32)

    def run(tokens: int) -> float:
        return seconds_of(engine, [Sequence([(i * 97 + j) % 50000 for j in range(16)],
                                            Sampling(tokens, 0.8, None, None, i)) for i in range(batch)])
    for _ in range(2):                                 # captures the graphs
        run(4)
    return run(new)


def first_token_ms(model: InferenceModel, length: int, after: int = 0, repeats: int = 9) -> float:
    """Milliseconds from a prompt's submission until its first token is with the host, when nothing else runs; after: a
    saved state of so many tokens, which the prompt continues."""
    engine = Engine(model, EOD, slots=1, length=after + length + 16)
    state = engine.state_of([j % 50000 for j in range(after)]) if after else None
    took = [seconds_of(engine, [Sequence([(i * 97 + j) % 50000 for j in range(length)], Sampling(1), state)])
            for i in range(repeats)]
    return statistics.median(took[2:]) * 1e3


def serving(model: InferenceModel, slots: int = 64, requests: int = 768) -> dict[str, float]:
    """The requests of benchmarks/serving.py, all waiting for slots of the engine alone, host included."""
    engine = Engine(model, EOD, slots=slots, length=LENGTH)
    for _ in range(3):                                 # the first two capture the graphs
        sequences = [Sequence(prompt, Sampling(new, 0.8, None, None, i))
                     for i, (prompt, new) in enumerate(map(request_of, range(requests)))]
        seconds = seconds_of(engine, sequences)
    tokens = sum(len(s.tokens) for s in sequences)
    return {"slots": slots, "requests_per_s": requests / seconds, "tokens_per_ms": tokens / seconds / 1e3}


def prefill_ms(model: InferenceModel, batch: int, length: int) -> float:
    """Milliseconds to put `batch` prompts of `length` tokens into their slots."""
    engine = Engine(model, EOD, slots=batch, length=length + 16)
    prompts = torch.randint(0, 50000, (batch, length)).tolist()
    sequences = [Sequence(prompt, Sampling(), slot=i) for i, prompt in enumerate(prompts)]
    engine.prefill(sequences)
    return median_us(lambda: engine.prefill(sequences), 3) / 1e3


def sweep(kind: str, model: InferenceModel, weights: int, context: int, batches: list[int]) -> list[dict[str, float]]:
    """Throughput by batch size at a context length, as far as memory goes."""
    rows, memory = [], torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE
    for batch in batches:
        one = speed.state_bytes(model, context + 64)
        if weights + batch * (one + 3 * 2 * model.config.padded_vocab_size) > memory:
            break
        ms = step_ms(model, batch, context)
        floor = floor_ms(model, weights, batch, context)
        rows.append({"batch": batch, "ms": ms, "tokens_per_ms": batch / ms, "share_of_floor": floor / ms})
        say(f"{kind}: batch {batch:5d} at {context}: {ms:7.3f} ms a step, {batch / ms:7.2f} tok/ms, "
            f"floor {floor:.3f} ms ({floor / ms:.0%})")
        free()
    return rows


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def profile(model: InferenceModel, batch: int, position: int = 1024, steps: int = 4) -> None:
    """Print where a step's time goes, by kernel."""
    decoder = Decoder(model, filled_pool(model, batch, position, 64))
    decoder.set_rows(list(range(batch)))
    decoder.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            decoder.step()
        torch.cuda.synchronize()
    rows = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows) / steps
    say(f"batch {batch}: {total / 1e3:.3f} ms of kernels a step")
    for e in rows[:24]:
        each = e.self_device_time_total / e.count
        print(f"  {each * e.count / steps:8.1f} us {e.count / steps:6.1f} x {each:7.2f} us  {e.key[:100]}", flush=True)


def measure(kind: str, name: str, quick: bool) -> dict[str, object]:
    module, model, weights = load(name)
    say(name, "loaded")
    if model.ops.__name__.endswith("decode_torch"):
        raise SystemExit(f"error: the kernels cannot run {name}: see the warning above")
    result: dict[str, object] = {"configuration": name, "weight_bytes": weights, "gate": gate(module, model)}
    del module
    free()
    new = 256 if quick or kind == "attention" else 1024
    for batch in (128, 1):
        ms = engine_run(model, batch, new) / new * 1e3
        floor = sum(floor_ms(model, weights, batch, 16 + i) for i in range(new)) / new
        free()
        result[f"batch_{batch}"] = {"new_tokens": new, "tokens_per_ms": batch / ms, "ms": ms,
                                    "graph_ms": step_ms(model, batch, new // 2), "floor_ms": floor,
                                    "share_of_floor": floor / ms}
        free()
    say(kind, json.dumps({k: result[k] for k in ("batch_128", "batch_1")}))
    result["prefill_4096_x_16_ms"] = prefill_ms(model, 16, 4096)
    free()
    say(kind, "prefill 4096 x 16:", result["prefill_4096_x_16_ms"], "ms")
    result["first_token_ms"] = {length: first_token_ms(model, length) for length in (16, 512, 4096)}
    result["first_token_after_state_ms"] = first_token_ms(model, 16, after=4096)
    result["serving"] = serving(model)
    free()
    say(kind, json.dumps({k: result[k] for k in ("first_token_ms", "first_token_after_state_ms", "serving")}))
    result["sweep_4096"] = sweep(kind, model, weights, 4096, (QUICK if quick else BATCHES)[kind])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and batch sizes")
    parser.add_argument("--profile", action="store_true", help="only print the time of every kernel of a step of BASED")
    parser.add_argument("--json", help="append the record to this file, one line a run")
    parser.add_argument("--commit", help="commit to record (default: git's)")
    args = parser.parse_args()
    if backends.extension() is None or not torch.cuda.is_available():
        raise SystemExit("error: needs a Hopper GPU and the compiled kernels (BASED_MP_CUDA=1 pip install -e .)")
    commit = args.commit or git_commit()
    state.initialize(device="cuda")
    if args.profile:
        _, model, _ = load("based_1.3b_window64")
        for batch in (1, 128, 512):
            profile(model, batch)
            free()
        return state.destroy()
    record: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit}
    record["based"] = measure("based", "based_1.3b_window64", args.quick)
    free()
    record["attention"] = measure("attention", "attention_1.3b", args.quick)
    free()
    based, attention = (max(row["tokens_per_ms"] for row in record[k]["sweep_4096"]) for k in ("based", "attention"))
    record["best_ratio_4096"] = based / attention
    ratio = record["attention"]["prefill_4096_x_16_ms"] / record["based"]["prefill_4096_x_16_ms"]
    record["prefill_ratio"] = ratio
    if not args.quick:
        _, model, _ = load("based_360m_window64")
        record["prefill_360m_8000_x_64_ms"] = prefill_ms(model, 64, 8000)
    print(json.dumps(record, indent=1))
    append(record, args.json)
    state.destroy()


if __name__ == "__main__":
    main()
