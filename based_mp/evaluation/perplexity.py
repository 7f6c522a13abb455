"""Loss and perplexity of a model on indexed corpora, with the recall slices, corpus by corpus."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from based_mp.config import Config
from based_mp.data.datasets import batches, build_datasets, check_corpora, prepare_cache
from based_mp.errors import UserError
from based_mp.evaluation.slices import RecallSlices
from based_mp.model.based_model import token_losses
from based_mp.parallel.state import Ranks


@torch.no_grad()
def corpus_loss(model: torch.nn.Module, name: str, dataset: Any, config: Config, ranks: Ranks, eod: int, *,
                slices: RecallSlices | None = None,
                stopped: Callable[[int], bool] = lambda seen: False) -> tuple[float, int] | None:
    """(mean loss, tokens that it is over) of validation.batches global batches of a dataset at most.

    slices: learn the corpus by its name, and add up its losses. stopped: asked after every micro-batch, with how many
    were seen; the answer is None as soon as it says True. Raises UserError for less than one global batch.
    """
    size = config.training.global_batch_size
    steps = min(config.validation.batches, len(dataset) // size)
    if steps == 0:
        raise UserError(f"corpus {name} has {len(dataset)} samples, fewer than one global batch of {size}: use a "
                        "larger corpus or lower training.global_batch_size")
    stream_of = partial(batches, dataset, config, ranks, eod, first_step=0, last_step=steps)
    if slices is not None:
        slices.learn(name, stream_of)
    sums = torch.zeros(2, device=ranks.device, dtype=torch.float64)
    with closing(stream_of()) as stream:
        for seen, batch in enumerate(stream, 1):
            losses, mask = token_losses(model, batch), batch["loss_mask"]
            if slices is not None:
                slices.add(batch, losses)
            sums += torch.stack([(losses * mask).double().sum(), mask.double().sum()])
            if stopped(seen):
                return None
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return (sums[0] / sums[1].clamp(min=1)).item(), int(sums[1])


def perplexity(model: torch.nn.Module, config: Config, ranks: Ranks, split: str = "test") -> dict[str, dict[str, Any]]:
    """By corpus of data.valid or data.test: tokens, loss, perplexity, and the slices of `RecallSlices.result`.

    Raises UserError for corpora that cannot be used.
    """
    eod = check_corpora(config)
    prepare_cache(config, ranks)
    data = build_datasets(config, ranks, eod)
    corpora = data.valid if split == "valid" else data.test
    if not corpora:
        raise UserError(f"the configuration has no data.{split}: give corpora with data.{split}=[{{path: …}}]")
    slices = RecallSlices(config, parallel_state.get_data_parallel_group(), ranks.device)
    out = {}
    for name, (dataset, _) in corpora.items():
        loss, tokens = corpus_loss(model, name, dataset, config, ranks, eod, slices=slices)
        out[name] = {"tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, 50)), **slices.result()}
    return out
