#!/usr/bin/env python3
"""Measure a checkpoint.

    # perplexity by corpus, AR hits and other tokens (data.test of the checkpoint's configuration, or an override)
    python launch/evaluate.py --checkpoint runs/a/checkpoints --perplexity test --output results.json
    # SWDE, FDA, SQuAD completion and any task of lm-evaluation-harness, each on a local .jsonl or .jsonl.zst file
    python launch/evaluate.py --checkpoint runs/a/checkpoints --task swde=swde.jsonl.zst --task piqa=piqa.jsonl \\
      --output results.json
    # bytes of the generation state and generated tokens per second
    python launch/evaluate.py --checkpoint runs/a/checkpoints --speed 16x1024x128 --output results.json

Several kinds may be given together. Tensor parallel: torchrun --nproc_per_node 2 launch/evaluate.py
--tensor-parallel-size 2 …
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from based_mp.errors import UserError, run_cli  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a step_… folder, or a folder of them (the newest)")
    parser.add_argument("--perplexity", choices=["valid", "test"], help="perplexity on these corpora")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE", help="may be given several times")
    parser.add_argument("--limit", type=int, help="at most this many documents a task")
    parser.add_argument("--speed", metavar="BATCHxPROMPTxNEW", help="generate NEW tokens after PROMPT random ones")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer; default training.seq_length")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at once")
    parser.add_argument("--samples", action="store_true", help="write every document's answer too")
    parser.add_argument("--name", help="name in plots; default the checkpoint's path")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; what it has of this name is updated")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the checkpoint's configuration")
    return parser.parse_args()


def tasks_of(items: list[str]) -> dict[str, str]:
    """{"swde": "file.jsonl"} of NAME=FILE. Raises UserError."""
    tasks = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not equals or not name or not file:
            raise UserError(f"--task {item} must have the form NAME=FILE, such as swde=swde.jsonl.zst")
        if not Path(file).is_file():
            raise UserError(f"--task {item}: the file {file} is missing")
        tasks[name] = file
    return tasks


def measure(a: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    """Everything that was asked for."""
    from based_mp.inference.load import open_model
    tasks = tasks_of(a.task)
    config, model = open_model(a.checkpoint, ranks, a.overrides)
    record: dict[str, Any] = {"checkpoint": str(a.checkpoint), "parameters": sum(p.numel() for p in model.parameters())}
    if a.perplexity:
        from based_mp.evaluation.perplexity import perplexity
        record["perplexity"] = perplexity(model, config, ranks, a.perplexity)
    if tasks:
        from based_mp.evaluation.harness import HarnessModel, evaluate
        from based_mp.evaluation.speed import open_generator
        adapter = HarnessModel(model, open_generator(model, config), batch_size=a.batch_size,
                               max_length=a.max_length or config.training.seq_length)
        found = evaluate(adapter, tasks, limit=a.limit)
        for task in found["tasks"].values():
            samples = task.pop("samples")
            if a.samples:
                task["samples"] = samples
        record |= found
    if a.speed:
        from based_mp.evaluation.speed import generation_speed
        from based_mp.inference.model import InferenceModel
        if not re.fullmatch(r"\d+x\d+x\d+", a.speed):
            raise UserError(f"--speed {a.speed} must be three numbers such as 16x1024x128")
        batch, prompt, new = map(int, a.speed.split("x"))
        record["speed"] = generation_speed(InferenceModel(model, config.model), batch=batch, prompt=prompt, new=new)
    return record


def write(path: Path, name: str, record: dict[str, Any]) -> None:
    """Add to the results of `name` in the file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = {**results.get(name, {}), **record}
        for kind in ("tasks", "perplexity"):
            if kind in record:
                merged[kind] = {**results.get(name, {}).get(kind, {}), **record[kind]}
        results[name] = merged
        path.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the results to {path}: {error}") from error


def main() -> None:
    a = parse()
    if not (a.perplexity or a.task or a.speed):
        raise UserError("nothing to measure: give --perplexity, --task or --speed")
    from based_mp.parallel import state
    ranks = state.initialize(a.tensor_parallel_size, device=a.device)
    try:
        record = measure(a, ranks)
    finally:
        state.destroy()
    if ranks.rank == 0:
        write(a.output, a.name or a.checkpoint, record)
        print(json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    run_cli(main)
