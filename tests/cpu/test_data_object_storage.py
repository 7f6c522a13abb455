"""Corpora in an S3-compatible store on loopback give the samples that the same files give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from based_mp.data import object_storage
from based_mp.data.datasets import batches, check_corpora
from based_mp.errors import UserError
from tests import helpers
from tests.cpu.test_data_datasets import EOD, VOCAB, built, settings, write_corpus

pytest.importorskip("boto3", reason="boto3 is not installed (pip install '.[s3]')")
moto_server = pytest.importorskip("moto.server", reason="moto is not installed (pip install 'moto[server]')")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A client of an empty store with the bucket "corpora"."""
    import boto3
    port = helpers.free_port()
    for name, value in (("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"), ("AWS_ACCESS_KEY_ID", "test"),
                        ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        yield client
    finally:
        server.stop()


def facts(tmp_path: Path, name: str, base: int, documents: int) -> str:
    """A corpus whose manifest has what a store's sizes are checked against."""
    prefix = write_corpus(tmp_path / name, base, documents)
    manifest = json.loads(Path(prefix + ".json").read_text())
    tokens = Path(prefix + ".bin").stat().st_size // 2
    Path(prefix + ".json").write_text(json.dumps({**manifest, "tokens": tokens, "documents": documents,
                                                  "dtype": "uint16"}))
    return prefix


def write(tmp_path: Path, store) -> tuple[list[str], list[str]]:
    """(local prefixes, the same in the store)"""
    local = [facts(tmp_path, *row) for row in (("one", 1, 200), ("two", 31, 100), ("val", 61, 100))]
    for prefix in local:
        for ending in (".bin", ".idx", ".json"):
            store.upload_file(prefix + ending, "corpora", f"pile/{Path(prefix).name}{ending}")
    return local, [f"s3://corpora/pile/{Path(prefix).name}" for prefix in local]


def configs(tmp_path: Path, local: list[str], remote: list[str]) -> list:
    return [settings(local, cache_dir=str(tmp_path / "cache_a"), num_workers=2),
            settings(remote, cache_dir=str(tmp_path / "cache_b"), num_workers=2)]


def test_samples_equal_those_of_local_files(tmp_path, store, gloo_process, monkeypatch):
    monkeypatch.setattr(object_storage, "READ_BYTES", 300)         # samples lie across several reads
    found = []
    for config in configs(tmp_path, *write(tmp_path, store)):
        data = built(config, gloo_process)
        found.append([batch["tokens"] for batch in batches(data.train, config, gloo_process, EOD, first_step=0,
                                                           last_step=3)])
        found[-1] += [data.valid["held out"][0][i]["tokens"] for i in range(8)]
    assert len(found[0]) == len(found[1]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert (tmp_path / "cache_b" / "corpora" / "pile" / "one.idx").is_file()


def test_what_is_wrong_with_a_store_is_told(tmp_path, store, monkeypatch):
    local, remote = write(tmp_path, store)
    config = configs(tmp_path, local, remote)[1]
    assert check_corpora(config) == EOD and config.model.vocab_size >= VOCAB
    store.put_object(Bucket="corpora", Key="pile/two.bin", Body=b"123")
    with pytest.raises(UserError, match="s3://corpora/pile/two.bin has 3 bytes, its manifest tells of .* again"):
        check_corpora(config)
    store.delete_object(Bucket="corpora", Key="pile/one.json")
    with pytest.raises(UserError, match="s3://corpora/pile/one.json is missing"):
        check_corpora(config)
    store.put_object(Bucket="corpora", Key="pile/one.json", Body=b"{}")
    with pytest.raises(UserError, match="is no manifest of data_prep.tokenize"):
        check_corpora(config)
    with pytest.raises(ValueError, match="set data.cache_dir to a local folder"):
        settings(remote)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{helpers.free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="cannot read .* check AWS_ENDPOINT_URL"):
        check_corpora(config)
