"""Runs that are killed and resumed, shared among processes, or fed with damaged, doubled or endless input."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard

from data_prep import run as run_module
from data_prep.errors import UserError
from data_prep.journal import Work
from data_prep.ranks import Alone
from data_prep.run import Options, Run, Share, tokenize
from data_prep.shards import Shard
from data_prep.verify import verify
from tests.cpu.test_data_prep_tokenize import TEXTS, outputs, record, tokenizer_file, write_shard  # noqa: F401

REPO = Path(__file__).resolve().parents[2]
COUNT = 600
KILLED_CHUNK_BYTES = 20_000


def shards(folder: Path, count: int = COUNT) -> list[str]:
    """Three shards, one of each kind, with a bad line, a blank one and an empty document."""
    rng = random.Random(5)
    found = []
    for number, ending in enumerate((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        lines = [record(f"{number} {i} " + " ".join(rng.choice(TEXTS) for _ in range(rng.randint(1, 9))),
                        rng.choice(["Web", "Code"])) for i in range(count)]
        lines[7:7] = [b'{"text": 5}', b" ", record("")]
        found.append(write_shard(folder / f"s{number}{ending}", lines))
    return found


def options(tmp_path: Path, inputs: list[str], tokenizer: str, out: str = "out", **more: object) -> Options:
    return Options(inputs, str(tmp_path / out / "data"), {"kind": "hf", "model": tokenizer},
                   **{"max_bad": 10, "chunk_bytes": KILLED_CHUNK_BYTES, **more})


@pytest.fixture
def expected(tmp_path: Path, tokenizer_file: str) -> tuple[list[str], dict[str, bytes]]:  # noqa: F811
    """(shards, the files an uninterrupted run of one process makes)."""
    inputs = shards(tmp_path)
    tokenize(options(tmp_path, inputs, tokenizer_file, "reference"))
    files = {p.name: p.read_bytes() for p in (tmp_path / "reference").iterdir()}
    assert sorted(files) == ["data.bin", "data.idx", "data.json"]
    assert len(json.loads(files["data.json"])["rejects"]) == 3
    verify(str(tmp_path / "reference" / "data"))
    return inputs, files


class Killed(BaseException):
    """Stands for a kill: no handler of the run sees it as an error it knows."""


def interrupted(monkeypatch: pytest.MonkeyPatch, chunks: int, opts: Options) -> int:
    """Runs until `chunks` chunks are in the journal; returns how many were encoded."""
    encoded = []
    plain = run_module.encode.encode

    def until(task):
        if len(encoded) == chunks:
            raise Killed
        encoded.append(task)
        return plain(task)
    with monkeypatch.context() as patch:
        patch.setattr(run_module.encode, "encode", until)
        try:
            tokenize(opts)
        except Killed:
            pass
    return len(encoded)


def test_a_resumed_run_repeats_nothing_and_loses_nothing(tmp_path, expected, tokenizer_file, monkeypatch):  # noqa: F811
    inputs, files = expected
    total = len(json.loads(files["data.json"])["sha256"]["bin"])
    opts = options(tmp_path, inputs, tokenizer_file)
    done = [interrupted(monkeypatch, n, opts) for n in (0, 1, total // 3, total // 3)]
    assert done == [0, 1, total // 3, total // 3]
    assert interrupted(monkeypatch, 10 ** 6, opts) == total - sum(done)
    assert outputs(tmp_path) == files


def test_finished_shards_are_not_read_again(tmp_path, expected, tokenizer_file, monkeypatch):  # noqa: F811
    inputs, files = expected
    opts = options(tmp_path, inputs, tokenizer_file)
    chunks = len(json.loads(files["data.json"])["sha256"]["bin"])
    interrupted(monkeypatch, chunks - 1, opts)
    read = []

    class Counted(Shard):
        def chunks(self):
            read.append(self.path)
            return super().chunks()
    monkeypatch.setattr(run_module, "Shard", Counted)
    tokenize(opts)
    assert read == inputs[2:] and outputs(tmp_path) == files


def test_a_repaired_shard_is_encoded_again(tmp_path, expected, tokenizer_file, monkeypatch):  # noqa: F811
    inputs, files = expected
    whole = Path(inputs[0]).read_bytes()
    Path(inputs[0]).write_bytes(whole.replace(b"0 3 ", b"9 9 ", 1))
    opts = options(tmp_path, inputs, tokenizer_file)
    interrupted(monkeypatch, len(json.loads(files["data.json"])["sha256"]["bin"]) - 1, opts)
    Path(inputs[0]).write_bytes(whole)
    assert interrupted(monkeypatch, 10 ** 6, opts) == 2            # the changed chunk, and the one that was missing
    assert outputs(tmp_path) == files


@pytest.mark.parametrize("damage", ["torn journal", "lost tokens", "changed tokens"])
def test_what_a_crash_of_the_machine_leaves(tmp_path, expected, tokenizer_file, monkeypatch, damage):  # noqa: F811
    inputs, files = expected
    opts = options(tmp_path, inputs, tokenizer_file)
    interrupted(monkeypatch, 8, opts)
    work = tmp_path / "out" / "data.work"
    journal, segment = sorted(work.glob("shard-*"))[0], next(work.glob("segment-*"))
    if damage == "torn journal":
        journal.write_bytes(journal.read_bytes()[:-20])
    else:
        data = bytearray(segment.read_bytes())
        segment.write_bytes(data[:-100] if damage == "lost tokens" else data[:50] + b"\1\1\1\1" + data[54:])
    total = len(json.loads(files["data.json"])["sha256"]["bin"])
    assert interrupted(monkeypatch, 10 ** 6, opts) == total - 7
    assert outputs(tmp_path) == files


def test_a_kill_while_publishing(tmp_path, expected, tokenizer_file, monkeypatch):  # noqa: F811
    inputs, files = expected
    opts = options(tmp_path, inputs, tokenizer_file)
    replace = os.replace
    for allowed in range(3):
        left = [allowed]

        def some(source, target, left=left):
            if Path(source).parent.name == "data.work" and left[0] == 0:
                raise Killed
            left[0] -= 1
            replace(source, target)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", some)
            with pytest.raises(Killed):
                tokenize(opts)
        assert "data.idx" not in outputs(tmp_path)
    tokenize(opts)
    assert outputs(tmp_path) == files


def command(tmp_path: Path, inputs: list[str], tokenizer: str, out: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "data_prep.tokenize", "--input", *inputs, "--output-prefix",
            str(tmp_path / out / "data"), "--tokenizer-type", "hf", "--tokenizer-model", tokenizer,
            "--on-bad-record", "skip", *more]


@pytest.mark.timeout(300)
def test_kill_9_at_20_random_moments(tmp_path, tokenizer_file):  # noqa: F811
    """Each time: start, SIGKILL, start again to the end; with two workers, which must not outlive their parent."""
    inputs = shards(tmp_path, 1500)
    subprocess.run(command(tmp_path, inputs, tokenizer_file, "reference", "--workers", "2"), cwd=REPO, check=True,
                   capture_output=True)
    files = {p.name: p.read_bytes() for p in (tmp_path / "reference").iterdir()}
    total = (tmp_path / "reference" / "data.bin").stat().st_size
    rng, unfinished = random.Random(), 0
    for number in range(20):
        # Moments by what is written, not by the clock: a busy machine changes its pace.
        process = subprocess.Popen(command(tmp_path, inputs, tokenizer_file, "out", "--workers", "2"), cwd=REPO,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = total * rng.uniform(0.0, 1.05)
        while process.poll() is None and written(tmp_path / "out" / "data.work") < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out" / "data.idx").exists() and not (tmp_path / "out" / "data.work" / "run.json").exists():
            assert outputs(tmp_path) == files
        else:
            unfinished += 1
            subprocess.run(command(tmp_path, inputs, tokenizer_file, "out"), cwd=REPO, check=True, capture_output=True)
            assert outputs(tmp_path) == files, f"kill {number}"
        shutil.rmtree(tmp_path / "out")
    assert unfinished >= 10
    deadline = time.monotonic() + 10
    while orphans := [p for p in running() if str(tmp_path) in p]:
        assert time.monotonic() < deadline, orphans
        time.sleep(0.1)


def written(folder: Path) -> int:
    """Bytes in the segments so far."""
    size = 0
    for path in folder.glob("segment-*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def running() -> list[str]:
    """Open files and command lines of other processes of this user, as far as they can be seen."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid():
            try:
                found += [str(link.readlink()) for link in (process / "fd").iterdir()]
                found.append((process / "cmdline").read_text())
            except OSError:
                continue
    return found


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_of_several_processes(tmp_path, expected, tokenizer_file, count, monkeypatch):  # noqa: F811
    """As under MPI, one after the other: every chunk is encoded by one process, and the result is the same."""
    inputs, files = expected
    opts = options(tmp_path, inputs, tokenizer_file)
    runs = []
    for rank in range(count):
        ranks = Alone()
        ranks.rank, ranks.size = rank, count
        ranks.bcast = lambda value, rank=rank: value if rank == 0 else (*value[:1], runs[0].work.attempt,
                                                                        runs[0].states)
        run = Run(opts, ranks)
        run.open()
        run.duplicates = set()
        run.encode(set())
        runs.append(run)
    lines = [item for run in runs for item in run.journals.written]
    numbers = [(shard, orjson.loads(line).get("number")) for shard, line in lines]
    assert len(numbers) == len(set(numbers))
    assert sum(len(run.journals.written) > 0 for run in runs) >= min(count, 2)    # small files are read at once
    runs[0].work.close()
    tokenize(opts)                                                # merges what the processes left
    assert outputs(tmp_path) == files


@pytest.mark.parametrize("sizes", [[5, 0, 7], [1], [0], [100, 1, 1, 100]])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 300])
def test_every_chunk_has_one_owner(sizes, count):
    shares = [Share(sizes, rank, count) for rank in range(count)]
    for shard, size in enumerate(sizes):
        assert sum(share.ends(shard) for share in shares) == 1
        for position in range(size + 1):
            owners = [share for share in shares if share.place(shard, position) == 0]
            assert len(owners) == 1 and owners[0].touches(shard)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (apt-get install openmpi-bin)")
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_mpirun(tmp_path, expected, tokenizer_file, processes):  # noqa: F811
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (pip install '.[mpi]')")
    inputs, files = expected

    def mpirun(*more: str) -> subprocess.CompletedProcess:
        mpi = ["mpirun", "--oversubscribe", "-n", str(processes), "--mca", "btl", "self,vader"]
        environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return subprocess.run([*mpi, *command(tmp_path, inputs, tokenizer_file, "out", "--mpi", *more)], cwd=REPO,
                              env=environment, capture_output=True, text=True, timeout=100)
    failed = mpirun("--max-bad", "2")
    assert failed.returncode != 0 and "more than --max-bad 2" in failed.stderr and outputs(tmp_path) == {}
    done = mpirun()
    assert done.returncode == 0, done.stderr
    found = outputs(tmp_path)
    # Chunks of the command line's size: fewer pieces, the same tokens.
    assert {n: found[n] for n in ("data.bin", "data.idx")} == {n: files[n] for n in ("data.bin", "data.idx")}
    verify(str(tmp_path / "out" / "data"))


def test_two_runs_do_not_write_the_same(tmp_path, expected, tokenizer_file):  # noqa: F811
    inputs, _ = expected
    work = Work(str(tmp_path / "out" / "data"))
    work.open({}, False)
    with pytest.raises(UserError, match="another run is writing"):
        tokenize(options(tmp_path, inputs, tokenizer_file))
    work.close()


def test_other_options_do_not_go_on(tmp_path, expected, tokenizer_file, monkeypatch):  # noqa: F811
    inputs, files = expected
    interrupted(monkeypatch, 3, options(tmp_path, inputs, tokenizer_file))
    for change in ({"split_by_component": True}, {"max_line_bytes": 1 << 20}):
        with pytest.raises(UserError, match="unfinished run with other --"):
            tokenize(options(tmp_path, inputs, tokenizer_file, **change))
    tokenize(options(tmp_path, inputs, tokenizer_file, workers=2))
    assert outputs(tmp_path) == files


def test_empty_and_duplicate_shards(tmp_path, tokenizer_file):  # noqa: F811
    a = write_shard(tmp_path / "a.jsonl", [record(t) for t in TEXTS])
    b = write_shard(tmp_path / "b.jsonl", [record(t) for t in TEXTS])
    empty = write_shard(tmp_path / "c.jsonl", [])
    Path(tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(b""))
    nothing = [empty, str(tmp_path / "d.jsonl.zst")]
    for inputs, message in (([a, b], "b.jsonl is a duplicate of .*a.jsonl"), ([a, a], "a.jsonl is a duplicate"),
                            ([a, nothing[0]], "c.jsonl is empty"), ([a, nothing[1]], "d.jsonl.zst is empty")):
        with pytest.raises(UserError, match=message):
            tokenize(options(tmp_path, inputs, tokenizer_file, max_bad=0, overwrite=True))
    assert outputs(tmp_path) == {}
    manifest = tokenize(options(tmp_path, [a, b, *nothing], tokenizer_file, overwrite=True))[
        str(tmp_path / "out" / "data")]
    assert manifest["documents"] == len(TEXTS) and [s["path"] for s in manifest["sources"]] == [a, *nothing]
    assert [(r["file"], r["line"]) for r in manifest["rejects"]] == [(f, 0) for f in (b, *nothing)]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_of_100_megabytes(tmp_path, tokenizer_file, ending):  # noqa: F811
    lines = [record(t) for t in TEXTS[:4]]
    long = record("x" * 100_000_000)
    shard = write_shard(tmp_path / f"a{ending}", [*lines[:2], long, *lines[2:]])
    # VmHWM is this program's own; ru_maxrss would begin with that of the test process.
    script = ("import re, sys\nfrom data_prep.run import Options, tokenize\n"
              "made = tokenize(Options([sys.argv[1]], sys.argv[2], {'kind': 'hf', 'model': sys.argv[3]}, max_bad=1))\n"
              "print(*[r['line'] for m in made.values() for r in m['rejects']], made[sys.argv[2]]['documents'],\n"
              "      int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)\n"
              "print(*[r['reason'] for m in made.values() for r in m['rejects']])")
    done = subprocess.run([sys.executable, "-c", script, shard, str(tmp_path / "o" / "d"), tokenizer_file], cwd=REPO,
                          capture_output=True, text=True, check=True)
    line, documents, megabytes = map(int, done.stdout.splitlines()[0].split())
    assert (line, documents) == (3, 4)
    assert f"the line has {len(long):,} bytes, more than --max-line-megabytes 32" in done.stdout
    # A line of one letter is a kilobyte in a .gz or .zst and comes out of it at once; a plain one is never held whole.
    assert megabytes < (150 if ending == ".jsonl" else 500)


def test_excluded_documents(tmp_path, expected, tokenizer_file):  # noqa: F811
    inputs, files = expected
    listed = tmp_path / "list.jsonl"
    listed.write_bytes(b"".join(orjson.dumps({"file": inputs[1], "line": n}) + b"\n" for n in (1, 2, 600)))
    manifest = tokenize(options(tmp_path, inputs, tokenizer_file, exclude=str(listed)))[str(tmp_path / "out" / "data")]
    assert manifest["excluded_documents"] == 3
    assert manifest["documents"] == json.loads(files["data.json"])["documents"] - 3
    listed.write_text('{"file": "none", "line": 1}\n')
    with pytest.raises(UserError, match="names none, which is no --input"):
        tokenize(options(tmp_path, inputs, tokenizer_file, exclude=str(listed), overwrite=True))
    listed.write_text("{")
    with pytest.raises(UserError, match="is no list of data_prep.dedup"):
        tokenize(options(tmp_path, inputs, tokenizer_file, exclude=str(listed), overwrite=True))


def test_damage_tells_the_last_good_line(tmp_path, tokenizer_file):  # noqa: F811
    rng = np.random.default_rng(0)
    shard = Path(write_shard(tmp_path / "a.jsonl.zst", [record(rng.bytes(300).hex()) for _ in range(600)]))
    shard.write_bytes(shard.read_bytes()[:-900])
    manifest = tokenize(options(tmp_path, [str(shard)], tokenizer_file))[str(tmp_path / "out" / "data")]
    assert [r["file"] for r in manifest["rejects"]] == [str(shard)]
    assert f"is damaged after line {manifest['documents']} " in manifest["rejects"][0]["reason"]
