"""Every test runs on one thread, with torch.empty poisoned."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported

import pytest
import torch

from tests import helpers

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floats are NaN in every test."""
    helpers.poison_empty(lambda owner, name, value: monkeypatch.setattr(owner, name, value))


@pytest.fixture
def free_port() -> int:
    """A TCP port that is free on loopback."""
    return helpers.free_port()


@pytest.fixture
def run_distributed():
    """`run_distributed(nproc, script, args, timeout=…)`: see tests/helpers.py."""
    return helpers.run_distributed


@pytest.fixture
def gloo_process():
    """This process as a world of one, with megatron-core's groups; left again at the end."""
    from based_mp.parallel import state
    yield state.initialize(device="cpu")
    state.destroy()
