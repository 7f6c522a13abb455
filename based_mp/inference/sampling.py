"""How the tokens of one sequence are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from based_mp.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k keeps the k likeliest tokens (None: all), top_p then the fewest likeliest whose
    probabilities sum to at least p; tokens of equal logits stay or go together. The same seed, prompt and options give
    the same tokens, whatever else is generated at the same time. Raises UserError for values out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: give at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give a number above 0 and up to 1")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: give a 64-bit integer")
