"""200 training steps with the kernels of Taylor linear attention beside the same steps in plain torch.

The limit is what bf16 itself does to the losses: that of runs in plain torch whose linear attention rounds its output
and its gradients up or down at random, not to nearest. SGD, because Adam does not see how large a gradient is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from based_mp.model import linear_attention
from based_mp.model.based_model import build_model, forward_loss
from based_mp.ops import backends, taylor_cuda
from based_mp.ops.reference import taylor_chunked
from based_mp.parallel import state
from tests.models import tiny_config

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.extension() is None, reason="needs a Hopper GPU and based_mp._C")
STEPS, WINDOW, VOCAB = 200, 20, 64
MODEL = {"d_model": 128, "num_heads": 2, "num_layers": 3, "linear_attention_layers": [1, 2],
         "sliding_attention_layers": [], "feature_dim": 16, "ffn_hidden_size": 256, "vocab_size": VOCAB,
         "init_std": 0.1}


class Rounded(torch.autograd.Function):
    """bf16 from fp32, up or down at random: what goes forward, or the gradient that goes back."""

    @staticmethod
    def forward(ctx, x: Tensor, back: bool, generator: torch.Generator) -> Tensor:
        ctx.back, ctx.generator = back, generator
        return x.float() if back else Rounded.once(x, generator)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return Rounded.once(grad, ctx.generator) if ctx.back else grad.float(), None, None

    @staticmethod
    def once(x: Tensor, generator: torch.Generator) -> Tensor:
        dither = torch.randint(0, 2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
        return ((x.contiguous().view(torch.int32) + dither) & -(2**16)).view(torch.float32).bfloat16()


def plain(qkv: Tensor, feature_dim: int, **unused: None) -> Tensor:
    return taylor_chunked(*taylor_cuda.parts(qkv, feature_dim))[0]


def rounding_at_random(seed: int, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def op(qkv: Tensor, feature_dim: int, **unused: None) -> Tensor:
        o = taylor_chunked(*(Rounded.apply(x, True, generator) for x in taylor_cuda.parts(qkv, feature_dim)))[0]
        return Rounded.apply(o, False, generator)
    return op


def train(model: torch.nn.Module, start: list[Tensor], op: Callable[..., Tensor]) -> Tensor:
    """Losses [steps] of one batch again and again, bf16 with fp32 master weights, from the weights `start`."""
    parameters, device = list(model.parameters()), start[0].device
    masters = [w.clone() for w in start]
    optimizer = torch.optim.SGD(masters, lr=3e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    symbols = torch.randint(0, VOCAB, (4, 8), generator=generator)                    # of each sequence
    tokens = symbols.gather(1, torch.randint(0, 8, (4, 257), generator=generator)).to(device)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(4, 256, device=device)}
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_attention, "taylor_linear_attention_qkv", op)
        for _ in range(STEPS):
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
            loss = forward_loss(model, batch)
            loss.backward()
            losses.append(loss.detach())
            for parameter, master in zip(parameters, masters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
    return torch.stack(losses).double().cpu()


def windows(difference: Tensor) -> Tensor:
    return difference.view(-1, WINDOW).mean(1).abs()


def prepare(device: str) -> tuple[torch.nn.Module, list[Tensor], Tensor, list[Tensor]]:
    """Model, first weights, losses in plain torch, and the differences from them that roundings make."""
    model = build_model(tiny_config(training={"precision": "bf16", "device": device, "seq_length": 256}, model=MODEL))
    start = [p.detach().float() for p in model.parameters()]
    expected = train(model, start, plain)
    noise = [train(model, start, rounding_at_random(seed, start[0].device)) - expected for seed in (1, 2)]
    return model, start, expected, noise


@pytest.fixture(scope="module")
def runs():
    state.initialize(device="cuda", seed=3)
    yield prepare("cuda")
    state.destroy()


def within_noise(difference: Tensor, noise: list[Tensor]) -> bool:
    """Step by step, and without what averages out over some steps."""
    steps = max(x.abs().max() for x in noise)
    means = max(windows(x).max() for x in noise)
    print(f"largest difference {difference.abs().max():.1e}, of means {windows(difference).max():.1e}; "
          f"noise {steps:.1e}, {means:.1e}")
    return bool(difference.abs().max() <= 3 * steps and windows(difference).max() <= 2 * means)


def test_losses_of_200_steps(runs):
    model, start, expected, noise = runs
    assert expected[-1] < 0.5 * expected[0]
    assert within_noise(train(model, start, linear_attention.taylor_linear_attention_qkv) - expected, noise)


def test_a_gradient_off_by_a_twentieth_is_seen(runs, monkeypatch):
    """dk's, the one that moves the losses least."""
    model, start, expected, noise = runs
    right = taylor_cuda.taylor_backward

    def wrong(*args):
        dqkv, *states = right(*args)
        taylor_cuda.parts(dqkv, MODEL["feature_dim"])[1].mul_(1.05)
        return dqkv, *states

    monkeypatch.setattr(taylor_cuda, "taylor_backward", wrong)
    assert not within_noise(train(model, start, linear_attention.taylor_linear_attention_qkv) - expected, noise)
