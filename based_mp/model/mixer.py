"""What every token mixer shares: its projections and its place in a layer."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from based_mp.model.recompute import recomputed


class Mixer(MegatronModule):
    """Base of the mixers: `linear_in` (column parallel) → `mix` → `linear_out` (row parallel).

    A subclass gives the width of `linear_in` and implements
    `mix(x [s, b, width / tp], cu_seqlens) -> [s, b, out_width / tp]`. `cheap` mixing is done again under selective
    recomputation.
    """

    cheap = False

    def __init__(self, config: TransformerConfig, submodules: None = None, layer_number: int = 1,
                 pg_collection: ProcessGroupCollection | None = None, cp_comm_type: str | None = None, *,
                 width: int, out_width: int, in_bias: bool = False, in_stride: int = 1) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        tp_group = pg_collection.tp
        self.tp_size, self.tp_rank = tp_group.size(), tp_group.rank()
        # With SwiGLU's trick of stride 2, each rank's slice is [first half | second half].
        self.linear_in = ColumnParallelLinear(
            config.hidden_size, width, config=config, init_method=config.init_method, bias=in_bias,
            gather_output=False, stride=in_stride, skip_bias_add=True, tp_group=tp_group)
        self.linear_out = RowParallelLinear(
            out_width, config.hidden_size, config=config, init_method=config.output_layer_init_method, bias=False,
            input_is_parallel=True, skip_bias_add=True, tp_group=tp_group)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                packed_seq_params: Tensor | None = None, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, d_model] → (out [s, b, d_model], bias or None).

        `packed_seq_params` carries `cu_seqlens` (int32 [docs + 1] over the b·s tokens, row after row) where the
        state is reset at document boundaries.
        """
        x, _ = self.linear_in(hidden_states)
        y, kept = self._mix_packed(x, packed_seq_params), x.detach()
        if not self.cheap:
            return self.linear_out(y)[0], self.output_bias()
        with recomputed(y, lambda: self._mix_packed(kept, packed_seq_params), self, self.config):
            return self.linear_out(y)[0], self.output_bias()

    def output_bias(self) -> Tensor | None:
        """Added to the output by the transformer layer."""
        return None

    def mix(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _mix_packed(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return self.mix(x, None)
        s, b, _ = x.shape
        packed = x.transpose(0, 1).reshape(s * b, 1, -1)
        return self.mix(packed, cu_seqlens).reshape(b, s, -1).transpose(0, 1)
