"""A tokenizing run of one or many processes: who does what, what is done already, and what is rejected."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import orjson

from data_prep import encode
from data_prep.errors import UserError
from data_prep.indexed import token_dtype
from data_prep.journal import Journals, ShardState, Work, intact
from data_prep.merge import check_absent, lay_out, manifest, merge, publish
from data_prep.pool import mapped
from data_prep.progress import Progress
from data_prep.ranks import Alone
from data_prep.shards import CHUNK_BYTES, MAX_LINE_BYTES, BadRecord, DamagedShard, Shard
from data_prep.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Options:
    """inputs: shards in order. max_bad: rejects allowed in all (0: none). chunk_bytes: 0, by the size of the inputs."""

    inputs: list[str]
    output_prefix: str
    tokenizer: dict[str, str | None]
    workers: int = 1
    max_bad: int = 0
    overwrite: bool = False
    split_by_component: bool = False
    exclude: str | None = None
    max_line_bytes: int = MAX_LINE_BYTES
    chunk_bytes: int = 0


class Share:
    """The part of the inputs' bytes, laid in a row, that is this process's. A chunk belongs to where it ends."""

    def __init__(self, sizes: list[int], rank: int, size: int) -> None:
        weights = [max(s, 1) for s in sizes]
        self.before = [sum(weights[:i]) for i in range(len(weights) + 1)]
        self.start, self.end = (self.before[-1] * r // size for r in (rank, rank + 1))

    def touches(self, shard: int) -> bool:
        return self.before[shard] < self.end and self.before[shard + 1] > self.start

    def place(self, shard: int, position: int) -> int:
        """-1: before this share, 0: in it, 1: after it."""
        at = min(self.before[shard] + max(position - 1, 0), self.before[shard + 1] - 1)
        return (at >= self.end) - (at < self.start)

    def ends(self, shard: int) -> bool:
        """Whether the end of the shard is in this share."""
        return self.start < self.before[shard + 1] <= self.end


class Run:
    """One process's part of a run."""

    def __init__(self, options: Options, ranks: Alone) -> None:
        self.options, self.ranks = options, ranks
        # The workers load the backend; this takes longer.
        self.tokenizer = load_tokenizer(**{**options.tokenizer, "backend": "reference"})    # type: ignore[arg-type]
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        for path in options.inputs:
            if not os.access(path, os.R_OK):
                raise UserError(f"the shard {path} is missing or unreadable: correct the path or its permissions")
        self.sizes = [os.path.getsize(path) for path in options.inputs]
        self.excluded = read_excluded(options.exclude, options.inputs)
        self.share = Share(self.sizes, ranks.rank, ranks.size)
        self.work = Work(options.output_prefix)
        self.rejects: list[BadRecord] = []                        # of this process's share, and duplicate shards
        self.states: list[ShardState] = []

    def run(self) -> dict[str, dict]:
        """Everything; returns the manifests by prefix on the first process, elsewhere nothing."""
        try:
            self.open()
            self.states, finished = self.check(self.states)
            self.encode(finished)
            layouts = self.collect()
            merge(layouts, self.work.folder, self.dtype, self.ranks, self.options.workers)
            manifests = self.publish(layouts) if layouts is not None else {}
            return manifests
        except OSError as error:
            raise UserError(f"cannot write {self.options.output_prefix}: {error.strerror or error}; nothing was "
                            "changed, and the same command goes on from where it was") from error
        finally:
            if self.ranks.rank == 0 and self.work.attempt and self.work.run_file.exists():
                self.work.remove_if_nothing_is_done()
            self.work.close()

    def open(self) -> None:
        o = self.options
        total = sum(self.sizes)
        # About 8,000 chunks, of 1 to 8 MiB: journals stay small, and little is lost with a killed worker.
        chunk_bytes = o.chunk_bytes or CHUNK_BYTES << min(3, max(0, (total >> 13) // CHUNK_BYTES).bit_length())
        about = {"inputs": o.inputs, "tokenizer": self.tokenizer.fingerprint(), "end of document": self.tokenizer.eod,
                 "--split-by-component": o.split_by_component, "--max-line-megabytes": o.max_line_bytes,
                 "--exclude": file_sha256(o.exclude) if o.exclude else None, "_chunk_bytes": chunk_bytes}
        if self.ranks.rank == 0:
            if not o.overwrite and not self.work.run_file.exists():
                check_absent(o.output_prefix, o.split_by_component)
            about = self.work.open(about, o.overwrite)
            self.states = self.work.load(len(o.inputs))
        about, self.work.attempt, self.states = self.ranks.bcast((about, self.work.attempt, self.states))
        self.chunk_bytes = about["_chunk_bytes"]

    def check(self, states: list[ShardState]) -> tuple[list[ShardState], set[int]]:
        """(states without what is not intact, shards that need not be read). All processes check a part each."""
        rank, size = self.ranks.rank, self.ranks.size
        mine = [s for s in range(len(states)) if s % size == rank]
        shas: dict[int, str] = {}
        with ThreadPoolExecutor(self.options.workers) as pool:
            lines = [(s, n, line) for s in mine for n, line in states[s].chunks.items()]
            whole = pool.map(lambda x: intact(self.work.folder, x[2], self.dtype.itemsize), lines)
            broken = [(s, n) for (s, n, _), good in zip(lines, whole, strict=True) if not good]
            same_size = [s for s in mine if self.sizes.count(self.sizes[s]) > 1]
            hashed = sorted({s for s in mine if states[s].end is not None} | set(same_size))
            shas.update(zip(hashed, pool.map(lambda s: file_sha256(self.options.inputs[s]), hashed), strict=True))
        for s, n in [item for part in self.ranks.allgather(broken) for item in part]:
            del states[s].chunks[n]
        for part in self.ranks.allgather(shas):
            shas.update(part)
        self.duplicates = self.find_duplicates(shas)
        finished = {s for s, state in enumerate(states) if state.complete and state.end["sha256"] == shas[s]}
        for s in finished:
            if self.share.ends(s):
                for reject in rejects_of(self.options.inputs[s], states[s]):
                    self.reject(reject)
        return states, finished

    def find_duplicates(self, shas: dict[int, str]) -> set[int]:
        """Shards that are the same file, or have the same content, as an earlier one."""
        first: dict[str, int] = {}
        duplicates = set()
        for s in sorted(shas):
            if first.setdefault(shas[s], s) != s and self.sizes[s]:
                duplicates.add(s)
                if self.ranks.rank == 0:
                    path, earlier = self.options.inputs[s], self.options.inputs[first[shas[s]]]
                    self.reject(BadRecord(path, 0, f"the shard {path} is a duplicate of {earlier}: give it once"))
        return duplicates

    def reject(self, bad: BadRecord) -> None:
        self.rejects.append(bad)
        self.check_rejects(self.rejects)

    def check_rejects(self, rejects: list[BadRecord]) -> None:
        allowed = self.options.max_bad
        if len(rejects) > allowed:
            hint = "repair it, or allow some with --on-bad-record skip" if allowed == 0 else \
                f"that is more than --max-bad {allowed}"
            raise UserError(f"{rejects[allowed]}; {hint}; nothing was written")

    def encode(self, finished: set[int]) -> None:
        """Reads this process's share and encodes what no journal tells of."""
        o, rank = self.options, self.ranks.rank
        self.journals = Journals(self.work.folder, self.work.attempt, rank)
        settings = encode.Settings(o.tokenizer, o.split_by_component, self.work.folder,
                                   f"segment-{self.work.attempt:04d}-{rank:05d}")
        mine = {path: size for s, (path, size) in enumerate(zip(o.inputs, self.sizes, strict=True))
                if self.share.touches(s)}
        try:
            with Progress(mine, shown=rank == 0) as self.progress:
                for shard, line in mapped(encode.encode, self.tasks(finished), o.workers, encode.start, settings):
                    record = orjson.loads(line)
                    for where, reason in record["rejects"]:
                        self.reject(BadRecord(o.inputs[shard], where, reason))
                    self.journals.append(shard, line)
                    self.tell(shard, record)
        finally:
            encode.close()
            self.journals.close()

    def tasks(self, finished: set[int]) -> Iterator[encode.Task]:
        for shard, path in enumerate(self.options.inputs):
            if self.share.touches(shard):
                if shard in finished or shard in self.duplicates:
                    self.progress.advance(path, self.sizes[shard], 0, 0, len(self.rejects))
                else:
                    yield from self.tasks_of(shard)

    def tasks_of(self, number: int) -> Iterator[encode.Task]:
        """The chunks of a shard that are this process's and not done; at its end, what is known of it."""
        shard = Shard(self.options.inputs[number], self.chunk_bytes, self.options.max_line_bytes)
        state, excluded = self.states[number], self.excluded.get(shard.path)
        chunks, bad = 0, None
        try:
            for chunk in shard.chunks():
                place = self.share.place(number, chunk.position)
                if place > 0:
                    return
                chunks = chunk.number + 1
                if place == 0:
                    line = state.chunks.get(chunk.number)
                    if line is not None and orjson.loads(line)["crc"] == encode.checksum(chunk):
                        record = orjson.loads(line)
                        for where, reason in record["rejects"]:
                            self.reject(BadRecord(shard.path, where, reason))
                        self.tell(number, record)
                    else:
                        yield encode.Task(number, chunk, lines_in(excluded, chunk.first_line, shard.lines))
        except DamagedShard as error:
            bad = BadRecord(shard.path, 0, str(error))
        if self.share.ends(number):
            if shard.lines == 0 and bad is None:
                bad = BadRecord(shard.path, 0, f"the shard {shard.path} is empty: fetch it again")
            if bad is not None:
                self.reject(bad)
            end = {"chunks": chunks, "lines": shard.lines, "sha256": shard.sha256, "bad": bad and bad.reason}
            self.journals.append(number, orjson.dumps({"end": end}))
            self.progress.advance(shard.path, self.sizes[number], 0, 0, len(self.rejects))

    def tell(self, shard: int, record: dict) -> None:
        counts = record["components"].values()
        self.progress.advance(self.options.inputs[shard], record["position"], sum(c[2] for c in counts),
                              sum(c[0] for c in counts), len(self.rejects))

    def collect(self) -> dict | None:
        """On the first process: the datasets to be, from the journals of all; checks that nothing is missing."""
        written = self.ranks.gather(self.journals.written)
        duplicate_rejects = [r for r in self.rejects if r.line == 0 and r.file in
                             {self.options.inputs[s] for s in self.duplicates}]
        if self.ranks.rank:
            return None
        for shard, line in (item for part in written for item in part):
            record = orjson.loads(line)
            if "end" in record:
                self.states[shard].end = record["end"]
            else:
                self.states[shard].chunks[record["number"]] = line
        used = [s for s in range(len(self.states)) if s not in self.duplicates]
        self.rejects = duplicate_rejects
        for s in used:
            if not self.states[s].complete:
                raise UserError(f"{self.options.inputs[s]} changed while it was read: run the same command again")
            self.rejects += rejects_of(self.options.inputs[s], self.states[s])
        self.check_rejects(self.rejects)
        layouts = lay_out([self.states[s] for s in used], self.options.split_by_component)
        if not any(layout.documents for layout in layouts.values()):
            self.work.remove()
            raise UserError(f"no document in {', '.join(self.options.inputs)}: nothing was written")
        return layouts

    def publish(self, layouts: dict) -> dict[str, dict]:
        o = self.options
        records = [orjson.loads(state.chunks[n]) for s, state in enumerate(self.states) if s not in self.duplicates
                   for n in range(state.end["chunks"])]           # type: ignore[index]
        facts = {"vocab_size": self.tokenizer.vocab_size, "eod": self.tokenizer.eod,
                 "tokenizer": {"type": self.tokenizer.kind, "sha256": self.tokenizer.fingerprint()},
                 "sources": [{"path": path, "bytes": self.sizes[s],
                              **{key: self.states[s].end[key] for key in ("lines", "sha256")}}    # type: ignore[index]
                             for s, path in enumerate(o.inputs) if s not in self.duplicates],
                 "rejects": [{"file": r.file, "line": r.line, "reason": r.reason} for r in self.rejects],
                 "empty_documents": sum(r["empty"] for r in records),
                 "excluded_documents": sum(r["excluded"] for r in records)}
        manifests = {}
        for name, layout in sorted(layouts.items()):
            prefix = f"{o.output_prefix}_{name}" if name else o.output_prefix
            manifests[prefix] = manifest(layout, self.work.folder / f"{name}.idx", self.dtype, facts)
        for name, prefix in zip(sorted(layouts), manifests, strict=True):
            publish(self.work.folder, name, prefix, manifests[prefix])
        self.work.remove()
        return manifests


def rejects_of(path: str, state: ShardState) -> list[BadRecord]:
    """All rejects of a complete shard, in order."""
    found = [BadRecord(path, line, reason) for number in range(state.end["chunks"])     # type: ignore[index]
             for line, reason in orjson.loads(state.chunks[number])["rejects"]]
    bad = state.end["bad"]                                        # type: ignore[index]
    return [*found, BadRecord(path, 0, bad)] if bad else found


def file_sha256(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_excluded(path: str | None, inputs: list[str]) -> dict[str, np.ndarray]:
    """Sorted line numbers by shard, from a list that data_prep.dedup wrote."""
    if path is None:
        return {}
    lines: dict[str, list[int]] = defaultdict(list)
    try:
        with open(path, "rb") as file:
            for row in file:
                record = orjson.loads(row)
                lines[record["file"]].append(record["line"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no list of data_prep.dedup ({error}): make it again") from error
    unknown = sorted(set(lines) - set(inputs))
    if unknown:
        raise UserError(f"{path} names {unknown[0]}, which is no --input: name the shards as dedup was given them")
    return {name: np.unique(np.array(numbers)) for name, numbers in lines.items()}


def lines_in(excluded: np.ndarray | None, first: int, last: int) -> frozenset[int]:
    if excluded is None:
        return frozenset()
    start, end = np.searchsorted(excluded, [first, last + 1])
    return frozenset(excluded[start:end].tolist())


def tokenize(options: Options, ranks: Alone | None = None) -> dict[str, dict]:
    """Write PREFIX.bin, .idx and .json (one such set a component with split_by_component).

    Returns the manifests by prefix (on the first process). Raises UserError; then no dataset was written or changed,
    and what was done so far is kept in PREFIX.work, where the same call goes on.
    """
    return Run(options, ranks or Alone()).run()
