"""What every token mixer shares: its projections and its place in a layer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from based_mp.model.linear import ColumnParallelLinear, RowParallelLinear
from based_mp.model.recompute import recomputed


class Mixer(MegatronModule):
    """Base of the mixers: `linear_in` (column parallel) → `mix` → `linear_out` (row parallel).

    A subclass gives the width of `linear_in` (None: it overrides `project`) and implements
    `mix(x [s, b, width / tp], cu_seqlens) -> [s, b, out_width / tp]`. `cheap` mixing is done again under selective
    recomputation.
    """

    cheap = False

    def __init__(self, config: TransformerConfig, submodules: None = None, layer_number: int = 1,
                 pg_collection: ProcessGroupCollection | None = None, cp_comm_type: str | None = None, *,
                 width: int | None, out_width: int, in_bias: bool = False, in_stride: int = 1) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        tp_group = pg_collection.tp
        self.tp_size, self.tp_rank = tp_group.size(), tp_group.rank()
        if width is not None:
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
        x = self.project(hidden_states)
        y, kept = self._mix_packed(x, packed_seq_params), x.detach()
        if not self.cheap:
            return self.linear_out(y)[0], self.output_bias()
        with recomputed(y, lambda: self._mix_packed(kept, packed_seq_params), self, self.config):
            return self.linear_out(y)[0], self.output_bias()

    def project(self, hidden_states: Tensor) -> Tensor:
        """What `mix` works on, from the layer's normalised input, token by token (the bias of linear_in left out)."""
        return self.linear_in(hidden_states)[0]

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

    def shard(self, whole: Tensor, dim: int | None = 0, *, decay: bool = True) -> torch.nn.Parameter:
        """An own parameter from its whole initial value, of which each tensor-parallel rank takes its part along `dim`
        (None: replicated). decay=False: no weight decay whatever its shape.
        """
        part = whole if dim is None else whole.chunk(self.tp_size, dim)[self.tp_rank]
        options = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
        parameter = torch.nn.Parameter(part.clone().to(**options))
        if dim is not None:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        parameter.no_weight_decay = not decay
        return parameter

    def generator(self) -> torch.Generator:
        """For own parameters: the same numbers on every rank, others in every layer."""
        return torch.Generator().manual_seed(1000 + self.layer_number)


class RowMixer(Mixer):
    """A mixer that works on rows of equal length; packed sequences become rows padded on the right.

    A subclass implements `run(x [s, b, width], state or None, lengths [b] or None) -> [s, b, out_width]`: it starts
    from nothing or from `state`, which it advances by each row's first `lengths` (None: all) tokens. `init_state`
    gives an empty state, a dataclass whose tensors have the rows first.
    """

    def run(self, x: Tensor, state: Any, lengths: Tensor | None) -> Tensor:
        raise NotImplementedError

    def mix(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return self.run_packed(x, None, cu_seqlens)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> Any:
        """For `batch` rows of at most `length` tokens."""
        raise NotImplementedError

    def run_packed(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> Tensor:
        """`run`, or with cu_seqlens int32 [rows + 1] on rows laid end to end in x [tokens, 1, width]."""
        if cu_seqlens is None:
            return self.run(x, state, None)
        lengths = cu_seqlens.diff().long()
        steps = torch.arange(int(lengths.max()), device=x.device)[:, None]
        inside = steps < lengths                                                     # [s, rows]
        index = torch.where(inside, cu_seqlens[:-1].long() + steps, 0)
        y = self.run(x[index, 0] * inside[..., None].to(x.dtype), state, lengths)
        out = y.new_empty(x.shape[0], 1, y.shape[-1])
        out[index[inside], 0] = y[inside]
        return out


def valid_mask(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """[s, b, 1] in x's dtype, 1 at each row's first `lengths` positions of x [s, b, …]; None where all are."""
    if lengths is None:
        return None
    return (torch.arange(x.shape[0], device=x.device)[:, None] < lengths)[..., None].to(x.dtype)
