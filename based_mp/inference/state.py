"""Generation states as values: copied, cut, saved and read again. One prompt's state serves many continuations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def map_states(function: Callable[[Tensor], Tensor], states: list[Any]) -> list[Any]:
    """New states with `function` applied to every tensor; the first dimension of each is the batch."""
    out = []
    for state in states:
        if dataclasses.is_dataclass(state):
            fields = {f.name: function(getattr(state, f.name)) for f in dataclasses.fields(state)}
            out.append(type(state)(**fields))
        else:
            out.append(type(state)(*(function(tensor) for tensor in state)))
    return out


def clone(states: list[Any]) -> list[Any]:
    """A copy that can be advanced on its own."""
    return map_states(torch.clone, states)


def select(states: list[Any], rows: list[int]) -> list[Any]:
    """The states of these sequences, in this order; a row may be taken several times (forked)."""
    return map_states(lambda tensor: tensor[rows].clone(), states)


def save(states: list[Any], path: str | Path) -> None:
    torch.save(map_states(lambda tensor: tensor.cpu(), states), path)


def load(path: str | Path, device: torch.device | str = "cpu") -> list[Any]:
    """States written by `save`; only from files you trust."""
    return map_states(lambda tensor: tensor.to(device), torch.load(path, weights_only=False))
