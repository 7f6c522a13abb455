"""The gated convolution's kernels against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from based_mp.ops import backends
from based_mp.ops.gated_conv import _backward, _forward, _torch, gated_conv

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.extension() is None, reason="needs a Hopper GPU and based_mp._C")

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def inputs(seq, batch, channels, dtype, rows=None):
    g = torch.Generator("cuda").manual_seed(seq + channels)
    shapes = [(seq, batch, 2 * channels), (channels, 3), (2 * channels,), (seq, batch, channels)]
    if rows:
        shapes.append((rows, 2, channels))
    return [torch.randn(*s, generator=g, device="cuda").to(dtype) for s in shapes]


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-9)).item()


def compare(seq, batch, channels, dtype, bounds=None, with_carry=False, with_bias=True):
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    rows = batch if cu is None else len(bounds) - 1
    x, weight, bias, dy, *carry = inputs(seq, batch, channels, dtype, rows if with_carry else None)
    leaves = [t.requires_grad_() for t in ([x, weight, bias] if with_bias else [x, weight])]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    carry = carry[0] if carry else None
    assert backends.gated_conv_backend(x, weight, carry) == "cuda"
    y, after = gated_conv(*leaves, cu_seqlens=cu, carry=carry, return_carry=True)
    expected, expected_after = _torch(*(doubles if with_bias else [*doubles, None]), cu,
                                      None if carry is None else carry.double(), True)
    errors = {"y": error(y, expected), "carry": error(after, expected_after)}
    got = torch.autograd.grad(y, leaves, dy)
    for name, a, b in zip(("dx", "dweight", "dbias"), got, torch.autograd.grad(expected, doubles, dy.double()),
                          strict=False):
        errors[name] = error(a, b)
    assert max(errors.values()) < LIMITS[dtype], errors


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("seq, batch, channels", [(1, 1, 8), (2, 3, 16), (31, 2, 40), (65, 2, 2048), (700, 3, 3584),
                                                  (1400, 3, 72)])
def test_sizes(seq, batch, channels, dtype):
    compare(seq, batch, channels, dtype)
    compare(seq, batch, channels, dtype, with_carry=True, with_bias=False)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("with_carry", [False, True])
def test_documents(dtype, with_carry):
    compare(300, 1, 64, dtype, [0, 5, 5, 63, 64, 65, 66, 127, 128, 129, 256, 257, 300], with_carry)
    compare(64, 1, 64, dtype, [0, 0, 64, 64], with_carry)
    compare(5000, 1, 64, dtype, [0, 31, 32, 33, 1000, 1000, 4097, 5000], with_carry)


def test_decoding_continues_a_prefill():
    x, weight, bias, _ = inputs(50, 4, 64, torch.bfloat16)
    whole = gated_conv(x, weight, bias)
    y, carry = gated_conv(x[:30], weight, bias, return_carry=True)
    steps = [y]
    for t in range(30, 50):
        y, carry = gated_conv(x[t : t + 1], weight, bias, carry=carry, return_carry=True)
        steps.append(y)
    assert error(torch.cat(steps), whole.double()) < 8e-3


def test_bitwise_repeatable_and_strided_gradient():
    x, weight, bias, dy = inputs(1000, 2, 256, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    strided = dy.transpose(0, 1).contiguous().transpose(0, 1)
    runs = [torch.autograd.grad(gated_conv(*leaves), leaves, g) for g in (dy, dy, strided)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_gradients_are_added_to_the_optimizers_sums():
    x, weight, bias, dy = inputs(700, 2, 264, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(_torch(*doubles, None, None, False), doubles, dy.double())
    start = [torch.randn(t.shape, device="cuda") for t in (weight, bias)]
    for parameter, total in zip((weight, bias), start, strict=True):
        parameter.main_grad = total.clone()
    for _ in range(2):
        dx, *others = torch.autograd.grad(gated_conv(*leaves), leaves, dy, allow_unused=True)
        assert others == [None, None] and error(dx, truth[0]) < 8e-3
    for parameter, before, gradient in zip((weight, bias), start, truth[1:], strict=True):
        assert error(parameter.main_grad, before.double() + 2 * gradient) < 1e-4


def test_opcheck():
    x, weight, bias, _ = inputs(40, 2, 16, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for carried in (False, True):
        torch.library.opcheck(_forward, (*leaves, None, None, carried), test_utils=tests)
    given = [t.detach() for t in (torch.randn(40, 2, 16, device="cuda"), *leaves)]
    torch.library.opcheck(_backward, (*given, None, None, *(torch.zeros_like(t) for t in given[2:])),
                          test_utils=("test_schema", "test_faketensor"))
