"""Reading Pile-format shards: one JSON object a line with a "text" field, plain, gzip or zstd."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from data_prep.errors import UserError


@dataclass(frozen=True)
class Document:
    """text, its component (meta.pile_set_name, "" without one) and where it stood."""

    text: str
    component: str
    line: int


@dataclass(frozen=True)
class BadRecord:
    """A line that is no document, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}: {self.reason}"


class DamagedShard(UserError):
    """A shard that can be read up to some line and no further."""


@dataclass(frozen=True)
class Lines:
    """Consecutive raw lines of a shard. first: number of the first, from 1; position: bytes of the file read so far."""

    path: str
    first: int
    lines: list[bytes]
    position: int


def read_lines(path: str | Path, batch_bytes: int = 1 << 19) -> Iterator[Lines]:
    """The lines of a shard in batches of about `batch_bytes`.

    Raises DamagedShard, after all whole lines before the damage, or UserError for a shard that cannot be read at all.
    """
    number, size, lines = 0, 0, []
    damage: Exception | None = None
    try:
        with open(path, "rb") as raw, _decompressed(raw, str(path)) as stream:
            try:
                for line in stream:
                    number += 1
                    lines.append(line)
                    size += len(line)
                    if size >= batch_bytes:
                        yield Lines(str(path), number - len(lines) + 1, lines, raw.tell())
                        size, lines = 0, []
            except (zstandard.ZstdError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                damage = error
            if lines:
                yield Lines(str(path), number - len(lines) + 1, lines, raw.tell())
    except FileNotFoundError as error:
        raise UserError(f"the shard {path} is missing: correct the path") from error
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror or error}") from error
    if damage is not None:
        raise DamagedShard(f"the shard {path} is damaged after line {number} ({' '.join(str(damage).split())}): "
                           "fetch it again") from damage


def parse_lines(batch: Lines) -> Iterator[Document | BadRecord]:
    """The records of the lines that are not blank."""
    for number, line in enumerate(batch.lines, batch.first):
        if line.strip():
            yield _parse(line, batch.path, number)


def read_shard(path: str | Path) -> Iterator[Document | BadRecord]:
    """Documents of a shard in order, bad lines as `BadRecord`. Raises as `read_lines`."""
    for batch in read_lines(path):
        yield from parse_lines(batch)


def _parse(line: bytes, path: str, number: int) -> Document | BadRecord:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(path, number, f"invalid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRecord(path, number, f"malformed JSON ({error})")
    if not isinstance(record, dict) or "text" not in record:
        return BadRecord(path, number, 'no "text" field')
    if not isinstance(record["text"], str):
        return BadRecord(path, number, f'"text" is {type(record["text"]).__name__}, not a string')
    try:
        record["text"].encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(path, number, '"text" holds an unpaired surrogate')
    meta = record.get("meta")
    component = meta.get("pile_set_name", "") if isinstance(meta, dict) else ""
    return Document(record["text"], str(component), number)


def _decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith(".jsonl"):
        return raw
    if name.endswith(".jsonl.gz"):
        return gzip.GzipFile(fileobj=raw)                      # type: ignore[return-value]
    if name.endswith(".jsonl.zst"):
        return io.BufferedReader(_WholeFrames(raw), 1 << 20)
    raise UserError(f"{name} is no shard: expected a name ending in .jsonl, .jsonl.gz or .jsonl.zst")


class _WholeFrames(io.RawIOBase):
    """zstd reader that reports a truncated last frame, which the library's own stream reader ends silently."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.decompressor: zstandard.ZstdDecompressionObj | None = None
        self.pending = memoryview(b"")
        self.compressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:   # type: ignore[override]
        while not self.pending:
            if not self.compressed:
                self.compressed = self.raw.read(1 << 16)
            if not self.compressed:
                if self.decompressor is not None:
                    raise zstandard.ZstdError("the last zstd frame is truncated")
                return 0
            if self.decompressor is None:
                self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self.pending = memoryview(self.decompressor.decompress(self.compressed))
            self.compressed = b""
            if self.decompressor.eof:
                self.compressed, self.decompressor = self.decompressor.unused_data, None
        count = min(len(buffer), len(self.pending))
        buffer[:count], self.pending = self.pending[:count], self.pending[count:]
        return count
