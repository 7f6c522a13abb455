"""Which of cuBLAS's candidates a product takes."""

import pytest
import torch

from based_mp.ops import products


@pytest.mark.parametrize(("candidates", "inner", "chosen"), [
    ([(495, 28.5), (24, 31.0), (29, 50.4), (201, 50.9)], 1024, 2),     # 50.4 waves take as long as 51
    ([(24, 31.0), (20, 62.1)], 1024, None),                            # none of those tiles
    ([(24, 31.0), (29, 50.4)], 4096, None),                            # a long inner dimension
    ([(24, 2.0), (29, 3.4)], 1024, None),                              # few waves
    ([(24, 7.8), (29, 4.2), (201, 4.9)], 1024, 2),                     # the first leaves a sixth of five waves idle
    ([], 1024, None)])
def test_choice(candidates, inner, chosen):
    assert products.choose(candidates, inner) == chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_torch_multiplies(dtype):
    a, b, out = torch.randn(24, 16).to(dtype), torch.randn(32, 16).to(dtype), torch.empty(24, 32, dtype=dtype)
    assert products.multiply(a, b.t(), out) is out and torch.equal(out, a @ b.t())
