"""List documents to leave out: exact and near duplicates, and those that share 13 words in a row with evaluation files.

    python -m data_prep.dedup --input pile/*.jsonl.zst --output data/exclude.jsonl --workers 8 \\
        --exact --near --decontaminate eval/*.jsonl
    python -m data_prep.tokenize --input pile/*.jsonl.zst --exclude data/exclude.jsonl …

Reads the shards once, in order; of equal or similar documents the first stays. Writes the list, a line a document
({"file", "line", "reason": "exact" | "near" | "contaminated", "like"}), and a report beside it (.report.json).
Memory: about 150 bytes a document for --exact, 2 kB for --near.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from data_prep.errors import UserError, run_cli
from data_prep.pool import mapped
from data_prep.progress import Progress
from data_prep.shards import Chunk, Document, Shard, parse_chunk, read_shard

WORD = re.compile(r"\w+")
GRAM = 13                # words in a row that a document and an evaluation text must share (Brown et al. 2020, app. C)
SHINGLE = 5              # words in a row that are one element of the sets whose Jaccard similarity --near estimates
PERMUTATIONS = 128
SEED = 42


@dataclass(frozen=True)
class Options:
    """threshold: Jaccard similarity from which documents count as near duplicates; None: not looked for."""

    inputs: list[str]
    output: str
    exact: bool = False
    threshold: float | None = None
    evaluation: tuple[str, ...] = ()
    workers: int = 1


@dataclass(frozen=True)
class Signature:
    """What a worker found of one document. gram: words it shares with an evaluation text."""

    line: int
    component: str
    size: int
    digest: bytes
    minhash: Any
    gram: str | None


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def grams(found: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(found[i:] for i in range(GRAM)), strict=False)


def shingles(found: list[str]) -> list[str]:
    return [" ".join(s) for s in zip(*(found[i:] for i in range(SHINGLE)), strict=False)] or [" ".join(found)]


class Reader:
    """Signatures of a chunk's documents."""

    def __init__(self, near: bool, evaluation: tuple[str, ...]) -> None:
        self.near = near
        self.grams = {gram for path in evaluation for record in read_shard(path) if isinstance(record, Document)
                      for gram in grams(words(record.text))}

    def __call__(self, chunk: Chunk) -> tuple[Chunk, list[Signature]]:
        documents = [d for d in parse_chunk(chunk) if isinstance(d, Document) and d.text]
        split = [words(d.text) if self.near or self.grams else [] for d in documents]
        minhashes: Iterable[Any] = [None] * len(documents)
        if self.near:
            import rensa
            minhashes = rensa.RMinHash.from_token_sets([shingles(s) for s in split], PERMUTATIONS, SEED)
        found = [Signature(d.line, d.component, len(d.text.encode()), hashlib.blake2b(d.text.encode(), digest_size=16)
                           .digest(), m, self.shared(s)) for d, m, s in zip(documents, minhashes, split, strict=True)]
        return Chunk(chunk.path, chunk.number, chunk.first_line, b"", chunk.position), found

    def shared(self, found: list[str]) -> str | None:
        if not self.grams:
            return None
        return next((" ".join(gram) for gram in grams(found) if gram in self.grams), None)


_reader: Reader


def _start(near: bool, evaluation: tuple[str, ...]) -> None:
    global _reader
    _reader = Reader(near, evaluation)


def _read(chunk: Chunk) -> tuple[Chunk, list[Signature]]:
    return _reader(chunk)


class Seen:
    """The documents that stay, as far as later ones are compared with them."""

    def __init__(self, options: Options) -> None:
        self.exact: dict[bytes, int] | None = {} if options.exact else None
        self.near = None
        if options.threshold is not None:
            import rensa
            self.near = rensa.RMinHashDeduplicator(threshold=options.threshold, num_perm=PERMUTATIONS, use_lsh=True,
                                                   seed=SEED)

    def verdict(self, found: Signature, number: int) -> tuple[str, int | str] | None:
        """(reason, what it is like: a document number or words), or None, and then the document is remembered."""
        if found.gram is not None:
            return "contaminated", found.gram
        if self.exact is not None and found.digest in self.exact:
            return "exact", self.exact[found.digest]
        if self.near is not None and not self.near.add(str(number), found.minhash):
            return "near", min(map(int, self.near.get_duplicates(found.minhash)), default=-1)
        if self.exact is not None:
            self.exact[found.digest] = number
        return None


def dedup(options: Options) -> dict[str, Any]:
    """Write the list and the report; returns the report. Raises UserError (a damaged shard too) and writes nothing."""
    if options.threshold is not None and importlib.util.find_spec("rensa") is None:
        raise UserError("--near needs rensa: pip install '.[dedup]'")
    started = time.perf_counter()
    kept: Counter = Counter()
    left_out: dict[str, dict[str, Counter]] = {}
    seen = Seen(options)
    # A document's number says where it stood: shard in the high bits, line in the low ones.
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.writing")
    order = {path: i for i, path in enumerate(options.inputs)}
    sizes = {path: os.path.getsize(path) for path in options.inputs if os.path.isfile(path)}
    chunks = (chunk for path in options.inputs for chunk in Shard(path).chunks())
    try:
        with open(temporary, "wb") as file, Progress(sizes) as progress:
            for chunk, signatures in mapped(_read, chunks, options.workers, _start, options.threshold is not None,
                                            options.evaluation):
                for found in signatures:
                    number = order[chunk.path] << 40 | found.line
                    verdict = seen.verdict(found, number)
                    if verdict is None:
                        kept.update(documents=1, bytes=found.size)
                        continue
                    reason, like = verdict
                    left_out.setdefault(reason, {}).setdefault(found.component, Counter()).update(
                        documents=1, bytes=found.size)
                    if isinstance(like, int):
                        like = {"file": options.inputs[like >> 40], "line": like & (1 << 40) - 1} if like >= 0 else ""
                    file.write(orjson.dumps({"file": chunk.path, "line": found.line, "reason": reason, "like": like})
                               + b"\n")
                progress.advance(chunk.path, chunk.position, sum(s.size for s in signatures), len(signatures), 0)
        report = {"inputs": options.inputs, "exact": options.exact, "near_threshold": options.threshold,
                  "evaluation": list(options.evaluation), "kept": dict(kept),
                  "left_out": {reason: {name: dict(counts) for name, counts in sorted(by.items())}
                               for reason, by in left_out.items()},
                  "seconds": round(time.perf_counter() - started, 2)}
        output.with_suffix(".report.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.dedup", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="shards, by the names data_prep.tokenize will get")
    parser.add_argument("--output", required=True, help="the list, for data_prep.tokenize --exclude")
    parser.add_argument("--exact", action="store_true", help="documents with the same text as an earlier one")
    parser.add_argument("--near", action="store_true", help="documents like an earlier one (MinHash LSH, words 5 by 5)")
    parser.add_argument("--threshold", type=float, default=0.8, help="--near: Jaccard similarity")
    parser.add_argument("--decontaminate", nargs="+", default=[], metavar="FILE",
                        help="evaluation files, as shards: documents that share 13 words in a row with one")
    parser.add_argument("--workers", type=int, default=1, help="processes; the list does not depend on it")
    a = parser.parse_args()
    if not (a.exact or a.near or a.decontaminate):
        raise UserError("nothing to look for: give --exact, --near or --decontaminate")
    if not 0 < a.threshold <= 1 or a.workers < 1:
        raise UserError("--threshold must be above 0 and at most 1, --workers at least 1")
    report = dedup(Options(a.input, a.output, a.exact, a.threshold if a.near else None, tuple(a.decontaminate),
                           a.workers))
    for reason, by in report["left_out"].items():
        print(f"{reason}: {sum(c['documents'] for c in by.values()):,} documents, "
              f"{sum(c['bytes'] for c in by.values()):,} bytes")
    print(f"{a.output}: {report['kept'].get('documents', 0):,} documents stay; {report['seconds']} s")


if __name__ == "__main__":
    run_cli(main)
