"""Faults while training: signals and losses that are no numbers."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from based_mp.errors import UserError


class StopSignal:
    """SIGTERM and SIGUSR1 (slurm's warning) ask for a save and a clean exit at the end of the step (with several
    ranks, of the next)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.received = device, False
        self.answer: Callable[[], bool] = lambda: False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def agreed(self) -> bool:
        """True on all ranks once any has been asked; a collective call.

        The answer is that of the call before, so that the host prepares a step while the GPU works on the last.
        """
        if dist.get_world_size() == 1:
            return self.received
        before, self.answer = self.answer, self._ask()
        return before()

    def _ask(self) -> Callable[[], bool]:
        flag = torch.full((1,), int(self.received), dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag.is_cuda:
            return lambda: bool(flag)
        arrived, event = torch.empty(1, dtype=torch.int32, pin_memory=True), torch.cuda.Event()
        arrived.copy_(flag, non_blocking=True)
        event.record()

        def answer() -> bool:
            event.synchronize()
            return bool(arrived)
        return answer


def check_loss(loss: float, step: int, last_checkpoint: str | None) -> None:
    """Stop at a loss that is no number, before it is saved."""
    if not math.isfinite(loss):
        where = f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was written yet"
        raise UserError(f"the loss of step {step} is {loss}: lower optimizer.lr or lengthen optimizer.warmup_steps "
                        f"and start again ({where})")
