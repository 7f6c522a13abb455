"""fp8 linear layers on two tensor-parallel ranks against their arithmetic in fp64; raises where they differ."""

from __future__ import annotations

import sys
import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402

from based_mp.model.based_model import build_model  # noqa: E402
from based_mp.model.fp8 import use_fp8  # noqa: E402
from based_mp.ops.fp8 import quantize_rows  # noqa: E402
from based_mp.parallel import state  # noqa: E402
from tests.models import tiny_config  # noqa: E402

SEQ, BATCH = 8, 3


def scaled(x: torch.Tensor) -> torch.Tensor:
    q, scale = quantize_rows(x)
    return q.double() * scale.double()


def near(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Row by row: rows differ by orders of magnitude. Two bf16 parts are added in bf16."""
    assert got.shape == expected.shape, what
    error = ((got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    assert error < 1e-2, f"{what}: {error:.4f}"


def rows(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal, tokens of very different sizes."""
    sizes = torch.logspace(-6, 6, SEQ)[:, None, None]
    return (torch.randn(*shape, generator=generator) * sizes).bfloat16()


def check(layer: torch.nn.Module, ranks: state.Ranks, sequence_parallel: bool) -> None:
    generator, cut, rank = torch.Generator().manual_seed(3), 2, ranks.tp_rank
    for name, dim in (("mlp.linear_fc1", 0), ("mlp.linear_fc2", 1)):
        module = layer.get_submodule(name)
        sizes = [n * cut if i == dim else n for i, n in enumerate(module.weight.shape)]
        weight = torch.randn(*sizes, generator=generator).bfloat16()
        module.weight.data.copy_(weight.chunk(cut, dim)[rank])
        x, dy = rows(generator, SEQ, BATCH, sizes[1]), rows(generator, SEQ, BATCH, sizes[0])
        flat, dflat, weights = x.flatten(0, 1), dy.flatten(0, 1), weight.chunk(cut, dim)
        xs, dys = (flat, flat), dflat.chunk(cut, 1)                            # of each rank
        if dim == 1:
            xs, dys = flat.chunk(cut, 1), (dflat, dflat)
        ys = [scaled(a) @ scaled(w).t() for a, w in zip(xs, weights, strict=True)]
        dxs = [scaled(d) @ scaled(w.t()).t() for d, w in zip(dys, weights, strict=True)]
        dw = dys[rank].double().t() @ xs[rank].double()
        y, dx = (ys[rank], sum(dxs)) if dim == 0 else (sum(ys), dxs[rank])
        part = slice(None)
        if sequence_parallel:
            part = slice(rank * SEQ // 2, (rank + 1) * SEQ // 2)
        own_x = x[part] if dim == 0 else x.chunk(cut, 2)[rank]
        own_dy = dy.chunk(cut, 2)[rank] if dim == 0 else dy[part]
        y, dx = y.unflatten(0, (SEQ, BATCH)), dx.unflatten(0, (SEQ, BATCH))
        y, dx = (y, dx[part]) if dim == 0 else (y[part], dx)
        leaf = own_x.clone().requires_grad_()
        got = module(leaf)[0]
        got.backward(own_dy)
        near(f"{name} y", got, y)
        near(f"{name} dx", leaf.grad, dx)
        near(f"{name} dw", module.weight.grad.flatten()[None], dw.flatten()[None])


sequence_parallel = sys.argv[1] == "sequence_parallel"
ranks = state.initialize(2, device="cpu", seed=7)
model = build_model(tiny_config(training={"precision": "bf16", "fp8": "rowwise"}, parallel={
    "tensor_parallel_size": 2, "sequence_parallel": sequence_parallel}))
use_fp8(model, torch.optim.AdamW(model.parameters()))
check(model.decoder.layers[0], ranks, sequence_parallel)
state.destroy()
