"""The Triton kernels on a GPU against float64, and fused attention and whole training steps against plain torch."""

from __future__ import annotations

import pytest
import torch

from based_mp.ops import backends
from based_mp.ops.window_attention import causal_attention, rope, rotary_attention
from tests import fused_checks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not backends.HAS_TRITON, reason="needs a CUDA GPU and Triton")


@pytest.mark.parametrize("op", ["norm", "embedding", "swiglu", "cross_entropy", "rope", "selective_scan"])
def test_against_float64(op):
    getattr(fused_checks, f"check_{op}")("cuda", scale=50)


@pytest.mark.parametrize("batch, bounds", [(3, None), (1, [0, 5, 300, 301, 700])])
@pytest.mark.parametrize("window", [64, 256, None])
@pytest.mark.parametrize("heads, dim, fraction", [(4, 64, 1.0), (5, 112, 1.0), (3, 72, 0.5), (2, 70, 1.0)])
def test_rotary_attention(heads, dim, fraction, window, batch, bounds):
    seq = 700
    x = torch.randn(seq, batch, heads * 3 * dim, device="cuda", dtype=torch.bfloat16)
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    grad = torch.randn(seq, batch, heads * dim, device="cuda", dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    o = rotary_attention(leaf * 1, heads, window=window, cu_seqlens=cu, fraction=fraction)
    double = x.double().requires_grad_()
    q, k, v = double.unflatten(-1, (heads, 3, dim)).transpose(0, 1).unbind(-2)
    positions = torch.arange(seq, device="cuda")[None]
    expected = causal_attention(rope(q, positions, fraction=fraction), rope(k, positions, fraction=fraction), v,
                                window=window, cu_seqlens=cu).transpose(0, 1).flatten(2)
    dx, = torch.autograd.grad(o, leaf, grad)
    truth, = torch.autograd.grad(expected, double, grad.double())
    assert fused_checks.error(o, expected) < 8e-3 and fused_checks.error(dx, truth) < 1.2e-2


@pytest.fixture(scope="module")
def groups():
    from based_mp.parallel import state
    state.initialize(device="cuda", seed=3)
    yield
    state.destroy()


@pytest.mark.parametrize("recompute", ["none", "norms", "selective", "full"])
@pytest.mark.parametrize("fp32_residual", [False, True])
def test_model_equals_plain_torch(groups, monkeypatch, recompute, fp32_residual):
    """One forward and backward pass of the same weights, every kernel against plain torch."""
    from based_mp.model.based_model import build_model, forward_loss
    from tests.models import tiny_config
    model = build_model(tiny_config(
        model={"d_model": 256, "feature_dim": 16, "window": 64, "ffn_hidden_size": 512, "fp32_residual": fp32_residual},
        training={"precision": "bf16", "device": "cuda", "seq_length": 256, "recompute": recompute}))
    tokens = torch.randint(0, 120, (4, 257), device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(4, 256, device="cuda")}

    def step():
        model.zero_grad()
        loss = forward_loss(model, batch)
        loss.backward()
        return loss.item(), {name: p.grad.double() for name, p in model.named_parameters()}

    loss, grads = step()
    monkeypatch.setattr(backends, "TORCH_ONLY", True)
    expected, truth = step()
    assert abs(loss - expected) < 2e-3 * expected
    whole = torch.stack([g.norm() for g in truth.values()]).norm()
    errors = {name: ((grads[name] - g).norm() / (g.norm() + 3e-3 * whole)).item() for name, g in truth.items()}
    assert not {name: error for name, error in errors.items() if not error < 3e-2}
