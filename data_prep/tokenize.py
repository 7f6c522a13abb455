"""Turn Pile-format shards into a Megatron indexed dataset (.bin/.idx) with a manifest.

    python -m data_prep.tokenize --input shard.jsonl.zst … --output-prefix data/train \\
        --tokenizer-type sentencepiece --tokenizer-model data/tokenizer.model --workers 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.errors import UserError, run_cli
from data_prep.indexed import token_dtype, write_index
from data_prep.shards import BadRecord, Document, read_shard
from data_prep.tokenizers import Tokenizer, load_tokenizer

BATCH_DOCUMENTS = 256


@dataclass
class Totals:
    """What went in and came out."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejects: list[str] = field(default_factory=list)
    components: dict[str, Counter] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """inputs: shards in order. max_bad: rejects allowed in all (0: none)."""

    inputs: list[str]
    output_prefix: str
    tokenizer: dict[str, str | None]
    workers: int = 1
    max_bad: int = 0
    overwrite: bool = False


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: dict[str, str | None]) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(**tokenizer)            # type: ignore[arg-type]


def _encode(batch: list[Document | BadRecord]) -> list[tuple[str, int, bytes] | BadRecord]:
    """(component, bytes of text, ids with the end-of-document token) of every good record."""
    good = [d for d in batch if isinstance(d, Document)]
    dtype = token_dtype(_worker_tokenizer.vocab_size)
    encoded = iter(_worker_tokenizer.encode_batch([d.text for d in good]))
    out: list[tuple[str, int, bytes] | BadRecord] = []
    for record in batch:
        if isinstance(record, BadRecord):
            out.append(record)
        else:
            ids = next(encoded)
            out.append((record.component, len(record.text.encode()),
                        np.array([*ids, _worker_tokenizer.eod], dtype=dtype).tobytes()))
    return out


def _batches(inputs: Iterable[str], progress: tqdm) -> Iterator[list[Document | BadRecord]]:
    for path in inputs:
        progress.set_postfix_str(Path(path).name)
        records = (r for r in read_shard(path) if isinstance(r, BadRecord) or r.text)
        while batch := list(islice(records, BATCH_DOCUMENTS)):
            yield batch


def _encoded(options: Options, progress: tqdm) -> Iterator[list[tuple[str, int, bytes] | BadRecord]]:
    """Batches in input order, whatever the number of workers."""
    if options.workers == 1:
        _start_worker(options.tokenizer)
        yield from map(_encode, _batches(options.inputs, progress))
        return
    # imap drains its input at once; the semaphore keeps the documents in memory to a few batches a worker.
    room = threading.Semaphore(4 * options.workers)

    def throttled() -> Iterator[list[Document | BadRecord]]:
        for batch in _batches(options.inputs, progress):
            room.acquire()
            yield batch

    with multiprocessing.get_context("spawn").Pool(options.workers, _start_worker, (options.tokenizer,)) as pool:
        for result in pool.imap(_encode, throttled()):
            room.release()
            yield result


def tokenize(options: Options) -> dict:
    """Write OUTPUT.bin, .idx and .json; nothing is left behind on failure. Returns the manifest. Raises UserError."""
    tokenizer = load_tokenizer(**options.tokenizer)            # type: ignore[arg-type]
    dtype = token_dtype(tokenizer.vocab_size)
    prefix = options.output_prefix
    finals = [Path(prefix + ending) for ending in (".bin", ".idx", ".json")]
    existing = [str(p) for p in finals if p.exists()]
    if existing and not options.overwrite:
        raise UserError(f"{existing[0]} exists: give --overwrite or another --output-prefix")
    for path in options.inputs:
        if not os.access(path, os.R_OK):
            raise UserError(f"the shard {path} is missing or unreadable: correct the path or its permissions")
    temporaries = [p.with_name(f".{p.name}.writing") for p in finals]
    started = time.perf_counter()
    totals, lengths, digest = Totals(), [], hashlib.sha256()
    try:
        finals[0].parent.mkdir(parents=True, exist_ok=True)
        with open(temporaries[0], "wb") as out, _progress() as progress:
            for batch in _encoded(options, progress):
                for record in batch:
                    _take(record, totals, lengths, out, digest, dtype, options.max_bad)
                progress.update(sum(r[1] for r in batch if not isinstance(r, BadRecord)))
            out.flush()
            os.fsync(out.fileno())
        if not lengths:
            raise UserError(f"no document in {', '.join(options.inputs)}: nothing was written")
        write_index(temporaries[1], np.array(lengths, dtype=np.int32), dtype)
        manifest = _manifest(options, tokenizer, totals, digest.hexdigest(), temporaries[1], dtype,
                             time.perf_counter() - started)
        temporaries[2].write_text(json.dumps(manifest, indent=1))
        for temporary, final in zip(temporaries, finals, strict=True):
            os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error.strerror or error}; nothing was changed") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    return manifest


def _take(record: tuple[str, int, bytes] | BadRecord, totals: Totals, lengths: list[int], out, digest,
          dtype: np.dtype, max_bad: int) -> None:
    if isinstance(record, BadRecord):
        totals.rejects.append(str(record))
        if len(totals.rejects) > max_bad:
            hint = "repair it, or allow some with --on-bad-record skip" if max_bad == 0 else \
                f"that is more than --max-bad {max_bad}"
            raise UserError(f"{record}; {hint}; nothing was written")
        return
    component, size, ids = record
    out.write(ids)
    digest.update(ids)
    lengths.append(len(ids) // dtype.itemsize)
    totals.documents += 1
    totals.tokens += lengths[-1]
    totals.text_bytes += size
    totals.components.setdefault(component, Counter()).update(documents=1, tokens=lengths[-1], bytes=size)


def _manifest(options: Options, tokenizer: Tokenizer, totals: Totals, bin_sha256: str, index: Path,
              dtype: np.dtype, seconds: float) -> dict:
    return {
        "documents": totals.documents, "tokens": totals.tokens, "text_bytes": totals.text_bytes,
        "seconds": round(seconds, 3), "megabytes_per_second": round(totals.text_bytes / 1e6 / seconds, 3),
        "rejects": totals.rejects, "components": {k: dict(v) for k, v in sorted(totals.components.items())},
        "dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod,
        "tokenizer": {"type": tokenizer.kind, "sha256": tokenizer.fingerprint()},
        "sources": [{"path": p, "bytes": os.path.getsize(p)} for p in options.inputs],
        "sha256": {"bin": bin_sha256, "idx": hashlib.sha256(index.read_bytes()).hexdigest()},
    }


def _progress() -> tqdm:
    """A bar on a terminal; elsewhere a plain line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(unit="B", unit_scale=True, desc="tokenizing", mininterval=0.2 if terminal else 30,
                ascii=not terminal)


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m data_prep.tokenize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz or .jsonl.zst shards")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    add_tokenizer_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on it")
    parser.add_argument("--on-bad-record", choices=["fail", "skip"], default="fail",
                        help="a line that is no document: stop, or leave it out and list it in the manifest")
    parser.add_argument("--max-bad", type=int, default=1000, help="with skip: more bad records than this stop the run")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    a = parser.parse_args(arguments)
    if a.workers < 1:
        raise UserError(f"--workers {a.workers}: give at least 1")
    return Options(a.input, a.output_prefix, tokenizer_arguments(a), a.workers,
                   a.max_bad if a.on_bad_record == "skip" else 0, a.overwrite)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """The options every program with a tokenizer shares."""
    parser.add_argument("--tokenizer-type", choices=["sentencepiece", "gpt2", "hf"], required=True)
    parser.add_argument("--tokenizer-model", help="SentencePiece .model, or tokenizers .json for hf")
    parser.add_argument("--vocab-file", help="gpt2: vocab.json")
    parser.add_argument("--merge-file", help="gpt2: merges.txt")
    parser.add_argument("--eod-token", help="end-of-document token of hf and gpt2 (default <|endoftext|>)")


def tokenizer_arguments(a: argparse.Namespace) -> dict[str, str | None]:
    return {"kind": a.tokenizer_type, "model": a.tokenizer_model, "vocab_file": a.vocab_file,
            "merge_file": a.merge_file, "eod_token": a.eod_token}


def main() -> None:
    options = parse()
    m = tokenize(options)
    print(f"{options.output_prefix}: {m['tokens']:,} tokens, {m['documents']:,} documents, {m['text_bytes']:,} bytes "
          f"in {m['seconds']:.1f} s ({m['megabytes_per_second']:.2f} MB/s), {len(m['rejects'])} records rejected")


if __name__ == "__main__":
    run_cli(main)
