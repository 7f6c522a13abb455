"""Gated short convolution mixer (BaseConv), tensor parallel over channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import Mixer
from based_mp.model.norms import replicated
from based_mp.ops.gated_conv import gated_conv


class GatedConv(Mixer):
    """u1, u2 = linear_in(x) (2·d_model each, bias); y = linear_out(silu(conv(u1)) ∘ u2) + bias."""

    cheap = True

    def __init__(self, config: TransformerConfig, submodules: None = None, *, kernel: int = 3, **kwargs: Any) -> None:
        channels = 2 * config.hidden_size
        super().__init__(config, submodules, width=2 * channels, out_width=channels, in_bias=True, in_stride=2,
                         **kwargs)                          # its bias is added by the convolution
        self.kernel, self.channels = kernel, channels // self.tp_size
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.conv_weight = torch.nn.Parameter(torch.empty(self.channels, kernel, **options))
        set_tensor_model_parallel_attributes(self.conv_weight, True, 0, 1)
        self.out_bias = torch.nn.Parameter(torch.zeros(config.hidden_size, **options))
        if config.perform_initialization:
            self._initialise_conv(channels)

    def _initialise_conv(self, channels: int) -> None:
        """torch's Conv1d default, U(±1/√kernel), drawn whole and cut, so that every TP size starts the same."""
        whole = torch.empty(channels, self.kernel)
        bound = 1 / math.sqrt(self.kernel)
        whole.uniform_(-bound, bound, generator=torch.Generator().manual_seed(1000 + self.layer_number))
        with torch.no_grad():
            self.conv_weight.copy_(whole[self.tp_rank * self.channels :][: self.channels])

    def output_bias(self) -> Tensor:
        return replicated(self.out_bias, self.config)

    def mix(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return gated_conv(x, self.conv_weight, self.linear_in.bias, cu_seqlens=cu_seqlens)
