#!/usr/bin/env python3
"""Small models of several systems trained on the same tokens: validation perplexity of AR hits and other tokens.

    python benchmarks/compare_systems.py --system BASED=configs/based_small.yaml \\
        --system attention=configs/attention_small.yaml --system Mamba=configs/mamba_small.yaml --steps 300 \\
        --train data/pile_sample/train --valid data/pile_sample/val_* --output runs/compare

Writes table.md, results.json and curves.png. A system whose run is finished is not trained again. --valid: prefixes of
.bin/.idx pairs, or any of their files; one corpus a component.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.errors import run_cli  # noqa: E402
from based_mp.evaluation.figures import pyplot  # noqa: E402
from benchmarks.learning_curves import curve  # noqa: E402
from benchmarks.record import git_commit  # noqa: E402
from data_prep.indexed import IndexedDataset  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
TAGS = {"all tokens": "perplexity", "AR hits": "ar_hits_perplexity", "other tokens": "other_perplexity"}


def corpora(paths: list[str], batch_tokens: int) -> list[dict[str, object]]:
    """data.valid: every prefix with the tokens of its batches; all count the same, as their batches are as many."""
    prefixes = sorted({str(Path(p).with_suffix("")) if Path(p).suffix in (".bin", ".idx", ".json") else p
                       for p in paths})
    sizes = {prefix: len(IndexedDataset(prefix).data) for prefix in prefixes if Path(prefix + ".idx").exists()}
    kept = {prefix: size for prefix, size in sizes.items() if size > batch_tokens}
    if not kept:
        sys.exit(f"error: none of {len(prefixes)} validation corpora has the {batch_tokens} tokens of its batches")
    for prefix in sorted(set(sizes) - set(kept)):
        print(f"{prefix} has {sizes[prefix]} tokens, fewer than its batches: left out")
    return [{"path": prefix} for prefix in kept]


def train(name: str, config: str, a: argparse.Namespace, folder: Path) -> None:
    """One run, as any other is started."""
    overrides = {
        "data.train": [{"path": a.train}], "data.valid": corpora(a.valid, a.valid_batches * a.batch * a.seq_length),
        "data.cache_dir": str(folder / "cache"), "training.steps": a.steps, "training.seq_length": a.seq_length,
        "training.micro_batch_size": a.batch, "training.global_batch_size": a.batch,
        "optimizer.warmup_steps": max(a.steps // 10, 1), "optimizer.lr": a.lr, "optimizer.min_lr": a.lr / 10,
        "validation.interval": max(a.steps // a.validations, 1), "validation.batches": a.valid_batches,
        "validation.recall_slices": True, "validation.rare_below": a.rare_below,
        "logging.tensorboard_dir": str(folder / "tensorboard"), "checkpoint.dir": str(folder / "checkpoints"),
        "checkpoint.interval": 0}
    command = [sys.executable, "launch/pretrain.py", "--config", config,
               *(f"{key}={json.dumps(value)}" for key, value in overrides.items()), *a.set]
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    subprocess.run(command, cwd=REPO, check=True)
    (folder / "seconds").write_text(f"{time.perf_counter() - start:.0f}")


def device() -> str:
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def last(folder: Path, corpus: str, tag: str) -> float | None:
    try:
        return curve(str(folder / "tensorboard"), f"{corpus}/{tag}")[1][-1]
    except SystemExit:                                        # a slice without tokens is not written
        return None


def table(results: dict[str, dict[str, dict[str, float | None]]]) -> str:
    lines = ["| corpus | tokens | " + " | ".join(results) + " |", "|---|---|" + "---|" * len(results)]
    for corpus in next(iter(results.values())):
        for label in TAGS:
            values = [results[system][corpus][label] for system in results]
            cells = " | ".join("–" if v is None else f"{v:.2f}" for v in values)
            lines.append(f"| {corpus} | {label} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", action="append", required=True, metavar="NAME=CONFIG")
    parser.add_argument("--train", required=True, help="prefix of the training .bin/.idx")
    parser.add_argument("--valid", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--validations", type=int, default=4)
    parser.add_argument("--valid-batches", type=int, default=1, help="batches of every corpus and validation")
    parser.add_argument("--rare-below", type=int, default=10, help="times in the training corpus")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="further overrides")
    a = parser.parse_args()
    names = [Path(str(c["path"])).name for c in corpora(a.valid, a.valid_batches * a.batch * a.seq_length)]
    results, figure = {}, pyplot().figure(figsize=(10, 4.5))
    panels = figure.subplots(1, 2)
    for system in a.system:
        name, _, config = system.partition("=")
        folder = a.output / name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "seconds").exists():
            train(name, config, a, folder)
        results[name] = {corpus: {label: last(folder, f"valid_{corpus}".removesuffix("_all"), tag)
                                  for label, tag in TAGS.items()} for corpus in ["all", *names]}
        for axes, label in zip(panels, ("AR hits", "other tokens"), strict=True):
            axes.plot(*curve(str(folder / "tensorboard"), f"valid/{TAGS[label]}"), marker=".", label=name)
            axes.set(xlabel="optimizer step", ylabel=f"validation perplexity, {label}", yscale="log")
    for axes in panels:
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(a.output / "curves.png", dpi=120)
    (a.output / "table.md").write_text(table(results) + "\n")
    seconds = {name: int((a.output / name / "seconds").read_text()) for name in results}
    (a.output / "results.json").write_text(json.dumps(
        {"device": device(), "commit": git_commit() or "unknown", "torch": importlib.metadata.version("torch"),
         "steps": a.steps, "tokens": a.steps * a.batch * a.seq_length, "seconds": seconds, "perplexity": results},
        indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    run_cli(main)
