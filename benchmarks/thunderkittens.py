"""The BASED forward kernel of ThunderKittens (github.com/HazyResearch/ThunderKittens, kernels/based), from a checkout.

It knows feature_dim 16, head_dim 64 and tokens in multiples of 64, gives sums without their denominator, and has no
backward. The launcher below leaves out the device synchronisations of the checkout's own binding, so that the kernel is
timed as the others are, in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import CUDA_HOME

LAUNCHER = r"""
#define main unused_main            // without torch the source ends in a program of its own
#include "linear_attn.cu"
#undef main

extern "C" int based_forward(void** tensors, int batch, int heads, int tokens, void* stream) {
    auto at = [tensors](int i) { return static_cast<bf16*>(tensors[i]); };
    const auto g = based_init(at(0), at(1), at(2), at(3), at(4), at(5), at(6), batch, heads, tokens);
    constexpr int shared_bytes = 98000;         // what the checkout's own launcher asks for
    cudaFuncSetAttribute(based_linear_attention, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    based_linear_attention<<<dim3(heads, batch), NUM_THREADS, shared_bytes, static_cast<cudaStream_t>(stream)>>>(g);
    return cudaGetLastError();
}
"""


def load(checkout: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiles the kernel (nvcc, about 10 s): q, k [b, h, n, 16], v [b, h, n, 64] → Σ (1 + s + s²/2) v [b, h, n, 64],
    bf16, contiguous. SystemExit where `checkout` has no such kernel or it does not compile."""
    root = Path(checkout)
    if not (root / "kernels/based/linear_attn.cu").is_file():
        raise SystemExit(f"error: {root} is no checkout of ThunderKittens with kernels/based/linear_attn.cu")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "launcher.cu"), Path(folder, "launcher.so")
        source.write_text(LAUNCHER)
        built = subprocess.run(
            [f"{CUDA_HOME}/bin/nvcc", "-shared", "-Xcompiler", "-fPIC", "-gencode", "arch=compute_90a,code=sm_90a",
             "-std=c++20", "-O3", "--use_fast_math", "--expt-extended-lambda", "--expt-relaxed-constexpr", "-DNDEBUG",
             "-DKITTENS_HOPPER", "-I", str(root / "include"), "-I", str(root / "kernels/based"), str(source),
             "-o", str(library)], capture_output=True, text=True)
        if built.returncode:
            raise SystemExit(f"error: ThunderKittens' kernel does not compile:\n{built.stderr[-2000:]}")
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)            # the driver makes the TMA descriptors
        launch = ctypes.CDLL(str(library)).based_forward

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = v.shape
        if q.shape[-1] != 16 or d != 64 or n % 64:
            raise ValueError("ThunderKittens' kernel takes feature_dim 16, head_dim 64, tokens in multiples of 64")
        tensors = [q, k, v, torch.empty_like(v), *(v.new_empty(b, h, rows, d) for rows in (256, 16, 1))]
        if not all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in tensors):
            raise ValueError("ThunderKittens' kernel takes contiguous bf16")
        code = launch((ctypes.c_void_p * 7)(*(x.data_ptr() for x in tensors)), b, h, n,
                      ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if code:
            raise RuntimeError(f"CUDA error {code} launching ThunderKittens' kernel")
        return tensors[3]

    return forward
