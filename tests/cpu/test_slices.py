"""AR hits against their definition, written as loops."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from based_mp.evaluation.slices import RecallSlices, bigrams, count_bigrams, repeated
from tests.models import tiny_config

VOCAB = 12


def write_corpus(folder, name, tokens):
    from data_prep.indexed import write_index
    array = np.asarray(tokens, np.uint16)
    array.tofile(folder / f"{name}.bin")
    write_index(folder / f"{name}.idx", [np.array([len(array)], np.int32)], np.dtype(np.uint16), 1)
    return str(folder / name)


def rows(count=3, length=40, seed=0):
    return torch.randint(0, VOCAB, (count, length + 1), generator=torch.Generator().manual_seed(seed))


def test_repeated_bigrams_by_row_and_by_document():
    ids = rows()
    codes = bigrams(ids[:, :-1], ids[:, 1:], VOCAB)
    bounds = torch.tensor([0, 10, 40, 63, 80, 120], dtype=torch.int32)
    for cu, contexts in ((None, [(0, 40), (40, 80), (80, 120)]),
                         (bounds, list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)))):
        expected, flat = [], codes.flatten().tolist()
        for a, b in contexts:
            expected += [flat[i] in flat[a:i] for i in range(a, b)]
        assert repeated(codes, cu).flatten().tolist() == expected
        assert 0 < sum(expected) < 120


def test_counting_by_stripes(tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(0, VOCAB, 1000)
    prefix = write_corpus(tmp_path, "train", ids)
    codes = np.array([0, 5, 13, 77, 143])
    pairs = (ids[:-1] * VOCAB + ids[1:]).tolist()
    expected = [pairs.count(code) for code in codes]
    monkeypatch.setattr("based_mp.evaluation.slices.STRIPE", 97)
    assert count_bigrams(prefix, codes, VOCAB).tolist() == expected
    assert sum(count_bigrams(prefix, codes, VOCAB, part, 3) for part in range(3)).tolist() == expected


@pytest.mark.parametrize("below", [1, 7, 10**6])
def test_slices_of_a_batch(tmp_path, gloo_process, below):
    train = np.random.default_rng(1).integers(0, VOCAB, 1000)
    prefix = write_corpus(tmp_path, "train", train)
    config = tiny_config(data={"train": [{"path": prefix}]}, model={"vocab_size": VOCAB},
                         validation={"recall_slices": True, "rare_below": below})
    slices = RecallSlices(config, dist.group.WORLD, torch.device("cpu"))
    ids, losses = rows(seed=5), torch.rand(3, 40)
    mask = (torch.rand(3, 40) < 0.8).float()
    batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask}
    slices.learn("a", lambda: [batch])
    slices.learn("a", lambda: 1 / 0)                                       # once a name
    slices.add(batch, losses)
    got = slices.result()
    pairs, sums = list(zip(train[:-1].tolist(), train[1:].tolist(), strict=True)), {True: [], False: []}
    for row, kept, loss in zip(ids.tolist(), mask.tolist(), losses.tolist(), strict=True):
        seen = list(zip(row[:-1], row[1:], strict=True))
        for i, pair in enumerate(seen):
            if kept[i]:
                sums[pair in seen[:i] and pairs.count(pair) < below].append(loss[i])
    assert got["other_perplexity"] == pytest.approx(math.exp(np.mean(sums[False])), rel=1e-5)
    assert got["ar_hits_share"] == pytest.approx(len(sums[True]) / (len(sums[True]) + len(sums[False])))
    if sums[True]:
        assert got["ar_hits_perplexity"] == pytest.approx(math.exp(np.mean(sums[True])), rel=1e-5)
    assert bool(sums[True]) == (below > 1)
    assert slices.result() == {"ar_hits_share": 0}
    assert slices.total() == got and slices.total() == {"ar_hits_share": 0}


def test_slices_are_logged_while_training(tmp_path, gloo_process):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from based_mp.training.loop import Trainer
    prefix = write_corpus(tmp_path, "train", np.random.default_rng(1).integers(0, 120, 3000))
    valid = write_corpus(tmp_path, "valid", np.tile(np.random.default_rng(2).integers(0, 120, 16), 80))
    config = tiny_config(
        data={"train": [{"path": prefix}], "valid": [{"path": valid, "name": "v"}], "cache_dir": str(tmp_path / "c")},
        training={"steps": 2}, logging={"tensorboard_dir": str(tmp_path / "tb"), "log_interval": 1},
        validation={"interval": 2, "batches": 1, "recall_slices": True}, checkpoint={"dir": None})
    Trainer(config, gloo_process).run()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"valid_v/ar_hits_perplexity", "valid_v/other_perplexity", "valid_v/ar_hits_share"} <= set(tags)
    assert events.Scalars("valid/ar_hits_share")[0].value == events.Scalars("valid_v/ar_hits_share")[0].value
    # Period 16 in rows of 32: all but the first 16 bigrams of a row are repeated.
    assert events.Scalars("valid_v/ar_hits_share")[0].value == pytest.approx(0.5, abs=0.01)
