"""The work of one worker: a chunk of lines becomes tokens in the worker's segment and a line for the journal."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from data_prep.indexed import token_dtype
from data_prep.shards import BadRecord, Chunk, Document, parse_chunk
from data_prep.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Settings:
    """What every worker of a process is told. segment: name of its segment but for the worker's own number."""

    tokenizer: dict[str, str | None]
    split_by_component: bool
    folder: Path
    segment: str


@dataclass(frozen=True)
class Task:
    """A chunk of shard number `shard`; the documents of the lines in `excluded` are left out."""

    shard: int
    chunk: Chunk
    excluded: frozenset[int] = field(default_factory=frozenset)


def checksum(chunk: Chunk) -> int:
    return zlib.crc32(chunk.data, zlib.crc32(repr(chunk.too_long).encode()))


def dataset_name(component: str) -> str:
    """The part of a file name that stands for a component."""
    return re.sub(r"[^A-Za-z0-9]+", "", component) or "unnamed"


class Encoder:
    """Encodes tasks one by one and appends to a segment of its own."""

    def __init__(self, settings: Settings) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.split = settings.split_by_component
        self.tokenizer = load_tokenizer(**settings.tokenizer)      # type: ignore[arg-type]
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.name = f"{settings.segment}-{os.getpid()}.bin"
        self.file = open(settings.folder / self.name, "ab", buffering=0)

    def __call__(self, task: Task) -> tuple[int, bytes]:
        """(shard, journal line)."""
        record = {"number": task.chunk.number, "crc": checksum(task.chunk), "position": task.chunk.position,
                  "segment": self.name, "pieces": {}, "components": {}, "rejects": [], "empty": 0, "excluded": 0}
        documents = self._documents(task, record)
        ids, counts = self.tokenizer.encode_batch([d.text for d in documents])
        lengths = (counts + 1).astype(np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        tokens = np.full(len(ids) + len(documents), self.tokenizer.eod, self.dtype)
        inside = np.ones(len(tokens), bool)
        inside[ends - 1] = False
        tokens[inside] = ids
        self._count(documents, lengths, record["components"])
        self._write(documents, lengths, ends, tokens, record["pieces"])
        return task.shard, orjson.dumps(record)

    def _documents(self, task: Task, record: dict) -> list[Document]:
        documents = []
        for found in parse_chunk(task.chunk):
            if isinstance(found, BadRecord):
                record["rejects"].append([found.line, found.reason])
            elif not found.text:
                record["empty"] += 1
            elif found.line in task.excluded:
                record["excluded"] += 1
            else:
                documents.append(found)
        if self.split:
            documents.sort(key=lambda d: dataset_name(d.component))   # stable: within a dataset the order stays
        return documents

    def _count(self, documents: list[Document], lengths: np.ndarray, components: dict) -> None:
        """components: name → [documents, tokens, bytes of text, documents by bit length of their tokens]."""
        of = np.array([d.component for d in documents])
        sizes = np.array([len(d.text.encode()) for d in documents], np.int64)
        for name in sorted({d.component for d in documents}):
            mine = of == name
            histogram = np.bincount(np.frexp(lengths[mine])[1])
            components[name] = [int(mine.sum()), int(lengths[mine].sum(dtype=np.int64)), int(sizes[mine].sum()),
                                histogram.tolist()]

    def _write(self, documents: list[Document], lengths: np.ndarray, ends: np.ndarray, tokens: np.ndarray,
               pieces: dict) -> None:
        """pieces: dataset → [offset in the segment, documents, tokens, sha256]; the lengths follow the tokens."""
        names = [dataset_name(d.component) if self.split else "" for d in documents]
        first = 0
        while first < len(names):
            last = first + names.count(names[first])
            start, end = (int(ends[first - 1]) if first else 0), int(ends[last - 1])
            data = tokens[start:end].tobytes()
            pieces[names[first]] = [self.file.tell(), last - first, end - start, hashlib.sha256(data).hexdigest()]
            write_all(self.file.fileno(), data + lengths[first:last].tobytes())
            first = last


def write_all(descriptor: int, data: bytes) -> None:
    """os.write writes less than asked for on a disk that fills up, and the rest of it raises."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


_encoder: Encoder | None = None


def start(settings: Settings) -> None:
    """Makes this process a worker."""
    global _encoder
    _encoder = Encoder(settings)


def encode(task: Task) -> tuple[int, bytes]:
    return _encoder(task)                                         # type: ignore[misc]


def close() -> None:
    """Closes the segment of this process, if it is a worker: on NFS others see it only then."""
    global _encoder
    if _encoder is not None:
        _encoder.file.close()
        _encoder = None
