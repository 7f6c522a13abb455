"""What ranks send each other arrives, however their turns fall; raises where it does not. exchange_worker.py DEVICE"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from based_mp.parallel import exchange, state

ROUNDS = 6


def turn(size: int, first: int, device: torch.device, numbers: torch.Tensor) -> Callable[[], None]:
    """Two sendings open at once, of `size` rows and twice as many, whose values are those of `numbers` + `first`. What
    arrived is added up on the receiver; returns the check of it."""
    from megatron.core import parallel_state
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = group.rank(), group.size()
    sums = torch.zeros(ranks, 2, device=device)
    values = [numbers[i] * 100 + rank * 10 + first + i for i in range(2)]
    operands = [(v.expand(size * (i + 1), 3).bfloat16(), v.expand(size * (i + 1)).contiguous())
                for i, v in enumerate(values)]
    open_ones = [exchange.sending(group, device) for _ in operands]
    for sent, (rows, scales) in zip(open_ones, operands, strict=True):
        for target in sent.targets:
            sent.to(target, (rows.contiguous(), scales + target))                  # to each rank something else
    for i in (1, 0):                                                               # the later first
        for source, (rows, scales) in open_ones[i].received():
            assert rows.shape == (size * (i + 1), 3) and rows.dtype == torch.bfloat16
            sums[source, i] = rows.float().mean() + 1000 * scales.mean()

    def check() -> None:
        for source in range(ranks):
            for i in range(2) if source != rank else ():
                value = numbers[i] * 100 + source * 10 + first + i
                expected = value.bfloat16().float() + 1000 * (value + rank)
                assert torch.allclose(sums[source, i], expected, rtol=1e-5), (rank, source, i, sums, expected)

    return check


def main(device: str) -> None:
    ranks = state.initialize(int(state.launcher_env()[1]), device=device)
    where, numbers = ranks.device, torch.arange(2.0, device=ranks.device)
    for i in range(ROUNDS):                                          # growing: the memory is made anew
        turn(7 * (i + 1), i, where, numbers)()
    if device == "cuda":
        from megatron.core import parallel_state
        way = exchange.sending(parallel_state.get_tensor_model_parallel_group(), where)
        assert type(way).__name__ == "_Copies", "GPUs of one machine do not write into each other's memory"
        torch.cuda.set_stream(torch.cuda.Stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            checks = [turn(5, i, where, numbers) for i in range(3)]
        for i in range(ROUNDS):
            numbers.copy_(torch.arange(2.0) + i)
            graph.replay()
            for check in checks:
                check()
            turn(3, i, where, numbers)()                             # between the graphs, in whichever slot is next
    state.destroy()


main(sys.argv[1])
