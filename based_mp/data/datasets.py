"""Training, validation and test datasets: megatron.core's blended indexed datasets behind our configuration."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronIndexedDataset
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig
from torch import Tensor
from torch.utils.data import DataLoader

from based_mp.config import Config, Corpus, DataConfig
from based_mp.data import object_storage
from based_mp.data.sampler import GlobalBatchSampler
from based_mp.errors import UserError
from based_mp.parallel.state import Ranks
from data_prep.indexed import IndexedDataset
from data_prep.tokenizers import load_tokenizer

CHECKED_TOKENS = 1 << 22


@dataclass
class Datasets:
    """train: blended; valid: (dataset, weight) by corpus; test likewise. Items hold seq_length + 1 tokens."""

    train: Any
    valid: dict[str, tuple[Any, float]]
    test: dict[str, tuple[Any, float]]


@dataclass(frozen=True)
class _Vocabulary:
    """What GPTDataset asks of a tokenizer."""

    vocab_size: int
    eod: int
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": "based_mp", "vocab_size": self.vocab_size, "eod": self.eod}


def corpus_name(corpus: Corpus) -> str:
    return corpus.name or Path(corpus.path).name


def check_corpora(config: Config) -> int:
    """Every corpus is whole and fits the model and the tokenizer; returns the end-of-document id. Raises UserError."""
    data = config.data
    for corpora in (data.train, data.valid, data.test):
        names = [corpus_name(c) for c in corpora]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"two corpora of one list under data are called {twice[0]}: give each another name")
    manifests = {c.path: _manifest(c, config) for c in data.train + data.valid + data.test}
    found = {path: m for path, m in manifests.items() if m is not None}
    eods = {m["eod"] for m in found.values()}
    tokenizers = {m["tokenizer"]["sha256"]: path for path, m in found.items()}
    if len(eods) > 1 or len(tokenizers) > 1:
        raise UserError(f"{' and '.join(sorted(tokenizers.values())[:2])} were made with different tokenizers: "
                        "tokenize all corpora with one")
    if data.tokenizer is not None and tokenizers:
        sha256, path = tokenizers.popitem()
        t = data.tokenizer
        try:
            own = load_tokenizer(t.type, model=t.model, vocab_file=t.vocab_file, merge_file=t.merge_file,
                                 eod_token=t.eod_token).fingerprint()
        except UserError as error:
            raise UserError(f"data.tokenizer: {error}") from error
        if own != sha256:
            raise UserError(f"{path} was made with another tokenizer than data.tokenizer: correct data.tokenizer, or "
                            "tokenize the corpora again")
    if not eods and (data.eod_mask_loss or data.reset_state_at_documents):
        raise UserError("data.eod_mask_loss and data.reset_state_at_documents need the end-of-document id: keep the "
                        ".json manifest that data_prep.tokenize writes beside the .bin")
    return eods.pop() if eods else -1


def _manifest(corpus: Corpus, config: Config) -> dict[str, Any] | None:
    """The corpus's manifest, None without one, once its files are known to fit each other and the model."""
    if object_storage.is_remote(corpus.path):
        return _remote_manifest(corpus, config)
    for ending in (".bin", ".idx"):
        file = Path(corpus.path + ending)
        if not file.is_file():
            raise UserError(f"{file} is missing: make it with python -m data_prep.tokenize, or correct the path "
                            "(a prefix without .bin) under data")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: make it again with python -m data_prep.tokenize --overwrite")
    try:
        indexed = IndexedDataset(corpus.path)
        path = Path(corpus.path + ".json")
        text = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): correct its permissions") from error
    manifest = None
    if text is not None:
        manifest = _parsed(str(path), text)
        vocab_size = manifest["vocab_size"]
    else:
        # Made by other tools: the first tokens tell most mistakes, and reading all of them could take hours.
        vocab_size = int(indexed.data[:CHECKED_TOKENS].max()) + 1
    _check_vocabulary(corpus, vocab_size, config)
    return manifest


def _parsed(path: str, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
        _ = manifest["vocab_size"], manifest["eod"], manifest["tokenizer"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest of data_prep.tokenize: make the corpus again, or remove the file") \
            from error
    return manifest


def _check_vocabulary(corpus: Corpus, vocab_size: int, config: Config) -> None:
    if vocab_size > config.model.vocab_size:
        raise UserError(f"{corpus.path} was made with a vocabulary of {vocab_size} or more, the model has "
                        f"model.vocab_size={config.model.vocab_size}: set it to the tokenizer's")


def _remote_manifest(corpus: Corpus, config: Config) -> dict[str, Any]:
    """The manifest of a corpus in an S3-compatible store, whose sizes tell whether all of it was uploaded."""
    try:
        manifest = _parsed(corpus.path + ".json", object_storage.read(corpus.path + ".json"))
    except FileNotFoundError as error:
        raise UserError(f"{corpus.path}.json is missing: upload .bin, .idx and .json together, or correct the path") \
            from error
    expected = {".bin": manifest["tokens"] * (2 if manifest["dtype"] == "uint16" else 4),
                ".idx": 42 + 20 * manifest["documents"]}
    for ending, size in expected.items():
        found = object_storage.size(corpus.path + ending)
        if found != size:
            raise UserError(f"{corpus.path}{ending} has {found or 0} bytes, its manifest tells of {size}: upload it "
                            "again")
    _check_vocabulary(corpus, manifest["vocab_size"], config)
    return manifest


def build_datasets(config: Config, ranks: Ranks, eod: int) -> Datasets:
    """Build (or read from the cache) the sample indices, once per node; all ranks call this together."""
    return _once_per_node(ranks, lambda: _datasets(config, eod))


def _once_per_node(ranks: Ranks, build: Callable[[], Datasets]) -> Datasets:
    """The first process of the run builds; then that of every node, which finds it done where nodes share the cache;
    then the others read.

    megatron-core itself lets rank 0 alone build, and processes that do not see its files fail. So who builds is made
    to believe that it is alone, and the barriers are here.
    """
    alone = mock.patch.multiple(dist, is_initialized=lambda: False, get_rank=lambda *_: 0)
    reader = mock.patch.object(dist, "barrier", lambda *_, **__: None)
    turn = 0 if ranks.rank == 0 else 1 if ranks.local_rank == 0 else 2
    built = None
    for now in range(3):
        if now == turn:
            with alone if turn < 2 else reader:
                built = build()
        dist.barrier()
    assert built is not None
    return built


class CorpusDataset(GPTDataset):
    """megatron-core's, with reads from object storage that fit shuffled samples."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> MegatronIndexedDataset:
        if not object_storage.is_remote(dataset_path):
            return MegatronIndexedDataset(dataset_path)
        return MegatronIndexedDataset(dataset_path, mmap=False, object_storage_config=ObjectStorageConfig(
            path_to_idx_cache=config.object_storage_cache_path, bin_chunk_nbytes=object_storage.READ_BYTES))


def _datasets(config: Config, eod: int) -> Datasets:
    data, training, validation = config.data, config.training, config.validation
    train_samples = training.steps * training.global_batch_size
    eval_samples = validation.batches * training.global_batch_size
    try:
        if data.split is not None:
            return _split(config, eod, train_samples, eval_samples)
        train = _build(config, eod, data.train, train_samples)
        return Datasets(train, *({corpus_name(c): (_build(config, eod, [c], eval_samples), c.weight) for c in corpora}
                                 for corpora in (data.valid, data.test)))
    except (AssertionError, ValueError, IndexError, OSError) as error:
        raise UserError(f"the indexed datasets under data cannot be used: {' '.join(str(error).split())[:300]}; check "
                        "them with python -m data_prep.verify") from error


def _settings(config: Config, eod: int, **choice: Any) -> GPTDatasetConfig:
    vocabulary = _Vocabulary(config.model.vocab_size, eod)
    return GPTDatasetConfig(
        random_seed=config.data.seed, sequence_length=config.training.seq_length, tokenizer=vocabulary,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache=_cache_dir(config.data), object_storage_cache_path=_cache_dir(config.data), **choice)


def _cache_dir(data: DataConfig) -> str:
    return data.cache_dir or str(Path(data.train[0].path).parent / "cache")


def _blend(corpora: list[Corpus]) -> tuple[list[str], list[float] | None]:
    total = sum(c.weight for c in corpora)
    return [c.path for c in corpora], [c.weight / total for c in corpora]


def _build(config: Config, eod: int, corpora: list[Corpus], samples: int) -> Any:
    settings = _settings(config, eod, blend_per_split=[_blend(corpora), None, None])
    return BlendedMegatronDatasetBuilder(CorpusDataset, [samples, None, None], _on_this_rank, settings).build()[0]


def _split(config: Config, eod: int, train_samples: int, eval_samples: int) -> Datasets:
    data = config.data
    settings = _settings(config, eod, blend=_blend(data.train), split=data.split)
    train = BlendedMegatronDatasetBuilder(CorpusDataset, [train_samples, eval_samples, eval_samples], _on_this_rank,
                                          settings).build()[0]
    valid: dict[str, tuple[Any, float]] = {}
    test: dict[str, tuple[Any, float]] = {}
    for corpus in data.train:
        settings = _settings(config, eod, blend=_blend([corpus]), split=data.split)
        _, one_valid, one_test = BlendedMegatronDatasetBuilder(
            CorpusDataset, [1, eval_samples, eval_samples], _on_this_rank, settings).build()
        for where, dataset in ((valid, one_valid), (test, one_test)):
            if dataset is not None:
                where[corpus_name(corpus)] = (dataset, corpus.weight)
    return Datasets(train, valid, test)


def _on_this_rank() -> bool:
    return True


class Collate:
    """Items → {"tokens", "labels" int64 [b, s], "loss_mask" fp32 [b, s]} and, with resets, "cu_seqlens".

    cu_seqlens: int32 [documents + 1] over the b·s tokens, row after row; a document begins at every row start and
    after every end-of-document token.
    """

    def __init__(self, data: DataConfig, eod: int) -> None:
        self.eod, self.mask_eod, self.reset = eod, data.eod_mask_loss, data.reset_state_at_documents

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([item["tokens"] for item in items]).long()
        labels = torch.stack([item["labels"] for item in items]).long()
        mask = torch.stack([item["loss_mask"] for item in items]).float()
        if self.mask_eod:
            mask = mask * (tokens != self.eod)
        batch = {"tokens": tokens, "labels": labels, "loss_mask": mask}
        if self.reset:
            batch["cu_seqlens"] = document_bounds(tokens, self.eod)
        return batch


def document_bounds(tokens: Tensor, eod: int) -> Tensor:
    """cu_seqlens (int32) of the documents in `tokens` [b, s], flattened row after row."""
    b, s = tokens.shape
    starts = torch.zeros(b, s, dtype=torch.bool)
    starts[:, 0] = True
    starts[:, 1:] = tokens[:, :-1] == eod
    return torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([b * s])]).int()


def _leave_signals_to_training(worker: int) -> None:
    """slurm signals every process of a job; loaders go on until training has saved, and end with `_end`."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end(iterator: Any) -> None:
    """End the worker processes of a DataLoader's iterator, whatever state they are in."""
    workers = getattr(iterator, "_workers", [])
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def batches(dataset: Any, config: Config, ranks: Ranks, eod: int, *, first_step: int,
            last_step: int) -> Generator[dict[str, Tensor], None, None]:
    """Micro-batches of this rank for the steps [first, last), on its device, loaded ahead by worker processes.

    Close it where it is not read to its end: the workers end then.
    """
    sampler = GlobalBatchSampler(
        first_step=first_step, last_step=last_step, global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size)
    cuda = ranks.device.type == "cuda"
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=Collate(config.data, eod), pin_memory=cuda,
                        worker_init_fn=_leave_signals_to_training,
                        num_workers=config.data.num_workers if last_step - first_step > 1 else 0)
    iterator = iter(loader)
    try:
        for batch in iterator:
            yield {name: value.to(ranks.device, non_blocking=cuda) for name, value in batch.items()}
    finally:
        _end(iterator)


def prepare_cache(config: Config, ranks: Ranks) -> None:
    """Make the cache folder once per node; a clear error where it cannot be written."""
    path = _cache_dir(config.data)
    if ranks.local_rank == 0:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the sample indices to {path} ({error.strerror}): set data.cache_dir") \
                from error
    dist.barrier()
