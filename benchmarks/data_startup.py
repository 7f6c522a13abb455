#!/usr/bin/env python3
"""Start-up of training on many documents: time and memory of checking a corpus and building its sample indices.

    python benchmarks/data_startup.py --documents 5000000

A corpus of random document lengths (log-normal, about 1,300 tokens in the mean) is made; its .bin is a sparse file. One
epoch of 2048 tokens a sample. The second start finds the indices in the cache. Printed per million documents too, so
that larger corpora can be estimated: every step is linear in documents or in samples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np  # noqa: E402

from data_prep.indexed import write_index  # noqa: E402

SEQ_LENGTH, BATCH = 2048, 256


def make(prefix: Path, documents: int) -> int:
    """Returns the tokens."""
    lengths = np.random.default_rng(0).lognormal(6.2, 1.4, documents).clip(2, 1e7).astype(np.int32)
    write_index(prefix.with_suffix(".idx"), [lengths], np.dtype(np.uint16), documents)
    tokens = int(lengths.sum(dtype=np.int64))
    with open(prefix.with_suffix(".bin"), "wb") as file:
        file.truncate(2 * tokens)
    manifest = {"vocab_size": 50257, "eod": 50256, "tokenizer": {"type": "gpt2", "sha256": "none"}}
    prefix.with_suffix(".json").write_text(json.dumps(manifest))
    return tokens


def memory() -> tuple[float, float]:
    """(GiB of this process's own pages, GiB of pages of files it has mapped)"""
    status = Path("/proc/self/status").read_text()
    own, files = (int(status.split(name + ":")[1].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))
    return own, files


def start(folder: str, prefix: str, steps: int) -> None:
    """One start, in a process of its own; prints seconds and the growth of its memory."""
    from based_mp.config import load_config
    from based_mp.data.datasets import build_datasets, check_corpora, prepare_cache
    from based_mp.parallel import state
    overrides = [f'data.train=[{{"path": "{prefix}"}}]', "data.valid=[]", "data.test=[]", "data.tokenizer=null",
                 f"data.cache_dir={folder}/cache", f"training.steps={steps}", "logging.sample_interval=0",
                 f"training.global_batch_size={BATCH}", f"training.seq_length={SEQ_LENGTH}"]
    config = load_config("configs/based_360m.yaml", overrides)
    ranks = state.initialize(device="cpu")
    before, files_before = memory()
    began = time.perf_counter()
    eod = check_corpora(config)
    checked = time.perf_counter() - began
    prepare_cache(config, ranks)
    data = build_datasets(config, ranks, eod)
    ready = time.perf_counter() - began
    first = data.train[0]["tokens"]
    assert len(first) == SEQ_LENGTH and len(data.train) >= steps * BATCH
    sampled = time.perf_counter() - began
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    after, files = memory()
    print(json.dumps({"check_seconds": round(checked, 3), "ready_seconds": round(ready, 2),
                      "first_sample_seconds": round(sampled, 2), "own_gib": round(after - before, 3),
                      "mapped_gib": round(files - files_before, 3), "peak_rss_gib": round(peak, 3)}), flush=True)
    state.destroy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--start", nargs=3, metavar=("FOLDER", "PREFIX", "STEPS"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.start:
        start(a.start[0], a.start[1], int(a.start[2]))
        return
    import subprocess
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        began = time.perf_counter()
        tokens = make(prefix, a.documents)
        steps = tokens // SEQ_LENGTH // BATCH - 1
        print(f"{a.documents:,} documents, {tokens:,} tokens, {steps * BATCH:,} samples; made in "
              f"{time.perf_counter() - began:.1f} s")
        for name in ("first start", "second start"):
            done = subprocess.run([sys.executable, __file__, "--start", folder, str(prefix), str(steps)], check=True,
                                  capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
            print(f"{name}: {done.stdout.strip().splitlines()[-1]}")
        sizes = {p.name.split("-")[-1]: p.stat().st_size for p in (Path(folder) / "cache").glob("*.npy")}
        print("cache, bytes a document:", {name: round(size / a.documents, 2) for name, size in sorted(sizes.items())})


if __name__ == "__main__":
    main()
