#!/usr/bin/env python3
"""Data preparation on this machine: throughput beside peers, scaling, memory, the cost of the merge, kill -9.

    python benchmarks/data_prep.py throughput --input shard.jsonl.zst … --vocab-file vocab.json --merge-file merges.txt
    python benchmarks/data_prep.py sentencepiece --input … --tokenizer-model x.model
    python benchmarks/data_prep.py memory --input … --vocab-file … --merge-file … --gigabytes 4

throughput: data_prep.tokenize with both backends beside the method of Megatron-LM's tools/preprocess_data.py, written
here from its description: a process pool, `imap` over the lines of a plain .jsonl in chunks of 32, in each worker JSON
and one `encode` call a document, and one process that appends to megatron.core's IndexedDatasetBuilder. All read the
same text with the same BPE. Gate: equal .bin and .idx bytes.
sentencepiece: beside the bare library, `encode(texts, num_threads=workers)` on texts in memory, nothing read or
written.
memory: one generated .jsonl.zst shard of the given size; the largest resident memory of any process, and the merge's
share of the time.

Sides run in turn, `--repeats` times; the median counts. Rates are of text bytes, and starting counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import zstandard  # noqa: E402

from benchmarks.record import git_commit  # noqa: E402
from data_prep import run as run_module  # noqa: E402
from data_prep.errors import UserError, run_cli  # noqa: E402
from data_prep.run import Options, tokenize  # noqa: E402
from data_prep.shards import Document, read_shard  # noqa: E402
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


def timed(run: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def sample(inputs: list[str], megabytes: float) -> list[str]:
    """The inputs' texts, over and over, until they have this size."""
    texts = [r.text for path in inputs for r in read_shard(path) if isinstance(r, Document) and r.text]
    chosen, size = [], 0.0
    while size < megabytes * 1e6:
        for text in texts:
            chosen.append(text)
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return chosen


def write_plain(path: Path, texts: list[str]) -> float:
    """One document a line; returns the megabytes of text."""
    with open(path, "wb") as file:
        for text in texts:
            file.write(json.dumps({"text": text}).encode() + b"\n")
    return sum(len(t.encode()) for t in texts) / 1e6


def medians(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of every side; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: statistics.median(values) for name, values in seconds.items()}


def same_bytes(folder: Path, names: list[str]) -> None:
    for ending in (".bin", ".idx"):
        if len({(folder / f"{name}{ending}").read_bytes() for name in names}) != 1:
            raise UserError(f"the sides wrote different {ending} files: no figures")


def throughput(a: argparse.Namespace, folder: Path) -> dict:
    """ours with both backends and the peer, at every number of workers."""
    import megatron.core.datasets.indexed_dataset  # noqa: F401
    bpe = {"kind": "gpt2", "vocab_file": a.vocab_file, "merge_file": a.merge_file}
    plain = folder / "text.jsonl"
    size, rows = write_plain(plain, sample(a.input, a.megabytes)), []
    for workers in a.workers:
        def ours(backend: str, workers: int = workers) -> float:
            return timed(tokenize, Options([str(plain)], str(folder / backend), {**bpe, "backend": backend}, workers,
                                           overwrite=True))
        found = medians({
            "gigatoken": lambda: ours("gigatoken"), "reference": lambda: ours("reference"),
            "peer": lambda workers=workers: timed(peer, plain, str(folder / "peer"), bpe, workers)}, a.repeats)
        same_bytes(folder, ["gigatoken", "reference", "peer"])
        rows.append({"workers": workers, **{f"{k}_mb_per_s": round(size / v, 2) for k, v in found.items()},
                     **{f"{k}_times_peer": round(found["peer"] / found[k], 2) for k in ("gigatoken", "reference")}})
    # Without starting and stopping: what is left when a short text is taken off a long one.
    longer = folder / "long.jsonl"
    long_size = write_plain(longer, sample(a.input, a.megabytes * 16))
    steady = {}
    for workers in a.workers:
        def fast(path: Path, workers: int = workers) -> float:
            return timed(tokenize, Options([str(path)], str(folder / "g"), {**bpe, "backend": "gigatoken"}, workers,
                                           overwrite=True))
        found = medians({"short": lambda: fast(plain), "long": lambda: fast(longer)}, a.repeats)
        steady[workers] = {"mb_per_s": round(long_size / found["long"], 2),
                           "steady_mb_per_s": round((long_size - size) / (found["long"] - found["short"]), 2)}
    return {"megabytes": round(size, 1), "rows": rows, "gigatoken_long_megabytes": round(long_size), "long": steady}


def sentencepiece(a: argparse.Namespace, folder: Path) -> dict:
    """ours at every number of workers beside the library with as many threads."""
    import sentencepiece as library
    model = {"kind": "sentencepiece", "model": a.tokenizer_model}
    bare = library.SentencePieceProcessor(model_file=a.tokenizer_model)
    texts = sample(a.input, a.megabytes)
    size, rows = write_plain(folder / "text.jsonl", texts), []
    for workers in a.workers:
        found = medians({
            "ours": lambda workers=workers: timed(tokenize, Options(
                [str(folder / "text.jsonl")], str(folder / "ours"), model, workers, overwrite=True)),
            "bare": lambda workers=workers: timed(lambda: bare.encode(texts, num_threads=workers))}, a.repeats)
        rows.append({"workers": workers, **{f"{k}_mb_per_s": round(size / v, 2) for k, v in found.items()},
                     "ours_of_bare": round(found["bare"] / found["ours"], 3)})
    ids = np.concatenate([[*row, bare.eos_id()] for row in bare.encode(texts)])
    if not np.array_equal(ids, np.fromfile(folder / "ours.bin", np.uint16)):
        raise UserError("our tokens are not the library's: no figures")
    return {"megabytes": round(size, 1), "model": Path(a.tokenizer_model).name, "rows": rows}


def memory(a: argparse.Namespace, folder: Path) -> dict:
    """A generated shard of a.gigabytes of text in one zstd frame; with the fast backend, or the time would be hours."""
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in sample(a.input, 33))
    shard, size = folder / "big.jsonl.zst", 0
    with open(shard, "wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as file:
        while size < a.gigabytes * 1e9:
            size += file.write(lines)
    bpe = {"kind": "gpt2", "vocab_file": a.vocab_file, "merge_file": a.merge_file, "backend": a.backend}
    peaks: dict[int, int] = {}
    stop = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not stop.wait(0.2):
            for process in [me, *me.children(recursive=True)]:
                try:
                    peaks[process.pid] = max(peaks.get(process.pid, 0), process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
    merging = []
    plain = run_module.merge

    def merge(*arguments: object) -> None:
        merging.append(timed(plain, *arguments))
    run_module.merge = merge
    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = timed(tokenize, Options([str(shard)], str(folder / "big"), bpe, a.workers[-1], overwrite=True))
    stop.set()
    watcher.join()
    run_module.merge = plain
    manifest = json.loads((folder / "big.json").read_text())
    return {"gigabytes": round(manifest["text_bytes"] / 1e9, 2), "backend": a.backend, "workers": a.workers[-1],
            "seconds": round(seconds, 1), "mb_per_s": round(manifest["text_bytes"] / 1e6 / seconds, 1),
            "pieces_merged": len(manifest["sha256"]["bin"]), "merge_seconds": round(merging[0], 2),
            "merge_share": round(merging[0] / seconds, 4),
            "peak_rss_mib": {"reader": peaks[os.getpid()] >> 20,
                             "workers": sorted(v >> 20 for k, v in peaks.items() if k != os.getpid())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "sentencepiece", "memory"])
    parser.add_argument("--input", nargs="+", required=True, help="shards whose text is used, repeated as needed")
    parser.add_argument("--vocab-file", help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", help="GPT-2's merges.txt")
    parser.add_argument("--tokenizer-model", help="sentencepiece: the .model")
    parser.add_argument("--backend", default="gigatoken", help="memory: which backend")
    parser.add_argument("--megabytes", type=float, default=33, help="text used")
    parser.add_argument("--gigabytes", type=float, default=4, help="memory: size of the generated shard's text")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where temporary files go")
    parser.add_argument("--output", help="JSON file the result is appended to, a line a run")
    a = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=a.folder))
    try:
        found = {"throughput": throughput, "sentencepiece": sentencepiece, "memory": memory}[a.what](a, folder)
    finally:
        shutil.rmtree(folder)
    commit = git_commit()
    result = {"what": a.what, "commit": commit, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
              "load_average": round(os.getloadavg()[0], 2), **found}
    print(json.dumps(result, indent=1))
    if a.output:
        with open(a.output, "a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_cli(main)
