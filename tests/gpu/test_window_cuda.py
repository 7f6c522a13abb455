"""Window attention on a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from based_mp.ops import backends
from based_mp.ops.fused.rotary_attention import RotaryAttention
from based_mp.ops.reference import window_attention_naive
from based_mp.ops.window_attention import causal_attention, rope, rotary_attention
from based_mp.ops.window_cuda import _forward, rotary_window_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
own = pytest.mark.skipif(torch.cuda.is_available() and backends.extension() is None, reason="needs based_mp._C")


@pytest.mark.parametrize("window", [1, 64, 128, 256, None])
@pytest.mark.parametrize("head_dim", [64, 70, 112])
@pytest.mark.parametrize("length", [1, 63, 300, 2048])
def test_window_attention_in_bf16(length, head_dim, window):
    q, k, v = torch.randn(3, 2, length, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    expected = window_attention_naive(q.double(), k.double(), v.double(), window, head_dim ** -0.5)
    got = causal_attention(q, k, v, window=window)
    assert ((got - expected).norm() / expected.norm()).item() < 4e-3


@pytest.mark.parametrize("window", [64, None])
def test_packed_window_attention_in_bf16(window):
    bounds = torch.tensor([0, 5, 300, 301, 900], dtype=torch.int32, device="cuda")
    q, k, v = torch.randn(3, 1, 900, 4, 64, device="cuda", dtype=torch.bfloat16)
    got = causal_attention(q, k, v, window=window, cu_seqlens=bounds)
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        expected = window_attention_naive(*(x[:, a:b].double() for x in (q, k, v)), window, 0.125)
        assert ((got[:, a:b] - expected).norm() / expected.norm()).item() < 4e-3


def error(a, b, least=0.0):
    """Relative to b, or to what b is compared with where it is nearly nothing (dq and dk of window 1 are zero)."""
    assert a.isfinite().all()
    return ((a.double() - b).norm() / b.norm().clamp_min(least)).item()


def reference(qkv, window, bounds):
    """RoPE and attention in qkv's precision, document by document: [seq, batch, heads, head_dim]."""
    q, k, v = qkv.transpose(0, 1).unbind(-2)
    positions = torch.arange(qkv.shape[0], device="cuda")[None]
    q, k = rope(q, positions), rope(k, positions)
    bounds = bounds or [0, qkv.shape[0]]
    parts = [window_attention_naive(*(x[:, a:b] for x in (q, k, v)), window, qkv.shape[-1] ** -0.5)
             for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a]
    return torch.cat(parts, 1).transpose(0, 1)


def inputs(seq, batch, heads, dim, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(seq, batch, heads, 3, dim, generator=g, device="cuda").bfloat16()
    return qkv, torch.randn(seq, batch, heads, dim, generator=g, device="cuda").bfloat16()


def errors(function, qkv, grad, window, bounds):
    """Relative errors of o, dq, dk, dv against float64. Fresh memory holds NaN, so that what is not written shows."""
    double = qkv.double().requires_grad_()
    expected = reference(double, window, bounds)
    truth, = torch.autograd.grad(expected, double, grad.double())
    leaf = qkv.clone().requires_grad_()
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)                  # fills fresh memory with NaN
        o = function(leaf, window, cu)
        dqkv, = torch.autograd.grad(o, leaf, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert dqkv.shape == qkv.shape and o.dtype == dqkv.dtype == torch.bfloat16
    return [error(o, expected), *(error(dqkv[:, :, :, i], truth[:, :, :, i], 0.01 * truth.norm()) for i in range(3))]


def flash(qkv, window, cu):
    return RotaryAttention.apply(qkv * 1, window, cu, 10000.0, 1.0).transpose(0, 1)


@own
@pytest.mark.parametrize("window", [1, 2, 64, 65, 100, 128, 200, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128])
def test_against_float64(head_dim, window):
    for seq, batch, heads in [(1, 1, 1), (63, 2, 3), (65, 1, 2), (700, 2, 16), (2048, 1, 3)]:
        qkv, grad = inputs(seq, batch, heads, head_dim, seq)
        found = errors(rotary_window_attention, qkv, grad, window, None)
        assert found[0] < 4e-3 and max(found[1:]) < 8e-3, (seq, found)
        if window > 2 and seq > 64:
            usual = errors(flash, qkv, grad, window, None)
            assert all(a < 1.3 * b for a, b in zip(found, usual, strict=True)), (seq, found, usual)


@own
@pytest.mark.parametrize("window", [64, 100, 256])
@pytest.mark.parametrize("head_dim", [64, 112])
def test_documents(head_dim, window):
    for bounds in ([0, 5, 5, 63, 64, 65, 200, 700], [0, 0, 128, 700, 700], [0, 350, 700]):
        qkv, grad = inputs(700, 1, 5, head_dim)
        found = errors(rotary_window_attention, qkv, grad, window, bounds)
        assert found[0] < 4e-3 and max(found[1:]) < 8e-3, (bounds, found)


@pytest.mark.parametrize("head_dim", [64, 112])
def test_full_attention_keeps_the_projection_itself(head_dim):
    qkv, _ = inputs(300, 2, 3, head_dim)
    x = qkv.requires_grad_() * 1
    o = RotaryAttention.apply(x, None, None, 10000.0, 1.0)
    assert o.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()


@own
def test_long_sequence_and_large_scores():
    qkv, grad = inputs(9000, 1, 2, 64)
    qkv[:, :, :, :2] *= 6                                                         # scores of ±100: weights near 0 and 1
    found, usual = errors(rotary_window_attention, qkv, grad, 256, None), errors(flash, qkv, grad, 256, None)
    assert all(a < 1.3 * b for a, b in zip(found, usual, strict=True)), (found, usual)


@own
def test_strided_inputs_and_bitwise_repeatable():
    qkv, grad = inputs(1000, 3, 6, 64)
    leaf = qkv.requires_grad_()
    others = [qkv.detach().permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4),          # readable strides
              torch.cat([qkv.detach(), qkv.detach()[..., :3]], -1)[..., :64],                     # rows off 16 bytes
              qkv.detach().clone()]
    first = rotary_window_attention(leaf, 128)
    for other in others:
        assert torch.equal(rotary_window_attention(other, 128), first)
    strided = grad.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    runs = [torch.autograd.grad(rotary_window_attention(leaf, 128), leaf, g)[0] for g in (grad, grad, strided)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    ones = torch.autograd.grad(rotary_window_attention(leaf, 128).sum(), leaf)[0]               # an expanded gradient
    assert torch.equal(ones, torch.autograd.grad(rotary_window_attention(leaf, 128), leaf, torch.ones_like(grad))[0])


@own
def test_opcheck_and_compile():
    qkv, grad = inputs(130, 1, 2, 64)
    cu = torch.tensor([0, 30, 130], dtype=torch.int32, device="cuda")
    for bounds in (None, cu):
        torch.library.opcheck(_forward, (qkv.requires_grad_(), bounds, 64, 10000.0),
                              test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    x = qkv.detach().flatten(2).requires_grad_()
    compiled = torch.compile(lambda x: rotary_attention(x, 2, window=64) * 2, fullgraph=True)
    results = []
    for function in (compiled, lambda x: rotary_attention(x, 2, window=64) * 2):
        o = function(x)
        results.append((o, torch.autograd.grad(o, x, grad.flatten(2))[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@own
def test_cuda_graph():
    qkv, grad = inputs(500, 2, 4, 112)
    leaf = qkv.requires_grad_()
    step = lambda: torch.autograd.grad(rotary_window_attention(leaf, 256), leaf, grad)[0]          # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dqkv = step()
    with torch.no_grad():
        leaf.copy_(inputs(500, 2, 4, 112, 1)[0])
    graph.replay()
    assert torch.equal(dqkv, step())


@own
def test_what_the_kernels_do_not_take_says_so(monkeypatch):
    monkeypatch.setattr(backends, "_warn_once", backends._warn_once.__wrapped__)
    for dtype, dim, window, fraction, reason in [
            (torch.float16, 64, 64, 1.0, "float16"), (torch.bfloat16, 72, 64, 1.0, "head_dim 72"),
            (torch.bfloat16, 64, 300, 1.0, "window 300"), (torch.bfloat16, 64, 64, 0.5, "rotary_fraction")]:
        x = torch.randn(40, 1, 2 * 3 * dim, device="cuda", dtype=dtype)
        with pytest.warns(UserWarning, match=f"torch's flash kernel.*{reason}"):
            rotary_attention(x, 2, window=window, fraction=fraction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(40, 1, 2 * 3 * 64, device="cuda", dtype=torch.bfloat16)
        rotary_attention(x.clone(), 2, window=None, fraction=0.5)
        rotary_attention(x, 2, window=64)
