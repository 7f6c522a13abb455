"""Check an indexed dataset: structure, checksums, token range, the end of every document.

    python -m data_prep.verify data/train
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from data_prep.errors import UserError, run_cli
from data_prep.indexed import IndexedDataset


def verify(prefix: str) -> dict[str, int]:
    """Raises UserError at the first fault; returns documents and tokens."""
    dataset = IndexedDataset(prefix)
    manifest_path = Path(prefix + ".json")
    if not manifest_path.is_file():
        raise UserError(f"{manifest_path} is missing: it holds the checksums that data_prep.tokenize wrote")
    try:
        manifest = json.loads(manifest_path.read_text())
    except ValueError as error:
        raise UserError(f"{manifest_path} is damaged ({error}): make the dataset again") from error
    expected = np.concatenate([[0], np.cumsum(dataset.lengths.astype(np.int64))]) * dataset.dtype.itemsize
    if not np.array_equal(dataset.offsets, expected[:-1]):
        raise UserError(f"{prefix}.idx is damaged: its offsets do not follow from its lengths")
    for ending in ("bin", "idx"):
        if _sha256(Path(f"{prefix}.{ending}")) != manifest["sha256"][ending]:
            raise UserError(f"{prefix}.{ending} differs from its checksum in {manifest_path}: make it again")
    if len(dataset.data) and int(dataset.data.max()) >= manifest["vocab_size"]:
        raise UserError(f"{prefix}.bin holds token {int(dataset.data.max())}, the vocabulary ends at "
                        f"{manifest['vocab_size'] - 1}: it was made with another tokenizer")
    ends = np.cumsum(dataset.lengths.astype(np.int64)) - 1
    wrong = np.flatnonzero(dataset.data[ends] != manifest["eod"])
    if len(wrong):
        raise UserError(f"document {int(wrong[0])} of {prefix} does not end with token {manifest['eod']}")
    return {"documents": len(dataset), "tokens": int(dataset.lengths.sum(dtype=np.int64))}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="prefixes of .bin/.idx pairs")
    for prefix in parser.parse_args().prefix:
        found = verify(prefix)
        print(f"{prefix}: {found['documents']:,} documents, {found['tokens']:,} tokens, all checks passed")


if __name__ == "__main__":
    run_cli(main)
