"""H3 mixer (Fu et al. 2022, section 3.1), tensor parallel over channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from based_mp.model.mixer import RowMixer
from based_mp.ops.recurrences import accumulation_dtype, causal_conv, long_conv, next_carry
from based_mp.systems import H3Config

STEPS = 256                                    # tokens that a state takes in at once


@dataclass
class H3State:
    """carry: last keys of the shift SSM [batch, d_state − 1, channels of this rank]; h: the diagonal SSM's state,
    real and imaginary parts, fp32 [batch, channels, d_state / 2, 2]."""

    carry: Tensor
    h: Tensor


class H3(RowMixer):
    """y = linear_out(q ∘ diagonal_ssm(shift_ssm(k) ∘ v)), q, k, v = linear_in(x), rows [channel][q | k | v].

    The shift SSM is a learned filter over the last d_state keys; the diagonal SSM is S4D with B = 1 (Gu et al. 2022,
    zero-order hold), both with a skip connection. One head a channel, as in the published models.
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, *, settings: H3Config,
                 **kwargs: Any) -> None:
        d, half = config.hidden_size, settings.d_state // 2
        super().__init__(config, submodules, width=3 * d, out_width=d, **kwargs)
        self.channels, self.half = d // self.tp_size, half
        g = self.generator()
        self.shift_weight = self.shard(torch.randn(d, settings.d_state, generator=g) * settings.d_state ** -0.5,
                                       decay=False)
        self.shift_skip = self.shard(torch.randn(d, generator=g))
        self.log_step = self.shard(torch.rand(d, generator=g) * math.log(100) + math.log(1e-3))
        # S4D-Lin: −1/2 + iπn.
        self.log_real = self.shard(torch.full((d, half), math.log(0.5)), decay=False)
        self.imaginary = self.shard(math.pi * torch.arange(half).float().repeat(d, 1), decay=False)
        self.read_out = self.shard(torch.randn(d, half, 2, generator=g) * 0.5 ** 0.5, decay=False)
        self.skip = self.shard(torch.randn(d, generator=g))

    def _discrete(self, acc: torch.dtype) -> tuple[Tensor, Tensor]:
        """(log of the state's multiplier a token, read-out), complex [channels, d_state / 2]."""
        a = torch.complex(-self.log_real.to(acc).exp(), self.imaginary.to(acc))
        step = self.log_step.to(acc).exp()[:, None] * a
        return step, torch.view_as_complex(self.read_out.to(acc)) * (step.exp() - 1) / a

    def run(self, x: Tensor, state: H3State | None, lengths: Tensor | None) -> Tensor:
        acc = accumulation_dtype(x)
        q, k, v = x.unflatten(-1, (self.channels, 3)).unbind(-1)
        carry = None if state is None else state.carry
        u = (causal_conv(k, self.shift_weight.flip(-1), carry) + self.shift_skip * k) * v
        step, read_out = self._discrete(acc)
        t = torch.arange(x.shape[0], device=x.device)
        if state is not None and x.shape[0] == 1 and lengths is None:
            y = self._decode(u[0].to(acc), state, step, read_out)[None]
        else:
            kernel = 2 * torch.einsum("cn,scn->sc", read_out, (t[:, None, None] * step).exp()).real
            y = long_conv(u, kernel)
            if state is not None:
                h = torch.view_as_complex(state.h)
                y = y + 2 * torch.einsum("bcn,scn->sbc", h * read_out, ((t[:, None, None] + 1) * step).exp()).real
                state.h = self._advance(u.to(acc), h, step, lengths)
        if state is not None:
            state.carry = next_carry(k, state.carry, lengths)
        return ((y + self.skip.to(acc) * u).to(x.dtype)) * q

    def _decode(self, u: Tensor, state: H3State, step: Tensor, read_out: Tensor) -> Tensor:
        h = torch.view_as_complex(state.h) * step.exp() + u[..., None]
        state.h = torch.view_as_real(h)
        return 2 * (h * read_out).sum(-1).real

    def _advance(self, u: Tensor, h: Tensor, step: Tensor, lengths: Tensor | None) -> Tensor:
        """The state after each row's first `lengths` inputs u [s, b, c]."""
        s, b, _ = u.shape
        counts = [s] * b if lengths is None else lengths.tolist()
        rows = []
        for row, count in enumerate(counts):
            now = h[row]
            for start in range(0, count, STEPS):
                piece = u[start : min(start + STEPS, count), row]
                left = torch.arange(piece.shape[0] - 1, -1, -1, device=u.device)
                powers = (left[:, None, None] * step).exp()
                now = now * (piece.shape[0] * step).exp() + torch.einsum("sc,scn->cn", piece.to(powers.dtype), powers)
            rows.append(now)
        return torch.view_as_real(torch.stack(rows))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> H3State:
        acc = torch.promote_types(dtype, torch.float32)
        return H3State(
            torch.zeros(batch, self.shift_weight.shape[1] - 1, self.channels, device=device, dtype=dtype),
            torch.zeros(batch, self.channels, self.half, 2, device=device, dtype=acc))
