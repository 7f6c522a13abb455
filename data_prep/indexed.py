"""The Megatron indexed dataset format: NAME.bin holds token ids, NAME.idx where each sequence and document begins.

idx, little-endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code (4 int32, 8 uint16), uint64 sequences,
uint64 document boundaries; int32 length and int64 byte offset of every sequence; int64 boundaries (first 0).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits (vocabulary below 65,536), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65536 else np.int32)


def write_index(path: Path, lengths: Iterable[np.ndarray], dtype: np.dtype, documents: int) -> None:
    """The .idx of sequences that are one document each. lengths: parts of the int32 [documents], tokens of each."""
    with open(path, "wb") as sizes, open(path, "rb+") as starts, open(path, "rb+") as bounds:
        sizes.write(MAGIC + struct.pack("<QBQQ", 1, CODES[dtype], documents, documents + 1))
        starts.seek(sizes.tell() + 4 * documents)
        bounds.seek(sizes.tell() + 12 * documents)
        bounds.write(bytes(8))                                    # boundaries begin with 0
        offset = number = 0
        for part in lengths:
            ends = np.cumsum(part.astype(np.int64) * dtype.itemsize) + offset
            sizes.write(part.astype(np.int32).tobytes())
            starts.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes() if len(part) else b"")
            bounds.write(np.arange(number + 1, number + len(part) + 1, dtype=np.int64).tobytes())
            number += len(part)
            offset = int(ends[-1]) if len(part) else offset
        for file in (sizes, starts, bounds):
            file.flush()
        os.fsync(sizes.fileno())


class IndexedDataset:
    """Read access. tokens(i): the ids of document i."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index, data = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for file in (index, data):
            if not file.is_file():
                raise UserError(f"{file} is missing: give the prefix of a .bin/.idx pair")
        head = len(MAGIC) + struct.calcsize("<QBQQ")
        with open(index, "rb") as file:
            start = file.read(head)
        if start[: len(MAGIC)] != MAGIC or len(start) < head:
            raise UserError(f"{index} is not a Megatron index: make it again with data_prep.tokenize")
        _, code, count, documents = struct.unpack_from("<QBQQ", start, len(MAGIC))
        if code not in DTYPES or index.stat().st_size != head + 12 * count + 8 * documents:
            raise UserError(f"{index} is damaged (its size does not fit its header): make it again")
        self.dtype = DTYPES[code]
        raw = np.memmap(index, np.uint8, "r")
        self.lengths = np.frombuffer(raw, np.int32, count, head)
        self.offsets = np.frombuffer(raw, np.int64, count, head + 4 * count)
        self.boundaries = np.frombuffer(raw, np.int64, documents, head + 12 * count)
        size = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if count else 0
        if data.stat().st_size != size:
            raise UserError(f"{data} has {data.stat().st_size} bytes, its index describes {size}: make both again")
        self.data = np.memmap(data, self.dtype, "r") if size else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int) -> np.ndarray:
        start = self.offsets[document] // self.dtype.itemsize
        return np.asarray(self.data[start : start + self.lengths[document]])
