"""One Megatron-core layer spec per layer: pre-norm mixer, pre-norm SwiGLU MLP."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from based_mp.config import ModelConfig
from based_mp.model.gated_conv import GatedConv
from based_mp.model.layer import Layer
from based_mp.model.linear_attention import LinearAttention
from based_mp.model.norms import RMSNorm
from based_mp.model.softmax_attention import SoftmaxAttention


def mixer_spec(kind: str, model: ModelConfig) -> ModuleSpec:
    """The spec of one mixer by its name in `ModelConfig.mixers`."""
    rotary = {"rotary_base": model.rotary_base, "rotary_fraction": model.rotary_fraction}
    if kind == "linear_attention":
        params = {"feature_dim": model.feature_dim, "decay_exponent": model.decay_exponent}
        return ModuleSpec(module=LinearAttention, params=params)
    if kind == "sliding_attention":
        return ModuleSpec(module=SoftmaxAttention, params={"window": model.window, **rotary})
    if kind == "softmax_attention":
        return ModuleSpec(module=SoftmaxAttention, params=rotary)
    if kind == "gated_conv":
        return ModuleSpec(module=GatedConv, params={"kernel": model.conv_kernel})
    raise ValueError(f"unknown mixer {kind!r}")


def block_spec(model: ModelConfig) -> TransformerBlockSubmodules:
    """The whole stack: a layer spec per layer, and the final norm."""
    layers = [ModuleSpec(module=Layer, params={"mixer": mixer_spec(kind, model)}) for kind in model.mixers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
