"""ZeRO-2 in bf16: every data-parallel rank keeps the fp32 gradient sums of its own partition alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


class ShardedGradients:
    """The sums of one parameter group, whose parameters lie one after the other in equal partitions of the ranks.

    Gradients of a layer are made in one of two fp32 buffers, which the layers take in turn. As soon as backward has
    made the last of them, each partition's part is summed over the ranks and added to what its rank keeps, on a stream
    of its own, while backward goes on with the layer before. Parameters outside the layers have buffers of their own,
    which are summed once a step.

    named: the group's parameters in order; each gets its place in a buffer as `main_grad`, fp32 and of its shape. Where
    that has a function `made`, a micro-batch's gradient is to be written there, not added, and `made` to be called.
    kept: fp32 [partition], this rank's sums, to be zeroed after a step.
    """

    def __init__(self, named: Iterable[tuple[str, Parameter]], kept: Tensor, group: dist.ProcessGroup) -> None:
        self.kept, self.group = kept, group
        self.stream = torch.cuda.Stream() if kept.is_cuda else None
        parts = [list(part) for _, part in itertools.groupby(named, lambda item: _layer(item[0]) or item[0])]
        sizes = [sum(p.numel() for _, p in part) for part in parts]
        layers = [i for i, part in enumerate(parts) if _layer(part[0][0])]
        turns = kept.new_zeros(2, max((sizes[i] for i in layers), default=0))
        self.layers, self.others = [], []
        starts = itertools.accumulate(sizes[:-1], initial=0)
        for i, (part, size, first) in enumerate(zip(parts, sizes, starts, strict=True)):
            buffer = turns[i % 2, :size] if i in layers else kept.new_zeros(size)
            bucket = _Bucket([p for _, p in part], buffer, first)
            (self.layers if i in layers else self.others).append(bucket)
        for bucket in self.layers:
            for parameter in bucket.parameters:
                parameter.main_grad.made = partial(self._made, bucket)
        self._begin()

    def _begin(self) -> None:
        """Of a backward pass."""
        self.order = self.layers.copy()
        self.before: torch.cuda.Event | None = None
        for bucket in self.layers:
            bucket.left = len(bucket.parameters)

    def _made(self, bucket: _Bucket) -> None:
        """One more gradient of the bucket."""
        bucket.left -= 1
        if bucket.left:
            return
        if self.order.pop() is not bucket:
            raise RuntimeError("backward left the order of the layers, in which they share two buffers under ZeRO-2: "
                               "set parallel.zero_stage=1")
        if self.stream is None:
            self._reduce(bucket)
        else:
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                self._reduce(bucket)
            if self.before is not None:                  # the layer that backward comes to takes that one's buffer
                current.wait_event(self.before)
            self.before = self.stream.record_event()
            if not self.order:
                current.wait_stream(self.stream)
        if not self.order:
            self._begin()

    def finish(self) -> None:
        """The last of a step. RuntimeError where the last backward pass left out a parameter of a layer."""
        if len(self.order) < len(self.layers) or any(b.left < len(b.parameters) for b in self.layers):
            raise RuntimeError("backward made no gradient of some parameters, which ZeRO-2 waits for: set "
                               "parallel.zero_stage=1")
        for bucket in self.others:
            self._reduce(bucket)
            bucket.buffer.zero_()

    def _reduce(self, bucket: _Bucket) -> None:
        """Adds the bucket to the partitions that it lies in."""
        size = self.kept.numel()
        end = bucket.first + bucket.buffer.numel()
        for owner in range(bucket.first // size, -(-end // size)):
            low, high = max(bucket.first, owner * size), min(end, (owner + 1) * size)
            part = bucket.buffer[low - bucket.first : high - bucket.first]
            dist.reduce(part, dist.get_global_rank(self.group, owner), group=self.group)
            if owner == self.group.rank():
                self.kept[low - owner * size : high - owner * size] += part


class _Bucket:
    """Parameters whose gradients travel together; `first`: where they begin in the group."""

    def __init__(self, parameters: list[Parameter], buffer: Tensor, first: int) -> None:
        self.parameters, self.buffer, self.first = parameters, buffer, first
        for parameter, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
            parameter.main_grad = part.view(parameter.shape)


def _layer(name: str) -> str | None:
    """The layer that a parameter of this name belongs to."""
    found = re.search(r"\blayers\.\d+\.", name)
    return found and found.group()
