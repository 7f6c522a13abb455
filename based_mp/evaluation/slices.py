"""Perplexity slices (Arora et al. 2023, "Zoology", section 3; Arora et al. 2024, section 3).

An "AR hit" is the last token of a bigram that stood earlier in the same context and is rare in the training data: it
can be recalled, and hardly be known. All other tokens form the other slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from based_mp.config import Config
from based_mp.errors import UserError
from data_prep.indexed import IndexedDataset

STRIPE = 1 << 22                                  # training tokens counted at once


def bigrams(tokens: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """One int64 a position: the bigram of its token and its label."""
    return tokens.long() * vocab_size + labels.long()


def repeated(codes: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """bool [b, s]: this bigram stood earlier in its row, or with cu_seqlens (over the flattened rows) its document."""
    b, s = codes.shape
    flat = codes.flatten()
    position = torch.arange(b * s, device=codes.device)
    context = position // s if cu_seqlens is None else torch.searchsorted(cu_seqlens[1:].contiguous(), position,
                                                                          right=True)
    order = flat.argsort(stable=True)
    order = order[context[order].argsort(stable=True)]                    # by context, bigram, position
    same = (flat[order][1:] == flat[order][:-1]) & (context[order][1:] == context[order][:-1])
    out = torch.zeros(b * s, dtype=torch.bool, device=codes.device)
    out[order[1:]] = same
    return out.view(b, s)


def count_bigrams(prefix: str, codes: np.ndarray, vocab_size: int, part: int = 0, parts: int = 1) -> np.ndarray:
    """How often each of the sorted `codes` stands in a .bin; `part` of `parts` reads every parts-th stripe of it."""
    counts = np.zeros(len(codes), np.int64)
    data = IndexedDataset(prefix).data
    for start in range(part * STRIPE, len(data) - 1, parts * STRIPE):
        piece = np.asarray(data[start : start + STRIPE + 1], np.int64)
        found = piece[:-1] * vocab_size + piece[1:]
        place = np.minimum(np.searchsorted(codes, found), len(codes) - 1)
        counts += np.bincount(place[codes[place] == found], minlength=len(codes))
    return counts


class RecallSlices:
    """Loss of AR hits and of all other tokens. `learn` the contexts, `add` their losses, read `result`.

    group: the processes that see different rows; all call together.
    """

    def __init__(self, config: Config, group: dist.ProcessGroup, device: torch.device) -> None:
        remote = [c.path for c in config.data.train if "://" in c.path]
        if remote:
            raise UserError(f"recall slices count bigrams of the training corpora, and {remote[0]} is not local: set "
                            "validation.recall_slices to false")
        self.prefixes = [c.path for c in config.data.train]
        self.vocab_size, self.below = config.model.vocab_size, config.validation.rare_below
        self.group, self.device = group, device
        self.learned: set[str] = set()
        self.rare = torch.zeros(0, dtype=torch.int64, device=device)      # sorted
        self.sums, self.all_sums = torch.zeros(2, 4, dtype=torch.float64, device=device)

    def learn(self, name: str, batches: Callable[[], Iterable[dict[str, Tensor]]]) -> None:
        """Count the repeated bigrams of these batches in the training corpora, once for every name."""
        if name in self.learned:
            return
        self.learned.add(name)
        seen = [np.zeros(0, np.int64)]
        for batch in batches():
            codes = bigrams(batch["tokens"], batch["labels"], self.vocab_size)
            seen.append(codes[repeated(codes, batch.get("cu_seqlens"))].unique().cpu().numpy())
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        everyone: list[np.ndarray] = [seen[0]] * size
        dist.all_gather_object(everyone, np.unique(np.concatenate(seen)), group=self.group)
        codes = np.unique(np.concatenate(everyone))
        if not len(codes):
            return
        counts = sum(count_bigrams(prefix, codes, self.vocab_size, rank, size) for prefix in self.prefixes)
        total = torch.from_numpy(counts).to(self.device)
        dist.all_reduce(total, group=self.group)
        rare = torch.from_numpy(codes).to(self.device)[total < self.below]
        self.rare = torch.cat([self.rare, rare]).unique()

    def hits(self, batch: dict[str, Tensor]) -> Tensor:
        """bool [b, s]: the AR hits of a batch that was learned."""
        codes = bigrams(batch["tokens"], batch["labels"], self.vocab_size)
        if not len(self.rare):
            return torch.zeros_like(codes, dtype=torch.bool)
        place = torch.searchsorted(self.rare, codes).clamp(max=len(self.rare) - 1)
        return repeated(codes, batch.get("cu_seqlens")) & (self.rare[place] == codes)

    def add(self, batch: dict[str, Tensor], losses: Tensor) -> None:
        """losses: of every token [b, s], before the loss mask."""
        hit, mask = self.hits(batch), batch["loss_mask"].double()
        losses = losses.double() * mask
        self.sums += torch.stack([(losses * hit).sum(), (mask * hit).sum(), (losses * ~hit).sum(), (mask * ~hit).sum()])

    def result(self) -> dict[str, float]:
        """{"ar_hits_perplexity", "other_perplexity", "ar_hits_share"} since the last call (without empty slices)."""
        dist.all_reduce(self.sums, group=self.group)
        self.all_sums += self.sums
        out = self._told(self.sums)
        self.sums.zero_()
        return out

    def total(self) -> dict[str, float]:
        """Of everything that `result` told since the last call."""
        out = self._told(self.all_sums)
        self.all_sums.zero_()
        return out

    @staticmethod
    def _told(sums: Tensor) -> dict[str, float]:
        hit, hits, other, others = sums.tolist()
        out = {"ar_hits_share": hits / max(hits + others, 1)}
        if hits:
            out["ar_hits_perplexity"] = math.exp(min(hit / hits, 50))
        if others:
            out["other_perplexity"] = math.exp(min(other / others, 50))
        return out
