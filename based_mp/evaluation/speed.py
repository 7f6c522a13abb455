"""Generation as an evaluation sees it: the generator, the bytes of a sequence's state, tokens per second."""

from __future__ import annotations

import time
from typing import Any

import torch

from based_mp.config import Config
from based_mp.errors import UserError
from based_mp.inference.engine import Engine, Sequence
from based_mp.inference.generate import Generator, open_tokenizer
from based_mp.inference.model import InferenceModel
from based_mp.inference.sampling import Sampling


def open_generator(model: torch.nn.Module, config: Config, **options: int) -> Generator:
    """A generator of a model that is on its device. Raises UserError where the checkpoint has no tokenizer."""
    if config.data.tokenizer is None:
        raise UserError("the checkpoint was trained without data.tokenizer: add it to its config.yaml")
    return Generator(InferenceModel(model, config.model), open_tokenizer(config.data.tokenizer), **options)


def state_bytes(model: InferenceModel, length: int) -> int:
    """Bytes of one sequence's generation state with room for `length` tokens, as it lies in memory."""
    buffers = (t for layer in model.layers for t in layer.mixer.buffers(1, length).values())
    return sum(t.numel() * t.element_size() for t in buffers if t.is_floating_point())


def generation_speed(model: InferenceModel, *, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Greedy generation of `new` tokens after `prompt` random ones, `batch` sequences at once, best of three.

    Returns tokens_per_second (generated ones over the whole time), state_bytes of a sequence at the end, device.
    """
    device, vocab_size = model.device, model.config.vocab_size
    prompts = torch.randint(0, vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(model, -1, slots=batch, length=prompt + new)          # no end of document: all go to the end

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for ids in prompts:
            engine.submit(Sequence(ids, Sampling(new)))
        while not engine.idle:
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()
    seconds = min(run() for _ in range(3))
    return {"tokens_per_second": batch * new / seconds, "state_bytes": state_bytes(model, prompt + new),
            "batch": batch, "prompt": prompt, "new": new,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
