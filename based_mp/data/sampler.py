"""Which samples a rank reads: a function of the global sample index alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches of one data-parallel rank.

    Optimizer step i consumes the samples i·global … (i+1)·global − 1 whatever the number of ranks; within a step,
    micro-batch m of rank r takes the rows (m·dp + r)·micro … + micro. So neither a resume nor another data-parallel
    size skips or repeats a sample.
    """

    def __init__(self, *, first_step: int, last_step: int, global_batch_size: int, micro_batch_size: int,
                 dp_rank: int, dp_size: int) -> None:
        self.first_step, self.last_step = first_step, last_step
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.accumulation, rest = divmod(global_batch_size, micro_batch_size * dp_size)
        if rest:
            raise ValueError(f"global batch {global_batch_size} is no multiple of {micro_batch_size} × {dp_size}")

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            for micro in range(self.accumulation):
                first = step * self.global_batch_size + (micro * self.dp_size + self.dp_rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))
