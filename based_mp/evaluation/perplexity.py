"""Perplexity of a trained model on indexed corpora, with the recall slices, corpus by corpus."""

from __future__ import annotations

import math
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
def perplexity(model: torch.nn.Module, config: Config, ranks: Ranks, split: str = "test") -> dict[str, dict[str, Any]]:
    """By corpus of data.valid or data.test: tokens, loss, perplexity, and the slices of `RecallSlices.result`.

    validation.batches global batches of every corpus at most. Raises UserError for corpora that cannot be used.
    """
    eod = check_corpora(config)
    prepare_cache(config, ranks)
    data = build_datasets(config, ranks, eod)
    corpora = data.valid if split == "valid" else data.test
    if not corpora:
        raise UserError(f"the configuration has no data.{split}: give corpora with data.{split}=[{{path: …}}]")
    group = parallel_state.get_data_parallel_group()
    slices = RecallSlices(config, group, ranks.device)
    out = {}
    for name, (dataset, _) in corpora.items():
        steps = min(config.validation.batches, len(dataset) // config.training.global_batch_size)
        if steps == 0:
            raise UserError(f"corpus {name} has {len(dataset)} samples, fewer than one batch of "
                            f"{config.training.global_batch_size}: lower training.global_batch_size")

        def stream(dataset: Any = dataset, steps: int = steps) -> Any:
            return batches(dataset, config, ranks, eod, first_step=0, last_step=steps)

        slices.learn(name, stream)
        sums = torch.zeros(2, device=ranks.device, dtype=torch.float64)
        for batch in stream():
            losses = token_losses(model, batch)
            slices.add(batch, losses)
            sums += torch.stack([(losses * batch["loss_mask"]).double().sum(), batch["loss_mask"].double().sum()])
        dist.all_reduce(sums, group=group)
        loss = (sums[0] / sums[1].clamp(min=1)).item()
        out[name] = {"tokens": int(sums[1]), "loss": loss, "perplexity": math.exp(min(loss, 50)), **slices.result()}
    return out
