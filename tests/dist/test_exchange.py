"""What tensor-parallel ranks send each other beside their products."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from based_mp.parallel import exchange
from tests.helpers import REPO, run_distributed


@pytest.mark.parametrize("processes", [2, 3])
def test_everything_arrives(processes):
    run_distributed(processes, REPO / "tests" / "dist" / "exchange_worker.py", ["cpu"])


class Handle:
    """Of memory that all ranks reach: here they take turns in one process."""

    def __init__(self, memories, waits):
        self.memories, self.waits = memories, waits

    def get_buffer(self, rank, shape, dtype, offset):
        size = dtype.itemsize
        flat = self.memories[rank][offset * size : (offset + torch.Size(shape).numel()) * size]
        return flat.view(dtype).view(shape)

    def barrier(self, timeout_ms):
        self.waits.append("barrier")


def memory_of(rank, ranks, memories, waits):
    """A rank's, of the plain memories of all; its waits are written down."""
    own = exchange._PeerMemory(SimpleNamespace(rank=lambda: rank, size=lambda: ranks), torch.device("cpu"))
    own.handles, own.slot_bytes = [Handle(memories, waits)], 4096
    return own


@pytest.mark.parametrize("ranks", [2, 4])
def test_places_in_the_others_memory(ranks, monkeypatch):
    """Sendings in turn, and two open at once, of rows and of their scales, to every rank something else."""
    waits = []
    here = SimpleNamespace(wait_stream=lambda _: waits.append("copies"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    memories = torch.zeros(ranks, exchange.SLOTS * 4096, dtype=torch.uint8)
    owns = [memory_of(rank, ranks, memories, waits) for rank in range(ranks)]

    def send(sendings, number):
        for rank, sending in enumerate(sendings):
            for target in sending.targets:
                value = 100 * number + 10 * rank + target
                sending.to(target, (torch.full((3, 5), value, dtype=torch.bfloat16), torch.full((3,), -float(value))))

    def check(sendings, number):
        for rank, sending in enumerate(sendings):
            received = sending.received()
            assert sorted(source for source, _ in received) == [r for r in range(ranks) if r != rank]
            for source, (rows, scales) in received:
                value = 100 * number + 10 * source + rank
                assert (rows == torch.tensor(value).bfloat16()).all() and rows.shape == (3, 5)
                assert scales.tolist() == [-value] * 3

    for number in range(3):
        sendings = [exchange._Copies(own) for own in owns]
        send(sendings, number)
        check(sendings, number)
    first, second = ([exchange._Copies(own) for own in owns] for _ in range(2))
    send(first, 3)
    send(second, 4)
    check(second, 4)
    before = list(waits)
    check(first, 3)
    assert waits == before                                   # the later one waited for both
    first, second = ([exchange._Copies(own) for own in owns] for _ in range(2))
    send(first, 5)
    check(first, 5)
    send(second, 6)
    waits.clear()
    check(second, 6)
    assert waits == ["copies", "barrier"] * ranks            # sent after the other had been waited for
