"""bf16 matrix products by cuBLAS, with the algorithm that suits a GPU at its power limit.

A training H100 draws all of its 700 W and runs at the clock that this allows, 1.3 to 1.5 of 1.98 GHz: the fastest
product is the one that takes least energy, not the one that is fastest on a cool GPU, which cuBLAS chooses. Over short
inner dimensions those are the kernels with the tiles below (docs/performance/training.md, "Matrix products").
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p

import torch
from torch import Tensor

from based_mp.ops import backends

TILES = (29, 201, 197)           # cublasLtMatmulTile_t: 128 × 160, 176 × 128, 168 × 128
LONGEST_INNER = 2048
FEWEST_WAVES, FULLNESS = 4, 0.9  # of the tiles over the multiprocessors; of the last wave counted with the others
ALIGNMENT = 16                   # bytes, of addresses and rows

# What is used of cublasLt.h.
_BF16, _FP32, _COMPUTE_FP32 = 14, 0, 68
_TRANSPOSE_A, _TILE, _WORKSPACE, _FIRST_ALIGNMENT = 3, 1, 1, 5


class _Candidate(ctypes.Structure):
    _fields_ = (("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("status", c_int), ("waves", c_float),
                ("reserved", c_int * 4))


def choose(candidates: Sequence[tuple[int, float]], inner: int) -> int | None:
    """Which of cuBLAS's candidates (tile, waves) to take, None for its own choice. inner: the summed dimension."""
    for i, (tile, waves) in enumerate(candidates):
        if tile in TILES and inner <= LONGEST_INNER and waves >= FEWEST_WAVES and waves >= FULLNESS * math.ceil(waves):
            return i
    return None


def _call(function: str, *arguments: object) -> None:
    status = getattr(backends.cublas_lt(), f"cublasLt{function}")(*arguments)
    if status:
        raise RuntimeError(f"cublasLt{function} failed with error {status}")


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    _call("Create", byref(handle))
    return handle


def _tile(candidate: _Candidate) -> int:
    tile = c_int()
    _call("MatmulAlgoConfigGetAttribute", byref(candidate.algorithm), _TILE, byref(tile), 4, byref(c_size_t()))
    return tile.value & 0xFFFF                               # beside it lies the shape of the cluster


class _Plan:
    """out = a b by one algorithm. cuBLAS's matrices are column-major, which ours are transposed: outᵀ = bᵀ aᵀ."""

    def __init__(self, handle: c_void_p, m: int, n: int, k: int, transposed: bool, a: int, b: int, out: int) -> None:
        """transposed: b is the transpose of rows. a, b, out: elements from row to row."""
        self.handle, self.operation, self.layouts = handle, c_void_p(), [c_void_p() for _ in range(3)]
        _call("MatmulDescCreate", byref(self.operation), _COMPUTE_FP32, _FP32)
        _call("MatmulDescSetAttribute", self.operation, _TRANSPOSE_A, byref(c_int(transposed)), 4)
        sizes = ((k, n, b) if transposed else (n, k, b)), (k, m, a), (n, m, out)
        for layout, (rows, columns, pitch) in zip(self.layouts, sizes, strict=True):
            _call("MatrixLayoutCreate", byref(layout), _BF16, c_uint64(rows), c_uint64(columns), c_int64(pitch))
        self.algorithm = None
        candidates = self._candidates()
        chosen = choose([(_tile(x), x.waves) for x in candidates], k)
        if chosen is not None:
            self.algorithm = candidates[chosen].algorithm

    def _candidates(self) -> list[_Candidate]:
        """Those without work space."""
        preference, found, count = c_void_p(), (_Candidate * 16)(), c_int()
        _call("MatmulPreferenceCreate", byref(preference))
        _call("MatmulPreferenceSetAttribute", preference, _WORKSPACE, byref(c_uint64(0)), 8)
        for i in range(4):
            _call("MatmulPreferenceSetAttribute", preference, _FIRST_ALIGNMENT + i, byref(c_int(ALIGNMENT)), 4)
        with contextlib.suppress(RuntimeError):                  # there are none
            _call("MatmulAlgoGetHeuristic", self.handle, self.operation, *self.layouts, self.layouts[2], preference,
                  len(found), found, byref(count))
        _call("MatmulPreferenceDestroy", preference)
        return [x for x in found[: count.value] if x.status == 0]

    def run(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        one, zero, stream = c_float(1), c_float(0), torch.cuda.current_stream(a.device).cuda_stream
        of_b, of_a, of_out = self.layouts
        to = c_void_p(out.data_ptr()), of_out
        _call("Matmul", self.handle, self.operation, byref(one), c_void_p(b.data_ptr()), of_b, c_void_p(a.data_ptr()),
              of_a, byref(zero), *to, *to, byref(self.algorithm), None, c_size_t(0), c_void_p(stream))


@functools.cache
def _plan(device: int, *shape: int) -> _Plan | None:
    with torch.cuda.device(device):
        plan = _Plan(_handle(device), *shape)
    return None if plan.algorithm is None else plan


def _chosen(a: Tensor, b: Tensor, out: Tensor) -> _Plan | None:
    """None where torch is to multiply."""
    if backends.TORCH_ONLY or not backends.is_hopper(a.device):
        return None
    for x, inner_stride in ((a, a.stride(1)), (b, min(b.stride())), (out, out.stride(1))):
        fits = x.data_ptr() % ALIGNMENT == 0 and max(x.stride()) * x.element_size() % ALIGNMENT == 0
        if x.dtype != torch.bfloat16 or inner_stride != 1 or not fits:
            return None
    if backends.cublas_lt() is None:
        return None
    pitches = (max(x.stride()) for x in (a, b, out))
    return _plan(a.device.index, a.shape[0], b.shape[1], a.shape[1], b.stride(1) != 1, *pitches)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [m, n] = a [m, k] b [k, n], where bf16 with fp32 sums. Any strides; chosen algorithms need rows of a and out,
    and of b or of its transpose, that are contiguous."""
    plan = _chosen(a, b, out)
    if plan is None:
        return torch.mm(a, b, out=out)
    plan.run(a, b, out)
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ [rows, out] of x [rows, in] and weight [out, in]."""
    return multiply(x, weight.t(), x.new_empty(x.shape[0], weight.shape[0]))
