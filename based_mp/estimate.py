"""Parameters, FLOPs per token and bytes per GPU of a configuration, by arithmetic alone (no GPU, no processes)."""

from __future__ import annotations

import math

from based_mp.config import Config, ModelConfig
from based_mp.ops.reference import taylor_feature_dim

GIB = 2**30


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by part; the vocabulary counts with its padding."""
    d, head, f = model.d_model, model.num_heads * model.head_dim, model.num_heads * model.feature_dim
    mixer = {
        "linear_attention": d * (2 * f + head) + head * d,
        "sliding_attention": 4 * d * head,
        "softmax_attention": 4 * d * head,
        "gated_conv": d * 4 * d + 4 * d + 2 * d * model.conv_kernel + 2 * d * d + d,
    } | _system_parameters(model)
    counts = {"embedding": model.padded_vocab_size * d}
    if not model.tie_embeddings:
        counts["head"] = model.padded_vocab_size * d
    for kind in sorted(set(model.mixers)):
        counts[kind] = model.mixers.count(kind) * mixer[kind]
    counts["mlp"] = model.num_layers * 3 * d * model.ffn_size
    counts["norms"] = ((2 if model.ffn_size else 1) * model.num_layers + 1) * d
    return counts


def _system_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of one mixer of the systems that BASED is compared with."""
    d, g, m, h = model.d_model, model.gla, model.mamba, model.hyena
    keys, values = int(d * g.expand_k), int(d * g.expand_v)
    channels, n, rank, width = m.expand * d, m.d_state, m.rank(d), h.filter_width
    filters = h.filter_embedding * width + (h.filter_layers - 2) * width * width + h.filter_layers * width + d * width
    return {
        "gla": 2 * d * (keys + values) + d * g.gate_rank + keys * (g.gate_rank + 1) + values // g.num_heads
        + values * d,
        "mamba": 3 * d * channels + channels * (m.conv_kernel + 1 + rank + 2 * n + rank + 1 + n + 1),
        "h3": 4 * d * d + d * (model.h3.d_state + 3 + 2 * model.h3.d_state),
        "hyena": 4 * d * d + 3 * d * (h.conv_kernel + 2) + filters + d,
        "rwkv": 5 * d * d + 8 * d,
    }


def mixing_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs a token of the mixers beside their projections, averaged over a sequence.

    Linear attention: state update and read-out, 4·D·(head_dim + 1) a head, D the distinct Taylor features. Softmax:
    4·head_dim a visible key. Convolution: 2·kernel a channel. GLA, RWKV: 4·d_k·d_v a head; Mamba 6·d_state a channel;
    long convolutions by FFT, 3 of 5·log₂ of the doubled length a channel. Elementwise work is not counted.
    """
    d, g, m = model.d_model, model.gla, model.mamba
    fft = 3 * 5 * math.log2(2 * seq_length)
    systems = {"gla": 4 * d * g.expand_k * d * g.expand_v / g.num_heads, "rwkv": 4 * d * model.rwkv.head_dim,
               "mamba": m.expand * d * (6 * m.d_state + 2 * m.conv_kernel),
               "h3": 2 * d * fft, "hyena": d * (fft + 6 * model.hyena.conv_kernel)}
    n, w = seq_length, min(model.window, seq_length)
    keys = {"softmax_attention": (n + 1) / 2, "sliding_attention": w - w * (w - 1) / (2 * n)}
    total = 0.0
    for kind in model.mixers:
        if kind == "linear_attention":
            total += model.num_heads * 4 * taylor_feature_dim(model.feature_dim) * (model.head_dim + 1)
        elif kind in systems:
            total += systems[kind]
        elif kind == "gated_conv":
            total += 2 * model.conv_kernel * 2 * model.d_model
        else:
            total += model.num_heads * 4 * model.head_dim * keys[kind]
    return total


def flops_per_token(config: Config) -> float:
    """Training FLOPs a token: 3 × forward (backward is twice forward).

    Forward: 2 a matrix parameter (the LM head counts, the embedding look-up does not) plus `mixing_flops`.
    Recomputation is not counted: MFU measures useful work.
    """
    counts = parameter_counts(config.model)
    matrices = sum(v for k, v in counts.items() if k not in ("norms", "head"))   # tied: the embedding is the head
    return 3 * (2 * matrices + mixing_flops(config.model, config.training.seq_length))


def kept_values(model: ModelConfig, recompute: str, tp: int = 1, sequence_parallel: bool = False) -> float:
    """Activations a token and GPU that wait for the backward pass.

    A layer keeps two sums of the residual stream, what the norms, SwiGLU and the convolution make of it (where that is
    not recomputed), and the outputs of its projections and of its mixing. Full recomputation keeps a layer's input, and
    one whole layer. The systems that BASED is compared with are counted roughly: fp32 as two values, spectra
    of long convolutions as four, GLA and RWKV with flash-linear-attention. Sequence parallelism also divides the
    residual stream and what the norms make of it.
    """
    d, h = model.d_model, model.num_heads
    keys, values = d * model.gla.expand_k, d * model.gla.expand_v
    mixing = {"gated_conv": (4 * d, 2 * d), "linear_attention": (h * (2 * model.feature_dim + 2 * model.head_dim), 0),
              "sliding_attention": (4 * d, 0), "softmax_attention": (4 * d, 0),
              "gla": (5 * keys + 4 * values, 0), "rwkv": (16 * d, 0), "h3": (22 * d, 0), "hyena": (18 * d, 0),
              "mamba": (model.mamba.expand * d * (15 + model.mamba.d_state / 8), 0)}
    cut = tp if sequence_parallel else 1
    layers = []
    for kind in model.mixers:
        kept, cheap = mixing[kind]
        layers.append(2 * d / cut + (2 * model.ffn_size + kept) / tp)
        if recompute not in ("norms", "selective"):
            layers[-1] += 2 * d / cut
        if recompute != "selective":
            layers[-1] += (model.ffn_size + cheap) / tp
    return sum(layers) if recompute != "full" else model.num_layers * d / cut + max(layers)


def _bucket_values(config: Config) -> float:
    """Gradients that ZeRO-2 in bf16 makes before they are summed: of two layers, the embedding and the head."""
    model = config.model
    if not config.shards_gradients:
        return 0
    counts = parameter_counts(model)
    layer = max(counts[kind] / model.mixers.count(kind) for kind in model.mixers) + counts["mlp"] / model.num_layers
    return 2 * layer + counts["embedding"] + counts.get("head", 0)


def memory_per_gpu(config: Config, world_size: int) -> dict[str, float]:
    """Bytes a GPU by part. Weights, gradients and optimizer state are exact up to padding; activations are what
    autograd keeps with the fused ops of a GPU."""
    dp, _ = config.check_world(world_size)
    model, tp, stage = config.model, config.parallel.tensor_parallel_size, config.parallel.zero_stage
    params = sum(parameter_counts(model).values()) / tp
    width = 2 if config.training.precision == "bf16" else 4
    parts = {
        "weights": params * width / (dp if stage == 3 else 1),
        "gradients": 4 * (params / (dp if stage >= 2 else 1) + _bucket_values(config) / tp * (dp > 1)),
        "optimizer": params * (12 if width == 2 else 8) / (dp if stage >= 1 else 1),
    }
    if config.training.fp8 != "none":
        counts = parameter_counts(model)
        parts["fp8 weights"] = 2 * sum(n for k, n in counts.items() if k not in ("embedding", "head", "norms")) / tp
    tokens = config.training.micro_batch_size * config.training.seq_length
    parts["activations"] = tokens * width * kept_values(model, config.training.recompute, tp,
                                                        config.parallel.sequence_parallel)
    parts["logits"] = tokens * model.padded_vocab_size / tp * width        # their gradient takes the same place
    return parts


def estimate_text(config: Config, world_size: int, tokens: float = 10e9, mfu: float = 0.4) -> str:
    """What `launch/pretrain.py --dry-run` prints."""
    counts = parameter_counts(config.model)
    total, flops = sum(counts.values()), flops_per_token(config)
    dp, accumulation = config.check_world(world_size)
    training = config.training
    lines = [f"parameters        {total:,}"]
    lines += [f"  {name:20}{value:,}" for name, value in counts.items()]
    lines += [f"FLOPs per token   {flops:,.0f}  (3 × (2 × matrix parameters + mixing))"]
    memory = memory_per_gpu(config, world_size)
    lines += [f"bytes per GPU     {sum(memory.values()) / GIB:.2f} GiB  (tensor parallel "
              f"{config.parallel.tensor_parallel_size}, data parallel {dp}, ZeRO {config.parallel.zero_stage})"]
    lines += [f"  {name:20}{value / GIB:.2f} GiB" for name, value in memory.items()]
    batch_tokens = training.global_batch_size * training.seq_length
    lines += [f"batch             {training.micro_batch_size} sequences × {accumulation} micro-batches × {dp} ranks = "
              f"{training.global_batch_size} sequences = {batch_tokens:,} tokens",
              f"run               {training.steps:,} steps = {training.steps * batch_tokens / 1e9:.3f}B tokens"]
    rate = mfu * config.logging.peak_tflops * 1e12 / flops
    hours = tokens / (rate * world_size) / 3600
    lines += [f"time              {tokens / 1e9:g}B tokens in {hours:,.1f} h on {world_size} GPUs at MFU {mfu:.0%} of "
              f"{config.logging.peak_tflops:g} TFLOP/s ({rate:,.0f} tokens/s a GPU)"]
    return "\n".join(lines)
