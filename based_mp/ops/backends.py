"""The one place that decides which implementation of an op can run."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from based_mp.errors import UserError
from based_mp.ops import recurrences

HEAD_DIMS = (64, 80, 96, 112, 128)
FEATURE_DIMS = (8, 16)


def _load_extension() -> ModuleType | None:
    try:
        return importlib.import_module("based_mp._C")
    except ImportError:
        return None


_EXTENSION = _load_extension()         # once, when imported: torch.compile cannot trace an import


def extension() -> ModuleType | None:
    """The compiled kernels `based_mp._C`, or None where they were not built."""
    return _EXTENSION


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"Taylor linear attention runs in plain torch, not in the CUDA kernels: {reason}", stacklevel=3)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _refusal(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"inputs are {q.dtype}, {k.dtype}, {v.dtype}; the kernels take bf16 or fp16"
    if q.shape[-1] not in FEATURE_DIMS:
        return f"feature_dim {q.shape[-1]} is not one of {FEATURE_DIMS}"
    if v.shape[-1] not in HEAD_DIMS:
        return f"head_dim {v.shape[-1]} is not one of {HEAD_DIMS}"
    if decay is not None:
        return "decay has no kernel yet"
    if q.shape[0] * q.shape[1] * q.shape[2] == 0:
        return "the input is empty"
    if _capability(q.device.index or 0)[0] != 9:
        return "the kernels are built for Hopper (compute capability 9.0)"
    if extension() is None:
        return "based_mp._C was not built (BASED_MP_CUDA=1 pip install --no-build-isolation -e .)"
    return None


def taylor_backend(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = None) -> str:
    """"cuda" where the kernels can run these inputs, else "torch"; on a GPU, one warning says why not."""
    if not q.is_cuda:
        return "torch"
    reason = _refusal(q, k, v, decay)
    if reason is None:
        return "cuda"
    _warn_once(reason)
    return "torch"


@functools.cache
def fla_ops() -> ModuleType | None:
    """flash-linear-attention's operators (`fla.ops`), or None where fla-core is not installed."""
    try:
        return importlib.import_module("fla.ops")
    except ImportError:
        return None


def check_kernels(kernels: str) -> None:
    """UserError where model.kernels asks for what is not installed."""
    if kernels == "fla" and fla_ops() is None:
        raise UserError("model.kernels is fla, but flash-linear-attention is not installed: pip install '.[fla]', or "
                        "set model.kernels=torch")


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, kernels: str,
                           bonus: Tensor | None = None, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`recurrences.gated_linear_attention`, on a GPU by flash-linear-attention's kernels unless kernels is "torch"."""
    fla = fla_ops() if q.is_cuda and kernels != "torch" else None
    if fla is None:
        return recurrences.gated_linear_attention(q, k, v, log_decay, scale=scale, bonus=bonus, initial=initial)
    q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay.to(torch.float32)))
    options = {"scale": scale, "initial_state": initial, "output_final_state": True}
    if bonus is None:
        return fla.chunk_gla(q, k, v, log_decay, **options)
    return fla.chunk_rwkv6(q, k, v, log_decay, bonus.contiguous(), **options)
