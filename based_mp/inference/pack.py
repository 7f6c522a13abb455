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


class Context(NamedTuple):
    """The keys before each piece that its first token still sees, and how they and the pieces' own follow each other.

    On the device: slots, places [n], where the earlier keys lie in rings; before [n], own [tokens], where they and the
    pack's own go among n + tokens; bounds int32 [pieces + 1] of each piece's there. longest: of them, or more.
    """

    slots: Tensor
    places: Tensor
    before: Tensor
    own: Tensor
    bounds: Tensor
    longest: int


def flatten(tokens: list[list[int]]) -> Tensor:
    """The ids of pieces laid end to end, int64, on the host."""
    flat = array("q", itertools.chain.from_iterable(tokens))          # torch.tensor takes three times as long
    return torch.frombuffer(flat, dtype=torch.int64)


class _Layout(NamedTuple):
    """Where pieces laid end to end lie, int64 on the host. starts, ends: tokens that each piece's slot has seen before
    and after it; bounds [pieces + 1]; piece, positions: of every token."""

    slots: Tensor
    starts: Tensor
    bounds: Tensor
    ends: Tensor
    piece: Tensor
    positions: Tensor

    def context(self, capacity: int, window: int | None, room: int | None = None) -> Context:
        """On the host: of rings of `capacity`, for attention in a window or to all before. room: as many earlier keys;
        those that are missing go behind all others, where no piece looks."""
        history = self.starts if window is None else self.starts.clamp(max=window - 1)
        ends = history.cumsum(0)
        piece = torch.repeat_interleave(torch.arange(len(history)), history)
        count, tokens = len(piece), len(self.piece)
        positions = (self.starts - ends)[piece] + torch.arange(count)
        before, own = self.bounds[piece] + torch.arange(count), ends[self.piece] + torch.arange(tokens)
        slots, places, bounds = self.slots[piece], positions % capacity, self.bounds + F.pad(ends, (1, 0))
        if room is not None:
            rest = torch.arange(count, room)
            slots, places = F.pad(slots, (0, len(rest))), F.pad(places, (0, len(rest)))
            before = torch.cat([before, rest + tokens])
        return Context(slots, places, before, own, bounds, int(bounds.diff().max()))


def _lay_out(slots: list[int], starts: list[int], lengths: list[int]) -> _Layout:
    first, own = torch.tensor(starts), torch.tensor(lengths)
    bounds = F.pad(own.cumsum(0), (1, 0))
    piece = torch.repeat_interleave(torch.arange(len(lengths)), own)
    positions = (first - bounds[:-1])[piece] + torch.arange(len(piece))
    return _Layout(torch.tensor(slots), first, bounds, first + own, piece, positions)


class Pack:
    """Pieces of several sequences; no piece is empty, no slot occurs twice.

    slots, starts, lengths: of each piece its slot, the tokens that its slot has seen, its own tokens.
    On the device: slots [pieces]; bounds int32 [pieces + 1]; last, the last token of every piece; ends int32, what
    every slot has seen after the pack. fresh: all pieces start documents; seen: bool [pieces], which of them do not.
    settled: whether states have taken in all that their slots have seen, for none has generated anything since.
    """

    settled = False

    def __init__(self, pool: StatePool, slots: list[int], starts: list[int], lengths: list[int],
                 rotate: Rotate) -> None:
        device = pool.positions.device
        self.pool, self.slot_list, self.starts, self.lengths, self._rotate = pool, slots, starts, lengths, rotate
        self.fresh, self.longest = not any(starts), max(lengths)
        self._layout = layout = _lay_out(slots, starts, lengths)
        self.slots, self.last = to_device(layout.slots, device), to_device(layout.bounds[1:] - 1, device)
        self.bounds, self.ends = to_device(layout.bounds.int(), device), to_device(layout.ends.int(), device)
        self._kept: dict[int, Kept] = {}
        self._context: dict[int, Context] = {}

    @cached_property
    def seen(self) -> Tensor:
        return to_device(self._layout.starts > 0, self.slots.device)

    def context(self, capacity: int, window: int | None) -> Context:
        """The keys before the pieces; the window is that of all rings of `capacity`."""
        if capacity not in self._context:
            *where, bounds, longest = self._layout.context(capacity, window)
            device = self.slots.device
            self._context[capacity] = Context(*(to_device(x, device) for x in where), to_device(bounds.int(), device),
                                              longest)
        return self._context[capacity]

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
            slots, _, _, ends, piece, positions = self._layout
            tokens = (ends[piece] - positions <= capacity).nonzero()[:, 0]
            device, kept = self.slots.device, (slots[piece[tokens]], positions[tokens] % capacity)
            some = to_device(tokens, device) if len(tokens) < len(piece) else None
            self._kept[capacity] = some, *(to_device(x, device) for x in kept)
        return self._kept[capacity]


class FixedPack:
    """As `Pack`, always of `tokens` tokens in `pieces` pieces, at addresses that stay.

    `load` fills it; pieces that are missing are of the pool's spare slot. fresh: all pieces start documents; else their
    slots have generated nothing, and window is that of attention, if there is any.
    """

    settled = True

    def __init__(self, pool: StatePool, tokens: int, pieces: int, rotate: Rotate, *, fresh: bool = True,
                 window: int | None = None) -> None:
        device = pool.positions.device
        self.pool, self.fresh, self.longest, self._pieces, self._rotate = pool, fresh, tokens, pieces, rotate
        self._window = None if fresh else window
        wide, narrow = [tokens] * 4 + [pieces] * 3, [pieces + 1, pieces]
        if self._window:
            wide += [pieces * (self._window - 1)] * 3 + [tokens]       # earlier keys and the pack's own
            narrow += [pieces + 1]
        self._wide = torch.zeros(sum(wide), dtype=torch.int64, device=device)
        self._narrow = torch.zeros(sum(narrow), dtype=torch.int32, device=device)
        self.ids, self._positions, self._ends, self._slots, self.slots, self.last, self._starts, *where = \
            self._wide.split(wide)
        self.bounds, self.ends, *bounds = self._narrow.split(narrow)
        self._context = Context(*where, *bounds, tokens + self._window - 1) if self._window else None

    def load(self, tokens: list[list[int]], slots: list[int], starts: list[int]) -> None:
        """The prompts of these slots: all tokens in all pieces, or fewer, with idle pieces for the rest."""
        idle, ids = self._pieces - len(tokens), flatten(tokens)
        rest = self.longest - len(ids)
        lengths = [*map(len, tokens), *([1] * (idle - 1) + [rest - (idle - 1)] if idle else [])]
        layout = _lay_out(slots + [self.pool.spare] * idle, starts + [0] * idle, lengths)
        wide = [ids, ids.new_zeros(rest), layout.positions, layout.ends[layout.piece], layout.slots[layout.piece],
                layout.slots, layout.bounds[1:] - 1, layout.starts]
        narrow = [layout.bounds, layout.ends]
        if self._context is not None:
            room = len(self._context.slots)
            *where, bounds, _ = layout.context(self._window, self._window, room)
            wide, narrow = wide + where, [*narrow, bounds]
        for buffer, new in ((self._wide, torch.cat(wide)), (self._narrow, torch.cat(narrow).int())):
            buffer[:] = to_device(new, buffer.device)
        for name in ("rotation", "seen"):
            self.__dict__.pop(name, None)
        self._kept: dict[int, Kept] = {}

    @cached_property
    def seen(self) -> Tensor:
        return self._starts > 0

    def context(self, capacity: int, window: int | None) -> Context:
        """The keys before the pieces, in rings of the window's size."""
        assert self._context is not None and capacity == window == self._window
        return self._context

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
