"""What tensor-parallel ranks send each other beside their own products.

Between GPUs of one machine the copy engines write straight into the receiver's memory: NCCL's kernels would take
multiprocessors from the products meanwhile. Elsewhere messages of torch.distributed travel.
"""

from __future__ import annotations

import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Operand = tuple[Tensor, ...]     # contiguous tensors with a row for each token

SLOTS = 2                        # places in a rank's memory that sendings take in turn
ALIGNMENT = 256                  # bytes, of each tensor there
TIMEOUT = timedelta(minutes=30)  # to wait for a rank that does not come

_ways: dict[dist.ProcessGroup, Callable[[], Sending]] = {}


def sending(group: dist.ProcessGroup, device: torch.device) -> Sending:
    """A new one. Every rank of the group calls, in the same order; the first of a group outside of a recording."""
    if group not in _ways:
        _ways[group] = _way(group, device)
    return _ways[group]()


def forget() -> None:
    """The groups are gone."""
    _ways.clear()


class Sending(ABC):
    """Each rank of a group sends tensors of the same sizes to each other; nothing sent changes before `received`.

    targets: the other ranks, in the order in which they are sent to; the one after this rank comes first.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.targets = [(self.rank + step) % self.size for step in range(1, self.size)]

    @abstractmethod
    def to(self, target: int, operand: Operand) -> None:
        """Starts to send to the next of `targets`."""

    def to_all(self, operand: Operand) -> None:
        """The same to every target."""
        for target in self.targets:
            self.to(target, operand)

    def _source(self, target: int) -> int:
        """The rank that sends to this one while this one sends to `target`."""
        return (2 * self.rank - target) % self.size

    @abstractmethod
    def received(self) -> list[tuple[int, Operand]]:
        """Each other rank and what it sent, there for what the current stream does next.

        To be read before the second sending after this one starts.
        """


class _Messages(Sending):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.works: list[Any] = []
        self.sent: list[Operand] = []
        self.arriving: list[tuple[int, Operand]] = []

    def to(self, target: int, operand: Operand) -> None:
        source, theirs = self._source(target), tuple(torch.empty_like(t) for t in operand)
        # As bytes: fp8 is a dtype that communication libraries do not know.
        self.works += dist.batch_isend_irecv([
            dist.P2POp(way, t.view(torch.uint8), group=self.group, group_peer=peer)
            for way, tensors, peer in ((dist.isend, operand, target), (dist.irecv, theirs, source)) for t in tensors])
        self.sent.append(operand)
        self.arriving.append((source, theirs))

    def received(self) -> list[tuple[int, Operand]]:
        for work in self.works:
            work.wait()
        return self.arriving


class _PeerMemory:
    """Memory of this rank that the others of its group write to."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.stream = torch.cuda.Stream(device)             # of the copies
        self.handles: list[Any] = []                        # the last is used; CUDA graphs may know earlier ones
        self.slot_bytes = 0
        self.begun = self.sent = self.arrived = 0           # the last sending made, sent whole, waited for

    def reserve(self, slot_bytes: int) -> None:
        """At least so much for a sending. Every rank calls with the same."""
        if slot_bytes > self.slot_bytes:
            from torch.distributed import _symmetric_memory as symmetric
            memory = symmetric.empty(SLOTS * slot_bytes, dtype=torch.uint8, device=self.device)
            self.handles.append(symmetric.rendezvous(memory, self.group.group_name))
            self.slot_bytes = slot_bytes

    def barrier(self) -> None:
        """The current stream goes on when those of all ranks are here."""
        self.handles[-1].barrier(timeout_ms=int(TIMEOUT.total_seconds() * 1e3))


class _Copies(Sending):
    def __init__(self, memory: _PeerMemory) -> None:
        super().__init__(memory.group)
        memory.begun += 1
        self.memory, self.number = memory, memory.begun
        self.sent: list[Operand] = []

    def _reserve(self, operand: Operand) -> None:
        self.bytes = sum(map(_aligned_bytes, operand))
        self.memory.reserve(self.size * self.bytes)
        self.handle, self.slot = self.memory.handles[-1], self.number % SLOTS * self.memory.slot_bytes
        self.memory.barrier()                               # whatever lay in the slot has been read

    def _place(self, owner: int, sender: int, operand: Operand) -> Operand:
        """Where in the memory of `owner` lies what `sender` sends."""
        offset, places = self.slot + sender * self.bytes, []
        for t in operand:
            places.append(self.handle.get_buffer(owner, tuple(t.shape), t.dtype, offset // t.element_size()))
            offset += _aligned_bytes(t)
        return tuple(places)

    def to(self, target: int, operand: Operand) -> None:
        if not self.sent:
            self._reserve(operand)
        self.memory.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.memory.stream):
            for t, place in zip(operand, self._place(target, self.rank, operand), strict=True):
                place.copy_(t)
        self.sent.append(operand)
        if len(self.sent) == len(self.targets):
            self.memory.sent = self.number

    def received(self) -> list[tuple[int, Operand]]:
        if self.memory.arrived < self.number:               # else a later sending was waited for
            torch.cuda.current_stream().wait_stream(self.memory.stream)
            self.memory.barrier()                           # the others' copies to here are over too
            self.memory.arrived = self.memory.sent
        return [(source, self._place(self.rank, source, self.sent[0])) for source in map(self._source, self.targets)]


def _aligned_bytes(t: Tensor) -> int:
    return -(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT


def _way(group: dist.ProcessGroup, device: torch.device) -> Callable[[], Sending]:
    """How a group sends; its ranks agree."""
    def told(fact: Any) -> list[Any]:
        facts = [None] * group.size()
        dist.all_gather_object(facts, fact, group=group)
        return facts

    if device.type == "cuda" and len(set(told(socket.gethostname()))) == 1:
        memory, problem = _PeerMemory(group, device), None
        try:
            memory.reserve(ALIGNMENT)
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:200]
        problems = [p for p in told(problem) if p]
        if not problems:
            return lambda: _Copies(memory)
        warnings.warn(f"the GPUs of a tensor-parallel group do not reach each other's memory ({problems[0]}): what "
                      "they send takes multiprocessors from their products", stacklevel=2)
    return lambda: _Messages(group)
