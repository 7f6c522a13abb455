"""Faults while training: signals and losses that are no numbers."""

from __future__ import annotations

import math
import signal
from typing import Any

import torch
import torch.distributed as dist

from based_mp.errors import UserError


class StopSignal:
    """SIGTERM and SIGUSR1 (slurm's warning) ask for a save and a clean exit at the end of the step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.received = device, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def agreed(self) -> bool:
        """True on all ranks once any has been asked; a collective call."""
        if dist.get_world_size() == 1:                                    # no need to wait for the GPU
            return self.received
        flag = torch.tensor([self.received], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def check_loss(loss: float, step: int, last_checkpoint: str | None) -> None:
    """Stop at a loss that is no number, before it is saved."""
    if not math.isfinite(loss):
        where = f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was written yet"
        raise UserError(f"the loss of step {step} is {loss}: lower optimizer.lr or lengthen optimizer.warmup_steps "
                        f"and start again ({where})")
