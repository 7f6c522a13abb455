"""DeepSpeed without what it says of its own progress; DEEPSPEED_LOG_LEVEL (info, warning …) asks for it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed without its notices, and on the CPU without the compilation of an op that training does not use."""
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed."""
    if "DEEPSPEED_LOG_LEVEL" in os.environ:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
