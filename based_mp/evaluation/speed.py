"""Generation as an evaluation sees it: the generator, the bytes of a sequence's state, tokens per second."""

from __future__ import annotations

import time
from typing import Any

import torch

from based_mp.config import Config
from based_mp.errors import UserError
from based_mp.inference.generate import Generator, open_tokenizer
from based_mp.inference.state import map_states
from based_mp.model.based_model import extend, init_states


def open_generator(model: torch.nn.Module, config: Config) -> Generator:
    """A generator of a model that is on its device. Raises UserError where the checkpoint has no tokenizer."""
    if config.data.tokenizer is None:
        raise UserError("the checkpoint was trained without data.tokenizer: add it to its config.yaml")
    return Generator(model, open_tokenizer(config.data.tokenizer), config.model.vocab_size)


def state_bytes(model: torch.nn.Module, length: int) -> int:
    """Bytes of one sequence's generation state after `length` tokens, as it lies in memory (counters left out)."""
    states = init_states(model, 1)
    device = model.embedding.word_embeddings.weight.device
    extend(model, torch.zeros(1, length, dtype=torch.int64, device=device), states, last_only=True)
    sizes: list[int] = []
    map_states(lambda t: sizes.append(t.numel() * t.element_size() if t.is_floating_point() else 0) or t, states)
    return sum(sizes)


@torch.no_grad()
def generation_speed(model: torch.nn.Module, config: Config, *, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Greedy generation of `new` tokens after `prompt` random ones, `batch` sequences at once, best of three.

    Returns tokens_per_second (generated ones over the whole time), state_bytes of a sequence at the end, device.
    """
    device = model.embedding.word_embeddings.weight.device
    tokens = torch.randint(0, config.model.vocab_size, (batch, prompt), device=device,
                           generator=torch.Generator(device).manual_seed(0))

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        states = init_states(model, batch)
        logits = extend(model, tokens, states, last_only=True)
        for _ in range(new - 1):
            logits = extend(model, logits.argmax(-1)[:, None], states, last_only=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()
    seconds = min(run() for _ in range(3))
    return {"tokens_per_second": batch * new / seconds, "state_bytes": state_bytes(model, prompt + new),
            "batch": batch, "prompt": prompt, "new": new,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
