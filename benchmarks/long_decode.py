"""Drift of long decoding: perplexity of one long text, one token at a time against all tokens at once.

    python benchmarks/long_decode.py (--checkpoint FOLDER | --config FILE) [--data PREFIX] [--tokens 32768]

--config: random weights, and without --data random tokens. --data: prefix of a .bin/.idx pair, whose first tokens are
taken. Fails where the perplexities differ by more than 0.1%.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.config import load_config
from based_mp.errors import UserError, run_cli
from based_mp.inference.load import open_model
from based_mp.inference.model import InferenceModel
from based_mp.model.based_model import build_model
from based_mp.parallel import state
from data_prep.indexed import IndexedDataset

LIMIT = 1e-3                     # relative difference of the perplexities


def _losses(logits: Tensor, targets: Tensor, vocab: int) -> Tensor:
    logits = logits[:, :vocab].float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


@torch.no_grad()
def decoded_losses(model: InferenceModel, tokens: Tensor) -> Tensor:
    """−log p of every token after the first, one step a token, as a CUDA graph on a GPU. int64 [n] → fp32 [n − 1]."""
    pool = model.new_pool(1, len(tokens))
    slots = torch.zeros(1, dtype=torch.int32, device=tokens.device)
    losses = torch.full((len(tokens) - 1,), torch.nan, device=tokens.device)

    def step() -> None:
        logits, position = model.step(pool, slots), pool.positions[:1].long()
        target = tokens.index_select(0, position + 1)
        losses.index_copy_(0, position, _losses(logits, target, model.config.vocab_size))
        pool.tokens[:1] = target.int()
        pool.positions[:1] += 1

    run = step
    if tokens.is_cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    pool.reset([0])
    pool.tokens[:1] = tokens[:1].int()
    for _ in range(len(tokens) - 1):
        run()
    return losses


@torch.no_grad()
def parallel_losses(model: InferenceModel, tokens: Tensor) -> Tensor:
    """The same, all tokens at once through the kernels of training."""
    pool = model.new_pool(1, len(tokens))
    logits = model.prefill(pool, [tokens.tolist()], [0], [0], every=True)
    pieces = zip(logits[:-1].split(2048), tokens[1:].split(2048), strict=True)
    return torch.cat([_losses(*piece, model.config.vocab_size) for piece in pieces])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint")
    source.add_argument("--config")
    parser.add_argument("--data", help="prefix of tokenised text")
    parser.add_argument("--tokens", type=int, default=32768)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = state.initialize(device=device, seed=1)
    if args.checkpoint:
        config, module = open_model(args.checkpoint, ranks)
        model = InferenceModel(module, config.model)
    else:
        config = load_config(args.config)
        config = config.model_copy(update={"training": config.training.model_copy(update={"device": device})})
        model = InferenceModel(build_model(config).eval(), config.model)
    if args.data:
        text = torch.from_numpy(IndexedDataset(args.data).data[: args.tokens].astype("int64"))
        if len(text) < args.tokens or text.max() >= model.config.vocab_size:
            raise UserError(f"{args.data} has {len(text)} tokens, or ids beyond the model's vocabulary of "
                            f"{model.config.vocab_size}: give longer data or fewer --tokens, in the model's own tokens")
    else:
        text = torch.randint(0, model.config.vocab_size, (args.tokens,))
    text = text.to(device)
    start = time.perf_counter()
    together = parallel_losses(model, text)
    alone = decoded_losses(model, text)
    a, b = (losses.double().mean().exp().item() for losses in (alone, together))
    quarter = max(len(alone) // 4, 1)
    first, last = ((alone - together)[part].square().mean().sqrt().item()
                   for part in (slice(quarter), slice(-quarter, None)))
    print(f"perplexity of {len(alone)} tokens: {a:.4f} by decoding, {b:.4f} at once ({a / b - 1:+.4%}); losses differ "
          f"by {first:.2e} (root mean square) in the first quarter, {last:.2e} in the last; "
          f"{time.perf_counter() - start:.0f} s")
    state.destroy()
    if not abs(a / b - 1) < LIMIT:
        raise SystemExit(f"error: the perplexities differ by more than {LIMIT:.1%}")


if __name__ == "__main__":
    run_cli(main)
