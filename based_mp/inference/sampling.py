"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def next_tokens(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None,
                generators: list[torch.Generator]) -> Tensor:
    """One token a row. logits: [batch, vocab]; returns int64 [batch].

    temperature 0 is greedy. top_k keeps the k likeliest tokens; top_p the fewest likeliest whose probabilities sum
    to at least p. Each row draws from its own generator, so that a row does not depend on its neighbours.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        values, order = logits.sort(descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
        values = values.masked_fill(before >= top_p, float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, values)
    probabilities = logits.softmax(-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)
