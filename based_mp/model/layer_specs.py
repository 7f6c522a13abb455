"""One Megatron-core layer spec per layer: pre-norm mixer, pre-norm SwiGLU MLP (or none)."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from based_mp.config import ModelConfig
from based_mp.model.gated_conv import GatedConv
from based_mp.model.gla import GLA
from based_mp.model.h3 import H3
from based_mp.model.hyena import Hyena
from based_mp.model.layer import Layer
from based_mp.model.linear_attention import LinearAttention
from based_mp.model.mamba import Mamba
from based_mp.model.norms import RMSNorm
from based_mp.model.rwkv import RWKV
from based_mp.model.softmax_attention import SoftmaxAttention
from based_mp.ops.backends import check_kernels

SYSTEMS = {"gla": GLA, "mamba": Mamba, "h3": H3, "hyena": Hyena, "rwkv": RWKV}


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
    params = {"settings": getattr(model, kind)}
    if kind in ("gla", "rwkv", "mamba"):
        params["kernels"] = model.kernels
    if kind in ("gla", "rwkv"):
        check_kernels(model.kernels)
    return ModuleSpec(module=SYSTEMS[kind], params=params)


def block_spec(model: ModelConfig) -> TransformerBlockSubmodules:
    """The whole stack: a layer spec per layer, and the final norm."""
    layers = [ModuleSpec(module=Layer, params={"mixer": mixer_spec(kind, model), "with_mlp": model.ffn_size > 0})
              for kind in model.mixers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
