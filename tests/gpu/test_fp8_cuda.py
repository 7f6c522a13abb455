"""fp8 matrix products on a GPU: the kernel that scales rows, the product, and whole steps beside bf16."""

from __future__ import annotations

import pytest
import torch

from based_mp.ops import backends, fp8

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9) or not backends.HAS_TRITON,
    reason="needs a CUDA GPU of compute capability 8.9 and Triton")


@pytest.fixture(scope="module")
def ranks():
    from based_mp.parallel import state
    yield state.initialize(device="cuda", seed=3)
    state.destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, width", [(8192, 1792), (300, 7168), (7, 16), (33, 1000)])
def test_the_kernel_equals_plain_torch(monkeypatch, rows, width, dtype):
    x = (torch.randn(rows, width, device="cuda") * torch.logspace(-20, 20, rows, device="cuda")[:, None]).to(dtype)
    x[0] = 0
    q, scale = fp8.quantize_rows(x)
    monkeypatch.setattr(backends, "fused_backend", lambda x: "torch")
    expected, expected_scale = fp8.quantize_rows(x)
    assert torch.equal(scale, expected_scale) and torch.equal(q.float(), expected.float())


def test_what_is_not_finite_stays_so():
    x = torch.ones(3, 64, device="cuda", dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    q, scale = fp8.quantize_rows(x)
    assert (q.float() * scale).isfinite().all(-1).tolist() == [False, False, True]


@pytest.mark.parametrize("m, n, k", [(8192, 7168, 1792), (16384, 1024, 2048), (5, 48, 96), (1000, 16, 16)])
def test_product(m, n, k):
    a, b = (fp8.quantize_rows(torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)) for rows in (m, n))
    y = fp8.product(a, b)
    exact = (a[0].double() * a[1].double()) @ (b[0].double() * b[1].double()).t()
    # bf16 of the result, 2e-3, and 14-bit sums within the tensor cores.
    assert y.dtype == torch.bfloat16 and (y.double() - exact).norm() < 4e-3 * exact.norm()


def test_steps_lie_near_those_in_bf16(ranks):
    from tests.parity.test_fp8 import losses
    model = {"d_model": 256, "feature_dim": 16, "ffn_hidden_size": 512}
    exact, ours = (losses(ranks, 12, model=model, training={"device": "cuda", "fp8": recipe})
                   for recipe in ("none", "rowwise"))
    assert exact[-1] < exact[0] - 2
    assert 1e-6 < max(abs(a - b) for a, b in zip(exact, ours, strict=True)) < 0.15
