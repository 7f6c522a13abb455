"""Training, validation and test datasets: megatron.core's blended indexed datasets behind our configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor
from torch.utils.data import DataLoader

from based_mp.config import Config, Corpus, DataConfig
from based_mp.data.sampler import GlobalBatchSampler
from based_mp.errors import UserError
from based_mp.parallel.state import Ranks
from data_prep.errors import UserError as DataPrepError
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
        except DataPrepError as error:
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
    for ending in (".bin", ".idx"):
        file = Path(corpus.path + ending)
        if not file.is_file():
            raise UserError(f"{file} is missing: make it with python -m data_prep.tokenize, or correct the path "
                            "(a prefix without .bin) under data")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: make it again with python -m data_prep.tokenize --overwrite")
    try:
        indexed = IndexedDataset(corpus.path)
    except DataPrepError as error:
        raise UserError(str(error)) from error
    path = Path(corpus.path + ".json")
    manifest = None
    if path.is_file():
        try:
            manifest = json.loads(path.read_text())
            vocab_size, _, _ = manifest["vocab_size"], manifest["eod"], manifest["tokenizer"]["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no manifest of data_prep.tokenize: make the corpus again, or remove the file") \
                from error
    else:
        # Made by other tools: the first tokens tell most mistakes, and reading all of them could take hours.
        vocab_size = int(indexed.data[:CHECKED_TOKENS].max()) + 1
    if vocab_size > config.model.vocab_size:
        raise UserError(f"{corpus.path} was made with a vocabulary of {vocab_size} or more, the model has "
                        f"model.vocab_size={config.model.vocab_size}: set it to the tokenizer's")
    return manifest


def build_datasets(config: Config, eod: int) -> Datasets:
    """Build (or read from the cache) the sample indices; all ranks call this together."""
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
        path_to_cache=_cache_dir(config.data), **choice)


def _cache_dir(data: DataConfig) -> str:
    return data.cache_dir or str(Path(data.train[0].path).parent / "cache")


def _blend(corpora: list[Corpus]) -> tuple[list[str], list[float] | None]:
    total = sum(c.weight for c in corpora)
    return [c.path for c in corpora], [c.weight / total for c in corpora]


def _build(config: Config, eod: int, corpora: list[Corpus], samples: int) -> Any:
    settings = _settings(config, eod, blend_per_split=[_blend(corpora), None, None])
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], _on_this_rank, settings).build()[0]


def _split(config: Config, eod: int, train_samples: int, eval_samples: int) -> Datasets:
    data = config.data
    settings = _settings(config, eod, blend=_blend(data.train), split=data.split)
    train = BlendedMegatronDatasetBuilder(GPTDataset, [train_samples, eval_samples, eval_samples], _on_this_rank,
                                          settings).build()[0]
    valid: dict[str, tuple[Any, float]] = {}
    test: dict[str, tuple[Any, float]] = {}
    for corpus in data.train:
        settings = _settings(config, eod, blend=_blend([corpus]), split=data.split)
        _, one_valid, one_test = BlendedMegatronDatasetBuilder(
            GPTDataset, [1, eval_samples, eval_samples], _on_this_rank, settings).build()
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


def batches(dataset: Any, config: Config, ranks: Ranks, eod: int, *, first_step: int,
            last_step: int) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of this rank for the steps [first, last), on its device, loaded ahead by worker processes."""
    sampler = GlobalBatchSampler(
        first_step=first_step, last_step=last_step, global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size)
    cuda = ranks.device.type == "cuda"
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=Collate(config.data, eod), pin_memory=cuda,
                        num_workers=config.data.num_workers if last_step - first_step > 1 else 0)
    for batch in loader:
        yield {name: value.to(ranks.device, non_blocking=cuda) for name, value in batch.items()}


def prepare_cache(config: Config, ranks: Ranks) -> None:
    """Make the cache folder once; a clear error where it cannot be written."""
    path = _cache_dir(config.data)
    if ranks.rank == 0:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the sample indices to {path} ({error.strerror}): set data.cache_dir") \
                from error
    dist.barrier()
