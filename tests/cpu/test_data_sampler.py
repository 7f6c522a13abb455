"""The data order depends on the global sample index alone."""

from __future__ import annotations

import pytest
import torch

from based_mp.config import DataConfig
from based_mp.data.datasets import Collate, document_bounds
from based_mp.data.sampler import GlobalBatchSampler

GLOBAL = 24


def steps(dp_size: int, micro: int, first: int = 0, last: int = 5) -> list[list[int]]:
    """The samples of every optimizer step, over all ranks in row order."""
    ranks = [list(GlobalBatchSampler(first_step=first, last_step=last, global_batch_size=GLOBAL,
                                     micro_batch_size=micro, dp_rank=r, dp_size=dp_size)) for r in range(dp_size)]
    accumulation = GLOBAL // (micro * dp_size)
    return [[i for m in range(accumulation) for rank in ranks for i in rank[step * accumulation + m]]
            for step in range(last - first)]


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 24), (1, 1), (2, 3), (4, 2), (4, 6), (8, 3)])
def test_each_step_takes_the_same_samples(dp_size, micro):
    assert steps(dp_size, micro) == [list(range(s * GLOBAL, (s + 1) * GLOBAL)) for s in range(5)]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_resume_at_another_size_skips_and_repeats_nothing(dp_size):
    assert steps(2, 3, 0, 2) + steps(dp_size, 2, 2, 5) == steps(1, 24)


def test_length_is_the_number_of_micro_batches():
    sampler = GlobalBatchSampler(first_step=3, last_step=7, global_batch_size=GLOBAL, micro_batch_size=3, dp_rank=1,
                                 dp_size=2)
    assert len(sampler) == len(list(sampler)) == 16


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="24 is no multiple of 5 × 2"):
        GlobalBatchSampler(first_step=0, last_step=1, global_batch_size=GLOBAL, micro_batch_size=5, dp_rank=0,
                           dp_size=2)


EOD = 9


def item(tokens: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    return {"tokens": torch.tensor(tokens, dtype=torch.int32), "labels": torch.tensor(labels, dtype=torch.int32),
            "loss_mask": torch.ones(len(tokens), dtype=torch.float64)}


ITEMS = [item([1, 2, 9, 4], [2, 9, 4, 5]), item([9, 9, 3, 9], [9, 3, 9, 1])]


def config(**keys: bool) -> DataConfig:
    return DataConfig.model_validate({"train": [{"path": "x"}], **keys})


def test_collate():
    batch = Collate(config(), EOD)(ITEMS)
    assert set(batch) == {"tokens", "labels", "loss_mask"}
    assert batch["tokens"].tolist() == [[1, 2, 9, 4], [9, 9, 3, 9]] and batch["tokens"].dtype == torch.int64
    assert batch["labels"].tolist() == [[2, 9, 4, 5], [9, 3, 9, 1]] and batch["labels"].dtype == torch.int64
    assert batch["loss_mask"].tolist() == [[1] * 4] * 2 and batch["loss_mask"].dtype == torch.float32


def test_no_loss_on_what_follows_a_document():
    batch = Collate(config(eod_mask_loss=True), EOD)(ITEMS)
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 1], [0, 0, 1, 0]]


def test_document_bounds():
    batch = Collate(config(reset_state_at_documents=True), EOD)(ITEMS)
    # Rows start at 0 and 4; documents end after 2, 4, 5 and 7; the last end is the row's too.
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 5, 6, 8] and batch["cu_seqlens"].dtype == torch.int32
    assert document_bounds(torch.zeros(3, 5, dtype=torch.int64), EOD).tolist() == [0, 5, 10, 15]
