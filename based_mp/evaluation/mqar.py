"""Multi-query associative recall (MQAR, Arora et al. 2023, "Zoology", section 4; settings of the BASED paper).

A row holds `pairs` key–value pairs, then queries: keys again, at gaps drawn from a power law, one every two tokens at
most; between them random tokens. The value of the key is asked for at every query, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.config import Config, ModelConfig
from based_mp.errors import UserError
from based_mp.evaluation.speed import state_bytes
from based_mp.inference.model import InferenceModel
from based_mp.model.based_model import build_model
from based_mp.training.engine import parameter_groups


@dataclass(frozen=True)
class Rows:
    """tokens [rows, length]; positions of the queries and targets (their values), both [rows, pairs]; int64."""

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


def distinct(rng: np.random.Generator, rows: int, count: int, low: int, high: int) -> np.ndarray:
    """[rows, count] integers of [low, high), uniform without replacement in every row."""
    draws = 2 * count + 8
    while True:
        drawn = rng.integers(low, high, (rows, draws))
        order = drawn.argsort(1, kind="stable")
        ordered = np.take_along_axis(drawn, order, 1)
        repeated = np.zeros((rows, draws), bool)
        np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        if (draws - repeated.sum(1)).min() >= count:
            first = repeated.argsort(1, kind="stable")[:, :count]              # the first draws that are new
            return np.take_along_axis(drawn, first, 1)
        draws *= 2


def mqar_rows(rows: int, length: int, pairs: int, *, vocab_size: int = 8192, power: float = 0.01,
              seed: int | list[int] = 0) -> Rows:
    """`rows` examples, a function of the seed. Keys are of the lower half of the vocabulary, values of the upper.

    Slot i of the two-token slots after the pairs holds a query with a weight ∝ (i + 1)^(power − 1). Raises UserError
    where the pairs and their queries do not fit.
    """
    slots = (length - 2 * pairs) // 2
    if slots < pairs:
        raise UserError(f"{pairs} pairs and their queries need {4 * pairs} tokens, and a row has {length}: lengthen it")
    if pairs >= vocab_size // 2:
        raise UserError(f"{pairs} distinct keys do not fit half of a vocabulary of {vocab_size}: enlarge it")
    rng = np.random.default_rng(seed)
    keys = distinct(rng, rows, pairs, 1, vocab_size // 2)
    values = distinct(rng, rows, pairs, vocab_size // 2, vocab_size)
    # Weighted draws without replacement: the largest of log-weight + Gumbel noise.
    weight = (power - 1) * np.log(np.arange(1, slots + 1))
    gaps = (weight + rng.gumbel(size=(rows, slots))).argsort(1)[:, ::-1][:, :pairs]
    positions = 2 * pairs + 2 * gaps
    tokens = rng.integers(0, vocab_size, (rows, length))
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(tokens, positions, keys, 1)
    return Rows(tokens, positions, values)


@dataclass(frozen=True)
class Recipe:
    """How a run is trained: AdamW, linear warm-up, cosine to a tenth; fresh rows every step, deterministic by seed.

    train, test: (length, pairs, weight) and (length, pairs). stop_accuracy: end once every training setting reaches
    it. precision: of the model, as in `training.precision`; the master weights are fp32.
    """

    train: tuple[tuple[int, int, float], ...]
    test: tuple[tuple[int, int], ...]
    vocab_size: int
    batch_tokens: int
    steps: int
    warmup_steps: int
    lr: float
    seed: int
    weight_decay: float
    test_rows: int
    check_interval: int
    stop_accuracy: float | None
    precision: str


def train_mqar(model_config: ModelConfig, recipe: Recipe, device: torch.device,
               progress: Callable[[int], None] = lambda steps: None) -> dict[str, Any]:
    """Train one model and test it. The process groups of one process must be there.

    Returns {"accuracy": {"LENGTHxPAIRS": share of right answers}, "state_bytes": {"LENGTH": bytes a sequence},
    "steps", "loss", "parameters"}.
    """
    torch.manual_seed(recipe.seed)
    longest = max(length for length, _ in recipe.test)
    config = Config.model_validate({
        "model": model_config.model_dump(), "data": {"train": [{"path": "none"}]},
        "training": {"precision": recipe.precision, "device": device.type, "seq_length": longest}})
    model = build_model(config)
    optimizer = _Optimizer(model, recipe)
    shares = np.array([weight for *_, weight in recipe.train])
    choose = np.random.default_rng([recipe.seed, 1])
    loss, step = torch.zeros(()), 0
    while step < recipe.steps:
        length, pairs, _ = recipe.train[choose.choice(len(shares), p=shares / shares.sum())]
        rows = mqar_rows(max(recipe.batch_tokens // length, 1), length, pairs, vocab_size=recipe.vocab_size,
                         seed=[recipe.seed, 2, step])
        logits, targets = _answers(model, rows, device)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step(step)
        step += 1
        progress(1)
        if recipe.stop_accuracy and step % recipe.check_interval == 0 and all(
                accuracy(model, recipe, n, p, device) >= recipe.stop_accuracy for n, p, _ in recipe.train):
            break
    progress(recipe.steps - step)
    model.eval()
    inference = InferenceModel(model, model_config)
    return {"accuracy": {f"{n}x{p}": accuracy(model, recipe, n, p, device) for n, p in recipe.test},
            "state_bytes": {str(n): state_bytes(inference, n) for n in sorted({n for n, _ in recipe.test})},
            "steps": step, "loss": loss.item(), "parameters": sum(p.numel() for p in model.parameters())}


def _answers(model: torch.nn.Module, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits at the queries [rows · pairs, vocab_size] and their targets."""
    tokens, positions, targets = (torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)
                                  for x in (rows.tokens, rows.positions, rows.targets))
    hidden = model.embedding(input_ids=tokens, position_ids=tokens)                    # [length, rows, d_model]
    hidden = model.decoder(hidden_states=hidden, attention_mask=None)
    wanted = hidden.gather(0, positions.T[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = F.linear(wanted.flatten(0, 1), model.shared_embedding_or_output_weight())
    return logits, targets.T.flatten()


@torch.no_grad()
def accuracy(model: torch.nn.Module, recipe: Recipe, length: int, pairs: int, device: torch.device) -> float:
    """Share of right answers on `test_rows` rows that no training step sees."""
    right = torch.zeros((), device=device)
    size = max(min(recipe.test_rows, 4 * recipe.batch_tokens // length), 1)
    batches = -(-recipe.test_rows // size)
    for i in range(batches):
        rows = mqar_rows(size, length, pairs, vocab_size=recipe.vocab_size, seed=[recipe.seed, 3, length, pairs, i])
        logits, targets = _answers(model, rows, device)
        right += (logits.argmax(-1) == targets).float().mean()
    return (right / batches).item()


class _Optimizer:
    """AdamW on fp32 master weights, clipped to a gradient norm of 1."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        groups = parameter_groups(model, recipe.weight_decay)
        self.parameters = [p for group in groups for p in group["params"]]
        self.masters = [p.detach().float().clone() if p.dtype != torch.float32 else p for p in self.parameters]
        masters = iter(self.masters)
        for group in groups:
            group["params"] = [next(masters) for _ in group["params"]]
        fused = self.masters[0].is_cuda or None
        self.adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=fused)

    def step(self, step: int) -> None:
        r = self.recipe
        scale = (step + 1) / r.warmup_steps if step < r.warmup_steps else \
            0.55 + 0.45 * math.cos(math.pi * (step - r.warmup_steps) / max(r.steps - r.warmup_steps, 1))
        for group in self.adam.param_groups:
            group["lr"] = r.lr * min(scale, 1.0)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.masters[0] is not self.parameters[0]:
                torch._foreach_copy_(self.parameters, self.masters)
