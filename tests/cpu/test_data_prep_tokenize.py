"""Shards to indexed datasets: the format against megatron.core, every kind of bad input, workers, publishing."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_prep import encode as encode_module
from data_prep import indexed
from data_prep import merge as merge_module
from data_prep.errors import UserError
from data_prep.tokenize import Options, parse, tokenize
from data_prep.tokenizers import load_tokenizer
from data_prep.verify import verify

REPO = Path(__file__).resolve().parents[2]
TEXTS = [f"def f{i}(x):\n    return x + {i}  # naïve “quotes” 数 {'word ' * (i % 7)}\n" for i in range(60)]


def write_shard(path: Path, lines: list[bytes]) -> str:
    data = b"".join(line + b"\n" for line in lines)
    if path.name.endswith(".zst"):
        data = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    elif path.name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    path.write_bytes(data)
    return str(path)


def record(text: object, component: str = "Web") -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": component}}, ensure_ascii=False).encode()


def good(count: int = len(TEXTS)) -> list[bytes]:
    return [record(text, "Code" if i % 3 == 0 else "Web") for i, text in enumerate(TEXTS[:count])]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small byte-level BPE with <|endoftext|>."""
    from tokenizers import ByteLevelBPETokenizer
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(TEXTS, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    model.save(path)
    return path


@pytest.fixture
def run(tmp_path: Path, tokenizer_file: str):
    """run(shards, **options) → manifests; output prefix out/data. Leaves no work folder after success."""
    def call(shards: list[str], **options: object) -> dict[str, dict]:
        kind = {"kind": "hf", "model": tokenizer_file}
        manifests = tokenize(Options(shards, str(tmp_path / "out" / "data"), kind, **options))
        assert not (tmp_path / "out" / "data.work").exists()
        return manifests
    return call


def outputs(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "out"
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.*")) if p.is_file()}


def test_equals_megatron_byte_for_byte(tmp_path, run, tokenizer_file):
    run([write_shard(tmp_path / "a.jsonl.zst", good())])
    tokenizer = load_tokenizer("hf", model=tokenizer_file)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in TEXTS:
        builder.add_item(torch.tensor([*tokenizer.encode(text), tokenizer.eod]))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    found = outputs(tmp_path)
    assert found["data.bin"] == (tmp_path / "theirs.bin").read_bytes()
    assert found["data.idx"] == (tmp_path / "theirs.idx").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "out" / "data"))
    assert [tokenizer.decode(dataset[i][:-1].tolist()) for i in range(len(dataset))] == TEXTS


def test_int32_index_of_large_vocabularies(tmp_path):
    assert indexed.token_dtype(65535) == np.uint16 and indexed.token_dtype(65536) == np.int32
    rows = [np.array([70000, 5], np.int32), np.array([1], np.int32)]
    (tmp_path / "d.bin").write_bytes(b"".join(r.tobytes() for r in rows))
    indexed.write_index(tmp_path / "d.idx", [np.array([2, 1], np.int32)], np.dtype(np.int32), 2)
    dataset = IndexedDataset(str(tmp_path / "d"))
    assert [dataset[i].tolist() for i in range(2)] == [[70000, 5], [1]]


def test_manifest(tmp_path, run, tokenizer_file):
    shard = write_shard(tmp_path / "a.jsonl.gz", good() + [record("")])
    manifest = run([shard])[str(tmp_path / "out" / "data")]
    found = outputs(tmp_path)
    manifest = json.loads(json.dumps(manifest))
    assert manifest == json.loads(found["data.json"])
    sha256 = {e: hashlib.sha256(found[f"data.{e}"]).hexdigest() for e in ("bin", "idx")}
    assert manifest["sha256"] == {"idx": sha256["idx"], "bin": [[60, sha256["bin"]]]}
    assert manifest["documents"] == 60 and manifest["tokens"] * 2 == len(found["data.bin"])
    assert manifest["text_bytes"] == sum(len(t.encode()) for t in TEXTS) and manifest["empty_documents"] == 1
    assert manifest["components"]["Code"]["documents"] == 20 and manifest["components"]["Web"]["documents"] == 40
    assert manifest["vocab_size"] == load_tokenizer("hf", model=tokenizer_file).vocab_size
    assert manifest["eod"] == 0 and manifest["rejects"] == []
    assert manifest["sources"] == [{"path": shard, "bytes": Path(shard).stat().st_size, "lines": 61,
                                    "sha256": hashlib.sha256(Path(shard).read_bytes()).hexdigest()}]
    lengths = indexed.IndexedDataset(tmp_path / "out" / "data").lengths
    for counts in manifest["components"].values():
        assert counts["bytes_per_token"] == pytest.approx(counts["bytes"] / counts["tokens"], abs=1e-4)
    merged = [c["documents_by_tokens"] for c in manifest["components"].values()]
    for bucket in {b for c in merged for b in c}:
        low, high = map(int, bucket.split("-"))
        assert sum(c.get(bucket, 0) for c in merged) == ((lengths >= low) & (lengths <= high)).sum()


def test_bytes_do_not_depend_on_workers_or_compression(tmp_path, run):
    found = []
    for ending, workers in ((".jsonl", 1), (".jsonl.gz", 2), (".jsonl.zst", 3)):
        shards = [write_shard(tmp_path / f"{n}{ending}", good()[n * 30:n * 30 + 30]) for n in (0, 1)]
        manifest = run(shards, workers=workers, overwrite=True, chunk_bytes=500)[str(tmp_path / "out" / "data")]
        assert len(manifest["sha256"]["bin"]) > 6                 # pieces: the chunks were many
        found.append({name: data for name, data in outputs(tmp_path).items() if name != "data.json"})
    assert found[0] == found[1] == found[2] and len(found[0]["data.bin"]) > 1000
    assert len(IndexedDataset(str(tmp_path / "out" / "data"))) == 60


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_stops_a_long_run(tmp_path, run, workers):
    """The reader is far ahead when the reject comes back: it must stop too."""
    shard = write_shard(tmp_path / "a.jsonl", [b"{", *good()])
    with pytest.raises(UserError, match="line 1: malformed JSON"):
        run([shard], workers=workers, chunk_bytes=100)
    assert outputs(tmp_path) == {}


def test_several_zstd_frames(tmp_path, run):
    lines = good()
    frames = [zstandard.ZstdCompressor().compress(b"".join(line + b"\n" for line in part))
              for part in (lines[:20], lines[20:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert run([str(tmp_path / "a.jsonl.zst")])[str(tmp_path / "out" / "data")]["documents"] == 60


BAD_LINES = [
    (b'{"text": "x"', "malformed JSON"),
    (b'{"meta": {}}', 'no "text" field'),
    (b'["text"]', 'no "text" field'),
    (b'{"text": 7}', '"text" is int, not a string'),
    (b'{"text": null}', '"text" is NoneType, not a string'),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}', "unpaired surrogate"),
    (b"[" * 100_000, "malformed JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(tmp_path, run, line, reason):
    shard = write_shard(tmp_path / "a.jsonl.zst", [*good(3), line, *good(2)])
    with pytest.raises(UserError) as error:
        run([shard])
    assert f"{shard} line 4: " in str(error.value) and reason in str(error.value)
    assert outputs(tmp_path) == {}
    manifest = run([shard], max_bad=1)[str(tmp_path / "out" / "data")]
    assert manifest["documents"] == 5 and len(manifest["rejects"]) == 1
    reject = manifest["rejects"][0]
    assert (reject["file"], reject["line"]) == (shard, 4) and reason in reject["reason"]


def test_more_rejects_than_allowed(tmp_path, run):
    shard = write_shard(tmp_path / "a.jsonl", [*good(3), b"{", b"{"])
    with pytest.raises(UserError, match="line 5: .* more than --max-bad 1"):
        run([shard], max_bad=1)
    assert outputs(tmp_path) == {}


@pytest.mark.parametrize("ending", [".zst", ".gz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not compressed"])
def test_damaged_shards(tmp_path, run, ending, damage):
    rng = np.random.default_rng(0)
    lines = [record(rng.bytes(300).hex()) for _ in range(600)]
    shard = Path(write_shard(tmp_path / f"a.jsonl{ending}", lines))
    whole = shard.read_bytes()
    half = len(whole) // 2
    broken = {"truncated": whole[:half], "not compressed": b"{}\n" * 99,
              "flipped": whole[:half] + bytes(b ^ 0x55 for b in whole[half:half + 400]) + whole[half + 400:]}
    shard.write_bytes(broken[damage])
    good_shard = write_shard(tmp_path / "good.jsonl", good())
    # Flipped bytes may first show as a broken line; everything else must be told as what it is.
    told = r"(line \d+|is damaged after line \d+)" if damage == "flipped" else r"is damaged after line \d+"
    with pytest.raises(UserError, match=f"{shard.name} {told}"):
        run([good_shard, str(shard)])
    assert outputs(tmp_path) == {}
    # Allowed, what stood before the damage is kept, and the damage is listed.
    manifest = run([str(shard), good_shard], max_bad=600, overwrite=True)[str(tmp_path / "out" / "data")]
    assert 60 <= manifest["documents"] < 660 and manifest["rejects"]
    assert damage == "flipped" or len(manifest["rejects"]) == 1
    assert (manifest["documents"] > 60) == (damage != "not compressed")


def test_shards_that_cannot_be_read(tmp_path, run):
    with pytest.raises(UserError, match="none.jsonl is missing or unreadable"):
        run([str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="is no shard: expected a name ending in"):
        run([write_shard(tmp_path / "a.txt", good())])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot read the shard"):
        run([str(tmp_path / "folder.jsonl")])
    assert outputs(tmp_path) == {}


@pytest.mark.parametrize("lines", [[b"", b"  "], [record("")]], ids=["blank", "empty text"])
def test_nothing_to_write(tmp_path, run, lines):
    with pytest.raises(UserError, match="no document in .*: nothing was written"):
        run([write_shard(tmp_path / "a.jsonl.zst", lines)])
    assert outputs(tmp_path) == {}


def test_existing_output_stays_unless_overwritten(tmp_path, run):
    shard = write_shard(tmp_path / "a.jsonl", good())
    run([shard])
    before = outputs(tmp_path)
    with pytest.raises(UserError, match=r"data.bin exists: give --overwrite"):
        run([write_shard(tmp_path / "b.jsonl", good(5))])
    with pytest.raises(UserError, match="malformed JSON"):
        run([write_shard(tmp_path / "c.jsonl", [*good(5), b"{"])], overwrite=True, chunk_bytes=100)
    assert outputs(tmp_path) == before
    with pytest.raises(UserError, match="data.work holds an unfinished run with other inputs: .* --overwrite"):
        run([str(tmp_path / "b.jsonl")])
    run([str(tmp_path / "b.jsonl")], overwrite=True)
    assert verify(str(tmp_path / "out" / "data"))["documents"] == 5


@pytest.mark.parametrize("where", ["segment", "bin", "idx"])
def test_full_disk(tmp_path, run, monkeypatch, where):
    shard = write_shard(tmp_path / "a.jsonl", good())
    run([shard])
    before = outputs(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    module, name = {"segment": (encode_module, "write_all"), "bin": (merge_module, "copy_range"),
                    "idx": (merge_module, "write_index")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(UserError, match="cannot write .*: No space left on device; nothing was changed"):
            run([shard], overwrite=True)
        assert outputs(tmp_path) == before
    run([shard], overwrite=True)
    assert outputs(tmp_path) == before


def test_copying_without_help_from_the_file_system(tmp_path, run, monkeypatch):
    shard = write_shard(tmp_path / "a.jsonl", good())
    run([shard], chunk_bytes=300)
    before = outputs(tmp_path)

    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")
    monkeypatch.setattr(merge_module.os, "copy_file_range", refused)
    run([shard], chunk_bytes=300, overwrite=True)
    assert outputs(tmp_path) == before


def test_split_by_component(tmp_path, run, tokenizer_file):
    shard = write_shard(tmp_path / "a.jsonl.zst", [*good(), record("x", "Pile-CC")])
    manifests = run([shard], split_by_component=True, chunk_bytes=700)
    assert [Path(p).name for p in sorted(manifests)] == ["data_Code", "data_PileCC", "data_Web"]
    assert [manifests[p]["documents"] for p in sorted(manifests)] == [20, 1, 40]
    for prefix in manifests:
        verify(prefix)
    tokenizer, web = load_tokenizer("hf", model=tokenizer_file), IndexedDataset(str(tmp_path / "out" / "data_Web"))
    assert [tokenizer.decode(web[i][:-1].tolist()) for i in range(40)] == [t for i, t in enumerate(TEXTS) if i % 3]
    with pytest.raises(UserError, match="data_Code.bin exists"):
        run([shard], split_by_component=True)


def test_command_line(tmp_path, tokenizer_file):
    shard = write_shard(tmp_path / "a.jsonl", good())

    def call(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "data_prep.tokenize", "--input", shard, "--output-prefix", str(tmp_path / "o" / "d"),
             "--tokenizer-type", "hf", "--tokenizer-model", tokenizer_file, *more],
            cwd=REPO, capture_output=True, text=True)

    first, second = call(), call()
    assert first.returncode == 0 and "60 documents" in first.stdout and "MB/s" in first.stdout
    assert second.returncode == 2 and second.stderr.startswith("error: ") and second.stderr.count("\n") == 1


def test_data_prep_imports_no_training_code():
    names = [p.stem for p in (REPO / "data_prep").glob("*.py") if p.stem != "__init__"]
    code = "import sys\n" + "".join(f"import data_prep.{n}\n" for n in names) + \
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'megatron', 'deepspeed', 'based_mp')])"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_options():
    with pytest.raises(UserError, match="--workers 0"):
        parse(["--input", "a", "--output-prefix", "b", "--tokenizer-type", "gpt2", "--workers", "0"])
