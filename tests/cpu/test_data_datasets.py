"""Blended datasets from indexed corpora: content, weights, splits, order, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from based_mp.data.datasets import batches, build_datasets, check_corpora, prepare_cache
from based_mp.errors import UserError
from data_prep.indexed import write_index
from tests.models import tiny_config

EOD, SEQ = 0, 32
VOCAB = 120


def write_corpus(prefix: Path, base: int, documents: int, **facts: object) -> str:
    """Documents of tokens base … base+29, ended by EOD, with a manifest."""
    rng = np.random.default_rng(base)
    rows = [np.append(rng.integers(base, base + 30, rng.integers(5, 60)), EOD).astype(np.uint16)
            for _ in range(documents)]
    prefix.with_suffix(".bin").write_bytes(b"".join(r.tobytes() for r in rows))
    lengths = np.array([len(r) for r in rows], np.int32)
    write_index(prefix.with_suffix(".idx"), [lengths], np.dtype(np.uint16), documents)
    manifest = {"vocab_size": VOCAB, "eod": EOD, "tokenizer": {"type": "hf", "sha256": "a"}, **facts}
    prefix.with_suffix(".json").write_text(json.dumps(manifest))
    return str(prefix)


@pytest.fixture
def corpora(tmp_path: Path) -> list[str]:
    return [write_corpus(tmp_path / name, base, count) for name, base, count in
            (("one", 1, 200), ("two", 31, 100), ("val", 61, 100))]


def settings(corpora: list[str], **data: object):
    lists = {"train": [{"path": corpora[0], "weight": 3.0}, {"path": corpora[1], "weight": 1.0}],
             "valid": [{"path": corpora[2], "weight": 2.0, "name": "held out"}, {"path": corpora[1]}]}
    return tiny_config(data={**lists, **data}, validation={"batches": 2})


def built(config, ranks):
    prepare_cache(config, ranks)
    return build_datasets(config, ranks, check_corpora(config))


def corpus_of(sample: dict[str, torch.Tensor]) -> int:
    """0, 1, 2 by the tokens' range."""
    return int((sample["tokens"].max() - 1) // 30)


def whole_documents(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """What ends with EOD; the first may be cut at its beginning."""
    return [tuple(d.tolist()) for d in np.split(tokens, np.flatnonzero(tokens == EOD) + 1) if len(d) and d[-1] == EOD]


def test_blend_content_and_weights(corpora, gloo_process):
    config = settings(corpora)
    data = built(config, gloo_process)
    assert len(data.train) >= 160 and list(data.valid) == ["held out", "two"]
    shares = np.bincount([corpus_of(data.train[i]) for i in range(160)], minlength=3) / 160
    assert shares == pytest.approx([0.75, 0.25, 0], abs=0.01)
    dataset, weight = data.valid["held out"]
    assert weight == 2.0 and {corpus_of(dataset[i]) for i in range(16)} == {2}
    documents = whole_documents(np.fromfile(corpora[2] + ".bin", np.uint16))
    for i in range(16):
        sample = dataset[i]
        assert sample["tokens"].shape == (SEQ,) and torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert all(d in documents for d in whole_documents(sample["tokens"].numpy())[1:])


def test_the_same_seed_gives_the_same_samples(corpora, gloo_process, tmp_path):
    def samples(**data: object) -> list[list[int]]:
        train = built(settings(corpora, **data), gloo_process).train
        return [train[i]["tokens"].tolist() for i in range(30)]
    first = samples(cache_dir=str(tmp_path / "x"))
    assert first == samples(cache_dir=str(tmp_path / "x")) == samples(cache_dir=str(tmp_path / "y"))
    assert first != samples(cache_dir=str(tmp_path / "z"), seed=7)


def test_split(corpora, gloo_process):
    config = settings(corpora, split="80,10,10", valid=[])
    data = built(config, gloo_process)
    assert list(data.valid) == list(data.test) == ["one", "two"]
    documents = whole_documents(np.fromfile(corpora[0] + ".bin", np.uint16))
    for dataset, expected in ((data.valid["one"][0], documents[160:180]), (data.test["one"][0], documents[180:])):
        for i in range(16):
            inner = whole_documents(dataset[i]["tokens"].numpy())[1:]
            assert all(document in expected for document in inner)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_where_they_stopped(corpora, gloo_process, workers):
    config = settings(corpora, num_workers=workers, reset_state_at_documents=True)
    data = built(config, gloo_process)

    def read(first: int, last: int) -> list[torch.Tensor]:
        found = list(batches(data.train, config, gloo_process, EOD, first_step=first, last_step=last))
        assert all(b["tokens"].shape == (2, SEQ) and b["cu_seqlens"][-1] == 2 * SEQ for b in found)
        return [b["tokens"] for b in found]

    whole = read(0, 4)
    assert len(whole) == 16
    assert all(torch.equal(a, b) for a, b in zip(whole[8:], read(2, 4), strict=True))
    assert torch.equal(whole[5], torch.stack([data.train[i]["tokens"] for i in (10, 11)]))


def test_a_failing_loader_process_stops_the_run(gloo_process, corpora):
    class Broken:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> dict:
            raise RuntimeError("unreadable sample")

    config = settings(corpora, num_workers=1)
    with pytest.raises(RuntimeError, match="unreadable sample"):
        list(batches(Broken(), config, gloo_process, EOD, first_step=0, last_step=2))


def refused(config) -> str:
    with pytest.raises(UserError) as error:
        check_corpora(config)
    return str(error.value)


def test_missing_empty_and_cut_files(corpora, tmp_path):
    config = settings(corpora)
    assert check_corpora(config) == EOD
    assert "nowhere.bin is missing" in refused(settings([str(tmp_path / "nowhere"), *corpora[1:]]))
    file = Path(corpora[0] + ".bin")
    file.write_bytes(file.read_bytes()[:-2])
    assert "its index describes" in refused(config)
    file.write_bytes(b"")
    assert "one.bin is empty" in refused(config)
    Path(corpora[0] + ".idx").unlink()
    assert "one.idx is missing" in refused(settings(corpora[::-1])) or "one.bin is empty" in refused(config)


def test_index_that_is_none(corpora):
    Path(corpora[1] + ".idx").write_bytes(b"x" * 100)
    assert "two.idx is not a Megatron index" in refused(settings(corpora))


def test_vocabulary_larger_than_the_models(corpora, tmp_path):
    write_corpus(tmp_path / "one", 1, 20, vocab_size=121)
    assert "vocabulary of 121" in refused(settings(corpora)) and "model.vocab_size=120" in refused(settings(corpora))


def test_vocabulary_without_a_manifest(corpora, tmp_path):
    write_corpus(tmp_path / "one", 100, 50)                     # tokens up to 129
    Path(corpora[0] + ".json").unlink()
    assert "vocabulary of 130" in refused(settings(corpora))


def test_different_tokenizers(corpora, tmp_path):
    write_corpus(tmp_path / "two", 31, 100, tokenizer={"type": "hf", "sha256": "b"})
    assert "different tokenizers" in refused(settings(corpora))


def test_another_tokenizer_than_configured(corpora, tmp_path):
    from tokenizers import ByteLevelBPETokenizer
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(["some text"], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save(str(tmp_path / "t.json"))
    config = settings(corpora, tokenizer={"type": "hf", "model": str(tmp_path / "t.json")})
    assert "another tokenizer than data.tokenizer" in refused(config)
    config = settings(corpora, tokenizer={"type": "hf", "model": str(tmp_path / "none.json")})
    assert "none.json is missing" in refused(config)


def test_manifest_of_something_else(corpora):
    Path(corpora[0] + ".json").write_text("{}")
    assert "is no manifest of data_prep.tokenize" in refused(settings(corpora))


def test_two_corpora_of_one_name(corpora):
    assert "are called two" in refused(settings(corpora, valid=[{"path": corpora[1]}, {"path": corpora[1]}]))


def test_document_options_need_the_end_of_document_id(corpora):
    for path in corpora:
        Path(path + ".json").unlink()
    assert check_corpora(settings(corpora)) == -1
    assert "need the end-of-document id" in refused(settings(corpora, eod_mask_loss=True))
