"""Reading Pile-format shards: one JSON object a line with a "text" field, plain, gzip or zstd.

A shard is cut into chunks of whole lines, the unit of work of every program here. Where a chunk ends follows from the
shard's text alone, so that a run that is resumed, or has another number of workers, sees the same chunks.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import orjson
import zstandard

from data_prep.errors import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 32 << 20
FEED = 1 << 17                                   # bytes read at once; a frame of zstd text grows about threefold


@dataclass(frozen=True)
class Document:
    """text, its component (meta.pile_set_name, "" without one) and where it stood."""

    text: str
    component: str
    line: int


@dataclass(frozen=True)
class BadRecord:
    """A line that is no document, and why. line 0: the shard as a whole."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}: {self.reason}" if self.line else self.reason


class DamagedShard(UserError):
    """A shard that can be read up to some line and no further."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive whole lines of a shard.

    number: from 0. first_line: from 1. data: the lines; one longer than allowed is blank here and stands in `too_long`
    as (line, bytes). position: bytes of the file read when the chunk was complete.
    """

    path: str
    number: int
    first_line: int
    data: bytes
    position: int
    max_line_bytes: int = MAX_LINE_BYTES
    too_long: list[tuple[int, int]] = field(default_factory=list)


class Shard:
    """One shard being read from its start.

    After `chunks` is exhausted: lines, the number of its lines; sha256, of the file. Both are of what was read where
    `chunks` raised DamagedShard.
    """

    def __init__(self, path: str, chunk_bytes: int = CHUNK_BYTES, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        if not path.endswith(ENDINGS):
            raise UserError(f"{path} is no shard: expected a name ending in .jsonl, .jsonl.gz or .jsonl.zst")
        self.path, self.chunk_bytes, self.max_line_bytes = path, chunk_bytes, max_line_bytes
        self.lines = self.position = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        """Raises DamagedShard, after all whole lines before the damage, or UserError where nothing can be read."""
        damage = None
        cutter = _Cutter(self)
        try:
            with open(self.path, "rb") as raw:
                try:
                    for piece in self._pieces(raw):
                        yield from cutter.add(piece)
                except (zstandard.ZstdError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                    damage = error
                yield from cutter.rest(whole=damage is None)
                for block in iter(lambda: self._read(raw), b""):      # what the damage left unread, for the checksum
                    del block
        except FileNotFoundError as error:
            raise UserError(f"the shard {self.path} is missing: correct the path") from error
        except OSError as error:
            raise UserError(f"cannot read the shard {self.path}: {error.strerror or error}") from error
        if damage is not None:
            raise DamagedShard(f"the shard {self.path} is damaged after line {self.lines} "
                               f"({' '.join(str(damage).split())}): fetch it again") from damage

    def _read(self, raw: IO[bytes]) -> bytes:
        data = raw.read(FEED)
        self._digest.update(data)
        self.position += len(data)
        return data

    def _pieces(self, raw: IO[bytes]) -> Iterator[bytes]:
        """The decompressed text, in pieces of any size. Both formats allow several frames in a row."""
        plain = self.path.endswith(".jsonl")
        decompressor = None
        while data := self._read(raw):
            while data:
                if plain:
                    piece, data = data, b""
                else:
                    decompressor = decompressor or self._decompressor()
                    piece = decompressor.decompress(data)
                    data = b""
                    if decompressor.eof:
                        data, decompressor = decompressor.unused_data, None
                        if self.path.endswith(".gz"):
                            data = data.lstrip(b"\0")                 # gzip files may be padded with zeros
                yield piece
        if decompressor is not None:
            raise EOFError("its last frame is truncated")

    def _decompressor(self) -> zlib._Decompress | zstandard.ZstdDecompressionObj:
        if self.path.endswith(".gz"):
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


class _Cutter:
    """Cuts text into chunks: one ends with the first line end at or after `chunk_bytes`."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.limit = shard, shard.chunk_bytes + shard.max_line_bytes
        self.buffer = bytearray()
        self.number = self.searched = self.skipped = 0
        self.too_long: list[tuple[int, int]] = []

    def add(self, piece: bytes) -> Iterator[Chunk]:
        if self.skipped:
            end = piece.find(b"\n")
            self.skipped += len(piece) if end < 0 else end
            if end < 0:
                return
            self._end_of_long_line()
            piece = piece[end:]
        self.buffer += piece
        while len(self.buffer) >= self.shard.chunk_bytes:
            end = self.buffer.find(b"\n", max(self.shard.chunk_bytes - 1, self.searched)) + 1
            if not end:
                self.searched = len(self.buffer)
                self._skip_long_line()
                return
            yield self._cut(end)

    def rest(self, whole: bool) -> Iterator[Chunk]:
        """What is left at the end of the text; only `whole` lines of a damaged one."""
        if self.skipped and whole:
            self._end_of_long_line()
            self.buffer += b"\n"
        end = len(self.buffer) if whole else self.buffer.rfind(b"\n") + 1
        if end:
            yield self._cut(end)

    def _skip_long_line(self) -> None:
        """Lets go of a line without an end that is too long already, so that memory stays bounded."""
        if len(self.buffer) > self.limit:
            start = self.buffer.rfind(b"\n") + 1
            self.skipped = len(self.buffer) - start
            del self.buffer[start:]
            self.searched = 0

    def _end_of_long_line(self) -> None:
        self.too_long.append((self.shard.lines + self.buffer.count(b"\n") + 1, self.skipped))
        self.skipped = 0

    def _cut(self, end: int) -> Chunk:
        data = bytes(memoryview(self.buffer)[:end])
        del self.buffer[:end]
        chunk = Chunk(self.shard.path, self.number, self.shard.lines + 1, data, self.shard.position,
                      self.shard.max_line_bytes, self.too_long)
        self.number, self.searched, self.too_long = self.number + 1, 0, []
        self.shard.lines += data.count(b"\n") + (not data.endswith(b"\n"))
        return chunk


def parse_chunk(chunk: Chunk) -> Iterator[Document | BadRecord]:
    """The records of the lines that are not blank, in order."""
    long = dict(chunk.too_long)
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first_line):
        size = long.get(number, len(line))
        if size > chunk.max_line_bytes:
            yield BadRecord(chunk.path, number, f"the line has {size:,} bytes, more than "
                                                f"--max-line-megabytes {chunk.max_line_bytes >> 20}")
        elif line and not line.isspace():
            yield _parse(line, chunk.path, number)


def read_shard(path: str | Path) -> Iterator[Document | BadRecord]:
    """Documents of a shard in order, bad lines as `BadRecord`. Raises as `Shard.chunks`."""
    for chunk in Shard(str(path)).chunks():
        yield from parse_chunk(chunk)


def _parse(line: bytes, path: str, number: int) -> Document | BadRecord:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_slowly(line)            # what orjson refuses, json may take (NaN), or tell better
        if isinstance(record, str):
            return BadRecord(path, number, record)
    if not isinstance(record, dict) or "text" not in record:
        return BadRecord(path, number, 'no "text" field')
    text, meta = record["text"], record.get("meta")
    if not isinstance(text, str):
        return BadRecord(path, number, f'"text" is {type(text).__name__}, not a string')
    component = meta.get("pile_set_name", "") if isinstance(meta, dict) else ""
    return Document(text, str(component), number)


def _parse_slowly(line: bytes) -> object:
    """The record by the standard library's parser; a string says what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start}"
    except UnicodeEncodeError:
        return "the text holds an unpaired surrogate"
    except (ValueError, RecursionError) as error:
        return f"malformed JSON ({error})"
    return record if isinstance(record, dict) else []
