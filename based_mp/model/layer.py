"""A layer of the residual stack: x + mixer(norm(x)), then x + mlp(norm(x)), with every addition fused into a norm."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig, mlp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from based_mp.model.linear import ColumnParallelLinear, RowParallelLinear
from based_mp.model.norms import RMSNorm
from based_mp.model.recompute import recomputed
from based_mp.ops.fused.swiglu import swiglu


class MLP(mlp.MLP):
    """SwiGLU: linear_fc2(silu(first half) ∘ second half) of linear_fc1(x); tensor parallel, no biases."""

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """hidden_states [s, b, d_model] → (out [s, b, d_model], None)."""
        x, _ = self.linear_fc1(hidden_states)
        y, x = swiglu(x), x.detach()
        with recomputed(y, lambda: swiglu(x), self, self.config):
            return self.linear_fc2(y)[0], None


class Layer(MegatronModule):
    """One layer for megatron-core's TransformerBlock, in place of its TransformerLayer.

    The MLP's output is not added here but handed to the next layer beside the residual stream (as the block's
    `context`, which it passes on untouched), so that addition and norm are one pass over memory. The last layer, and
    every layer under full recomputation (which keeps what a layer receives), closes the sum itself.
    """

    def __init__(self, config: TransformerConfig, *, mixer: ModuleSpec, with_mlp: bool = True, layer_number: int = 1,
                 pg_collection: ProcessGroupCollection | None = None, vp_stage: int | None = None) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = build_module(mixer, config=config, layer_number=layer_number,
                                           pg_collection=pg_collection)
        self.mlp = None
        if with_mlp:
            self.pre_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.mlp = MLP(config, mlp.MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                           ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)
        self.closes = layer_number == config.num_layers or config.recompute_granularity == "full"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, context: Tensor | None = None,
                packed_seq_params: Tensor | None = None, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, d_model] (fp32 for an fp32 residual), context: what is still to be added to it."""
        residual, x = self.input_layernorm(hidden_states, context, return_sum=True)
        with recomputed(x, self.input_layernorm.again(residual), self, self.config, part="layernorm"):
            out, bias = self.self_attention(x, packed_seq_params=packed_seq_params)
        if self.mlp is not None:
            residual, x = self.pre_mlp_layernorm(residual, out, bias, return_sum=True)
            with recomputed(x, self.pre_mlp_layernorm.again(residual), self, self.config, part="layernorm"):
                out, bias = self.mlp(x)
        if bias is not None:
            out = out + bias
        return (residual + out, None) if self.closes else (residual, out)
