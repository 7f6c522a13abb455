"""The operations of generation in CUDA (csrc/decode_*.cu); the functions, shapes and meanings of `decode_torch`.

Activations are bf16 and contiguous. `slots` may hold −1: such a row changes nothing and its results mean nothing.
Nothing waits for the device, so everything here can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.ops.backends import extension
from based_mp.ops.decode_torch import conv_run, embed, rotations

__all__ = ["attention_step", "conv_run", "conv_step", "embed", "embed_step", "linear", "linear_add", "norm_linear",
           "rope_run", "rotations", "sample", "taylor_step_"]

PADS_ROWS = True                 # idle rows (−1) fill a batch up to the size of a captured graph
MAX_ROWS_LINEAR = 4              # rows that decode_linear takes, norm, SwiGLU and residual inside; cuBLAS from there on
SPLIT_BLOCKS = 924               # blocks of decode_attention that an H100 runs at once, seven on each multiprocessor
SPLIT_KEYS = 256                 # keys a split has at least


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def embed_step(pool: Any, slots: Tensor, table: Tensor, first: int, residual_dtype: torch.dtype,
               frequency: Tensor) -> tuple[Tensor, Tensor]:
    rows, width, half = slots.shape[0], table.shape[1], frequency.shape[0]
    residual = table.new_empty(rows, width, dtype=residual_dtype)
    rotation = frequency.new_empty(rows, 2, half)
    extension().decode_embed(_at(pool.tokens), _at(pool.positions), _at(slots), _at(table), _at(residual),
                             residual_dtype == torch.float32, rows, width, first, table.shape[0], _at(frequency),
                             _at(rotation), half, _stream())
    return residual, rotation


def _add_norm(residual: Tensor, out: Tensor | None, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
    extension().decode_add_norm(_at(residual), residual.dtype == torch.float32, _at(out), _at(bias), _at(weight),
                                _at(y), eps, *residual.shape, _stream())
    return y


def _few_rows(x: Tensor, weight: Tensor, y: Tensor | None, *, norm: Tensor | None = None, eps: float = 0.0,
              add_to: Tensor | None = None, bias: Tensor | None = None, swiglu: bool = False) -> None:
    residual = x if norm is not None else add_to
    fp32 = residual is not None and residual.dtype == torch.float32
    extension().decode_linear(_at(x), _at(weight), _at(y), _at(norm), eps, _at(add_to), _at(bias), fp32, swiglu,
                              x.shape[0], *weight.shape, _stream())


def norm_linear(residual: Tensor, out: Tensor | None, bias: Tensor | None, norm_weight: Tensor, eps: float,
                weight: Tensor, *, swiglu: bool = False) -> Tensor:
    rows, columns = residual.shape[0], weight.shape[0]
    if rows <= MAX_ROWS_LINEAR:
        y = weight.new_empty(rows, columns // 2 if swiglu else columns)
        if out is None:
            _few_rows(residual, weight, y, norm=norm_weight, eps=eps, swiglu=swiglu)
        else:
            _few_rows(_add_norm(residual, out, bias, norm_weight, eps), weight, y, swiglu=swiglu)
        return y
    return _many_rows(_add_norm(residual, out, bias, norm_weight, eps), weight, swiglu=swiglu)


def _many_rows(x: Tensor, weight: Tensor, *, swiglu: bool = False) -> Tensor:
    x = F.linear(x, weight)
    if not swiglu:
        return x
    rows, columns = x.shape
    y = weight.new_empty(rows, columns // 2)
    extension().decode_swiglu(_at(x), _at(y), rows, columns // 2, _stream())
    return y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    if x.shape[0] > MAX_ROWS_LINEAR:
        return _many_rows(x, weight)
    y = weight.new_empty(x.shape[0], weight.shape[0])
    _few_rows(x, weight, y)
    return y


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if x.shape[0] > MAX_ROWS_LINEAR:
        return _many_rows(x, weight), bias
    _few_rows(x, weight, None, add_to=residual, bias=bias)
    return None, None


def conv_step(x: Tensor, bias: Tensor, weight: Tensor, slots: Tensor, carry: Tensor) -> Tensor:
    rows, (channels, taps) = x.shape[0], weight.shape
    y = x.new_empty(rows, channels)
    extension().decode_conv(_at(x), _at(bias), _at(weight), _at(slots), _at(carry), _at(y), rows, channels, taps,
                            _stream())
    return y


def taylor_step_(x: Tensor, slots: Tensor, kv: Tensor, z: Tensor, decay: Tensor | None, feature_dim: int) -> Tensor:
    rows, heads, head_dim = x.shape[0], kv.shape[1], kv.shape[3]
    o = x.new_empty(rows, heads * head_dim)
    factor = None if decay is None else decay.exp()
    extension().decode_taylor(_at(x), _at(slots), _at(kv), _at(z), _at(factor), _at(o), rows, heads, feature_dim,
                              head_dim, feature_dim ** -0.5, _stream())
    return o


def attention_step(x: Tensor, slots: Tensor, positions: Tensor, rotation: Tensor, keys: Tensor, values: Tensor,
                   head_dim: int) -> Tensor:
    rows, (heads, capacity, padded) = x.shape[0], keys.shape[1:]
    o = x.new_empty(rows, heads * head_dim)
    splits = max(1, min(SPLIT_BLOCKS // (rows * heads), capacity // SPLIT_KEYS))
    partial = torch.empty(rows, heads, splits, padded + 2, dtype=torch.float32, device=x.device) if splits > 1 else None
    extension().decode_attention(_at(x), _at(slots), _at(positions), _at(rotation), _at(keys), _at(values),
                                 _at(partial), _at(o), rows, heads, head_dim, padded, rotation.shape[-1], capacity,
                                 splits, head_dim ** -0.5, _stream())
    return o


def rope_run(x: Tensor, rotation: Tensor, heads: int, head_dim: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    q, k, v = (x.new_empty(tokens, heads, padded) for _ in range(3))
    extension().prefill_rope(_at(x), _at(rotation), _at(q), _at(k), _at(v), tokens, heads, head_dim, padded,
                             rotation.shape[-1], math.sqrt(padded / head_dim), _stream())
    return q, k, v


def sample(logits: Tensor, pool: Any, slots: Tensor, advance: int) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    chosen = torch.empty(rows, dtype=torch.int32, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    extension().decode_sample(_at(logits), _at(slots), _at(pool.tokens), _at(pool.positions), _at(pool.temperature),
                              _at(pool.top_k), _at(pool.top_p), _at(pool.seeds), _at(chosen), _at(logprob), rows,
                              logits.shape[1], pool.vocab_size, advance, _stream())
    return chosen, logprob
