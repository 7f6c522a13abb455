"""Token ids against the reference library's own, on awkward texts and on the whole Pile sample where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from data_prep import tokenizers as module
from data_prep.errors import UserError
from data_prep.shards import Document, read_shard
from data_prep.tokenizers import PROBES, load_tokenizer
from tests.cpu.test_data_prep_tokenize import TEXTS, tokenizer_file  # noqa: F401

# A folder with tokenizers/ and pile/, of which nothing is in this repository.
DATA = Path(os.environ.get("BASED_MP_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
sample = pytest.mark.skipif(not (DATA / "pile").is_dir() or not (DATA / "tokenizers").is_dir(),
                            reason="no Pile sample and tokenizers: set BASED_MP_TEST_DATA")
gigatoken = pytest.mark.skipif(module.importlib.util.find_spec("gigatoken") is None,
                               reason="gigatoken is not installed (pip install '.[fast]')")
AWKWARD = [*PROBES, *TEXTS, "\t\t x  y\n \n" * 50, "a" * 5000, "1234567890" * 99, "的" * 700, " \u00a0 " * 30,
           "e\u0301" * 60, "'s 'S 't'll '' 'Re", "\u0130i\u0307 ß ẞ",
           "\U0001F600" * 40, "A\u0000B", "\ufeffx", "\u200d\u200c"]


def equal(tokenizer: module.Tokenizer, texts: list[str], rows: list[list[int]]) -> None:
    ids, counts = tokenizer.encode_batch(texts)
    assert counts.tolist() == [len(row) for row in rows]
    assert np.array_equal(ids, np.concatenate([np.array(row, np.int64) for row in rows]))


@gigatoken
def test_gigatoken_equals_the_reference(tokenizer_file):  # noqa: F811
    library = tokenizers.Tokenizer.from_file(tokenizer_file)
    rows = [e.ids for e in library.encode_batch(AWKWARD, add_special_tokens=False)]
    fast = load_tokenizer("hf", model=tokenizer_file, backend="gigatoken")
    equal(fast, AWKWARD, rows)
    reference = load_tokenizer("hf", model=tokenizer_file)
    equal(reference, AWKWARD, rows)
    assert fast.fingerprint() == reference.fingerprint() and fast.eod == reference.eod
    assert [a.tolist() for a in fast.encode_batch([])] == [a.tolist() for a in reference.encode_batch([])] == [[], []]
    assert fast.decode(rows[0]) == PROBES[0]


@gigatoken
def test_gigatoken_is_refused_where_it_is_not_exact(tmp_path, tokenizer_file, monkeypatch):  # noqa: F811
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(tmp_path / "u"), vocab_size=120, model_type="unigram",
        minloglevel=2, hard_vocab_limit=False)
    with pytest.raises(UserError, match="gigatoken does not know this tokenizer .* leave out --backend"):
        load_tokenizer("sentencepiece", model=str(tmp_path / "u.model"), backend="gigatoken")
    plain = module.GigatokenTokenizer.encode
    monkeypatch.setattr(module.GigatokenTokenizer, "encode", lambda self, text: [*plain(self, text), 1])
    with pytest.raises(UserError, match="gigatoken and the hf tokenizer differ on"):
        load_tokenizer("hf", model=tokenizer_file, backend="gigatoken")


def test_gigatoken_that_is_not_installed(tokenizer_file, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gigatoken is not installed"):
        load_tokenizer("hf", model=tokenizer_file, backend="gigatoken")


def test_long_texts_are_cut_where_no_token_is(tokenizer_file, monkeypatch):  # noqa: F811
    text = "".join(TEXTS) + " ".join(PROBES) + "".join(TEXTS)
    whole = tokenizers.Tokenizer.from_file(tokenizer_file).encode(text, add_special_tokens=False).ids
    for size in (10, 100, 1000):
        monkeypatch.setattr(module, "BATCH_BYTES", size)
        assert len(module._parts(text)) > 4 and "".join(module._parts(text)) == text
        equal(load_tokenizer("hf", model=tokenizer_file), ["x", text, text[:5]], [
            tokenizers.Tokenizer.from_file(tokenizer_file).encode(t, add_special_tokens=False).ids
            for t in ("x", text, text[:5])])
    assert load_tokenizer("hf", model=tokenizer_file).may_cut and len(whole) > 1000


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": {"type": "Whitespace"}}, {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, {"added_tokens": [{"content": "one word"}]},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    {"added_tokens": [{"content": "x", "lstrip": True}]}])
def test_other_tokenizers_are_never_cut(change):
    plain = {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}, "added_tokens": []}
    assert module._has_gpt2_pattern(plain) and not module._has_gpt2_pattern({**plain, **change})


@sample
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["gpt2", "neox", "sentencepiece"])
def test_the_whole_sample_equals_the_reference_library(kind):
    """Every document of the sample, both backends, against the library called plainly."""
    folder = DATA / "tokenizers"
    texts = [r.text for p in sorted((DATA / "pile").glob("*.zst")) for r in read_shard(p) if isinstance(r, Document)]
    assert len(texts) > 5000
    if kind == "sentencepiece":
        model = str(folder / "sentencepiece" / "mistral_v1_32000.model")
        rows = sentencepiece.SentencePieceProcessor(model_file=model).encode(texts, num_threads=2)
        files = {"kind": kind, "model": model}
    elif kind == "gpt2":
        files = {"kind": kind, "vocab_file": str(folder / "gpt2" / "vocab.json"),
                 "merge_file": str(folder / "gpt2" / "merges.txt")}
        library = tokenizers.ByteLevelBPETokenizer.from_file(files["vocab_file"], files["merge_file"])
    else:
        files = {"kind": "hf", "model": str(folder / "gpt_neox_20b" / "20B_tokenizer.json")}
        library = tokenizers.Tokenizer.from_file(files["model"])
    if kind != "sentencepiece":
        rows = [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
        if module.importlib.util.find_spec("gigatoken"):
            equal(load_tokenizer(backend="gigatoken", **files), texts, rows)
    equal(load_tokenizer(**files), texts, rows)
    eod = load_tokenizer(**files).eod
    assert eod == {"gpt2": 50256, "neox": 0, "sentencepiece": 2}[kind]
