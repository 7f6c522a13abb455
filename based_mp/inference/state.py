"""Generation states: a pool of slots that the model works in, and states of single sequences as values."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from based_mp.errors import UserError

RINGS = ("keys", "values", "past")
LAG = 2                          # steps the host stays behind the GPU, so that neither waits for the other
RECENT = "recent"                # generated tokens that a state has still to take in: of no use to another slot


def to_device(x: Tensor | list[int], device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for, as a plain copy would for all that was launched before."""
    x = torch.as_tensor(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass
class SequenceState:
    """Everything generation needs of the tokens seen so far: it can be kept, saved, and continued any number of times.

    layers: of every layer its tensors, without a slot dimension; position: tokens seen; logits: fp32 or bf16
    [padded vocab] after the last of them. With tensor parallelism, of this rank.
    """

    layers: list[dict[str, Tensor]]
    position: int
    logits: Tensor

    def save(self, path: str | Path) -> None:
        """Write to a file; with tensor parallelism every rank to one of its own."""
        layers = [{name: t.cpu() for name, t in layer.items()} for layer in self.layers]
        torch.save({"layers": layers, "position": self.position, "logits": self.logits.cpu()}, path)

    @staticmethod
    def load(path: str | Path) -> SequenceState:
        """A state written by `save`. Raises UserError where the file is something else."""
        try:
            return SequenceState(**torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} is not a saved generation state: {' '.join(str(error).split())[:100]}") from error


class StatePool:
    """Buffers whose first dimension is the slot; their addresses never change, so CUDA graphs can hold them.

    buffers: of every layer its tensors (see the mixers' `buffers`) of slots + 1 slots; what the last, `spare`, holds
    does not count. states: those of them that a state consists of. A slot also has the token that comes next, the
    number of tokens it has seen (positions) and had seen when its generation began (starts), and how its tokens are
    sampled. What was chosen after p tokens, and its log probability, is in column p modulo their number of chosen int32
    and logprobs fp32 [slots, LAG + 2]: with on_host in memory of the host that kernels write. `copy` and `read` are for
    slots whose generation has not begun.
    """

    def __init__(self, buffers: list[dict[str, Tensor]], slots: int, length: int, vocab_size: int,
                 device: torch.device, *, on_host: bool = False) -> None:
        self.buffers, self.slots, self.length, self.vocab_size = buffers, slots, length, vocab_size
        self.spare = slots
        self.states = [{name: t for name, t in layer.items() if name != RECENT} for layer in buffers]
        self.tokens, self.positions, self.starts, self.top_k = (
            torch.zeros(slots + 1, dtype=torch.int32, device=device) for _ in range(4))
        self.temperature, self.top_p = torch.zeros(slots, device=device), torch.ones(slots, device=device)
        self.seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        place: dict[str, Any] = {"pin_memory": True} if on_host else {"device": device}
        self.chosen = torch.zeros(slots, LAG + 2, dtype=torch.int32, **place)
        self.logprobs = torch.zeros(slots, LAG + 2, **place)
        if on_host:                                    # steps may run on, of which the host's allocator knows nothing
            weakref.finalize(self, torch.cuda.synchronize).atexit = False

    def reset(self, slots: list[int]) -> None:
        """Make these slots empty. Rings need nothing: positions say what of them is valid."""
        index = to_device(slots, self.positions.device)
        self.positions[index] = self.starts[index] = 0
        for layer in self.states:
            for name, buffer in layer.items():
                if name not in RINGS:
                    buffer[index] = 0

    def set_sampling(self, slots: list[int], temperature: list[float], top_k: list[int], top_p: list[float],
                     seeds: list[int]) -> None:
        index = to_device(slots, self.positions.device)
        for buffer, values in ((self.temperature, temperature), (self.top_k, top_k), (self.top_p, top_p),
                               (self.seeds, seeds)):
            buffer[index] = to_device(torch.tensor(values, dtype=buffer.dtype), buffer.device)

    def results(self, slots: list[int], positions: list[int]) -> tuple[list[int], list[float]]:
        """What was chosen in these slots after so many tokens, and the log probabilities. At most LAG + 1 steps ago, by
        kernels that have ended."""
        place = slots, [position % self.chosen.shape[1] for position in positions]
        return self.chosen[place].tolist(), self.logprobs[place].tolist()

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Fork: give every target slot the state of its source."""
        source, target = (to_device(slots, self.positions.device) for slots in (sources, targets))
        self.positions[target] = self.starts[target] = self.positions[source]
        for layer in self.states:
            for buffer in layer.values():
                buffer[target] = buffer[source]

    def read(self, slot: int, position: int, logits: Tensor) -> SequenceState:
        """The state of a slot that has seen `position` tokens, copied."""
        def copy(name: str, buffer: Tensor) -> Tensor:
            return (buffer[slot, :, :position] if name in RINGS else buffer[slot]).clone()
        return SequenceState([{name: copy(name, buffer) for name, buffer in layer.items()} for layer in self.states],
                             position, logits.clone())

    def write(self, slot: int, state: SequenceState) -> None:
        """Put a state into a slot. Raises UserError for a state of another model."""
        self.positions[slot] = self.starts[slot] = state.position
        try:
            for layer, own in zip(self.states, state.layers, strict=True):
                for name, buffer in layer.items():
                    if name in RINGS:
                        buffer[slot, :, : own[name].shape[1]] = own[name]
                    else:
                        buffer[slot] = own[name]
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError("this generation state is of another model: make it with the model that continues it") \
                from error
