"""Recomputation changes what is kept for the backward pass, and nothing else."""

import pytest
import torch

from based_mp.model import layer
from based_mp.model.based_model import build_model, forward_loss
from tests.models import tiny_config


def step(recompute, fp32_residual=False, precision="fp32", **model):
    """Loss, gradients and the values that autograd keeps outside megatron-core's checkpoints."""
    torch.manual_seed(1)
    model = build_model(tiny_config(training={"recompute": recompute, "precision": precision},
                                    model={"fp32_residual": fp32_residual, **model}))
    tokens = torch.randint(0, 120, (2, 33), generator=torch.Generator().manual_seed(2))
    loss = forward_loss(model, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(2, 32)})
    loss.backward()
    return loss, [p.grad for p in model.parameters()], model


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_same_loss_and_gradients(gloo_process, recompute):
    loss, grads, _ = step("none")
    again, grads_again, _ = step(recompute)
    assert torch.equal(loss, again)
    for a, b in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_same_loss_and_gradients_of_the_compared_systems(gloo_process, recompute):
    systems = {"num_layers": 5, "linear_attention_layers": [], "sliding_attention_layers": [], "mixer_layers": {
        "gla": [0], "mamba": [1], "h3": [2], "hyena": [3], "rwkv": [4]}, "rwkv": {"head_dim": 16}}
    for mlp in ({}, {"ffn_hidden_size": 0}):
        loss, grads, _ = step("none", **systems, **mlp)
        again, grads_again, _ = step(recompute, **systems, **mlp)
        assert torch.equal(loss, again)
        for a, b in zip(grads, grads_again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_selective_makes_activations_again(gloo_process, monkeypatch):
    calls = []
    monkeypatch.setattr(layer, "swiglu", lambda x, f=layer.swiglu: (calls.append(1), f(x))[1])
    step("none")
    assert len(calls) == 4
    step("selective")
    assert len(calls) == 4 + 8


def test_fp32_residual_is_kept_in_fp32(gloo_process):
    loss, _, model = step("none", fp32_residual=True, precision="bf16")
    exact, _, _ = step("none")
    seen = []
    model.decoder.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long), None)
    assert seen == [torch.float32] and abs(loss - exact) < 0.05
