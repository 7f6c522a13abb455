"""The operations of generation in CUDA (csrc/decode_*.cu); the functions, shapes and meanings of `decode_torch`.

Activations are bf16 and contiguous. `slots` may hold −1: such a row changes nothing and its results mean nothing.
Nothing waits for the device, so everything here can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from based_mp.ops import products
from based_mp.ops.backends import extension
from based_mp.ops.decode_torch import Pending, conv_run, embed, rotations
from based_mp.ops.reference import TaylorState, taylor_features

__all__ = ["attention_step", "conv_run", "embed", "embed_step", "linear", "linear_add", "norm_attention_step",
           "norm_conv_step", "norm_linear", "norm_taylor_step_", "rope_run", "rotations", "sample", "settled",
           "taylor_step_"]

PADS_ROWS = True                 # idle rows (−1) fill a batch up to the size of a captured graph
RESULTS_ON_HOST = True           # `sample` writes to the host's memory
RECENT = 16                      # tokens that the state of linear attention takes in at a time (csrc/decode_taylor.cu)
# Who makes a matrix product, by its rows: up to FEW_ROWS decode_linear, whose weights come straight to registers, up to
# MOST_ROWS decode_product, where they come through shared memory, both with what is around the product inside; cuBLAS
# beyond, with the residual addition inside, and the norm in the kernel that takes the product.
FEW_ROWS, MOST_ROWS = 16, 32
# What a kernel finds the factor of every row's RMSNorm by, which the product that it takes was made without: where the
# residual stream lies (bf16; 0: the product has the factor), its width, eps.
Norm = tuple[int, int, float]
NORMED: Norm = (0, 0, 0.0)
PLAIN, SWIGLU, CONV, ADD = range(4)                 # kinds of products
COLUMNS, CHUNK = 64, 64          # of the weights in a block of decode_product
BLOCKS = 100                     # that it has at least, where the inner dimension can be cut
SPLIT_BLOCKS = 528               # blocks of decode_attention that an H100 runs at once, four on each multiprocessor
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


def _add_norm(residual: Tensor, pending: Pending | None, eps: float) -> Tensor:
    y = torch.empty(residual.shape, dtype=torch.bfloat16, device=residual.device)
    out, bias = (None, None) if pending is None else (pending.out, pending.bias)
    extension().decode_add_norm(_at(residual), residual.dtype == torch.float32, _at(out), _at(bias), _at(y), eps,
                                *residual.shape, _stream())
    return y


@dataclass
class Summed:
    """The residual stream, nothing pending, as the next product takes it: x [n, d_model], itself or a bf16 copy.

    squares: sums of its squares over parts of d_model, fp32 [parts, n], for the norm's factor.
    """

    x: Tensor
    squares: Tensor

    def __getitem__(self, rows: Tensor) -> Summed:
        return Summed(self.x[rows], self.squares[:, rows])


def _splits(columns: int, inner: int) -> int:
    """Parts of the inner dimension in `decode_product`: not of the rows, so that a row's result depends on no other."""
    splits = 1
    while splits < 8 and splits * -(-columns // COLUMNS) < BLOCKS and inner >= 2 * splits * CHUNK:
        splits *= 2
    return splits


def _product(kind: int, x: Tensor, weight: Tensor, *, squares: Tensor | None = None, eps: float = 0.0,
             residual: Tensor | None = None, bias: Tensor | None = None, taps: Tensor | None = None,
             slots: Tensor | None = None, carry: Tensor | None = None) -> Any:
    (rows, inner), columns = x.shape, weight.shape[0]
    width = columns // 2 if kind in (SWIGLU, CONV) else columns
    fp32, sums = residual is not None and residual.dtype == torch.float32, None
    y = weight.new_empty(rows, width) if residual is None or fp32 else residual
    if kind == ADD:
        sums = torch.empty(-(-width // COLUMNS), rows, dtype=torch.float32, device=x.device)
    extension().decode_product(_at(x), _at(weight), _at(y), kind, rows, width, inner, _splits(columns, inner),
                               _at(squares), 0 if squares is None else squares.shape[0], eps, _at(residual), fp32,
                               _at(bias), _at(sums), _at(taps), 0 if taps is None else taps.shape[1], _at(slots),
                               _at(carry), _stream())
    return y if sums is None else Summed(y, sums)


def _few_rows(x: Tensor, weight: Tensor, y: Tensor | None, kind: int = PLAIN, *, norm: bool = False, eps: float = 0.0,
              add_to: Tensor | None = None, bias: Tensor | None = None, taps: Tensor | None = None,
              slots: Tensor | None = None, carry: Tensor | None = None) -> None:
    residual = x if norm else add_to
    fp32 = residual is not None and residual.dtype == torch.float32
    extension().decode_linear(_at(x), _at(weight), _at(y), kind, norm, eps, _at(add_to), _at(bias), fp32, _at(taps),
                              0 if taps is None else taps.shape[1], _at(slots), _at(carry), x.shape[0], *weight.shape,
                              _stream())


def _normed_product(kind: int, residual: Tensor, pending: Pending | Summed | None, eps: float, weight: Tensor,
                    **conv: Tensor) -> Tensor:
    """The norm, the product and what `kind` says in one kernel or two, of at most MOST_ROWS rows."""
    rows, columns = residual.shape[0], weight.shape[0]
    if rows > FEW_ROWS or isinstance(pending, Summed):
        x, squares = (pending.x, pending.squares) if isinstance(pending, Summed) else \
            (_add_norm(residual, pending, eps), None)
        return _product(kind, x, weight, squares=squares, eps=eps, **conv)
    y = weight.new_empty(rows, columns if kind == PLAIN else columns // 2)
    if pending is None:
        _few_rows(residual, weight, y, kind, norm=True, eps=eps, **conv)
    else:
        _few_rows(_add_norm(residual, pending, eps), weight, y, kind, **conv)
    return y


def _many_rows(residual: Tensor, pending: Pending | None, eps: float, weight: Tensor) -> tuple[Tensor, Norm]:
    """The product of more than MOST_ROWS rows, by cuBLAS, and what is left of the norm for the kernel that takes it."""
    if pending is None and residual.dtype == weight.dtype:
        return products.linear(residual, weight), (_at(residual), residual.shape[1], eps)
    return products.linear(_add_norm(residual, pending, eps), weight), NORMED


def _input(residual: Tensor, pending: Pending | Summed | None, eps: float, weight: Tensor) -> tuple[Tensor, Norm]:
    """The product before a mixer whose kernel takes any number of rows, and what is left of the norm."""
    if residual.shape[0] > MOST_ROWS:
        return _many_rows(residual, pending, eps, weight)
    return _normed_product(PLAIN, residual, pending, eps, weight), NORMED


def norm_linear(residual: Tensor, pending: Pending | Summed | None, eps: float, weight: Tensor, *,
                swiglu: bool = False) -> Tensor:
    if residual.shape[0] <= MOST_ROWS:
        return _normed_product(SWIGLU if swiglu else PLAIN, residual, pending, eps, weight)
    if not swiglu:
        return products.linear(_add_norm(residual, pending, eps), weight)
    x, norm = _many_rows(residual, pending, eps, weight)
    rows, columns = x.shape
    y = weight.new_empty(rows, columns // 2)
    extension().decode_swiglu(_at(x), _at(y), rows, columns // 2, *norm, _stream())
    return y


def norm_conv_step(residual: Tensor, pending: Pending | Summed | None, eps: float, weight: Tensor, bias: Tensor,
                   conv: Tensor, out_bias: Tensor, slots: Tensor, carry: Tensor) -> tuple[Tensor, Tensor | None]:
    if residual.shape[0] <= MOST_ROWS:
        return _normed_product(CONV, residual, pending, eps, weight, bias=bias, taps=conv, slots=slots,
                               carry=carry), out_bias
    x, norm = _many_rows(residual, pending, eps, weight)
    rows, (channels, taps) = x.shape[0], conv.shape
    y = x.new_empty(rows, channels)
    extension().decode_conv(_at(x), _at(bias), _at(conv), _at(slots), _at(carry), _at(y), rows, channels, taps,
                            _at(out_bias), *norm, _stream())
    return y, out_bias if norm is NORMED else None


def norm_taylor_step_(residual: Tensor, pending: Pending | Summed | None, eps: float, weight: Tensor,
                      *arguments: Any) -> Tensor:
    x, norm = _input(residual, pending, eps, weight)
    return taylor_step_(x, *arguments, norm=norm)


def norm_attention_step(residual: Tensor, pending: Pending | Summed | None, eps: float, weight: Tensor,
                        *arguments: Any) -> Tensor:
    x, norm = _input(residual, pending, eps, weight)
    return attention_step(x, *arguments, norm=norm)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    if x.shape[0] > MOST_ROWS:
        return products.linear(x, weight)
    if x.shape[0] > FEW_ROWS:
        return _product(PLAIN, x, weight)
    y = weight.new_empty(x.shape[0], weight.shape[0])
    _few_rows(x, weight, y)
    return y


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Pending | Summed | None:
    if x.shape[0] > MOST_ROWS:
        if bias is not None or residual.dtype != x.dtype:          # cuBLAS adds neither
            return Pending(products.linear(x, weight), bias)
        residual.addmm_(x, weight.T)
        return None
    if x.shape[0] > FEW_ROWS:
        return _product(ADD, x, weight, residual=residual, bias=bias)
    _few_rows(x, weight, None, add_to=residual, bias=bias)
    return None


def taylor_step_(x: Tensor, slots: Tensor, pool: Any, kv: Tensor, z: Tensor, recent: Tensor | None,
                 decay: Tensor | None, feature_dim: int, norm: Norm = NORMED) -> Tensor:
    rows, heads, head_dim = x.shape[0], kv.shape[1], kv.shape[3]
    o = x.new_empty(rows, heads * head_dim)
    factor = None if decay is None else decay.exp()
    extension().decode_taylor(_at(x), _at(slots), _at(pool.positions), _at(pool.starts), _at(kv), _at(z), _at(recent),
                              _at(factor), _at(o), rows, heads, feature_dim, head_dim, feature_dim ** -0.5,
                              *norm, _stream())
    return o


def settled(pool: Any, slots: Tensor, kv: Tensor, z: Tensor, recent: Tensor, decay: Tensor | None,
            feature_dim: int) -> TaylorState:
    slots, heads, head_dim = slots.long(), torch.arange(kv.shape[1], device=kv.device), kv.shape[3]
    generated = (pool.positions - pool.starts)[slots][:, None]
    left = torch.minimum(generated, (generated + heads) % RECENT)                 # [n, heads], as in decode_taylor.cu
    later = left[..., None] - 1 - torch.arange(RECENT, device=kv.device)          # tokens after each that lies there
    inside = (later >= 0)[..., None]
    k, v = recent[slots].where(inside, 0).float().split([feature_dim, head_dim], -1)
    phi = taylor_features(k, feature_dim ** -0.5) * inside
    kv, z = kv[slots], z[slots]
    if decay is not None:
        phi = phi * (decay[:, None] * later).exp()[..., None]
        faded = (decay * left).exp()[..., None]
        kv, z = kv * faded[..., None], z * faded
    return TaylorState(kv + phi.transpose(2, 3) @ v, z + phi.sum(2))


def attention_step(x: Tensor, slots: Tensor, positions: Tensor, rotation: Tensor, keys: Tensor, values: Tensor,
                   head_dim: int, norm: Norm = NORMED) -> Tensor:
    rows, (heads, capacity, padded) = x.shape[0], keys.shape[1:]
    o = x.new_empty(rows, heads * head_dim)
    splits = max(1, min(SPLIT_BLOCKS // (rows * heads), capacity // SPLIT_KEYS))
    partial = torch.empty(rows, heads, splits, padded + 2, dtype=torch.float32, device=x.device) if splits > 1 else None
    extension().decode_attention(_at(x), _at(slots), _at(positions), _at(rotation), _at(keys), _at(values),
                                 _at(partial), _at(o), rows, heads, head_dim, padded, rotation.shape[-1], capacity,
                                 splits, head_dim ** -0.5, *norm, _stream())
    return o


def rope_run(x: Tensor, rotation: Tensor, heads: int, head_dim: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    q, k, v = (x.new_empty(tokens, heads, padded) for _ in range(3))
    extension().prefill_rope(_at(x), _at(rotation), _at(q), _at(k), _at(v), tokens, heads, head_dim, padded,
                             rotation.shape[-1], math.sqrt(padded / head_dim), _stream())
    return q, k, v


def sample(logits: Tensor, pool: Any, slots: Tensor, advance: int) -> None:
    extension().decode_sample(_at(logits), _at(slots), _at(pool.tokens), _at(pool.positions), _at(pool.temperature),
                              _at(pool.top_k), _at(pool.top_p), _at(pool.seeds), _at(pool.chosen), _at(pool.logprobs),
                              pool.chosen.shape[1], *logits.shape, pool.vocab_size, advance, _stream())
