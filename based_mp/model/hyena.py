"""Hyena mixer of order 2 (Poli et al. 2023, section 3), tensor parallel over channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import RowMixer
from based_mp.ops.recurrences import accumulation_dtype, causal_conv, long_conv, next_carry
from based_mp.systems import HyenaConfig

SLOW, FAST, TARGET, SHIFT = 1.5, 0.3, 1e-2, 0.05       # exponential modulation of the filters


@dataclass
class HyenaState:
    """Hyena has no state of constant size: it keeps every input of its long convolution.

    carry: last inputs of the short convolution [batch, kernel − 1, 3·channels of this rank];
    past: [batch, 1, most tokens, channels], by position; length: int64 [batch], tokens seen.
    """

    carry: Tensor
    past: Tensor
    length: Tensor


class Hyena(RowMixer):
    """y = linear_out(x0 ∘ long_conv(x1 ∘ v)), x0, x1, v = short_conv(linear_in(x)), rows [channel][x0 | x1 | v].

    The long filter is a sine-activated MLP of the position, times exp(−|δ|·t), and a skip connection.
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, *, settings: HyenaConfig,
                 **kwargs: Any) -> None:
        d, width = config.hidden_size, settings.filter_width
        super().__init__(config, submodules, width=3 * d, out_width=d, in_bias=True, **kwargs)
        self.channels, self.settings = d // self.tp_size, settings
        g = self.generator()

        def uniform(*shape: int, bound: float) -> Tensor:
            return (torch.rand(*shape, generator=g) * 2 - 1) * bound

        kernel = settings.conv_kernel
        self.conv_weight = self.shard(uniform(3 * d, kernel, bound=kernel ** -0.5))
        self.conv_bias = self.shard(uniform(3 * d, bound=kernel ** -0.5))
        inputs = [settings.filter_embedding] + [width] * (settings.filter_layers - 2)
        self.filter_weights = torch.nn.ParameterList(
            [self.shard(uniform(width, n, bound=n ** -0.5), None, decay=False) for n in inputs])
        self.filter_biases = torch.nn.ParameterList(
            [self.shard(uniform(width, bound=n ** -0.5), None) for n in inputs])
        self.filter_frequency = self.shard(torch.full((width,), settings.sine_frequency), None)
        self.filter_out = self.shard(uniform(d, width, bound=width ** -0.5), decay=False)
        self.skip = self.shard(torch.randn(d, generator=g))

    def filters(self, length: int, acc: torch.dtype) -> Tensor:
        """The first `length` taps of this rank's filters, [length, channels]."""
        whole = self.settings.filter_length
        if length > whole:
            raise ValueError(f"Hyena's filters are {whole} taps long and the sequence has {length} tokens: set "
                             "model.hyena.filter_length to the longest sequence")
        device = self.skip.device
        t = torch.linspace(0, 1, whole, device=device, dtype=acc)[:length, None]
        bands = (self.settings.filter_embedding - 1) // 2
        angle = 2 * math.pi / whole * torch.arange(length, device=device, dtype=acc)[:, None] \
            * torch.linspace(1e-4, bands - 1, bands, device=device, dtype=acc)
        z = torch.cat([t, angle.cos(), -angle.sin()], -1)
        for weight, bias in zip(self.filter_weights, self.filter_biases, strict=True):
            z = torch.sin(self.filter_frequency.to(acc) * (z @ weight.to(acc).T + bias.to(acc)))
        z = copy_to_tensor_model_parallel_region(z) @ self.filter_out.to(acc).T
        delta = torch.linspace(math.log(TARGET) / SLOW, math.log(TARGET) / FAST, self.channels * self.tp_size,
                               device=device, dtype=acc).chunk(self.tp_size)[self.tp_rank]
        return z * (torch.exp(-t * delta.abs()) + SHIFT)

    def project(self, hidden_states: Tensor) -> Tensor:
        x, bias = self.linear_in(hidden_states)
        return x + bias

    def run(self, x: Tensor, state: HyenaState | None, lengths: Tensor | None) -> Tensor:
        acc = accumulation_dtype(x)
        short = causal_conv(x, self.conv_weight, None if state is None else state.carry) + self.conv_bias
        x0, x1, v = short.unflatten(-1, (self.channels, 3)).unbind(-1)
        u = x1 * v
        if state is None:
            y = long_conv(u, self.filters(u.shape[0], acc))
        else:
            state.carry = next_carry(x, state.carry, lengths)
            y = self._extend(u, state, lengths)
        return (y + self.skip.to(acc) * u).to(x.dtype) * x0

    def _extend(self, u: Tensor, state: HyenaState, lengths: Tensor | None) -> Tensor:
        """The long convolution at the next positions of every row, u [s, b, channels]."""
        s, b, _ = u.shape
        rows = torch.arange(b, device=u.device)
        lengths = torch.full_like(state.length, s) if lengths is None else lengths
        steps = torch.arange(s, device=u.device)[:, None]
        position = state.length + steps                                                # [s, b]
        inside = steps < lengths
        state.past[rows.expand(s, b)[inside], 0, position[inside]] = u[inside].to(state.past.dtype)
        state.length = state.length + lengths
        used = int(state.length.max())
        seen = torch.arange(used, device=u.device) < state.length[:, None]             # the rest is of older sequences
        past, kernel = state.past[:, 0, :used] * seen[..., None], self.filters(used, accumulation_dtype(u))
        if s == 1:
            lag = position[0][:, None] - torch.arange(used, device=u.device)           # [b, used]
            taps = kernel[lag.clamp(min=0)] * (lag >= 0)[..., None]
            return (taps * past).sum(1)[None]
        y = long_conv(past.transpose(0, 1), kernel)
        return y[position.clamp(max=used - 1), rows]

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> HyenaState:
        taps, length = self.conv_weight.shape[1] - 1, min(length, self.settings.filter_length)
        return HyenaState(torch.zeros(batch, taps, 3 * self.channels, device=device, dtype=dtype),
                          torch.zeros(batch, 1, length, self.channels, device=device, dtype=dtype),
                          torch.zeros(batch, dtype=torch.int64, device=device))
