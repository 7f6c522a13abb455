"""BASED and its softmax-attention baseline as a Megatron-core GPTModel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.config import Config
from based_mp.model.layer_specs import block_spec
from based_mp.model.linear import Head
from based_mp.ops import backends
from based_mp.ops.fused.cross_entropy import cross_entropy
from based_mp.ops.fused.embedding import embedding

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-core's view of our configuration."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.precision]
    recompute: dict[str, Any] = {}
    if config.training.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif config.training.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    elif config.training.recompute == "norms":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}

    def normal(std: float):
        return lambda weight: torch.nn.init.normal_(weight, 0.0, std)

    return TransformerConfig(
        num_layers=model.num_layers, hidden_size=model.d_model, num_attention_heads=model.num_heads,
        ffn_hidden_size=model.ffn_size or model.d_model, kv_channels=model.head_dim,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel_size > 1,
        params_dtype=dtype, bf16=dtype == torch.bfloat16, pipeline_dtype=dtype,
        fp32_residual_connection=model.fp32_residual,
        normalization="RMSNorm", layernorm_epsilon=model.norm_eps, persist_layer_norm=False,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0,
        init_method=normal(model.init_std), embedding_init_method=normal(model.init_std),
        output_layer_init_method=normal(model.init_std / math.sqrt(2 * model.num_layers)),
        use_cpu_initialization=not torch.cuda.is_available() or config.training.device == "cpu",
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_dropout_fusion=False,
        bias_activation_fusion=False, apply_rope_fusion=False, **recompute)


class Embedding(layers.VocabParallelEmbedding):
    """[b, s] → [b, s, d_model] that lies in memory as the [s, b, d_model] that is made of it next (under sequence
    parallelism that itself, this rank's part)."""

    def forward(self, tokens: Tensor) -> Tensor:
        if backends.fused_backend(self.weight) != "triton":
            return super().forward(tokens)
        y = embedding(tokens, self.weight, self.vocab_start_index)
        if self.reduce_scatter_embeddings:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group).transpose(0, 1)


class BasedModel(GPTModel):
    """Megatron-core's GPTModel with an embedding whose gradient is not as large as the vocabulary, and a cross-entropy
    that makes no copy of the logits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.embedding.word_embeddings.__class__ = Embedding
        self.output_layer.__class__ = Head

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Of labels [b, s] and logits [s, b, padded_vocab / tp], the loss of every token [b, s] in fp32."""
        return cross_entropy(logits, labels.transpose(0, 1).contiguous(), self.pg_collection.tp).transpose(0, 1)


def build_model(config: Config) -> BasedModel:
    """The model of `config`, on this rank's device, after the process groups are initialised.

    `model(tokens [b, s], position_ids, None, labels=[b, s])` gives the loss of every token [b, s] in fp32;
    without labels the logits [b, s, padded_vocab / tp].
    """
    model = BasedModel(
        config=transformer_config(config), transformer_layer_spec=block_spec(config.model),
        vocab_size=config.model.padded_vocab_size, max_sequence_length=config.training.seq_length,
        parallel_output=True, share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="none")
    model.register_state_dict_post_hook(_drop_extra_state)
    if model.config.bf16:
        model.bfloat16()
    return model


def _drop_extra_state(module: torch.nn.Module, state_dict: dict, prefix: str, metadata: object) -> None:
    """Megatron-core's linears add empty `_extra_state` entries, which DeepSpeed's universal checkpoints choke on."""
    for key in [key for key in state_dict if key.endswith("_extra_state")]:
        del state_dict[key]


def token_losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every token [b, s], fp32, of a collated batch (tokens, labels[, cu_seqlens])."""
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=batch["labels"], packed_seq_params=batch.get("cu_seqlens"))


def forward_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss over the tokens that `loss_mask` keeps; a scalar."""
    losses, mask = token_losses(model, batch), batch["loss_mask"]
    return (losses * mask).sum() / mask.sum().clamp(min=1)
