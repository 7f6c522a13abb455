"""What an unfinished run has done so far, in the folder PREFIX.work, so that a killed one goes on where it was.

run.json         what the run is about: a run with other inputs, tokenizer or options does not go on with it
shard-S.A-R.jsonl  journal of shard S by process R of attempt A: a line a finished chunk, one at the end of the shard
segment-A-R-P.bin  tokens and document lengths, in the order in which worker P of process R finished them

A line is written when what it tells of is in its segment. A torn last line, or one whose tokens are not what they were,
counts for nothing. Files of earlier attempts are only read.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from data_prep.errors import UserError


@dataclass
class ShardState:
    """chunks: journal line (JSON) by number. end: what is known once the shard was read to its end."""

    chunks: dict[int, bytes] = field(default_factory=dict)
    end: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        return self.end is not None and all(number in self.chunks for number in range(self.end["chunks"]))


class Work:
    """The folder, opened by the first process of a run. attempt: its number, new with every start."""

    def __init__(self, prefix: str) -> None:
        self.folder = Path(prefix + ".work")
        self.run_file = self.folder / "run.json"
        self.resumed, self.attempt = False, 0
        self._lock: IO[str] | None = None

    def open(self, about: dict[str, Any], overwrite: bool) -> dict[str, Any]:
        """Returns `about` as the run was started with. Keys that begin with "_" may differ from this start's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing {self.folder}: wait for it, or give another --output-prefix") \
                from error
        started = self._started()
        if started is not None:
            other = sorted(k for k in {*about, *started} if k[0] != "_" and about.get(k) != started.get(k))
            if other and not overwrite:
                raise UserError(f"{self.folder} holds an unfinished run with other {' and '.join(other)}: finish it "
                                "with its own options, or give --overwrite to start again")
            self.resumed = not other
        if not self.resumed:
            self._empty()
            started = about
            temporary = self.folder / "run.json.writing"
            temporary.write_bytes(orjson.dumps(about))
            temporary.replace(self.run_file)
        named = (re.match(r"(?:segment-|shard-\d+\.)(\d+)-", path.name) for path in self.folder.iterdir())
        numbers = [int(match[1]) for match in named if match]
        self.attempt = max(numbers, default=0) + 1
        return started                                            # type: ignore[return-value]

    def _started(self) -> dict[str, Any] | None:
        try:
            return orjson.loads(self.run_file.read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return None

    def _empty(self) -> None:
        self.run_file.unlink(missing_ok=True)                     # first: without it the rest counts for nothing
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def remove(self) -> None:
        self.run_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def remove_if_nothing_is_done(self) -> None:
        if not any(path.stat().st_size for path in self.folder.glob("shard-*")):
            self.remove()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def load(self, shards: int) -> list[ShardState]:
        """The state of every shard, from all journals; later attempts count more."""
        states = [ShardState() for _ in range(shards)]
        for path in sorted(self.folder.glob("shard-*.jsonl"), key=lambda p: p.name.split(".")[1]):
            state = states[int(path.name[6:11])]
            for line in path.read_bytes().split(b"\n")[:-1]:
                record = orjson.loads(line)
                if "end" in record:
                    state.end = record["end"]
                else:
                    state.chunks[record["number"]] = line
        return states


class Journals:
    """This process's journals of the shards it works on."""

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self.folder, self.ending = folder, f"{attempt:04d}-{rank:05d}.jsonl"
        self.files: dict[int, IO[bytes]] = {}
        self.written: list[tuple[int, bytes]] = []

    def append(self, shard: int, line: bytes) -> None:
        if shard not in self.files:
            self.files[shard] = open(self.folder / f"shard-{shard:05d}.{self.ending}", "ab", buffering=0)
        self.files[shard].write(line + b"\n")
        self.written.append((shard, line))

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def intact(folder: Path, line: bytes, itemsize: int) -> bool:
    """Whether the tokens and lengths of a journal line are in their segment as they were written."""
    record = orjson.loads(line)
    try:
        with open(folder / record["segment"], "rb") as file:
            for offset, documents, tokens, sha256 in record["pieces"].values():
                file.seek(offset)
                if hashlib.sha256(file.read(tokens * itemsize)).hexdigest() != sha256:
                    return False
                if np.frombuffer(file.read(4 * documents), np.int32).sum() != tokens:
                    return False
    except OSError:
        return False
    return True


def lengths_of(folder: Path, pieces: list[tuple[str, int, int, int]], itemsize: int) -> Iterator[np.ndarray]:
    """int32 document lengths of (segment, offset, documents, tokens) in order."""
    files: dict[str, IO[bytes]] = {}
    for segment, offset, documents, tokens in pieces:
        if segment not in files:
            files[segment] = open(folder / segment, "rb")
        files[segment].seek(offset + tokens * itemsize)
        yield np.frombuffer(files[segment].read(4 * documents), np.int32)
    for file in files.values():
        file.close()
