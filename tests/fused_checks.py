"""Checks of the fused ops against float64 on any device, for tests/cpu/test_fused.py and tests/gpu/test_fused_cuda.py.

python -m tests.fused_checks OP  (on the CPU, with TRITON_INTERPRET=1)
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from based_mp.ops import backends
from based_mp.ops.fused.cross_entropy import cross_entropy
from based_mp.ops.fused.embedding import embedding
from based_mp.ops.fused.norm import add_rms_norm
from based_mp.ops.fused.rotary_attention import pack_gradients, rope_tables, rotate
from based_mp.ops.fused.swiglu import swiglu
from based_mp.ops.window_attention import rope

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 8e-3}


class One:
    """A tensor-parallel group of one."""

    def size(self):
        return 1

    def rank(self):
        return 0


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-9)).item()


def compare(function, reference, inputs, limit):
    """Outputs and gradients (of one random linear functional) of two functions."""
    assert backends.fused_backend(inputs[0]) == "triton"
    leaves = [t.requires_grad_() for t in inputs]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = function(*leaves), reference(*doubles)
    weights = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in expected]
    errors = [error(a, b) for a, b in zip(out, expected, strict=True)]
    got = torch.autograd.grad([o for o in out], leaves, [w.to(o.dtype) for w, o in zip(weights, out, strict=True)])
    truth = torch.autograd.grad(expected, doubles, [w.to(o.dtype).double() for w, o in zip(weights, out, strict=True)])
    for leaf, a in zip(leaves, got, strict=True):
        assert a.dtype == leaf.dtype
    errors += [error(a, b) for a, b in zip(got, truth, strict=True)]
    assert max(errors) < limit, errors


def randn(*shape, dtype, device):
    return torch.randn(*shape).to(device=device, dtype=dtype)


def rms(h, weight):
    return F.rms_norm(h, h.shape[-1:], weight, 1e-5)


def norm(dtype, residual, rows, width, device):
    make = lambda *shape: randn(*shape, dtype=dtype, device=device)  # noqa: E731
    x = randn(rows, 2, width, dtype=residual, device=device)
    limit = LIMITS[dtype]
    compare(lambda x, d, b, w: add_rms_norm(x, d, w, bias=b),
            lambda x, d, b, w: (x + d + b, rms(x + d + b, w)),
            [x, make(rows, 2, width), make(width), make(width)], limit)
    compare(lambda x, d, w: add_rms_norm(x, d, w), lambda x, d, w: (x + d, rms(x + d, w)),
            [x.detach(), make(rows, 2, width), make(width)], limit)
    compare(lambda x, w: add_rms_norm(x, None, w), lambda x, w: (x, rms(x, w)), [x.detach(), make(width)], limit)
    compare(lambda x, w: add_rms_norm(x, None, w)[1:], lambda x, w: (rms(x, w),), [x.detach(), make(width)], limit)


def norm_adds_to_sums(rows, width, device):
    """The gradients of weight and bias in the optimizer's fp32 sums, twice, and nowhere else."""
    x, delta, weight, bias, dy = (randn(*shape, dtype=torch.bfloat16, device=device).requires_grad_()
                                  for shape in ((rows, width), (rows, width), (width,), (width,), (rows, width)))
    start = randn(2, width + 3, dtype=torch.float32, device=device)[:, 3:].clone()
    for shared in (True, False):
        for parameter, total in zip((weight, bias), start, strict=True):
            parameter.main_grad = total.clone()
        doubles = [t.detach().double().requires_grad_() for t in ((x, delta, weight, bias) if shared else (x, weight))]
        for _ in range(2):
            y = add_rms_norm(x, delta, weight, bias=bias)[1] if shared else add_rms_norm(x, None, weight)[1]
            got = torch.autograd.grad(y, (x, weight, bias), dy, allow_unused=True)
            assert got[1] is None and got[2] is None
        expected = rms(sum(doubles[i] for i in (0, 1, 3)) if shared else doubles[0], doubles[2 if shared else 1])
        truth = torch.autograd.grad(expected, doubles, dy.double())
        assert error(got[0], truth[0]) < LIMITS[torch.bfloat16]
        # h is rounded to bf16 before its norm; of the sums only fp32's rounding is left where there is no addition.
        assert error(weight.main_grad, start[0].double() + 2 * truth[2 if shared else 1]) < (8e-3 if shared else 2e-5)
        assert error(bias.main_grad, start[1].double() + 2 * truth[3] if shared else start[1].double()) < 8e-3


def check_norm(device="cpu", scale=1):
    for rows, width in [(5 * scale, 40), (600 * scale, 24)]:      # parts that one tile holds, and more
        norm_adds_to_sums(rows, width, device)
    norm(torch.bfloat16, torch.float32, 600 * scale, 16, device)
    for rows, width in [(1, 8), (3, 40), (11 * scale, 200), (7 * scale, 1792)]:
        norm(torch.float32, torch.float32, rows, width, device)
        norm(torch.bfloat16, torch.bfloat16, rows, width, device)
        norm(torch.bfloat16, torch.float32, rows, width, device)


def check_embedding(device="cpu", scale=1):
    for dtype in LIMITS:
        for batch, seq, rows, width, first in [(1, 1, 3, 8, 0), (2, 9, 7, 40, 5), (1, 300, 1, 8, 0), (2, 128, 1, 8, 3),
                                                (3, 150 * scale, 50 * scale, 24, 0)]:
            tokens = torch.randint(0, first + rows + 3, (batch, seq))
            tokens[:, seq // 4 : 3 * seq // 4] = first + rows - 1        # more than a piece
            tokens, weight = tokens.to(device), randn(rows, width, dtype=dtype, device=device)
            dy = randn(seq, batch, width, dtype=dtype, device=device)

            def reference(w, tokens=tokens, first=first, rows=rows, width=width):
                whole = torch.cat([w.new_zeros(first, width), w, w.new_zeros(3, width)])
                return (F.embedding(tokens.t(), whole),)

            compare(lambda w, tokens=tokens, first=first: (embedding(tokens, w, first),), reference, [weight],
                    LIMITS[dtype])
            double = weight.detach().double().requires_grad_()
            truth, = torch.autograd.grad(reference(double), double, dy.double())
            start = randn(rows, width, dtype=torch.float32, device=device)
            weight.main_grad = start.clone()
            for _ in range(2):
                embedding(tokens, weight, first).backward(dy)
            assert weight.grad is None and error(weight.main_grad, start.double() + 2 * truth) < 1e-6


def swiglu_reference(x):
    a, b = x.chunk(2, -1)
    return (F.silu(a) * b,)


def check_swiglu(device="cpu", scale=1):
    for dtype in LIMITS:
        for rows, width in [(1, 8), (5 * scale, 100), (3 * scale, 2048), (2, 3584)]:
            compare(lambda x: (swiglu(x),), swiglu_reference,
                    [randn(rows, 3, 2 * width, dtype=dtype, device=device)], LIMITS[dtype])


def check_cross_entropy(device="cpu", scale=1):
    for dtype in LIMITS:
        for rows, vocab in [(1, 32), (3 * scale, 120), (2, 4096), (5 * scale, 9000), (2, 50304)]:
            labels = torch.randint(0, vocab, (rows, 2))
            labels[0, 0], labels[-1, -1] = 0, vocab - 1
            labels = labels.to(device)
            logits = randn(rows, 2, vocab, dtype=dtype, device=device) * 5
            compare(lambda x, labels=labels: (cross_entropy(x * 1, labels, One()),),
                    lambda x, labels=labels: (F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none")
                                              .view(labels.shape),), [logits], LIMITS[dtype])


def check_rope(device="cpu", scale=1):
    for dtype in LIMITS:
        for seq, batch, heads, dim, fraction in [(1, 1, 1, 8, 1.0), (5 * scale, 2, 3, 20, 0.5), (9, 1, 16, 112, 1.0),
                                                 (4, 3, 24, 70, 0.5), (3, 2, 2, 16, 0.0)]:
            qkv = randn(seq, batch, heads, 3, dim, dtype=dtype, device=device)
            double = qkv.double().requires_grad_()
            half = int(dim * fraction) // 2
            positions = torch.arange(seq, device=device)[None]
            expected = [t.transpose(0, 1) for t in double.unbind(-2)]
            expected = [rope(t, positions, fraction=fraction) for t in expected[:2]] + expected[2:]
            tables = rope_tables(seq, half, 10000.0, torch.device(device))
            turned = qkv.clone()
            rotate(turned, *tables)
            # As attention kernels leave them: of heads padded to a multiple of 8.
            grads = [randn(batch, seq, heads, dim + -dim % 8, dtype=dtype, device=device)[..., :dim] for _ in range(3)]
            truth, = torch.autograd.grad(expected, double, [g.double() for g in grads])
            got = pack_gradients(*(g.transpose(0, 1) for g in grads), *tables)
            errors = [error(a.transpose(0, 1), b) for a, b in zip(turned.unbind(-2), expected, strict=True)]
            assert max([*errors, error(got, truth)]) < LIMITS[dtype], errors


def check_selective_scan(device="cpu", scale=1):
    from based_mp.ops import recurrences
    from based_mp.ops.fused.selective_scan import selective_scan
    for dtype in LIMITS:
        for steps, batch, width, n in [(1, 1, 1, 2), (33, 2, 5, 4), (70 * scale, 1, 8 * scale, 16)]:
            x, b, c = (randn(steps, batch, size, dtype=dtype, device=device) for size in (width, n, n))
            delta, a, initial = (randn(*shape, dtype=torch.float32, device=device)
                                 for shape in ((steps, batch, width), (width, n), (batch, width, n)))
            # What underflows has no relative error: decays stay above e^-3 a token.
            inputs = [x, delta.sigmoid(), -3 * a.sigmoid(), b, c, initial]
            compare(selective_scan, recurrences.selective_scan, inputs, LIMITS[dtype])


def check_training(device="cpu", scale=1):
    """An optimizer step of the small model, gradients of a layer and of the shared embedding in ZeRO-2's buffers: its
    first moments, beside those of plain torch."""
    from based_mp.parallel import state
    from based_mp.training import bf16_optimizer
    from tests.parity.test_bf16_optimizer import train
    ranks, fuse, moments = state.initialize(device=device), bf16_optimizer.fuse, []

    def sharding(engine, **_):
        fuse(engine)
        engine.optimizer.shard_gradients()

    for backends.TORCH_ONLY, bf16_optimizer.fuse in ((True, fuse), (False, sharding)):
        optimizer = train(ranks, 1)[0].optimizer
        moments.append([optimizer.state[w]["exp_avg"] for w in optimizer.fp32_groups_flat_partition])
    assert all(error(a, b.double()) < 0.03 for a, b in zip(*reversed(moments), strict=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    globals()[f"check_{sys.argv[1]}"]()
