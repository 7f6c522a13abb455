"""Check an indexed dataset: structure, checksums, token range, ends of documents; some documents beside their source.

    python -m data_prep.verify data/train
    python -m data_prep.verify data/train --samples 20 --tokenizer-type gpt2 --vocab-file … --merge-file …
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError, run_cli
from data_prep.indexed import IndexedDataset
from data_prep.run import read_excluded
from data_prep.shards import DamagedShard, Document, read_shard
from data_prep.tokenize import add_tokenizer_arguments, tokenizer_arguments
from data_prep.tokenizers import Tokenizer, load_tokenizer

DOCUMENTS_AT_ONCE = 1 << 20


def read_manifest(prefix: str) -> dict[str, Any]:
    path = Path(prefix + ".json")
    if not path.is_file():
        raise UserError(f"{path} is missing: it holds the checksums that data_prep.tokenize wrote")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): make the dataset again") from error


def verify(prefix: str) -> dict[str, int]:
    """Raises UserError at the first fault; returns documents and tokens. Reads every byte once, a piece at a time."""
    dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    size = dataset.dtype.itemsize
    offset = 0
    for first in range(0, len(dataset), DOCUMENTS_AT_ONCE):
        lengths = dataset.lengths[first : first + DOCUMENTS_AT_ONCE].astype(np.int64)
        ends = offset + np.cumsum(lengths) * size
        if not np.array_equal(dataset.offsets[first : first + len(lengths)], np.append(offset, ends[:-1])):
            raise UserError(f"{prefix}.idx is damaged: its offsets do not follow from its lengths")
        offset = int(ends[-1])
    with open(prefix + ".idx", "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest["sha256"]["idx"]:
            raise UserError(f"{prefix}.idx differs from its checksum in {prefix}.json: make it again")
    first = 0
    for documents, sha256 in manifest["sha256"]["bin"]:
        _check_piece(prefix, dataset, manifest, first, documents, sha256)
        first += documents
    if first != len(dataset):
        raise UserError(f"{prefix}.json tells of {first} documents, {prefix}.idx of {len(dataset)}: make both again")
    return {"documents": len(dataset), "tokens": offset // size}


def _check_piece(prefix: str, dataset: IndexedDataset, manifest: dict[str, Any], first: int, documents: int,
                 sha256: str) -> None:
    """Documents first … first + documents: checksum, token range, and the last token of each."""
    starts = dataset.offsets[first : first + documents] // dataset.dtype.itemsize
    ends = starts + dataset.lengths[first : first + documents]
    tokens = dataset.data[starts[0] : ends[-1]]
    if hashlib.sha256(tokens).hexdigest() != sha256:
        raise UserError(f"{prefix}.bin differs from its checksum in {prefix}.json between documents {first} and "
                        f"{first + documents - 1}: make it again")
    if int(tokens.max()) >= manifest["vocab_size"]:
        raise UserError(f"{prefix}.bin holds token {int(tokens.max())}, the vocabulary ends at "
                        f"{manifest['vocab_size'] - 1}: it was made with another tokenizer")
    wrong = np.flatnonzero(tokens[ends - starts[0] - 1] != manifest["eod"])
    if len(wrong):
        raise UserError(f"document {first + int(wrong[0])} of {prefix} does not end with token {manifest['eod']}")


def sources(prefix: str, exclude: str | None = None) -> Iterator[Document]:
    """The documents that the dataset was made of, in its order, from the shards that its manifest names."""
    manifest = read_manifest(prefix)
    paths = [source["path"] for source in manifest["sources"]]
    excluded = read_excluded(exclude, paths)
    rejected = {(reject["file"], reject["line"]) for reject in manifest["rejects"]}
    for path in paths:
        lines = set(excluded[path].tolist()) if path in excluded else set()
        try:
            for record in read_shard(path):
                if isinstance(record, Document) and record.text and record.component in manifest["components"] \
                        and record.line not in lines and (path, record.line) not in rejected:
                    yield record
        except DamagedShard:
            if (path, 0) not in rejected:
                raise


def compare(prefix: str, tokenizer: Tokenizer, samples: int,
            exclude: str | None = None) -> Iterator[tuple[int, str, str]]:
    """(document, its text decoded, the source's text) of documents spread evenly over the dataset.

    Raises UserError for a document whose tokens are not those of its source. Reads the shards up to the last sample.
    """
    dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    if tokenizer.fingerprint() != manifest["tokenizer"]["sha256"]:
        raise UserError(f"{prefix} was made with another tokenizer: give the one it was made with")
    wanted = set(np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist())
    number = -1
    for number, document in enumerate(sources(prefix, exclude)):
        if number in wanted:
            ids = dataset.tokens(number).tolist()[:-1]
            if ids != tokenizer.encode(document.text):
                raise UserError(f"document {number} of {prefix} is not line {document.line} of its source: the shards "
                                "changed, or --exclude is missing")
            yield number, tokenizer.decode(ids), document.text
            if number == len(dataset) - 1:
                return
    if number < len(dataset) - 1:
        raise UserError(f"the sources of {prefix} hold {number + 1} documents, it has {len(dataset)}: they changed")


def side_by_side(left: str, right: str, width: int = 58, rows: int = 4) -> str:
    """The beginnings of two texts in two columns."""
    columns = [[repr(t[i : i + width])[1:-1][:width] for i in range(0, width * rows, width)] for t in (left, right)]
    return "\n".join(f"  {a:<{width}} | {b}" for a, b in zip(*columns, strict=True) if a or b)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="prefixes of .bin/.idx pairs")
    parser.add_argument("--samples", type=int, default=0, help="documents to show beside their source, token by token "
                                                               "compared; needs the tokenizer")
    parser.add_argument("--exclude", help="the list that data_prep.tokenize was given")
    add_tokenizer_arguments(parser, required=False)
    a = parser.parse_args()
    if a.samples and a.tokenizer_type is None:
        raise UserError("--samples needs the tokenizer: give --tokenizer-type and its files")
    tokenizer = load_tokenizer(**tokenizer_arguments(a)) if a.samples else None
    for prefix in a.prefix:
        found = verify(prefix)
        if tokenizer is not None:
            print(f"{prefix}: tokens decoded | source")
            for number, decoded, text in compare(prefix, tokenizer, a.samples, a.exclude):
                print(f"document {number}: {'same text' if decoded == text else 'same tokens, text normalised'}\n"
                      f"{side_by_side(decoded, text)}")
        print(f"{prefix}: {found['documents']:,} documents, {found['tokens']:,} tokens, all checks passed")


if __name__ == "__main__":
    run_cli(main)
