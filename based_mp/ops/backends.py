"""The one place that decides which implementation of an op can run."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from based_mp.config import ModelConfig

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
def _warn_once(what: str, reason: str) -> None:
    warnings.warn(f"{what} runs in plain torch, not in the CUDA kernels: {reason}", stacklevel=3)


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
    return _unusable(q.device)


def _unusable(device: torch.device) -> str | None:
    if _capability(device.index or 0)[0] != 9:
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
    _warn_once("Taylor linear attention", reason)
    return "torch"


def _decode_refusal(weight: Tensor, model: ModelConfig, tp_size: int) -> str | None:
    if weight.dtype != torch.bfloat16:
        return f"the weights are {weight.dtype}; the kernels take bf16"
    widths = {"d_model": model.d_model // tp_size, "ffn_hidden_size": model.ffn_size // tp_size,
              "padded vocabulary": model.padded_vocab_size // tp_size}
    odd = [f"{name} {width}" for name, width in widths.items() if width % 8]
    if odd:
        return f"{odd[0]} (of a rank) is not a multiple of 8"
    if model.d_model > 8192 or model.vocab_size > 110_000:
        return "d_model is above 8192 or the vocabulary above 110,000"
    if model.linear_attention_layers and (model.feature_dim not in FEATURE_DIMS or model.head_dim not in HEAD_DIMS):
        return f"feature_dim {model.feature_dim} or head_dim {model.head_dim} is not one of {FEATURE_DIMS}, {HEAD_DIMS}"
    if model.head_dim > 128 or model.conv_kernel > 4:
        return "head_dim is above 128 or conv_kernel above 4"
    return _unusable(weight.device)


def decode_ops(weight: Tensor, model: ModelConfig, tp_size: int) -> ModuleType:
    """`decode_cuda` where the generation kernels can run this model, else `decode_torch`; on a GPU, a warning why."""
    reason = "no GPU"
    if weight.is_cuda:
        reason = _decode_refusal(weight, model, tp_size)
        if reason is not None:
            _warn_once("Generation", reason)
    return importlib.import_module("based_mp.ops.decode_cuda" if reason is None else "based_mp.ops.decode_torch")
