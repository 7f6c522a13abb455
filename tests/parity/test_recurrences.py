"""The recurrences of the compared systems against their definitions, token by token in fp64."""

import pytest
import torch

from based_mp.ops.recurrences import (
    causal_conv,
    gated_linear_attention,
    linear_scan,
    long_conv,
    next_carry,
    selective_scan,
)

DOUBLE = torch.float64


def close(a, b, tolerance=1e-9):
    assert ((a - b).norm() / b.norm()).item() < tolerance


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=DOUBLE)


def naive_gla(q, k, v, log_decay, scale, bonus, state):
    out = []
    for t in range(q.shape[1]):
        update = k[:, t, :, :, None] * v[:, t, :, None, :]
        decayed = state * log_decay[:, t].exp()[..., None]
        read = decayed + update if bonus is None else state + bonus[..., None] * update
        out.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], read))
        state = decayed + update
    return torch.stack(out, 1), state


@pytest.mark.parametrize("with_bonus", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_gated_linear_attention_and_its_gradients(length, with_bonus):
    q, k = randn(2, length, 3, 5), randn(2, length, 3, 5, seed=1)
    v, decay = randn(2, length, 3, 7), -2 * randn(2, length, 3, 5, seed=2).abs()
    bonus, state = (randn(3, 5) if with_bonus else None), randn(2, 3, 5, 7)
    inputs = [x.requires_grad_() for x in (q, k, v, decay, state) + ((bonus,) if with_bonus else ())]
    expected, last = naive_gla(q, k, v, decay, 0.4, bonus, state)
    got, final = gated_linear_attention(q, k, v, decay, scale=0.4, bonus=bonus, initial=state)
    close(got, expected)
    close(final, last)
    weight = randn(*got.shape, seed=3)
    wanted = torch.autograd.grad((expected * weight).sum() + last.sum(), inputs)
    for a, b in zip(torch.autograd.grad((got * weight).sum() + final.sum(), inputs), wanted, strict=True):
        close(a, b)


def test_fast_decay_stays_finite_in_fp32():
    q, k, v = (randn(1, 64, 2, 4, seed=i).float() for i in range(3))
    decay = torch.full_like(q, -60.0).requires_grad_()
    k.requires_grad_()
    o, _ = gated_linear_attention(q, k, v, decay, scale=1.0)
    torch.testing.assert_close(o, ((q * k).sum(-1, keepdim=True) * v), rtol=1e-3, atol=1e-3)
    o.square().sum().backward()
    assert torch.isfinite(k.grad).all() and torch.isfinite(decay.grad).all()


@pytest.mark.parametrize("length", [1, 2, 50, 130])
def test_selective_scan_and_its_gradients(length):
    x, delta = randn(length, 2, 6), randn(length, 2, 6, seed=1).exp() * 0.1
    a, b, c = -randn(6, 4).exp(), randn(length, 2, 4), randn(length, 2, 4, seed=1)
    start = randn(2, 6, 4)
    inputs = [t.requires_grad_() for t in (x, delta, a, b, c, start)]
    h, out = start, []
    for t in range(length):
        h = (delta[t][..., None] * a).exp() * h + (delta[t] * x[t])[..., None] * b[t][:, None]
        out.append((h * c[t][:, None]).sum(-1))
    expected = torch.stack(out)
    got, last = selective_scan(x, delta, a, b, c, start)
    close(got, expected)
    close(last, h)
    weight = randn(*got.shape, seed=3)
    wanted = torch.autograd.grad((expected * weight).sum() + h.sum(), inputs)
    for one, two in zip(torch.autograd.grad((got * weight).sum() + last.sum(), inputs), wanted, strict=True):
        close(one, two)


def test_linear_scan_gradients_with_broadcasting():
    inputs = [randn(9, 3, 1).requires_grad_(), randn(9, 3, 4).requires_grad_(), randn(3, 4).requires_grad_()]
    assert torch.autograd.gradcheck(linear_scan, inputs)


@pytest.mark.parametrize("width", [2, 4, 20])
def test_causal_conv_with_carry(width):
    x, weight = randn(30, 2, 3), randn(3, width)
    whole = causal_conv(x, weight)
    expected = torch.stack([sum(x[t - i] * weight[:, width - 1 - i] for i in range(width) if t >= i)
                            for t in range(30)])
    close(whole, expected)
    carry = torch.zeros(2, width - 1, 3, dtype=DOUBLE)
    first = causal_conv(x[:11], weight, carry)
    second = causal_conv(x[11:], weight, next_carry(x[:11], carry))
    close(torch.cat([first, second]), expected)
    ragged = next_carry(x, carry, torch.tensor([7, 30]))
    close(ragged[0], next_carry(x[:7], carry)[0])
    close(ragged[1], next_carry(x, carry)[1])


@pytest.mark.parametrize("length", [1, 7, 64])
def test_long_conv_is_the_causal_sum(length):
    u, kernel = randn(length, 2, 3), randn(length, 3)
    expected = torch.stack([sum(kernel[i] * u[t - i] for i in range(t + 1)) for t in range(length)])
    close(long_conv(u, kernel), expected)
