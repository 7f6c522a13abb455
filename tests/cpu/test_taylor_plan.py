"""How the CUDA kernels' work is cut, and their generated header: what needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from based_mp.ops import taylor_cuda

CSRC = Path(__file__).parents[2] / "csrc"


def test_generated_header_is_up_to_date():
    made = subprocess.run([sys.executable, CSRC / "wgmma_sizes.py"], capture_output=True, text=True, check=True).stdout
    assert made == (CSRC / "wgmma_sizes.h").read_text()


@pytest.mark.parametrize("batch, seq, heads", [(1, 1, 1), (8, 2048, 16), (1, 2048, 16), (4, 2047, 16), (1, 32768, 3)])
def test_segments_cover_the_sequence_once(batch, seq, heads):
    p = taylor_cuda.plan(batch, seq, heads, None)
    assert p.length % taylor_cuda.CHUNK == 0 and p.slots == batch * p.segments
    assert (p.segments - 1) * p.length < seq <= p.segments * p.length


@pytest.mark.parametrize("shape, packed, given, expected", [
    ((8, 2048, 16, 64), False, False, "none"),             # a block a head fills the chip
    ((2, 8192, 16, 64), False, False, "sums"),
    ((4, 2048, 16, 112), False, False, "walk"),            # two blocks a head do; the gradients have one
    ((4, 2048, 16, 112), False, True, "scan"),             # states come in or go out
    ((1, 32768, 1, 64), False, False, "scan"),             # more segments than readers should add up
    ((1, 2048, 16, 64), True, False, "sums"),
])
def test_how_states_travel(shape, packed, given, expected):
    batch, seq, heads, head_dim = shape
    p = taylor_cuda.plan(batch, seq, heads, 3 if packed else None)
    states = taylor_cuda._states(p, *shape, packed, given)
    assert states == expected
    space = torch.empty(1)
    names, walked, how = taylor_cuda._kernels(states, p, seq, space)
    assert names[-1] == "output" and ("segment_state" in names) == (expected in ("sums", "scan"))
    assert (walked.segments == 1) == (expected in ("none", "walk"))
    # The states for the gradients are made in place by the scan, else left by the outputs.
    assert how.get("space" if expected == "scan" else "boundaries") is (None if expected == "none" else space)
