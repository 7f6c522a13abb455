"""Products by an algorithm of our choice: against float64, from run to run, and where torch has to multiply."""

import pytest
import torch

from based_mp.ops import products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def rows(count, width, pitch, offset=0):
    """bf16 [count, width], `pitch` from row to row."""
    return torch.randn(count * pitch + offset, device="cuda").bfloat16()[offset:].view(count, pitch)[:, :width]


@pytest.fixture
def counted(monkeypatch):
    """The products that ran by our choice."""
    runs = []
    run = products._Plan.run
    monkeypatch.setattr(products._Plan, "run", lambda self, *tensors: (runs.append(1), run(self, *tensors)))
    return runs


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "inner", "width", "pitch"), [
    (32768, 1024, 4096, 1024), (16384, 1024, 2048, 1040), (32800, 2048, 1024, 2048), (16384, 1792, 7168, 1792)])
def test_products(tokens, inner, width, pitch, transposed, counted):
    x = rows(tokens, inner, pitch)
    w = rows(width, inner, inner + 16).t() if transposed else rows(inner, width, width + 16)
    out = torch.full((tokens, width), float("nan"), device="cuda", dtype=torch.bfloat16)
    products.multiply(x, w, out)
    assert counted == [1]
    some = torch.arange(0, tokens, 61, device="cuda")
    expected = x[some].double() @ w.double()
    assert (out[some].double() - expected).norm() < 3e-3 * expected.norm()
    again = torch.empty_like(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products.multiply(x, w, again)
    graph.replay()
    assert torch.equal(again, out) and counted == [1, 1]


def test_where_torch_multiplies(counted):
    w = rows(4096, 1024, 1024).t()
    for x in (rows(16384, 1024, 1024, offset=1), rows(16384, 1024, 1025), rows(1024, 16384, 16384).t(),
              rows(16384, 1024, 1024).float(), rows(100, 1024, 1024)):
        b = w.to(x.dtype)
        out = torch.empty(x.shape[0], 4096, device="cuda", dtype=x.dtype)
        assert torch.equal(products.multiply(x, b, out), x @ b)
    assert not counted
