#!/usr/bin/env python3
"""Tokenizing throughput: data_prep.tokenize beside the method of Megatron-LM's tools/preprocess_data.py.

    python benchmarks/data_prep.py --input shard.jsonl.zst --vocab-file vocab.json --merge-file merges.txt

The peer's method, written here from its description: a process pool, `imap` over the lines of a plain .jsonl in chunks
of 32, in each worker JSON and one `encode` call a document, and one process that appends to megatron.core's
IndexedDatasetBuilder. Both sides read the same text with the same BPE of the `tokenizers` library. Gate: equal .bin
and .idx bytes. Each side runs in turn, `--repeats` times; the best run of each counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np  # noqa: E402

from data_prep.errors import UserError, run_cli  # noqa: E402
from data_prep.shards import Document, read_shard  # noqa: E402
from data_prep.tokenize import Options, tokenize  # noqa: E402
from data_prep.tokenizers import load_tokenizer  # noqa: E402


def _start(arguments: dict[str, str]) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(**arguments)


def _encode(line: bytes) -> list[int]:
    return [*_tokenizer.encode(json.loads(line)["text"]), _tokenizer.eod]


def peer(plain: Path, prefix: str, arguments: dict[str, str], workers: int) -> None:
    # Imported here, and once before the clock starts, so that our spawned workers do not import them.
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    with multiprocessing.get_context("fork").Pool(workers, _start, (arguments,)) as pool, open(plain, "rb") as lines:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(prefix + ".idx")


def timed(run, *arguments) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="one shard")
    parser.add_argument("--vocab-file", required=True)
    parser.add_argument("--merge-file", required=True)
    parser.add_argument("--max-megabytes", type=float, default=20, help="text used")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", help="JSON file the result is appended to, a line a run")
    a = parser.parse_args()
    bpe = {"kind": "gpt2", "vocab_file": a.vocab_file, "merge_file": a.merge_file}
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), 0
        plain = folder / "text.jsonl"
        with open(plain, "wb") as file:
            for record in read_shard(a.input):
                if isinstance(record, Document) and record.text and size < a.max_megabytes * 1e6:
                    size += len(record.text.encode())
                    file.write(json.dumps({"text": record.text}).encode() + b"\n")
        import megatron.core.datasets.indexed_dataset  # noqa: F401
        rows = []
        for workers in a.workers:
            best = {"ours": float("inf"), "peer": float("inf")}
            for _ in range(a.repeats):
                options = Options([str(plain)], str(folder / "ours"), bpe, workers, overwrite=True)
                best["ours"] = min(best["ours"], timed(tokenize, options))
                best["peer"] = min(best["peer"], timed(peer, plain, str(folder / "peer"), bpe, workers))
            for ending in (".bin", ".idx"):
                if (folder / f"ours{ending}").read_bytes() != (folder / f"peer{ending}").read_bytes():
                    raise UserError(f"the two sides wrote different {ending} files: no figures")
            rows.append({"workers": workers, **{f"{k}_mb_per_s": round(size / 1e6 / v, 2) for k, v in best.items()},
                         "ratio": round(best["peer"] / best["ours"], 2)})
    worker_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip()
    result = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
              "load_average": round(os.getloadavg()[0], 2), "megabytes": round(size / 1e6, 2),
              "largest_child_rss_mib": round(worker_mb), "rows": rows}
    print(f"{size / 1e6:.1f} MB of text, {os.cpu_count()} cores, load {result['load_average']}; equal output bytes")
    print("| workers | data_prep MB/s | peer's method MB/s | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['workers']} | {row['ours_mb_per_s']} | {row['peer_mb_per_s']} | {row['ratio']} |")
    if a.output:
        with open(a.output, "a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_cli(main)
