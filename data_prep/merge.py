"""The end of a run: segments become PREFIX.bin, .idx and .json together, or nothing.

Where every piece of a segment belongs in PREFIX.bin follows from the journals, so all processes copy their own pieces
at once, inside the kernel (copy_file_range; a shared extent where the file system can); only the lengths of the
documents go through one process, which writes the index.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_prep.encode import dataset_name, write_all
from data_prep.errors import UserError
from data_prep.indexed import write_index
from data_prep.journal import ShardState, lengths_of
from data_prep.ranks import Alone

NOT_IN_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}
BLOCK = 1 << 20


@dataclass
class Layout:
    """One dataset to be: its pieces in order as (segment, offset, documents, tokens) and what its manifest tells."""

    pieces: list[tuple[str, int, int, int]] = field(default_factory=list)
    checksums: list[tuple[int, str]] = field(default_factory=list)
    components: dict[str, Counter] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        return sum(piece[2] for piece in self.pieces)


@dataclass(frozen=True)
class Copy:
    """bytes [source, source + size) of a segment go to `target` of a file."""

    segment: str
    source: int
    size: int
    file: str
    target: int


def lay_out(states: Iterable[ShardState], split: bool) -> dict[str, Layout]:
    """Datasets by name ("" for the only one), from the journals of all shards in order."""
    layouts: dict[str, Layout] = {}
    for state in states:
        for number in range(state.end["chunks"]):                 # type: ignore[index]
            record = orjson.loads(state.chunks[number])
            for name, (offset, documents, tokens, sha256) in record["pieces"].items():
                layout = layouts.setdefault(name, Layout())
                layout.pieces.append((record["segment"], offset, documents, tokens))
                layout.checksums.append((documents, sha256))
            for component, (documents, tokens, size, histogram) in record["components"].items():
                counts = layouts[dataset_name(component) if split else ""].components.setdefault(component, Counter())
                counts.update({"documents": documents, "tokens": tokens, "bytes": size})
                counts.update({("log2", bits): n for bits, n in enumerate(histogram) if n})
    return layouts


def merge(layouts: dict[str, Layout] | None, folder: Path, dtype: np.dtype, ranks: Alone, threads: int) -> None:
    """All processes together write folder/NAME.bin, the first one NAME.idx too; layouts: given on the first."""
    plan: list[list[Copy]] | None = None
    if ranks.rank == 0:
        plan = [[] for _ in range(ranks.size)]
        for name, layout in layouts.items():                      # type: ignore[union-attr]
            target = 0
            for segment, offset, _, tokens in layout.pieces:
                # Whoever wrote a segment has it in its page cache.
                writer = int(segment.split("-")[2]) % ranks.size
                plan[writer].append(Copy(segment, offset, tokens * dtype.itemsize, f"{name}.bin", target))
                target += tokens * dtype.itemsize
            with open(folder / f"{name}.bin", "wb") as file:
                file.truncate(target)
    copy_all(ranks.scatter(plan), folder, threads)
    if ranks.rank == 0:
        for name, layout in layouts.items():                      # type: ignore[union-attr]
            write_index(folder / f"{name}.idx", lengths_of(folder, layout.pieces, dtype.itemsize), dtype,
                        layout.documents)
    ranks.gather(None)


def copy_all(copies: list[Copy], folder: Path, threads: int) -> None:
    descriptors: dict[str, int] = {}
    try:
        for copy in copies:
            for name, flags in ((copy.segment, os.O_RDONLY), (copy.file, os.O_WRONLY)):
                if name not in descriptors:
                    descriptors[name] = os.open(folder / name, flags)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda c: copy_range(descriptors[c.segment], descriptors[c.file], c), copies))
        for name in {copy.file for copy in copies}:
            os.fsync(descriptors[name])
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def copy_range(source: int, target: int, copy: Copy) -> None:
    """Inside the kernel where the file system can."""
    done = 0
    while done < copy.size:
        try:
            count = os.copy_file_range(source, target, copy.size - done, copy.source + done, copy.target + done)
        except OSError as error:
            if error.errno not in NOT_IN_KERNEL:
                raise
            data = os.pread(source, min(BLOCK, copy.size - done), copy.source + done)
            count = os.pwrite(target, data, copy.target + done)
        if count == 0:
            raise OSError(errno.EIO, f"{copy.segment} is shorter than its journal says")
        done += count


def manifest(layout: Layout, index: Path, dtype: np.dtype, facts: dict[str, Any]) -> dict[str, Any]:
    """What PREFIX.json tells. sha256.bin: (documents, checksum of their tokens) for every piece in order."""
    components = {}
    for name, counts in sorted(layout.components.items()):
        bits = sorted(key[1] for key in counts if isinstance(key, tuple))
        components[name] = {
            **{key: counts[key] for key in ("documents", "tokens", "bytes")},
            "bytes_per_token": round(counts["bytes"] / counts["tokens"], 4),
            # documents of at least 2^(bits-1) and below 2^bits tokens, end-of-document token included
            "documents_by_tokens": {f"{1 << b - 1}-{(1 << b) - 1}": counts["log2", b] for b in bits}}
    totals = {key: sum(c[key] for c in components.values()) for key in ("documents", "tokens", "bytes")}
    with open(index, "rb") as file:
        index_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"documents": totals["documents"], "tokens": totals["tokens"], "text_bytes": totals["bytes"],
            "components": components, "dtype": dtype.name, **facts,
            "sha256": {"idx": index_sha256, "bin": layout.checksums}}


def finals(prefix: str) -> list[Path]:
    return [Path(prefix + ending) for ending in (".bin", ".json", ".idx")]


def check_absent(prefix: str, split: bool) -> None:
    """Refuses to replace a dataset that is there."""
    first = Path(prefix)
    existing = [p for p in finals(prefix) if p.exists()] if not split else \
        [p for p in sorted(first.parent.glob(f"{first.name}_*")) if p.suffix in (".bin", ".idx")]
    if existing:
        raise UserError(f"{existing[0]} exists: give --overwrite or another --output-prefix")


def publish(folder: Path, name: str, prefix: str, content: dict[str, Any]) -> None:
    """The index goes first and comes last: whoever finds an index finds what belongs to it."""
    descriptor = os.open(folder / f"{name}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(descriptor, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    files = finals(prefix)
    files[2].unlink(missing_ok=True)
    for final in files:
        os.replace(folder / f"{name}{final.suffix}", final)
