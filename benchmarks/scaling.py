#!/usr/bin/env python3
"""Tensor-parallel and ZeRO training on the GPUs of one machine: equality, weak scaling, memory, checkpoints, text.

    python benchmarks/scaling.py --json benchmarks/records/scaling.jsonl            # every row, 1, 2, 4 or 8 GPUs
    python benchmarks/scaling.py --quick --budget 230                               # BASED with ZeRO-1, 12 steps a row
    python benchmarks/scaling.py --cpu 2 --stages equality checkpoint               # the benchmark itself, without GPU

Rows run in order of importance until the budget is spent; what was skipped or failed is said, and the rest goes on.

equality    20 steps of a 6-layer based_360m from the same weights, the same global batch, beside one GPU's: largest
            |Δ loss| and relative |Δ gradient norm| (limit 5e-3); replicas are compared bit by bit afterwards
speed       tokens/s per GPU with as many tokens a GPU and step as one GPU has in the row it is divided by (median over
            the steps after the first three); peak memory beside what `--dry-run` predicts; of one more step the share
            of NCCL's kernel time (waiting for other ranks included) during which another kernel ran, on rank 0
checkpoint  launch/pretrain.py under torchrun: save at TP 2, go on there, reshard, go on at TP 1; greedy text of TP 2
            and TP 1 from that checkpoint

Equality and speed rows of one layout share the processes: each is what launch/pretrain.py does (`Trainer.run`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from based_mp.config import load_config  # noqa: E402
from based_mp.estimate import memory_per_gpu, parameter_counts  # noqa: E402
from benchmarks.record import append, git_commit  # noqa: E402
from benchmarks.train_throughput import LINE, MICRO, overrides, synthetic  # noqa: E402
from data_prep.indexed import write_index  # noqa: E402

STAGES = ["equality", "speed", "checkpoint"]
TOLERANCE = 5e-3                                    # bf16: loss, and relative gradient norm
WEAK_SCALING = {1: 0.95, 2: 0.80}                   # least tokens/s a GPU beside one GPU's, by tensor-parallel size
SIX_LAYERS = ["model.num_layers=6", "model.linear_attention_layers=[1]", "model.sliding_attention_layers=[2]"]
SMALL = [*SIX_LAYERS, "model.d_model=512", "model.num_heads=8", "model.vocab_size=257"]
TINY = ["model.d_model=64", "model.num_heads=4", "model.feature_dim=8", "model.window=16", *SIX_LAYERS,
        "training.device=cpu", "training.precision=fp32", "data.num_workers=0", "optimizer.eps=1e-5"]
RESULT = "RESULT "
START, GRACE, RESERVE = 20, 10, 55                  # seconds: to import, to be late, of resuming and resharding
PROMPTS = ["def main(", "import torch\n", "class Model(", "## Measured\n"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row that needs `processes` GPUs. seconds: how long it takes, roughly; arguments: of launch/pretrain.py."""

    kind: str                                       # equality, speed or generate
    config: str
    processes: int
    tp: int
    zero: int
    seconds: float
    arguments: list[str]
    steps: int = 20
    profile: bool = False

    @property
    def layout(self) -> str:
        dp = self.processes // self.tp
        return f"TP {self.tp} × DP {dp}, ZeRO-{self.zero}" if self.processes > 1 else "one GPU"


@dataclasses.dataclass
class Place:
    """Where the benchmark runs. end: time.time() at which everything must be over."""

    folder: Path
    gpus: int
    cpu: bool
    end: float

    @property
    def steps(self) -> tuple[int, int]:
        """After which the small model is saved: the one it is gone on from, and the last."""
        return (4, 6) if self.cpu else (40, 60)

    def environment(self, gpus: int) -> dict[str, str]:
        """Of a process that sees the first `gpus` of the GPUs (all that this process sees come in their order)."""
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        env.setdefault("NCCL_NVLS_ENABLE", "0")     # no multicast
        if self.cpu:
            return env | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
        return env | {"CUDA_VISIBLE_DEVICES": ",".join(seen.split(",")[:gpus])}


class Job:
    """Processes with one output each, none of which outlives `stop`."""

    started: list[Job] = []

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]], log: Path) -> None:
        self.logs = [log.with_suffix(f".{i}") for i in range(len(commands))]
        self.processes = []
        Job.started.append(self)
        for command, env, file in zip(commands, environments, self.logs, strict=True):
            with open(file, "w") as output:
                self.processes.append(subprocess.Popen(command, env=env, cwd=REPO, stdout=output,
                                                       stderr=subprocess.STDOUT, start_new_session=True))

    def lines(self) -> list[str]:
        return [line for log in self.logs for line in log.read_text(errors="replace").splitlines()]

    def state(self) -> str:
        """"running", "done" or "failed": any process's failure is the job's."""
        codes = [process.poll() for process in self.processes]
        return "failed" if any(codes) else "running" if None in codes else "done"

    def wait(self, end: float) -> str | None:
        """Until all have ended; what went wrong, None if nothing did. Nothing runs afterwards."""
        while self.state() == "running" and time.time() < end:
            time.sleep(0.1)
        state = self.state()
        self.stop()
        return None if state == "done" else "out of time" if state == "running" else self.complaint()

    def complaint(self) -> str:
        """The end of what the processes said, or the sentence meant for the user."""
        lines = [line.strip() for line in self.lines() if line.strip() and not line.startswith(RESULT)]
        told = [line for line in lines if line.startswith("error:")] or \
            [line for line in lines if "Error" in line and "ChildFailedError" not in line]
        return (told[0] if told else " / ".join(lines[-6:]))[:400]

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is not None:
                continue
            try:
                tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            except psutil.NoSuchProcess:
                tree = []
            for each in tree:
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    pass
            process.wait()


# Rows of one layout, in processes that they share


def launched(place: Place, cases: list[Case], name: str) -> tuple[Job, Path]:
    """Processes for cases of one layout, with torchrun's variables. They import and wait until the file exists."""
    from based_mp.parallel.state import _free_port
    processes = cases[0].processes
    spec, go = place.folder / f"{name}.json", place.folder / f"{name}.go"
    spec.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    base = place.environment(processes) | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(spec)] + ["--cpu", "1"] * place.cpu
    environments = [base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return Job([command] * processes, environments, place.folder / f"{name}.log"), go


def run_group(place: Place, cases: list[Case], started: tuple[Job, Path], end: float
              ) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with its result, as they come.

    {"error": …} of one that failed, {"skipped": …} of one that would not be over at time.time() `end`. After a failure
    the others go on in new processes.
    """
    (job, go), left = started, list(cases)
    if time.time() > end:
        job.stop()
        yield from ((case, {"skipped": "no time left"}) for case in left)
        return
    while left:
        go.write_text(str(end))
        read, error, since = 0, None, time.time()
        while left and error is None:
            state = job.state()                     # before reading: a result may be written between the two
            results = [json.loads(line[len(RESULT):]) for line in job.lines() if line.startswith(RESULT)]
            for result in results[read:]:
                if "error" in result:
                    error = result["error"]
                    break
                read, since = read + 1, time.time()
                yield left.pop(0), result
            if left and error is None:
                if state != "running":
                    error = job.complaint() or "the processes ended without a result"
                elif time.time() > min(end + GRACE, since + START + 4 * left[0].seconds):
                    error = f"killed after {time.time() - since:.0f} s: {job.complaint()}"
                time.sleep(0.1)
        if not left:
            job.wait(time.time() + 5)
        job.stop()
        if left:
            yield left.pop(0), {"error": error}
        if left and time.time() + START + left[0].seconds < end:
            job, go = launched(place, left, f"{cases[0].processes}_{cases[0].tp}_{len(left)}_left")
        else:
            yield from ((case, {"skipped": "no time left"}) for case in left)
            return


def end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def worker(spec: Path, cpu: bool) -> None:
    """The processes of a group: every case in turn, its result a line of rank 0."""
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    cases = [Case(**case) for case in json.loads(spec.read_text())]
    from based_mp.parallel import state
    from based_mp.training.quiet import import_deepspeed
    state.quiet_imports()
    device = "cpu" if cpu else "cuda"
    os.environ.setdefault("DS_ACCELERATOR", device)
    if not cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import_deepspeed(torch.device(device))
    if not cpu:
        import based_mp.training.loop  # noqa: F401    (without a GPU the processes must have met before)
    go = spec.with_suffix(".go")
    while not go.exists() or not go.read_text():
        time.sleep(0.05)
    end = float(go.read_text())
    try:
        for case in cases:
            ranks = state.initialize(case.tp, device=device, timeout_minutes=5)
            fits = [time.time() + case.seconds < end]
            torch.distributed.broadcast_object_list(fits, src=0, device=ranks.device)
            result = run_case(case, ranks, spec.parent) if fits[0] else {"skipped": "no time left"}
            if ranks.rank == 0:
                print("\n" + RESULT + json.dumps(result), flush=True)
    except BaseException as error:
        text = "out of GPU memory" if isinstance(error, torch.cuda.OutOfMemoryError) else \
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print("\n" + RESULT + json.dumps({"error": text}), flush=True)
        import traceback
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)                                 # the others may wait for this one inside a collective
    state.destroy()


def run_case(case: Case, ranks: Any, folder: Path) -> dict[str, Any]:
    """What is measured of one case; every rank calls."""
    cuda = ranks.device.type == "cuda"
    if case.kind == "generate":
        return {"texts": greedy(folder / "straight", ranks)}
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    from based_mp.parallel import state
    settings = load_config(REPO / f"configs/{case.config}.yaml", [
        *case.arguments, f"training.steps={case.steps + case.profile}",
        f"parallel.tensor_parallel_size={case.tp}", f"parallel.zero_stage={case.zero}",
        f"parallel.sequence_parallel={'true' if case.tp > 1 else 'false'}"])
    state.initialize(case.tp, device=ranks.device.type, seed=settings.training.seed)
    from based_mp.training import loop
    from based_mp.training.engine import build_engine, replicas_unequal
    weights = initial_weights(settings, folder) if case.kind == "equality" else None
    with mock.patch.object(loop, "build_engine", partial(build_engine, weights=weights)):
        trainer = loop.Trainer(settings, ranks)
    built, history = time.perf_counter(), []
    trainer.metrics.log_step = lambda step, loss, lr, norm: history.append((loss, norm, time.perf_counter()))
    trainer.run(stop_after=case.steps)
    peak = torch.tensor([torch.cuda.max_memory_allocated() - held if cuda else 0], device=ranks.device)
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    seconds = np.diff([t for *_, t in history])[2:]
    result = {"losses": [loss for loss, *_ in history], "norms": [norm for _, norm, _ in history],
              "seconds_a_step": statistics.median(seconds), "peak_bytes": peak.item(),
              "tokens_a_step": settings.training.global_batch_size * settings.training.seq_length,
              "predicted_bytes": sum(memory_per_gpu(settings, ranks.world_size).values()),
              "parameters": sum(parameter_counts(settings.model).values()),
              "build_seconds": built - start, "train_seconds": history[-1][2] - built}
    if case.kind == "equality":
        result["unequal_replicas"] = replicas_unequal(trainer.engine.module, ranks.tp_size)
    if case.profile and cuda:
        result["communication"] = profiled_step(trainer, ranks, folder)
    trainer.engine.destroy()
    del trainer
    gc.collect()
    return result


def initial_weights(settings: Any, folder: Path) -> Path:
    """A checkpoint of random weights that every layout starts from: on a GPU the random numbers depend on the layout.

    One GPU, which comes first, writes it.
    """
    from based_mp.model.based_model import build_model
    from based_mp.training import checkpoint as ckpt
    directory = folder / "initial"
    if not directory.exists() and settings.parallel.tensor_parallel_size == torch.distributed.get_world_size() == 1:
        state = {name: value.detach().cpu() for name, value in build_model(settings).named_parameters()}
        ckpt.save_weights(state, settings, directory)
    return ckpt.resolve(directory)


def profiled_step(trainer: Any, ranks: Any, folder: Path) -> dict[str, float]:
    """One more step of every rank; what rank 0's GPU did in it, by `overlap`."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    torch.cuda.synchronize()
    if ranks.rank == 0:
        with profiler:
            trainer.run()
            torch.cuda.synchronize()
        trace = folder / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        return overlap([(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"])
    trainer.run()
    return {}


def overlap(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """Of (name, start µs, end µs): ms during which NCCL's ran, during which others ran, and the share of NCCL's time
    that others ran in."""
    def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
        merged: list[tuple[float, float]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], end)
            else:
                merged.append((start, end))
        return merged

    nccl = union([(a, b) for name, a, b in kernels if "nccl" in name.lower()])
    others = union([(a, b) for name, a, b in kernels if "nccl" not in name.lower()])
    length = lambda spans: sum(b - a for a, b in spans)  # noqa: E731
    both = length(nccl) + length(others) - length(union(nccl + others))
    return {"communication_ms": length(nccl) / 1e3, "compute_ms": length(others) / 1e3,
            "overlapped": both / length(nccl) if nccl else 0.0}


class Bytes:
    """A tokenizer of bytes, so that no tokenizer's library is needed."""

    vocab_size, eod = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def greedy(checkpoint: Path, ranks: Any) -> list[dict[str, Any]]:
    """64 tokens after each prompt."""
    from based_mp.inference.generate import Generator
    from based_mp.inference.load import open_model
    from based_mp.inference.model import InferenceModel
    config, module = open_model(checkpoint, ranks)
    completions = Generator(InferenceModel(module, config.model), Bytes()).generate(PROMPTS, max_new_tokens=64)
    return [{"tokens": c.tokens, "logprobs": c.logprobs, "text": c.text} for c in completions]


# Save, resume, reshard: launch/pretrain.py and launch/convert.py


def own_text(prefix: Path) -> None:
    """The bytes of this repository's Python and Markdown files, one document each, as a .bin/.idx pair."""
    files = [f for pattern in ("based_mp/**/*.py", "data_prep/*.py", "tests/**/*.py", "docs/**/*.md", "README.md")
             for f in sorted(REPO.glob(pattern)) if f.stat().st_size > 0]
    documents = [np.append(np.frombuffer(f.read_bytes(), np.uint8).astype(np.uint16), np.uint16(256)) for f in files]
    np.concatenate(documents).tofile(prefix.with_suffix(".bin"))
    write_index(prefix.with_suffix(".idx"), [np.array([len(d) for d in documents], np.int32)], np.dtype(np.uint16),
                len(documents))


def pretrain(place: Place, directory: str, tp: int) -> Job:
    """launch/pretrain.py on all GPUs: a small model on this repository's text, saved at `place.steps`."""
    from based_mp.parallel.state import _free_port
    size = [*TINY, "model.vocab_size=257"] if place.cpu else SMALL
    saved, last = place.steps
    arguments = overrides(str(place.folder / "text"), str(place.folder / "cache"), last, 32 if place.cpu else 512, 2,
                          4 if place.cpu else 8, *size, f"checkpoint.dir={place.folder / directory}",
                          f"checkpoint.interval={saved}", f"parallel.tensor_parallel_size={tp}",
                          f"parallel.sequence_parallel={'true' if tp > 1 else 'false'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(place.gpus),
               "--master_addr", "127.0.0.1", "--master_port", str(_free_port()), "launch/pretrain.py", "--config",
               str(REPO / "configs/based_360m.yaml")]
    return Job([[*command, *arguments]], [place.environment(place.gpus)], place.folder / f"{directory}.log")


def losses(job: Job) -> dict[int, float]:
    """Of each step that launch/pretrain.py logged."""
    found = [LINE.search(line) for line in job.lines()]
    return {int(m[1]): float(m[2]) for m in found if m}


def difference(ours: dict[int, float], theirs: dict[int, float], saved: int, last: int) -> float:
    """Largest |Δ loss| of the steps after `saved`. Raises ValueError where `ours` are not exactly those."""
    if sorted(ours) != list(range(saved + 1, last + 1)) or not ours.keys() <= theirs.keys():
        raise ValueError(f"steps {min(ours, default=None)} to {max(ours, default=None)} were run, not {saved + 1} to "
                         f"{last}")
    return max(abs(ours[step] - theirs[step]) for step in ours)


def resume_and_reshard(place: Place, straight: dict[int, float], report: Report) -> None:
    """Go on from the older checkpoint in the layout that saved it; reshard it and go on without tensor parallelism."""
    (saved, last), dp = place.steps, place.gpus // 2
    name = f"step_{saved:08d}"
    for folder in ("resumed", "source"):
        shutil.copytree(place.folder / "straight" / name, place.folder / folder / name)
        (place.folder / folder / "latest").write_text(name)
    resumed = pretrain(place, "resumed", 2)
    convert = Job([[sys.executable, "launch/convert.py", "reshard", "--checkpoint", str(place.folder / "source"),
                    "--output", str(place.folder / "resharded")]],
                  [place.environment(0) | {"DS_ACCELERATOR": "cpu"}], place.folder / "reshard.log")
    error = convert.wait(place.end)
    other = pretrain(place, "resharded", 1) if error is None else None
    for name, job, failed, limit in [
            (f"resume at TP 2 × DP {dp}", resumed, None, 1e-4),
            (f"reshard TP 2 × DP {dp} → TP 1 × DP {2 * dp}", other, error and f"convert.py: {error}", 1e-3)]:
        failed = failed or job.wait(place.end)
        row: dict[str, Any] = {"stage": "checkpoint", "configuration": "6 layers, d_model 512", "layout": name}
        try:
            if failed:
                raise ValueError(failed)
            row["loss_difference"] = difference(losses(job), straight, saved, last)
            report.add(row, f"largest Δ loss of steps {saved + 1}–{last} {row['loss_difference']:.4f}, of 4 decimals "
                       "printed", row["loss_difference"] <= limit * 1.01)
        except ValueError as problem:
            report.add(row | {"error": str(problem)})


# What is told


class Report:
    """Rows as they come: a table for the reader, a record for the file."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.solo: dict[str, dict[str, Any]] = {}            # one GPU's result by stage and configuration
        self.texts: dict[int, list[dict[str, Any]]] = {}     # by tensor-parallel size
        print("| stage | configuration | layout | measured | within limits |\n|---|---|---|---|---|", flush=True)

    def add(self, row: dict[str, Any], text: str = "", ok: bool | None = None) -> None:
        if "error" in row:
            text, verdict = f"failed: {' '.join(str(row['error']).split())}", "failed"
        elif "skipped" in row:
            text, verdict = f"skipped: {row['skipped']}", "—"
        else:
            verdict = {True: "yes", False: "NO", None: "—"}[ok]
        self.record["rows"].append(row | {"text": text, "within_limits": ok})
        print(f"| {row['stage']} | {row['configuration']} | {row['layout']} | {text} | {verdict} |", flush=True)

    def case(self, case: Case, result: dict[str, Any]) -> None:
        """The row of a case."""
        row = {"stage": case.kind, "configuration": case.config, "layout": case.layout, "processes": case.processes,
               "tensor_parallel": case.tp, "zero_stage": case.zero, **result}
        if "error" in row or "skipped" in row:
            self.add(row)
        elif case.kind == "generate":
            self._generation(case, row)
        else:
            if case.processes == 1:
                self.solo[f"{case.kind} {case.config}"] = row
            (self._equality if case.kind == "equality" else self._speed)(case, row)

    def _equality(self, case: Case, row: dict[str, Any]) -> None:
        one = self.solo.get(f"equality {case.config}")
        text = f"loss {row['losses'][0]:.4f} → {row['losses'][-1]:.4f}, "
        if case.processes == 1:
            return self.add(row, text + "the reference")
        text += f"{row['unequal_replicas']} parameters with unequal replicas"
        if one is None:
            return self.add(row, text + "; no reference", None)
        row["loss_difference"] = max(abs(a - b) for a, b in zip(row["losses"], one["losses"], strict=True))
        row["norm_difference"] = max(abs(a - b) / b for a, b in zip(row["norms"], one["norms"], strict=True))
        ok = row["loss_difference"] < TOLERANCE and row["norm_difference"] < TOLERANCE and not row["unequal_replicas"]
        self.add(row, f"Δ loss {row['loss_difference']:.1e}, relative Δ norm {row['norm_difference']:.1e}, {text}",
                 ok)

    def _speed(self, case: Case, row: dict[str, Any]) -> None:
        rate = row["tokens_per_second_per_gpu"] = row["tokens_a_step"] / row["seconds_a_step"] / case.processes
        one, ok, text = self.solo.get(f"speed {case.config}"), None, f"{rate:,.0f} tokens/s a GPU"
        if case.processes > 1 and one:
            row["weak_scaling"] = rate / one["tokens_per_second_per_gpu"]
            text += f" = {row['weak_scaling']:.3f} of one GPU's (limit {WEAK_SCALING[case.tp]} at 8 GPUs)"
            ok = row["weak_scaling"] >= WEAK_SCALING[case.tp]
        if row["peak_bytes"]:
            row["memory_ratio"] = row["peak_bytes"] / row["predicted_bytes"]
            ok = (ok is not False) and abs(row["memory_ratio"] - 1) <= 0.1
            text += (f"; peak {row['peak_bytes'] / 2**30:.1f} GiB = {row['memory_ratio']:.2f} of the predicted "
                     f"{row['predicted_bytes'] / 2**30:.1f}")
        if row.get("communication"):
            c = row["communication"]
            text += (f"; NCCL {c['communication_ms']:.1f} ms a step beside {c['compute_ms']:.1f} ms of other kernels, "
                     f"{c['overlapped']:.0%} overlapped")
        self.add(row, text, ok)

    def _generation(self, case: Case, row: dict[str, Any]) -> None:
        self.texts[case.tp] = row["texts"]
        if len(self.texts) < 2:
            return self.add(row, f"{sum(len(t['tokens']) for t in row['texts'])} tokens, the reference for the other, "
                                 f"such as {row['texts'][0]['text'][:24]!r}".replace("|", "¦"))
        ok, told = True, []
        for one, two in zip(self.texts[1], self.texts[2], strict=True):
            same = next((i for i, (a, b) in enumerate(zip(one["tokens"], two["tokens"], strict=False)) if a != b), None)
            if one["tokens"] != two["tokens"]:
                ok = False
                told.append("lengths differ" if same is None else f"differs at token {same}, log probabilities "
                            f"{one['logprobs'][same]:.4f} and {two['logprobs'][same]:.4f}")
        self.add(row, f"{len(PROMPTS)} greedy texts, TP 2 against TP 1: " + ("; ".join(told) or "equal"), ok)


def estimated(one_gpu_seconds: float, communication_seconds: float, overlapped: float, measured_gpus: int,
              parameters: int, gpus: int, network: float) -> dict[str, float]:
    """A data-parallel ZeRO-1 step on `gpus` GPUs of many nodes, from parts measured on `measured_gpus` of one node.

    one_gpu_seconds: a step of one GPU (compute, and the whole optimizer, which ZeRO shards); communication_seconds and
    overlapped: NCCL's time a step and its hidden share. A ring moves (n − 1)/n of 4 bytes a parameter (fp32 gradients,
    reduced and scattered once a step) and of 2 bytes (bf16 weights, gathered). The bandwidth is the measured
    one, or `network` (bytes/s of a node's adapters together: every ring leaves a node through one of them) if less.
    """
    moved = lambda n: (n - 1) / n * parameters * (4 + 2)  # noqa: E731
    measured = moved(measured_gpus) / communication_seconds
    communication = moved(gpus) / min(measured, network)
    seconds = one_gpu_seconds + communication * (1 - overlapped)
    return {"ring_bytes_per_second": measured, "communication_seconds": communication, "step_seconds": seconds,
            "weak_scaling": one_gpu_seconds / seconds}


def estimates(report: Report, nodes: int, network_gbits: float, efficiency: float) -> None:
    """Of every configuration whose parts were measured, on nodes of 8 GPUs."""
    for row in report.record["rows"]:
        one = report.solo.get(f"speed {row['configuration']}")
        if row["stage"] != "speed" or not one or not row.get("communication") or row["tensor_parallel"] > 1 \
                or row["zero_stage"] != 1 or not row["communication"]["communication_ms"]:
            continue
        c = row["communication"]
        parts = estimated(one["seconds_a_step"], c["communication_ms"] / 1e3, c["overlapped"], row["processes"],
                          row["parameters"], 8 * nodes, network_gbits / 8 * 1e9 * efficiency)
        report.record.setdefault("estimates", {})[row["configuration"]] = parts
        rate = one["tokens_per_second_per_gpu"] * parts["weak_scaling"]
        print(f"estimate, not measured: {row['configuration']}, ZeRO-1, DP {8 * nodes} on {nodes} nodes × 8 GPUs, the "
              f"batch a GPU of the row above, {network_gbits:g} Gbit/s a node of which {efficiency:.0%} are reached: "
              f"{1e3 * parts['communication_seconds']:.0f} ms of communication at "
              f"{min(parts['ring_bytes_per_second'], network_gbits / 8e-9 * efficiency) / 1e9:.0f} GB/s, "
              f"{rate:,.0f} tokens/s a GPU = {parts['weak_scaling']:.3f} of one GPU's", flush=True)


# Order


def plan(place: Place, stages: list[str], quick: bool, configs: list[str] | None = None) -> list[list[Case]]:
    """The cases of each group of processes, the groups in the order they run; what matters least comes last."""
    n, cpu = place.gpus, place.cpu
    steps = 12 if quick or cpu else 20
    data, cache = str(place.folder / "synthetic"), str(place.folder / "cache")
    cases: list[Case] = []
    layouts = [(1, 1, 1)] + ([(n, 1, 1), (n, 1, 2), (n, 2, 1)] if n > 1 else [])       # processes, TP, ZeRO
    if "equality" in stages:
        size = [*TINY, "model.vocab_size=2048"] if cpu else SIX_LAYERS
        arguments = overrides(data, cache, 20, 32 if cpu else 1024, 2, 4 if cpu else 8, *size,
                              *([] if cpu else ["optimizer.warmup_steps=200"]))     # so that noise does not grow
        cases += [Case("equality", "based_360m", *layout, 8, arguments) for layout in layouts]
    if "speed" in stages:
        rows = [(config, tp, 1) for config in ("based_360m", "based_1.3b") for tp in (1, 2)]
        if not quick:
            rows += [("attention_1.3b", 1, 1), ("attention_1.3b", 2, 1), ("based_360m", 1, 2), ("based_1.3b", 1, 2)]
        for config in dict.fromkeys(name for name, *_ in rows if configs is None or name in configs):
            for processes, tp, zero in [(1, 1, 1)] + [(n, tp, zero) for name, tp, zero in rows if name == config]:
                if (processes, tp, zero) in layouts:
                    micro, size = MICRO[config] * tp, [*TINY, "model.vocab_size=2048"] if cpu else []
                    arguments = overrides(data, cache, steps, 64 if cpu else 2048, micro, 4 * processes // tp, *size)
                    case = Case("speed", config, processes, tp, zero, 8 if "360m" in config else 16, arguments, steps,
                                processes > 1)
                    cases += [case] if case not in cases else []
    if "checkpoint" in stages and n > 1:
        cases += [Case("generate", "6 layers, d_model 512", processes, tp, 1, 5, [])
                  for processes, tp in ((1, 1), (n, 2))]
    if cpu:
        cases = [dataclasses.replace(case, seconds=30) for case in cases]
    keys = sorted({(case.processes, case.tp) for case in cases})
    return [[case for case in cases if (case.processes, case.tp) == key] for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=1200, metavar="SECONDS", help="end after this time")
    parser.add_argument("--quick", action="store_true", help="speed: BASED with ZeRO-1 alone, 12 steps a row")
    parser.add_argument("--config", nargs="+", metavar="NAME", help="speed: of these configurations alone")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--cpu", type=int, metavar="PROCESSES", help="tiny models on CPU processes")
    parser.add_argument("--nodes", type=int, default=16, help="of 8 GPUs, for the estimate")
    parser.add_argument("--network", type=float, default=3200, metavar="GBIT/S", help="of a node, for the estimate")
    parser.add_argument("--network-efficiency", type=float, default=0.8, help="share of it that collectives reach")
    parser.add_argument("--json", help="append the record to this file")
    parser.add_argument("--commit", help="commit to record (default: git's)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, bool(args.cpu))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: asked to stop"))
    gpus = args.cpu or torch.cuda.device_count()
    if gpus not in (1, 2, 4, 8):
        raise SystemExit(f"error: {gpus} GPUs: needs 1, 2, 4 or 8 (CUDA_VISIBLE_DEVICES chooses), or --cpu 2")
    commit = args.commit or git_commit()
    names = [f"{gpus} CPU processes"] if args.cpu else [torch.cuda.get_device_name(i) for i in range(gpus)]
    record = {"benchmark": "scaling", "commit": commit, "gpus": names, "torch": torch.__version__,
              "command": " ".join(sys.argv), "rows": []}
    print(f"{len(names)} × {names[0]}, {commit}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(args, Place(Path(folder), gpus, bool(args.cpu), time.time() + args.budget), Report(record))
        finally:
            append(record, args.json)


def run(args: argparse.Namespace, place: Place, report: Report) -> None:
    began = time.time()
    synthetic(place.folder / "synthetic", 200_000 if place.cpu else 8_000_000, 2048 if place.cpu else 50257)
    groups = plan(place, args.stages, args.quick, args.config)
    checkpoints = "checkpoint" in args.stages and place.gpus > 1
    straight: dict[int, float] = {}
    try:
        started = [launched(place, cases, f"group_{i}") for i, cases in enumerate(groups)]     # all import at once
        if checkpoints:
            own_text(place.folder / "text")
            job = pretrain(place, "straight", 2)
            error = job.wait(place.end)
            straight = losses(job)
            row = {"stage": "checkpoint", "configuration": "6 layers, d_model 512",
                   "layout": f"TP 2 × DP {place.gpus // 2}, ZeRO-1"}
            saved, last = place.steps
            report.add(row | ({"error": error} if error else {}), f"loss {straight.get(1, 0):.4f} → "
                       f"{straight.get(last, 0):.4f}, saved after steps {saved} and {last}")
            checkpoints = error is None
        for cases, group in zip(groups, started, strict=True):
            end = min(place.end - RESERVE * checkpoints, time.time() + START + 2 * sum(case.seconds for case in cases))
            for case, result in run_group(place, cases, group, end):
                report.case(case, result)
        if checkpoints:
            resume_and_reshard(place, straight, report)
    finally:
        for job in Job.started:
            job.stop()
    estimates(report, args.nodes, args.network, args.network_efficiency)
    print(f"{time.time() - began:.0f} s of {args.budget:g}", flush=True)


if __name__ == "__main__":
    main()
