"""The one place that decides which implementation of an op can run."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from based_mp.config import BASED_MIXERS, ModelConfig
from based_mp.errors import UserError
from based_mp.ops import recurrences

HEAD_DIMS = (64, 80, 96, 112, 128)
FEATURE_DIMS = (8, 16)
LONGEST_WINDOW = 256


def _load_extension() -> ModuleType | None:
    try:
        return importlib.import_module("based_mp._C")
    except ImportError:
        return None


# BASED_MP_BACKEND=torch: every op in plain torch, to compare with or to look for a fault.
TORCH_ONLY = os.environ.get("BASED_MP_BACKEND") == "torch"
HAS_TRITON = importlib.util.find_spec("triton") is not None          # comes with CUDA builds of torch
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"       # Triton's kernels run on the CPU, for tests

_EXTENSION = _load_extension()         # once, when imported: torch.compile cannot trace an import


def extension() -> ModuleType | None:
    """The compiled kernels `based_mp._C`, or None where they were not built."""
    return _EXTENSION


@functools.cache
def _warn_once(what: str, reason: str, instead: str = "plain torch", usual: str = "in the CUDA kernels") -> None:
    warnings.warn(f"{what} runs in {instead}, not {usual}: {reason}", stacklevel=3)


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


def is_hopper(device: torch.device) -> bool:
    """Whether this is a GPU of compute capability 9."""
    return device.type == "cuda" and _capability(device.index or 0)[0] == 9


def _unusable(device: torch.device) -> str | None:
    if not is_hopper(device):
        return "the kernels are built for Hopper (compute capability 9.0)"
    if extension() is None:
        return "based_mp._C was not built (BASED_MP_CUDA=1 pip install --no-build-isolation -e .)"
    return None


def taylor_backend(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = None) -> str:
    """"cuda" where the kernels can run these inputs, else "torch"; on a GPU, one warning says why not."""
    if not q.is_cuda or TORCH_ONLY:
        return "torch"
    reason = _refusal(q, k, v, decay)
    if reason is None:
        return "cuda"
    _warn_once("Taylor linear attention", reason)
    return "torch"


def gated_conv_backend(x: Tensor, weight: Tensor, carry: Tensor | None) -> str:
    """"cuda" where the gated convolution's kernels can run these inputs, else "torch", with one warning on a GPU."""
    if not x.is_cuda or TORCH_ONLY:
        return "torch"
    reason = None
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.dtype != x.dtype:
        reason = f"inputs are {x.dtype} and {weight.dtype}; the kernels take bf16, fp16 or fp32"
    elif weight.shape[1] != 3 or weight.shape[0] % 8 or x.numel() == 0:
        reason = f"the weight is {tuple(weight.shape)}; the kernels take width 3 and a multiple of 8 channels"
    elif carry is not None and carry.requires_grad and torch.is_grad_enabled():
        reason = "the carry's gradient has no kernel"
    reason = reason or _unusable(x.device)
    if reason:
        _warn_once("The gated convolution", reason)
    return "torch" if reason else "cuda"


def window_backend(qkv: Tensor, window: int | None, rotary_fraction: float) -> str:
    """Of RoPE and causal attention on qkv [seq, batch, heads, 3, head_dim]: "cuda" for the kernels of csrc/, "flash"
    for Triton and torch's flash kernel (one warning says why, where there is a window), else "torch"."""
    if fused_backend(qkv) != "triton" or not qkv.is_cuda or qkv.dtype not in (torch.bfloat16, torch.float16):
        return "torch"
    if window is None:
        return "flash"
    reason = None
    if qkv.dtype != torch.bfloat16:
        reason = f"inputs are {qkv.dtype}; the kernels take bf16"
    elif window > LONGEST_WINDOW:
        reason = f"window {window} is above {LONGEST_WINDOW}"
    elif qkv.shape[-1] not in HEAD_DIMS:
        reason = f"head_dim {qkv.shape[-1]} is not one of {HEAD_DIMS}"
    elif rotary_fraction != 1:
        reason = f"rotary_fraction is {rotary_fraction}; the kernels rotate whole heads"
    reason = reason or _unusable(qkv.device)
    if reason:
        _warn_once("Sliding-window attention", reason, "torch's flash kernel")
    return "flash" if reason else "cuda"


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN takes full causal attention on [batch, heads, seq, head_dim]; torch's flash kernel else."""
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, False)
    usable = torch.backends.cuda.can_use_cudnn_attention(params)
    if not usable:
        _warn_once("Full causal attention", "torch finds no cuDNN kernel for it", "torch's flash kernel", "in cuDNN")
    return usable


def fused_backend(x: Tensor) -> str:
    """"triton" for the element-wise ops of `based_mp.ops.fused` on a GPU with Triton, else "torch"."""
    usable = (x.is_cuda or TRITON_INTERPRETED) and HAS_TRITON and x.dtype != torch.float64
    return "triton" if usable and not TORCH_ONLY else "torch"


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
    others = sorted(set(model.mixers) - set(BASED_MIXERS))
    if others or not model.ffn_size:
        return f"{others[0] if others else 'a layer without MLP'} has no generation kernel"
    fits = model.feature_dim in FEATURE_DIMS and model.head_dim in HEAD_DIMS
    if "linear_attention" in model.mixers and not fits:
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


@functools.cache
def cublas_lt() -> ctypes.CDLL | None:
    """The library that lists cuBLAS's algorithms, or None, with a warning, where it is not beside torch's CUDA."""
    name = f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}"
    try:
        return ctypes.CDLL(name)                               # torch has loaded it
    except OSError:
        _warn_once("A linear layer", f"{name} was not found", "the products that torch chooses", "in those chosen here")
        return None


def check_fp8(device: torch.device) -> None:
    """UserError where the GPU has no fp8 matrix products; on a CPU torch computes them."""
    if device.type == "cuda" and _capability(device.index or 0) < (8, 9):
        found = ".".join(map(str, _capability(device.index or 0)))
        raise UserError("training.fp8 needs a GPU of compute capability 8.9 or above (Ada, Hopper or later), this one "
                        f"has {found}: set training.fp8=none")


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
    """`recurrences.gated_linear_attention`; more than one token on a GPU by flash-linear-attention's kernels, unless
    kernels is "torch"."""
    fla = fla_ops() if q.is_cuda and kernels != "torch" and q.shape[1] > 1 else None
    if fla is None:
        return recurrences.gated_linear_attention(q, k, v, log_decay, scale=scale, bonus=bonus, initial=initial)
    q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay.to(torch.float32)))
    options = {"scale": scale, "initial_state": initial, "output_final_state": True}
    if bonus is None:
        return fla.chunk_gla(q, k, v, log_decay, **options)
    return fla.chunk_rwkv6(q, k, v, log_decay, bonus.contiguous(), **options)
