"""Window attention on a GPU."""

import pytest
import torch

from based_mp.ops.reference import window_attention_naive
from based_mp.ops.window_attention import causal_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


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
