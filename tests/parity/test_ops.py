"""Every op against its definition: quadratic = chunked = recurrent, blocks = naive loops, packed = each alone."""

import pytest
import torch

from based_mp.ops.decode_torch import taylor_step_
from based_mp.ops.gated_conv import gated_conv
from based_mp.ops.linear_attention import TaylorState, taylor_linear_attention, taylor_linear_attention_qkv
from based_mp.ops.reference import (
    causal_conv_naive,
    init_taylor_state,
    taylor_chunked,
    taylor_denominator,
    taylor_feature_dim,
    taylor_features,
    taylor_quadratic,
    taylor_recurrent,
    window_attention_naive,
)
from based_mp.ops.window_attention import causal_attention, rope

LENGTHS = [1, 63, 65, 1000]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


def qkv(length, batch=2, heads=3, feature_dim=16, head_dim=20, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads)
    return [torch.randn(*shape, e, generator=g, dtype=dtype) for e in (feature_dim, feature_dim, head_dim)]


@pytest.mark.parametrize("feature_dim", [1, 2, 7, 8, 16])
def test_feature_map_is_the_taylor_polynomial(feature_dim):
    q, k, _ = qkv(20, feature_dim=feature_dim)
    phi_q, phi_k = taylor_features(q, 0.3), taylor_features(k, 0.3)
    assert phi_q.shape[-1] == taylor_feature_dim(feature_dim)
    s = 0.3 * (q * k).sum(-1)
    torch.testing.assert_close((phi_q * phi_k).sum(-1), 1 + s + s * s / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [None, (-0.02, -0.1, -0.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
def test_quadratic_chunked_recurrent(length, dtype, decay):
    q, k, v = qkv(length, dtype=dtype)
    decay = None if decay is None else torch.tensor(decay)
    expected = taylor_quadratic(q, k, v, decay=decay)
    chunked, chunked_state = taylor_chunked(q, k, v, decay=decay, chunk_size=64)
    recurrent, recurrent_state = taylor_recurrent(q, k, v, decay=decay)
    assert relative(chunked, expected) < TOLERANCE[dtype]
    assert relative(recurrent, expected) < TOLERANCE[dtype]
    for a, b in zip(chunked_state, recurrent_state, strict=True):
        assert relative(a, b) < TOLERANCE[dtype]


def test_gradients_of_chunked_equal_the_quadratic_ones():
    inputs = [x.requires_grad_() for x in qkv(77)]
    weight = torch.randn(2, 77, 3, 20, dtype=torch.float64)
    expected = torch.autograd.grad((taylor_quadratic(*inputs) * weight).sum(), inputs)
    got = torch.autograd.grad((taylor_chunked(*inputs, chunk_size=16)[0] * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("cut", [1, 64, 99])
def test_state_carried_over_any_cut(cut):
    q, k, v = qkv(100)
    whole, state = taylor_linear_attention(q, k, v, return_state=True)
    first, carried = taylor_linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], return_state=True)
    second, final = taylor_linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], initial_state=carried,
                                            return_state=True)
    assert relative(torch.cat([first, second], 1), whole) < 1e-10
    assert relative(final.kv, state.kv) < 1e-10 and relative(final.z, state.z) < 1e-10


def test_initial_state_gradient():
    q, k, v = qkv(9)
    state = TaylorState(*(x.requires_grad_() for x in taylor_recurrent(*qkv(5, seed=1))[1]))
    chunked = taylor_chunked(q, k, v, initial_state=state, chunk_size=4)[0]
    recurrent = taylor_recurrent(q, k, v, initial_state=state)[0]
    for a, b in zip(torch.autograd.grad(chunked.square().sum(), state),
                    torch.autograd.grad(recurrent.square().sum(), state), strict=True):
        assert relative(a, b) < 1e-10


def test_step_updates_the_state_in_place():
    q, k, v = qkv(30)
    state = init_taylor_state(2, 3, 16, 20, dtype=torch.float64)
    x, slots = torch.cat([q, k, v], -1).flatten(2), torch.tensor([1, 0], dtype=torch.int32)
    out = torch.stack([taylor_step_(x[:, t], slots, None, *state, None, None, 16) for t in range(30)], 1)
    assert relative(out, taylor_quadratic(q, k, v).flatten(2)) < 1e-10


PACKED = torch.tensor([0, 5, 5, 70, 200, 201], dtype=torch.int32)


@pytest.mark.parametrize("decay", [None, (-0.02, -0.1, -0.5)])
def test_packed_documents_equal_each_alone(decay):
    decay = None if decay is None else torch.tensor(decay)
    q, k, v = qkv(201, batch=1)
    start = TaylorState(torch.rand(5, 3, 153, 20, dtype=torch.float64), torch.rand(5, 3, 153, dtype=torch.float64))
    out, state = taylor_chunked(q, k, v, cu_seqlens=PACKED, initial_state=start, decay=decay, chunk_size=16)
    for d in range(5):
        row = TaylorState(start.kv[d : d + 1], start.z[d : d + 1])
        piece = slice(PACKED[d], PACKED[d + 1])
        if piece.start == piece.stop:
            torch.testing.assert_close(state.kv[d], start.kv[d])
            continue
        alone, final = taylor_recurrent(q[:, piece], k[:, piece], v[:, piece], initial_state=row, decay=decay)
        assert relative(out[:, piece], alone) < 1e-10
        assert relative(state.kv[d], final.kv[0]) < 1e-10


def test_constant_values_and_large_scores():
    q, k, v = qkv(300, dtype=torch.float32)
    constant = torch.ones_like(v) * 3
    torch.testing.assert_close(taylor_linear_attention(q * 8, k * 8, constant), constant, rtol=1e-5, atol=1e-5)
    assert taylor_linear_attention(torch.zeros_like(q), k, v)[:, -1].sub(v.mean(1)).abs().max() < 1e-5


def test_denominator_is_at_least_half_the_position():
    q, k, _ = qkv(500, dtype=torch.float32)
    t = torch.arange(1, 501)[None, :, None]
    assert (taylor_denominator(q, k) >= t / 2 * (1 - 1e-5)).all()


def test_shapes_are_checked():
    q, k, v = qkv(4)
    with pytest.raises(ValueError, match="batch 1"):
        taylor_linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="expected q, k"):
        taylor_linear_attention(q, k[:, :2], v)
    with pytest.raises(ValueError, match="with feature_dim 16"):
        taylor_linear_attention_qkv(torch.cat((q, k), -1), 16)


@pytest.mark.parametrize("window", [1, 8, 64, None])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 130])
def test_window_attention_against_the_definition(length, window):
    q, k, v = qkv(length, feature_dim=16, head_dim=16)
    expected = window_attention_naive(q, k, v, window, 16 ** -0.5)
    torch.testing.assert_close(causal_attention(q, k, v, window=window), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [8, None])
def test_window_attention_stays_inside_a_document(window):
    q, k, v = qkv(201, batch=1, head_dim=16)
    out = causal_attention(q, k, v, window=window, cu_seqlens=PACKED)
    for a, b in zip(PACKED[:-1], PACKED[1:], strict=True):
        if a < b:
            expected = window_attention_naive(q[:, a:b], k[:, a:b], v[:, a:b], window, 0.25)
            torch.testing.assert_close(out[:, a:b], expected, rtol=1e-10, atol=1e-12)


def test_rope_rotates_pairs_by_position():
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    turned = rope(x, torch.arange(5)[None], fraction=0.5)
    torch.testing.assert_close(turned[..., 4:], x[..., 4:])                 # the other half is left alone
    for t in range(5):
        for i in range(2):
            angle = torch.tensor(t * 10000.0 ** (-i / 2))
            a, b = x[0, t, :, i], x[0, t, :, i + 2]
            torch.testing.assert_close(turned[0, t, :, i], a * angle.cos() - b * angle.sin(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(turned[0, t, :, i + 2], b * angle.cos() + a * angle.sin(), rtol=1e-6,
                                       atol=1e-6)


def conv_inputs(length, batch=1):
    g = torch.Generator().manual_seed(length)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((length, batch, 12), (6, 3), (12,))]


@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_gated_conv_against_the_definition(length):
    x, weight, bias = conv_inputs(length, batch=2)
    u1, u2 = (x + bias).chunk(2, -1)
    expected = torch.nn.functional.silu(causal_conv_naive(u1.transpose(0, 1), weight)).transpose(0, 1) * u2
    torch.testing.assert_close(gated_conv(x, weight, bias), expected)


def test_gated_conv_carries_and_resets():
    x, weight, bias = conv_inputs(201)
    packed = gated_conv(x, weight, bias, cu_seqlens=PACKED)
    for a, b in zip(PACKED[:-1].tolist(), PACKED[1:].tolist(), strict=True):
        for cut in {min(a + 1, b), (a + b) // 2} - {a}:
            head, carry = gated_conv(x[a:cut], weight, bias, return_carry=True)
            tail = gated_conv(x[cut:b], weight, bias, carry=carry)
            torch.testing.assert_close(torch.cat([head, tail]), packed[a:b])


def test_gated_conv_carry_of_packed_rows():
    x, weight, bias = conv_inputs(201)
    carry = torch.randn(5, 2, 6, dtype=torch.float64)
    out, after = gated_conv(x, weight, bias, cu_seqlens=PACKED, carry=carry, return_carry=True)
    for d, (a, b) in enumerate(zip(PACKED[:-1].tolist(), PACKED[1:].tolist(), strict=True)):
        row = carry[d : d + 1]
        alone, expected = gated_conv(x[a:b], weight, bias, carry=row, return_carry=True)
        torch.testing.assert_close(out[a:b], alone)
        torch.testing.assert_close(after[d : d + 1], expected)


def test_gated_conv_checks_shapes():
    x, weight, bias = conv_inputs(4, batch=2)
    with pytest.raises(ValueError, match="batch 1"):
        gated_conv(x, weight, bias, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="carry"):
        gated_conv(x, weight, bias, carry=torch.zeros(1, 2, 6))
