"""Prompts laid end to end, as the mixers run them: packs of any size, and packs of sizes that CUDA graphs can hold."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from based_mp.inference.state import StatePool, to_device

# cos and sin, fp32 [n, 2, half], of int positions [n].
Rotate = Callable[[Tensor], Tensor]
# Tokens a layer runs: (which of them lie in a ring's slots at the end, None for all; their slots; places in the ring).
Kept = tuple[Tensor | None, Tensor, Tensor]


def flatten(tokens: list[list[int]]) -> Tensor:
    """The ids of pieces laid end to end, int64, on the host."""
    flat = array("q", itertools.chain.from_iterable(tokens))          # torch.tensor takes three times as long
    return torch.frombuffer(flat, dtype=torch.int64)


class _Layout(NamedTuple):
    """Where pieces laid end to end lie, int64 on the host. bounds [pieces + 1]; ends: tokens that each piece's slot has
    seen after it; piece, positions: of every token."""

    slots: Tensor
    bounds: Tensor
    ends: Tensor
    piece: Tensor
    positions: Tensor


def _lay_out(slots: list[int], starts: list[int], lengths: list[int]) -> _Layout:
    first, own = torch.tensor(starts), torch.tensor(lengths)
    bounds = F.pad(own.cumsum(0), (1, 0))
    piece = torch.repeat_interleave(torch.arange(len(lengths)), own)
    positions = (first - bounds[:-1])[piece] + torch.arange(len(piece))
    return _Layout(torch.tensor(slots), bounds, first + own, piece, positions)


class Pack:
    """Pieces of several sequences; no piece is empty, no slot occurs twice.

    slots, starts, lengths: of each piece its slot, the tokens that its slot has seen, its own tokens.
    On the device: slots [pieces]; bounds int32 [pieces + 1]; last, the last token of every piece; ends int32, what
    every slot has seen after the pack. fresh: all pieces start documents.
    """

    def __init__(self, pool: StatePool, slots: list[int], starts: list[int], lengths: list[int],
                 rotate: Rotate) -> None:
        device = pool.positions.device
        self.pool, self.slot_list, self.starts, self.lengths, self._rotate = pool, slots, starts, lengths, rotate
        self.fresh, self.longest = not any(starts), max(lengths)
        self._layout = layout = _lay_out(slots, starts, lengths)
        self.slots, self.last = to_device(layout.slots, device), to_device(layout.bounds[1:] - 1, device)
        self.bounds, self.ends = to_device(layout.bounds.int(), device), to_device(layout.ends.int(), device)
        self._kept: dict[int, Kept] = {}

    def tail(self, count: int) -> tuple[Tensor, Pack] | None:
        """The last `count` tokens of every piece: (which they are in this pack, a pack of them alone)."""
        lengths = [min(length, count) for length in self.lengths]
        skipped = [length - own for length, own in zip(self.lengths, lengths, strict=True)]
        tokens = torch.tensor(skipped).cumsum(0).repeat_interleave(torch.tensor(lengths)) + torch.arange(sum(lengths))
        starts = [start + more for start, more in zip(self.starts, skipped, strict=True)]
        pack = Pack(self.pool, self.slot_list, starts, lengths, self._rotate)
        pack.fresh = self.fresh                                       # what was before `count` tokens does not matter
        return to_device(tokens, self.slots.device), pack

    @cached_property
    def rotation(self) -> Tensor:
        """fp32 [tokens, 2, half] of the tokens' positions; only softmax attention asks for it."""
        return self._rotate(to_device(self._layout.positions, self.slots.device))

    def kept(self, capacity: int) -> Kept:
        """What a ring of `capacity` still holds at the end."""
        if capacity not in self._kept:                                # on the host: its size must not be waited for
            slots, _, ends, piece, positions = self._layout
            tokens = (ends[piece] - positions <= capacity).nonzero()[:, 0]
            device, kept = self.slots.device, (slots[piece[tokens]], positions[tokens] % capacity)
            some = to_device(tokens, device) if len(tokens) < len(piece) else None
            self._kept[capacity] = some, *(to_device(x, device) for x in kept)
        return self._kept[capacity]


class FixedPack:
    """As `Pack`, always of `tokens` tokens in `pieces` pieces that start documents, at addresses that stay.

    `load` fills it; pieces that are missing are of the pool's spare slot.
    """

    fresh = True

    def __init__(self, pool: StatePool, tokens: int, pieces: int, rotate: Rotate) -> None:
        device = pool.positions.device
        self.pool, self.longest, self._pieces, self._rotate = pool, tokens, pieces, rotate
        self._wide = torch.zeros(4 * tokens + 2 * pieces, dtype=torch.int64, device=device)
        self._narrow = torch.zeros(2 * pieces + 1, dtype=torch.int32, device=device)
        self.ids, self._positions, self._ends, self._slots, self.slots, self.last = \
            self._wide.split([tokens] * 4 + [pieces] * 2)
        self.bounds, self.ends = self._narrow.split([pieces + 1, pieces])

    def load(self, tokens: list[list[int]], slots: list[int]) -> None:
        """The prompts of these slots: all tokens in all pieces, or fewer, with idle pieces for the rest."""
        idle, ids = self._pieces - len(tokens), flatten(tokens)
        rest = self.longest - len(ids)
        lengths = [*map(len, tokens), *([1] * (idle - 1) + [rest - (idle - 1)] if idle else [])]
        layout = _lay_out(slots + [self.pool.spare] * idle, [0] * self._pieces, lengths)
        wide = torch.cat([ids, ids.new_zeros(rest), layout.positions, layout.ends[layout.piece],
                          layout.slots[layout.piece], layout.slots, layout.bounds[1:] - 1])
        narrow = torch.cat([layout.bounds, layout.ends]).int()
        for buffer, new in ((self._wide, wide), (self._narrow, narrow)):
            buffer[:] = to_device(new, buffer.device)
        self.__dict__.pop("rotation", None)
        self._kept: dict[int, Kept] = {}

    def tail(self, count: int) -> None:
        """Not worth shapes of its own."""

    @cached_property
    def rotation(self) -> Tensor:
        return self._rotate(self._positions)

    def kept(self, capacity: int) -> Kept:
        """All tokens; those that a ring of `capacity` does not hold at the end go to the spare slot."""
        if capacity not in self._kept:
            slots = self._slots.where(self._ends - self._positions <= capacity, self.pool.spare)
            self._kept[capacity] = None, slots, self._positions % capacity
        return self._kept[capacity]


AnyPack = Pack | FixedPack
