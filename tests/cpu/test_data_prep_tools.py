"""Tokenizers, tokenizer training, the demonstration corpus, verify, inspect, stats and blend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from based_mp.config import DataConfig
from data_prep import blend, demo_corpus, inspect, stats
from data_prep import verify as verify_module
from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset, write_index
from data_prep.shards import Document, read_shard
from data_prep.tokenize import Options, tokenize
from data_prep.tokenizers import load_tokenizer
from data_prep.train_tokenizer import parse_weights, train
from data_prep.verify import compare, verify


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 1.5 megabytes, a SentencePiece model, and the PythonDocs training set."""
    folder = tmp_path_factory.mktemp("demo")
    demo_corpus.write(folder, 1.5)
    train([str(p) for p in sorted(folder.glob("*_train.jsonl.zst"))], str(folder / "tokenizer"), 700, 10)
    tokenize(Options([str(folder / "PythonDocs_train.jsonl.zst")], str(folder / "docs"), sentencepiece(folder)))
    tokenize(Options([str(folder / "PythonSource_train.jsonl.zst")], str(folder / "source"), sentencepiece(folder)))
    return folder


def sentencepiece(folder: Path) -> dict[str, str]:
    return {"kind": "sentencepiece", "model": str(folder / "tokenizer.model")}


def test_demo_corpus_is_the_same_each_time_and_disjoint(demo, tmp_path):
    names = ["PythonDocs_train", "PythonDocs_val", "PythonSource_train", "PythonSource_val"]
    assert sorted(p.name for p in demo.glob("*.zst")) == [f"{n}.jsonl.zst" for n in names]
    demo_corpus.write(tmp_path, 1.5)
    texts = {}
    for name in names:
        assert (tmp_path / f"{name}.jsonl.zst").read_bytes() == (demo / f"{name}.jsonl.zst").read_bytes()
        records = list(read_shard(demo / f"{name}.jsonl.zst"))
        assert all(isinstance(r, Document) and r.component == name.split("_")[0] for r in records)
        texts[name] = {r.text for r in records}
    assert not texts["PythonSource_train"] & texts["PythonSource_val"]
    # No validation docstring stands in a training source, but for lines that modules share.
    longest = [max(prose.splitlines(), key=len) for prose in texts["PythonDocs_val"]]
    assert sum(any(line in source for source in texts["PythonSource_train"]) for line in longest) < 0.3 * len(longest)
    with pytest.raises(UserError, match="too little text"):
        demo_corpus.write(tmp_path / "x", 1e-6)
    assert 1.2e6 < sum(len(t) for part in texts.values() for t in part) < 3e6


AWKWARD = ["  leading and trailing  ", "\tdef f():\n\t\treturn 1\n\n\n", "a\r\nb\rc", "", "\n", "naïve 数学 😀 \u200b",
           "nul \0 byte", "<s></s><unk>", "x" * 5000]


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_trained_sentencepiece_round_trips(demo, text):
    tokenizer = load_tokenizer(**sentencepiece(demo))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eod not in ids
    found, counts = tokenizer.encode_batch([text, "b"])
    assert found.tolist() == ids + tokenizer.encode("b") and counts.tolist() == [len(ids), len(tokenizer.encode("b"))]
    assert max(ids, default=0) < tokenizer.vocab_size == 700


def test_sentencepiece_round_trips_the_corpus(demo):
    tokenizer = load_tokenizer(**sentencepiece(demo))
    texts = [r.text for r in read_shard(demo / "PythonSource_val.jsonl.zst")]
    # "▁" is SentencePiece's own mark of a space: the one character that cannot come back.
    assert all(tokenizer.decode(tokenizer.encode(t)) == t.replace("\u2581", " ") for t in texts) and texts


def test_training_is_deterministic_and_explains_failure(demo, tmp_path):
    shards = [str(demo / "PythonDocs_val.jsonl.zst")]
    models = []
    for name in ("a", "b"):
        report = train(shards, str(tmp_path / name), 400, 10)
        models.append((tmp_path / f"{name}.model").read_bytes())
    assert models[0] == models[1] and report["vocab_size"] == 400 and report["documents"] > 0
    with pytest.raises(UserError, match="could not train 60000 pieces .* smaller --vocab-size"):
        train(shards, str(tmp_path / "c"), 60000, 10)
    assert not (tmp_path / "c.model").exists()


def test_tokenizers_that_cannot_be_used(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "merges").write_text("#version: 0.2\n")
    (tmp_path / "vocab").write_text('{"a": 0}')
    junk, vocab, merges = (str(tmp_path / n) for n in ("junk", "vocab", "merges"))
    for kind, files, message in [
            ("sentencepiece", {"model": junk}, "is not a SentencePiece model"),
            ("hf", {"model": junk}, "cannot be read as a hf tokenizer"),
            ("gpt2", {"vocab_file": junk, "merge_file": merges}, "cannot be read as a gpt2 tokenizer"),
            ("gpt2", {"vocab_file": vocab, "merge_file": merges}, "no token '<|endoftext|>'"),
            ("gpt2", {"vocab_file": vocab}, "needs its vocab.json"),
            ("hf", {}, "needs its file"), ("hf", {"model": str(tmp_path / "x")}, "x is missing"),
            ("bpe", {}, "unknown tokenizer type")]:
        with pytest.raises(UserError) as error:
            load_tokenizer(kind, **files)
        assert message in str(error.value)


def test_verify_finds_what_is_wrong(demo, tmp_path):
    def copy(change=None, **facts: object) -> str:
        prefix = str(tmp_path / "d")
        for ending in ("bin", "idx", "json"):
            data = (demo / f"docs.{ending}").read_bytes()
            Path(f"{prefix}.{ending}").write_bytes(change(ending, data) if change else data)
        if facts:
            manifest = json.loads(Path(prefix + ".json").read_text())
            Path(prefix + ".json").write_text(json.dumps({**manifest, **facts}))
        return prefix

    def fault(prefix: str) -> str:
        with pytest.raises(UserError) as error:
            verify(prefix)
        return str(error.value)

    assert verify(copy())["documents"] == len(IndexedDataset(demo / "docs"))
    assert "differs from its checksum" in fault(copy(lambda e, d: d[:50] + b"\1\1" + d[52:] if e == "bin" else d))
    assert "its index describes" in fault(copy(lambda e, d: d[:-2] if e == "bin" else d))
    assert "does not fit its header" in fault(copy(lambda e, d: d[:-8] if e == "idx" else d))
    assert "made with another tokenizer" in fault(copy(vocab_size=10))
    assert "does not end with token 5" in fault(copy(eod=5))
    assert "d.json is damaged" in fault(copy(lambda e, d: b"{" if e == "json" else d))
    Path(copy() + ".json").unlink()
    assert "d.json is missing" in fault(str(tmp_path / "d"))
    assert "none.idx is missing" in fault(str(tmp_path / "none"))


def test_inspect_shows_the_source_text(demo, capsys, monkeypatch):
    text = next(r.text for r in read_shard(demo / "PythonDocs_train.jsonl.zst"))
    call = ["x", str(demo / "docs"), "--tokenizer-type", "sentencepiece", "--tokenizer-model",
            str(demo / "tokenizer.model"), "--document"]
    monkeypatch.setattr(sys, "argv", [*call, "0"])
    inspect.main()
    assert text in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*call, "100000"])
    with pytest.raises(UserError, match="has documents 0 to"):
        inspect.main()


def test_blend_by_tokens(demo):
    prefixes = [str(demo / "docs"), str(demo / "source")]
    tokens = np.array([len(IndexedDataset(p).data) for p in prefixes])
    weights = blend.token_weights(prefixes, temperature=1.0)
    assert weights == pytest.approx(list(tokens / tokens.sum()))
    flat = blend.token_weights(prefixes, temperature=2.0)
    assert flat == pytest.approx(list(np.sqrt(tokens) / np.sqrt(tokens).sum()))
    data = DataConfig.model_validate(yaml.safe_load(blend.fragment(prefixes, weights, "train"))["data"])
    assert [c.path for c in data.train] == prefixes
    assert [c.weight for c in data.train] == pytest.approx(weights, rel=1e-5)


def small_set(prefix: Path, component: str) -> str:
    Path(f"{prefix}.bin").write_bytes(np.array([1, 0], np.uint16).tobytes())
    write_index(Path(f"{prefix}.idx"), [np.array([2], np.int32)], np.dtype(np.uint16), 1)
    Path(f"{prefix}.json").write_text(json.dumps(
        {"tokens": 2, "components": {component: {"documents": 1, "tokens": 2, "bytes": 9}}}))
    return str(prefix)


def test_blend_with_the_piles_weights(tmp_path, demo):
    assert sum(blend.PILE_WEIGHTS.values()) == pytest.approx(1, abs=2e-3) and len(blend.PILE_WEIGHTS) == 22
    prefixes = [small_set(tmp_path / "a", "Pile-CC"), small_set(tmp_path / "b", "Github")]
    weights = blend.pile_weights(prefixes)
    assert weights[0] / weights[1] == pytest.approx(18.11 / 7.59) and sum(weights) == pytest.approx(1)
    with pytest.raises(UserError, match="'PythonDocs' is no component of the Pile"):
        blend.pile_weights([str(demo / "docs")])


def test_weights_of_components_in_tokenizer_training(demo, tmp_path):
    shards = [str(p) for p in sorted(demo.glob("*_train.jsonl.zst"))]
    report = train(shards, str(tmp_path / "w"), 400, 0.2, {"PythonDocs": 3, "PythonSource": 1})
    assert report == json.loads((tmp_path / "w.json").read_text())
    found = report["components"]
    assert {name: c["weight"] for name, c in found.items()} == {"PythonDocs": 0.75, "PythonSource": 0.25}
    assert found["PythonDocs"]["share"] == pytest.approx(0.75, abs=0.15)
    assert all(1 < c["bytes_per_token"] < 6 for c in found.values())
    only = train(shards, str(tmp_path / "o"), 400, 0.2, {"PythonDocs": 1})
    assert list(only["components"]) == ["PythonDocs"]
    with pytest.raises(UserError, match="no document of component 'Pithon'"):
        train(shards, str(tmp_path / "x"), 400, 0.2, {"Pithon": 1, "PythonDocs": 1})
    assert parse_weights(["a=b=2"], False) == {"a=b": 2} and parse_weights([], False) is None
    for bad in ("a", "=1", "a=-1", "a=x"):
        with pytest.raises(UserError, match="give COMPONENT=NUMBER"):
            parse_weights([bad], False)


def test_verify_compares_with_the_source(demo, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer(**sentencepiece(demo))
    rows = list(compare(str(demo / "docs"), tokenizer, 7))
    assert len(rows) == 7 and rows[0][0] == 0 and rows[-1][0] == len(IndexedDataset(demo / "docs")) - 1
    assert all(decoded == text.replace("\u2581", " ") for _, decoded, text in rows)
    monkeypatch.setattr(sys, "argv", ["x", str(demo / "docs"), "--samples", "3", "--tokenizer-type", "sentencepiece",
                                      "--tokenizer-model", str(demo / "tokenizer.model")])
    verify_module.main()
    shown = capsys.readouterr().out
    assert shown.count("same text") == 3 and "all checks passed" in shown
    other = train([str(demo / "PythonDocs_val.jsonl.zst")], str(tmp_path / "other"), 400, 10)
    with pytest.raises(UserError, match="made with another tokenizer"):
        list(compare(str(demo / "docs"), load_tokenizer("sentencepiece", model=str(tmp_path / "other.model")), 3))
    assert other["vocab_size"] == 400
    for ending in ("bin", "idx", "json"):
        (tmp_path / f"d.{ending}").write_bytes((demo / f"docs.{ending}").read_bytes())
    manifest = json.loads((tmp_path / "d.json").read_text())
    manifest["sources"][0]["path"] = str(demo / "PythonDocs_val.jsonl.zst")
    (tmp_path / "d.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="document 0 of .* is not line 1 of its source"):
        list(compare(str(tmp_path / "d"), tokenizer, 3))


def test_stats(demo, tmp_path, capsys, monkeypatch):
    prefixes = [str(demo / "docs"), str(demo / "source")]
    found = stats.statistics(prefixes)
    assert found["total"]["documents"] == sum(len(IndexedDataset(p)) for p in prefixes)
    assert found["total"]["tokens"] == sum(len(IndexedDataset(p).data) for p in prefixes)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install '.[plot]')")
    monkeypatch.setattr(sys, "argv", ["x", *prefixes, "--plot", str(tmp_path / "p.png")])
    stats.main()
    assert json.loads(capsys.readouterr().out) == found
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "p.png").stat().st_size > 20_000
