"""Text from a trained model: prefill, then one token at a time on a constant-size state."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from based_mp.config import TokenizerConfig
from based_mp.errors import UserError
from based_mp.inference.load import full_state, load_state, read_config
from based_mp.inference.sampling import next_tokens
from based_mp.model.based_model import build_model, extend, init_states
from based_mp.parallel.state import Ranks
from based_mp.training import checkpoint as ckpt
from data_prep.tokenizers import Tokenizer, load_tokenizer


@dataclass
class Completion:
    """text and tokens: what was generated, without the prompt; finish_reason: "stop", "eod" or "length"."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a configuration names."""
    return load_tokenizer(config.type, model=config.model, vocab_file=config.vocab_file,
                          merge_file=config.merge_file, eod_token=config.eod_token)


class Generator:
    """Generates with a model that is already on its device."""

    def __init__(self, model: GPTModel, tokenizer: Tokenizer, vocab_size: int) -> None:
        if tokenizer.vocab_size > vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: give the "
                            "tokenizer the model was trained with")
        self.model, self.tokenizer, self.vocab_size = model, tokenizer, vocab_size
        self.device = model.embedding.word_embeddings.weight.device

    @classmethod
    def from_checkpoint(cls, path: str | Path, ranks: Ranks) -> Generator:
        """A checkpoint folder (or a folder of them: its newest), at the tensor-parallel size of `ranks`."""
        checkpoint = ckpt.resolve(path)
        config = read_config(checkpoint)
        if config.data.tokenizer is None:
            raise UserError(f"{checkpoint} was trained without data.tokenizer: add it to its config.yaml")
        parallel = config.parallel.model_copy(update={"tensor_parallel_size": ranks.tp_size})
        training = config.training.model_copy(update={"device": ranks.device.type})
        config = config.model_copy(update={"parallel": parallel, "training": training})
        model = build_model(config).eval()
        load_state(model, full_state(checkpoint, model), ranks.tp_rank, ranks.tp_size)
        return cls(model, open_tokenizer(config.data.tokenizer), config.model.vocab_size)

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]], *, chunk: int = 4096) -> tuple[Tensor, list[Any]]:
        """Run prompts of different lengths as one pack, `chunk` tokens of each at a time.

        Returns the logits after each prompt [batch, vocab_size] and the states. An empty prompt starts a document.
        """
        prompts = [prompt or [self.tokenizer.eod] for prompt in prompts]
        states = init_states(self.model, len(prompts))
        after: list[Tensor | None] = [None] * len(prompts)
        for start in range(0, max(map(len, prompts)), chunk):
            pieces = [prompt[start : start + chunk] for prompt in prompts]
            bounds = torch.tensor([0, *map(len, pieces)]).cumsum(0).to(self.device, torch.int32)
            tokens = torch.tensor([sum(pieces, [])], device=self.device)
            logits = extend(self.model, tokens, states, bounds, last_only=True)
            for row, piece in enumerate(pieces):
                if piece:
                    after[row] = logits[row]
        return self._whole(torch.stack(after)), states

    @torch.no_grad()
    def decode(self, tokens: Tensor, states: list[Any]) -> Tensor:
        """One more token a row: int64 [batch] → logits [batch, vocab_size]; `states` advances in place."""
        return self._whole(extend(self.model, tokens[:, None], states, last_only=True))

    def _whole(self, logits: Tensor) -> Tensor:
        """Logits over the tokenizer's vocabulary, the same on every tensor-parallel rank."""
        return gather_from_tensor_model_parallel_region(logits)[:, : self.tokenizer.vocab_size]

    def generate(self, prompts: list[str] | list[list[int]], *, max_new_tokens: int = 128, temperature: float = 0.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int | list[int] = 0,
                 stop: list[str] | None = None, prefill_chunk: int = 4096) -> list[Completion]:
        """Continue every prompt (text or token ids), greedily at temperature 0.

        seed: of each prompt, or one from which prompt i takes seed + i. A completion ends at the end-of-document
        token, before the first of the `stop` strings, or after max_new_tokens. Raises UserError for options out of
        range.
        """
        _check(prompts, max_new_tokens, temperature, top_k, top_p)
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        seeds = seed if isinstance(seed, list) else [seed + i for i in range(len(ids))]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        logits, states = self.prefill(ids, chunk=prefill_chunk)
        out = [Completion() for _ in ids]
        for position in range(max_new_tokens):
            tokens = next_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generators=generators)
            for completion, token in zip(out, tokens.tolist(), strict=True):
                self._take(completion, token, stop or [])
            if all(c.finish_reason for c in out):
                break
            if position + 1 < max_new_tokens:
                logits = self.decode(tokens, states)
        for completion in out:
            completion.finish_reason = completion.finish_reason or "length"
        return out

    def _take(self, completion: Completion, token: int, stop: list[str]) -> None:
        if completion.finish_reason:
            return
        if token == self.tokenizer.eod:
            completion.finish_reason = "eod"
            return
        completion.tokens.append(token)
        completion.text = self.tokenizer.decode(completion.tokens)
        found = [at for s in stop if (at := completion.text.find(s)) >= 0]
        if found:
            completion.text, completion.finish_reason = completion.text[: min(found)], "stop"


def _check(prompts: list, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not prompts:
        raise UserError("no prompt: give at least one")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: give at least 1")
    if temperature < 0:
        raise UserError(f"temperature={temperature}: give 0 (greedy) or more")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("top_k and top_p choose what is drawn from, and temperature 0 draws nothing: give a "
                        "temperature above 0, such as 1")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: give at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: give a number above 0 and up to 1")
