"""Turn Pile-format shards into a Megatron indexed dataset (.bin/.idx) with a manifest.

    python -m data_prep.tokenize --input shard.jsonl.zst … --output-prefix data/train \\
        --tokenizer-type sentencepiece --tokenizer-model data/tokenizer.model --workers 4
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from data_prep.errors import UserError, run_cli
from data_prep.indexed import token_dtype
from data_prep.output import Output
from data_prep.progress import Progress
from data_prep.shards import BadRecord, DamagedShard, Lines, parse_lines, read_lines
from data_prep.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Options:
    """inputs: shards in order. max_bad: rejects allowed in all (0: none)."""

    inputs: list[str]
    output_prefix: str
    tokenizer: dict[str, str | None]
    workers: int = 1
    max_bad: int = 0
    overwrite: bool = False
    split_by_component: bool = False


@dataclass
class Encoded:
    """What a worker made of some lines: per document (component, bytes of text, tokens), and all their ids in a row."""

    path: str
    position: int
    documents: list[tuple[str, int, int]] = field(default_factory=list)
    ids: bytes = b""
    rejects: list[str] = field(default_factory=list)
    empty: int = 0


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: dict[str, str | None]) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(**tokenizer)            # type: ignore[arg-type]


def _encode(batch: Lines) -> Encoded:
    """Parse and tokenize lines; every document ends with the end-of-document token."""
    out = Encoded(batch.path, batch.position)
    documents = []
    for record in parse_lines(batch):
        if isinstance(record, BadRecord):
            out.rejects.append(str(record))
        elif record.text:
            documents.append(record)
        else:
            out.empty += 1
    dtype = token_dtype(_worker_tokenizer.vocab_size)
    rows = []
    for document, ids in zip(documents, _worker_tokenizer.encode_batch([d.text for d in documents]), strict=True):
        ids.append(_worker_tokenizer.eod)
        rows.append(np.array(ids, dtype=dtype).tobytes())
        out.documents.append((document.component, len(document.text.encode()), len(ids)))
    out.ids = b"".join(rows)
    return out


def _batches(options: Options) -> Iterator[Lines | BadRecord]:
    """Lines of all shards; where rejects are allowed, a shard's damaged rest is one."""
    for path in options.inputs:
        try:
            yield from read_lines(path)
        except DamagedShard as error:
            if options.max_bad == 0:
                raise
            yield BadRecord(path, 0, str(error))


def _encoded(options: Options) -> Iterator[Encoded]:
    """Results in input order, whatever the number of workers; a few batches a worker are under way at a time."""
    if options.workers == 1:
        _start_worker(options.tokenizer)
        for batch in _batches(options):
            yield _rejected(batch) if isinstance(batch, BadRecord) else _encode(batch)
        return
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), _start_worker,
                             (options.tokenizer,)) as pool:
        waiting: deque[Future | Encoded] = deque()
        try:
            for batch in _batches(options):
                waiting.append(_rejected(batch) if isinstance(batch, BadRecord) else pool.submit(_encode, batch))
                if len(waiting) > 4 * options.workers:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except BrokenProcessPool as error:
            raise UserError("a worker process died (killed, or out of memory): use fewer --workers; "
                            "nothing was written") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _rejected(record: BadRecord) -> Encoded:
    return Encoded(record.file, 0, rejects=[record.reason])


def _result(item: Future | Encoded) -> Encoded:
    return item if isinstance(item, Encoded) else item.result()


class _Outputs:
    """The outputs of a run by component, or the only one."""

    def __init__(self, options: Options, dtype: np.dtype) -> None:
        self.options, self.dtype = options, dtype
        self.by_prefix: dict[str, Output] = {}
        if not options.split_by_component:
            self.of("")

    def of(self, component: str) -> Output:
        prefix = self.options.output_prefix
        if self.options.split_by_component:
            prefix += "_" + (re.sub(r"[^A-Za-z0-9]+", "", component) or "unnamed")
        if prefix not in self.by_prefix:
            self.by_prefix[prefix] = Output(prefix, self.dtype, self.options.overwrite)
        return self.by_prefix[prefix]

    def append(self, encoded: Encoded) -> None:
        start, ids = 0, memoryview(encoded.ids)
        for component, text_bytes, tokens in encoded.documents:
            end = start + tokens * self.dtype.itemsize
            self.of(component).append(ids[start:end], component, text_bytes)
            start = end

    def discard(self) -> None:
        for output in self.by_prefix.values():
            output.discard()


def tokenize(options: Options) -> dict[str, dict]:
    """Write PREFIX.bin, .idx and .json (one such set a component with split_by_component); on failure nothing.

    Returns the manifests by prefix. Raises UserError.
    """
    tokenizer = load_tokenizer(**options.tokenizer)            # type: ignore[arg-type]
    for path in options.inputs:
        if not os.access(path, os.R_OK):
            raise UserError(f"the shard {path} is missing or unreadable: correct the path or its permissions")
    started = time.perf_counter()
    rejects: list[str] = []
    empty = 0
    outputs: _Outputs | None = None
    try:
        outputs = _Outputs(options, token_dtype(tokenizer.vocab_size))
        with Progress({path: os.path.getsize(path) for path in options.inputs}) as progress:
            for encoded in _encoded(options):
                rejects += encoded.rejects
                empty += encoded.empty
                _check_rejects(rejects, options.max_bad)
                outputs.append(encoded)
                progress.advance(encoded.path, encoded.position, sum(d[1] for d in encoded.documents),
                                 len(encoded.documents), len(rejects))
        written = outputs.by_prefix
        if not any(output.lengths for output in written.values()):
            raise UserError(f"no document in {', '.join(options.inputs)}: nothing was written")
        facts = {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod,
                 "tokenizer": {"type": tokenizer.kind, "sha256": tokenizer.fingerprint()},
                 "sources": [{"path": p, "bytes": os.path.getsize(p)} for p in options.inputs],
                 "rejects": rejects, "empty_documents": empty}
        seconds = time.perf_counter() - started
        manifests = {prefix: output.finish(facts, seconds) for prefix, output in written.items()}
        for output in written.values():
            output.publish()
    except OSError as error:
        raise UserError(f"cannot write {options.output_prefix}: {error.strerror or error}; nothing was changed") \
            from error
    finally:
        if outputs is not None:
            outputs.discard()
    return manifests


def _check_rejects(rejects: list[str], max_bad: int) -> None:
    if len(rejects) > max_bad:
        hint = "repair it, or allow some with --on-bad-record skip" if max_bad == 0 else \
            f"that is more than --max-bad {max_bad}"
        raise UserError(f"{rejects[max_bad]}; {hint}; nothing was written")


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
    parser.add_argument("--split-by-component", action="store_true",
                        help="one dataset a pile_set_name: PREFIX_COMPONENT.bin, .idx and .json")
    a = parser.parse_args(arguments)
    if a.workers < 1:
        raise UserError(f"--workers {a.workers}: give at least 1")
    return Options(a.input, a.output_prefix, tokenizer_arguments(a), a.workers,
                   a.max_bad if a.on_bad_record == "skip" else 0, a.overwrite, a.split_by_component)


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
    for prefix, m in sorted(tokenize(parse()).items()):
        print(f"{prefix}: {m['tokens']:,} tokens, {m['documents']:,} documents, {m['text_bytes']:,} bytes in "
              f"{m['seconds']:.1f} s ({m['megabytes_per_second']:.2f} MB/s), {len(m['rejects'])} records rejected")
        for reject in m["rejects"][:10]:
            print(f"rejected: {reject}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
