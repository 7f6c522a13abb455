"""The CUDA kernels against the float64 reference: every size, ragged lengths, packs, states, hostile inputs."""

from __future__ import annotations

import re

import pytest
import torch

from based_mp.ops import backends, taylor_cuda
from based_mp.ops.linear_attention import TaylorState, taylor_linear_attention, taylor_linear_attention_qkv
from based_mp.ops.reference import taylor_chunked

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.extension() is None, reason="needs a Hopper GPU and based_mp._C")


def make(b, s, h, f, d, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(b, s, h, e, generator=g, device="cuda").to(dtype).requires_grad_() for e in (f, f, d, d)]


def error(x, ref):
    assert x.isfinite().all()
    return ((x.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-300)).item()


def compare(q, k, v, grad, state=None, cu=None, return_state=False):
    """Relative errors of o, dq, dk, dv (and of states and their gradients) against float64."""
    assert backends.taylor_backend(q, k, v) == "cuda"
    ref = [x.detach().double().requires_grad_() for x in (q, k, v)]
    state_ref = None if state is None else TaylorState(*(x.detach().double().requires_grad_() for x in state))
    o, out = taylor_linear_attention(q, k, v, initial_state=state, return_state=True, cu_seqlens=cu) \
        if return_state else (taylor_linear_attention(q, k, v, initial_state=state, cu_seqlens=cu), None)
    o_ref, out_ref = taylor_chunked(*ref, initial_state=state_ref, cu_seqlens=cu)
    loss, loss_ref = (o * grad).sum(), (o_ref * grad.double()).sum()
    errors = {"o": error(o, o_ref)}
    if return_state:
        g = torch.Generator("cuda").manual_seed(9)
        for name, a, b in zip(("kv", "z"), out, out_ref, strict=True):
            errors[name] = error(a, b)
            w = torch.randn(a.shape, generator=g, device="cuda") / 50
            loss, loss_ref = loss + (a * w).sum(), loss_ref + (b * w.double()).sum()
    leaves = [q, k, v] + list(state or [])
    refs = ref + list(state_ref or [])
    for name, a, b in zip(("dq", "dk", "dv", "dkv", "dz"), torch.autograd.grad(loss, leaves),
                          torch.autograd.grad(loss_ref, refs), strict=False):
        exact_zero = b.norm() < 1e-12                  # one token: o = v whatever q and k are
        errors[name] = a.double().norm().item() / grad.double().norm().item() if exact_zero else error(a, b)
    return errors


def check(errors):
    print({name: f"{e:.1e}" for name, e in errors.items()})
    limits = {"o": 4e-3, "kv": 1e-3, "z": 1e-3}
    assert all(e <= limits.get(name, 8e-3) for name, e in errors.items()), errors


@pytest.mark.parametrize("d", backends.HEAD_DIMS)
@pytest.mark.parametrize("f", backends.FEATURE_DIMS)
def test_sizes(f, d):
    check(compare(*make(2, 777, 3, f, d)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (3, 17, 5), (1, 159, 1), (1, 160, 2), (2, 161, 2),
                                   (1, 5000, 1), (1, 1023, 7), (64, 33, 8), (2, 2048, 16)])
def test_lengths_and_grids(shape):
    check(compare(*make(*shape, 16, 64, seed=sum(shape))))


@pytest.mark.parametrize("shape, states", [((4, 700, 16, 112), "walk"), ((7, 300, 8, 128), "walk"),
                                           ((4, 513, 16, 80), "walk"), ((4, 900, 16, 96), "walk"),
                                           ((2, 1500, 8, 64), "sums"),
                                           ((1, 2500, 1, 96), "scan")])
def test_ways_of_states(shape, states):
    """Each way the state reaches a segment (see `taylor_cuda._states`), ragged."""
    b, s, h, d = shape
    assert taylor_cuda._states(taylor_cuda.plan(b, s, h, None), b, s, h, d, False, False) == states
    check(compare(*make(b, s, h, 16, d)))


def test_half_precision():
    check(compare(*make(2, 300, 2, 16, 64, torch.float16)))


@pytest.mark.parametrize("d", [64, 112])
@pytest.mark.parametrize("f", backends.FEATURE_DIMS)
def test_states(f, d):
    """Initial state in, final state out, gradients through both."""
    q, k, v, grad = make(2, 400, 2, f, d)
    x = make(2, 70, 2, f, d, seed=5)
    with torch.no_grad():
        state = taylor_chunked(*(t.float() for t in x[:3]))[1]
    state = TaylorState(*(t.clone().requires_grad_() for t in state))
    check(compare(q, k, v, grad, state, return_state=True))


def test_packed_documents():
    q, k, v, grad = make(1, 1700, 2, 16, 64)
    cu = torch.tensor([0, 5, 5, 600, 601, 1003, 1700], dtype=torch.int32, device="cuda")
    check(compare(q, k, v, grad, cu=cu))
    with torch.no_grad():
        state = taylor_linear_attention(q, k, v, cu_seqlens=cu, return_state=True)[1]
        ref = taylor_chunked(q.double(), k.double(), v.double(), cu_seqlens=cu)[1]
    assert error(state.kv, ref.kv) < 1e-3 and (state.kv[1] == 0).all()


@pytest.mark.parametrize("f, d", [(16, 64), (8, 112)])
def test_documents_do_not_read_each_other(f, d):
    """A chunk is copied whole, also where it reaches into the next document: not even NaN comes through."""
    cu = torch.tensor([0, 200, 500, 900], dtype=torch.int32, device="cuda")
    def run(qkv):
        o = taylor_linear_attention_qkv(qkv.requires_grad_(), f, cu_seqlens=cu)
        return o, torch.autograd.grad(o, qkv, grad)[0]
    qkv, grad = (torch.cat(x, -1).detach() for x in (make(1, 900, 2, f, d)[:3], make(1, 900, 2, f, d, seed=1)[3:]))
    clean, spoilt = run(qkv.clone()), qkv.clone()
    spoilt[:, :200] = spoilt[:, 500:] = float("nan")
    for a, b in zip(run(spoilt), clean, strict=True):
        assert a[:, :200].isnan().any() and torch.equal(a[:, 200:500], b[:, 200:500])


@pytest.mark.parametrize("n", [1, 100, 160, 511])
def test_split_invariance(n):
    q, k, v, _ = make(1, 512, 2, 16, 64)
    with torch.no_grad():
        o, whole = taylor_linear_attention(q, k, v, return_state=True)
        o1, first = taylor_linear_attention(q[:, :n], k[:, :n], v[:, :n], return_state=True)
        o2, second = taylor_linear_attention(q[:, n:], k[:, n:], v[:, n:], return_state=True, initial_state=first)
    assert error(second.kv, whole.kv) < 1e-6 and error(second.z, whole.z) < 1e-6
    assert error(torch.cat([o1, o2], 1), o) < 5e-3


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("first, f, d", [(0, 16, 64), (8, 8, 112), (3, 16, 80)])
def test_strides_and_misaligned_inputs(order, first, f, d):
    """Of qkv and of the output's gradient: the dimensions in memory in any order, rows on any boundary."""
    def strided(*shape):
        x = torch.randn(*(shape[i] + (first if i == 3 else 0) for i in order), device="cuda", dtype=torch.bfloat16)
        return x.permute([order.index(i) for i in range(4)])[..., first:]

    x, grad = strided(2, 300, 3, 2 * f + d).requires_grad_(), strided(2, 300, 3, d)
    double = x.detach().double().requires_grad_()
    o, ref = taylor_linear_attention_qkv(x, f), taylor_chunked(*taylor_cuda.parts(double, f))[0]
    dx, truth = torch.autograd.grad(o, x, grad)[0], torch.autograd.grad(ref, double, grad.double())[0]
    assert error(o, ref) < 4e-3
    for part, expected in zip(taylor_cuda.parts(dx, f), taylor_cuda.parts(truth, f), strict=True):
        assert error(part, expected) < 8e-3


def test_nothing_is_copied_around_the_kernels():
    """Output and gradient lie as the projections take them, [seq, batch, heads, ...]."""
    x = torch.randn(300, 2, 3, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(300, 2, 3 * 64, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        o = taylor_linear_attention_qkv(x.transpose(0, 1), 16).transpose(0, 1).flatten(2)
        dx, = torch.autograd.grad(o, x, grad)
    assert o.is_contiguous() and dx.is_contiguous()
    assert not [e.key for e in profiler.key_averages() if re.search("copy|cpy|CatArray", e.key, re.IGNORECASE)]


def test_hostile_inputs():
    q, k, v, grad = make(1, 600, 2, 16, 64)
    with torch.no_grad():
        big = 60 / (q * k).sum(-1).abs().max()
        a, b = (x * big.sqrt() for x in (q, k))
        one = torch.full_like(v, 0.7109375)
        assert error(taylor_linear_attention(a, b, one), one) < 4e-3
        assert error(taylor_linear_attention(a, b, v), taylor_chunked(a.double(), b.double(), v.double())[0]) < 5e-3
        huge = v.clone()
        huge[0, 10, 0, 3] = 1e30
        assert taylor_linear_attention(q, k, huge).isfinite().all()
        zero = torch.zeros_like(q)
        assert error(taylor_linear_attention(zero, k, v), taylor_chunked(*(x.double() for x in (zero, k, v)))[0]) < 4e-3


def test_bitwise_repeatable():
    q, k, v, grad = make(1, 3000, 4, 16, 64)
    runs = []
    for _ in range(3):
        o = taylor_linear_attention(q, k, v)
        runs.append([o, *torch.autograd.grad(o, (q, k, v), grad)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_opcheck():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for batch, return_state in ((1, False), (1, True), (2, False)):
        qkv = torch.cat(make(batch, 200, 2, 16, 64)[:3], -1).detach().requires_grad_()
        torch.library.opcheck(taylor_cuda.taylor_forward, (qkv, 16, None, None, None, 0.25, return_state),
                              test_utils=tests)
        o, denominator, space, *_ = taylor_cuda.taylor_forward(qkv.detach(), 16, None, None, None, 0.25, False)
        torch.library.opcheck(taylor_cuda.taylor_backward, (
            torch.ones_like(o), denominator, space, qkv.detach(), 16, None, None, None, 0.25, False),
            test_utils=("test_schema", "test_faketensor"))


def test_compile():
    q, k, v, grad = make(1, 300, 2, 16, 64)
    o = torch.compile(lambda *x: taylor_linear_attention(*x) * 2, fullgraph=True)(q, k, v)
    expected = taylor_linear_attention(q, k, v) * 2
    assert torch.equal(o, expected)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), grad) for x in (o, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_cuda_graph():
    q, k, v, _ = (x.detach() for x in make(1, 700, 2, 16, 64))
    taylor_linear_attention(q, k, v, return_state=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = taylor_linear_attention(q, k, v, return_state=True)
    q.copy_(torch.randn_like(q))
    graph.replay()
    expected, expected_state = taylor_linear_attention(q, k, v, return_state=True)
    assert torch.equal(o, expected) and torch.equal(state.kv, expected_state.kv)


def test_fallback_says_why():
    q, k, v, _ = make(1, 20, 2, 24, 64)
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="feature_dim 24"):
        taylor_linear_attention(q, k, v)
