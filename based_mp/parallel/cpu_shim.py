"""Lets megatron-core run without CUDA: the few torch.cuda calls it makes unconditionally are pointed at the CPU.

A no-op where CUDA is used. Nothing outside this module patches anything.
"""

from __future__ import annotations

import logging

import torch

_enabled = False


def enable() -> None:
    """Patch once per process, before any megatron-core module is built on the CPU."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    import megatron.core.fusions.fused_softmax as fused_softmax
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.utils as transformer_utils

    # Communication buffers and parameters are allocated on torch.cuda.current_device().
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # The random-state tracker forks the CUDA generator: here the CPU's plays that part.
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(mcore_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())
    causal_mask = lambda size: torch.ones(size, size).triu(diagonal=1).bool()  # noqa: E731
    transformer_utils.get_default_causal_mask = fused_softmax.get_default_causal_mask = causal_mask
