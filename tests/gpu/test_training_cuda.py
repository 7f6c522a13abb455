"""Training steps on a GPU: the bf16 optimizer against DeepSpeed's, and that the host never waits."""

from __future__ import annotations

import pytest
import torch

from based_mp.ops import backends
from based_mp.training import bf16_optimizer
from tests.parity.test_bf16_optimizer import train

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.extension() is None, reason="needs a Hopper GPU and based_mp._C")
SMALL = {"d_model": 256, "feature_dim": 16, "ffn_hidden_size": 512}


@pytest.fixture(scope="module")
def ranks():
    from based_mp.parallel import state
    yield state.initialize(device="cuda", seed=3)
    state.destroy()


@pytest.mark.parametrize("tokens, inputs, outputs", [(16384, 1024, 4096), (4096, 2048, 1024), (96, 48, 136), (1, 8, 8)])
def test_weight_gradient_is_added_in_fp32(tokens, inputs, outputs):
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    total = torch.randn(outputs, inputs, device="cuda")
    expected = total.double() + 2 * (dy.double().t() @ x.double())
    for _ in range(2):
        bf16_optimizer.add_weight_gradient(x, dy, total)
    # Sums of 16384 products in the tensor cores' fp32; a bf16 gradient would be off by 2e-3.
    assert (total.double() - expected).norm() < 5e-5 * expected.norm()


def test_steps_equal_deepspeeds(ranks, monkeypatch):
    _, norms, weights = train(ranks, 3, model=SMALL)
    start = [w.to(torch.bfloat16) for w in weights[0]]
    monkeypatch.setattr(bf16_optimizer, "fuse", lambda engine: None)
    _, expected, expected_weights = train(ranks, 3, model=SMALL, start=start)
    assert [float(n) for n in norms] == pytest.approx([float(n) for n in expected], rel=5e-3) and min(norms) > 0.5
    for before, after, truth in zip(weights[:-1], weights[1:], expected_weights[1:], strict=True):
        for first, a, b in zip(before, after, truth, strict=True):
            assert (a - b).norm() < 0.1 * (b - first).norm()


def test_the_host_never_waits(ranks, monkeypatch):
    """After the first steps, which allocate and compile."""
    def waits(*args):
        raise AssertionError("torch.cuda.synchronize")

    def settled(step):
        if step == 2:
            monkeypatch.setattr(torch.cuda, "synchronize", waits)
        torch.cuda.set_sync_debug_mode("error" if step in (2, 3) else "default")

    try:
        train(ranks, 4, model=SMALL, before_step=settled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
