"""Taylor linear attention in CUDA (csrc/taylor_*.cu): two torch.library ops, their fake versions and autograd.

q, k and v are read where a projection leaves them, side by side in qkv [batch, seq, heads, 2·feature_dim + head_dim],
and their gradients written the same way. o and the gradient lie in memory as [seq, batch, heads, …], as the projections
around them do, so that none of them is copied.

The sequence of every head is cut into segments so that the grid fills the GPU; `_states` says how the state reaches
each segment. Nothing waits for the device, and nothing depends on the values of `cu_seqlens`, so the ops
can be captured in CUDA graphs. Sums run in a fixed order: results are bitwise the same from run to run.
fp16 inputs are computed in bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from based_mp.ops.backends import extension
from based_mp.ops.reference import TaylorState, taylor_feature_dim

CHUNK = 128            # tokens a block handles at a time (kChunk of csrc/taylor_common.cuh)
ROWS = 160             # feature rows of a segment state in the work space
SEGMENTS_WITHOUT_SCAN = 16
VALUES_WITH_KEYS = 64  # head_dim up to which "gradient" makes dv beside dk (Shape::Values of csrc/taylor_gradient.cu)
BLOCKS = 132           # blocks that fill an H100; a constant, so that shapes do not depend on the device


class Plan(NamedTuple):
    """How the tokens are cut: `docs` sequences, each of `segments` segments of `length` tokens; `slots` in all."""

    docs: int
    segments: int
    length: int
    slots: int


def plan(batch: int, seq: int, heads: int, docs: int | None) -> Plan:
    """Segments for [batch, seq, heads]; `docs` is the number of packed documents, None without packing."""
    wanted = max(1, BLOCKS // max(1, batch * heads))
    length = -(-seq // min(wanted, -(-seq // CHUNK)))
    length = -(-length // CHUNK) * CHUNK
    segments = -(-seq // length)
    if docs is None:
        return Plan(batch, segments, length, batch * segments)
    return Plan(docs, segments, length, seq // length + docs)


def aligned(x: Tensor) -> Tensor:
    """`x` as the kernels read it: bf16, contiguous last dimension, rows on 16-byte boundaries, none read twice."""
    x = x.to(torch.bfloat16)
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(s % 8 or not s for s in x.stride()[:-1]):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def parts(qkv: Tensor, feature_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [batch, seq, heads, feature_dim] and v [batch, seq, heads, head_dim], views."""
    return qkv.split([feature_dim, feature_dim, qkv.shape[-1] - 2 * feature_dim], -1)


def _launch(names: list[str], p: Plan, qkv: Tensor, feature_dim: int, scale: float, *, reverse: bool = False,
            exact: bool = False, summed: bool = True, boundary: int = 0, older: bool = False,
            o: Tensor | None = None, grad_o: Tensor | None = None, dqkv: Tensor | None = None,
            **tensors: Tensor | None) -> None:
    b, s, h, width = qkv.shape
    order = ["cu_seqlens", "space", "denominator", "grad_dot", "kv_in", "z_in", "kv_out", "z_out", "boundaries"]
    given = [*parts(qkv, feature_dim), *([None] * 3 if dqkv is None else parts(dqkv, feature_dim)), o, grad_o]
    pointers = [0 if x is None else x.data_ptr() for x in given + [tensors.get(name) for name in order]]
    strides = [n for x in (qkv, dqkv, o, grad_o) for n in ((0, 0, 0) if x is None else x.stride()[:3])]
    sizes = [b, s, h, feature_dim, width - 2 * feature_dim, p.docs, p.segments, p.length, p.slots, int(exact),
             int(reverse), int(summed), boundary, int(older)]
    with torch.cuda.device(qkv.device):
        extension().launch(names, pointers, strides, sizes, scale, torch.cuda.current_stream().cuda_stream)


def _states(p: Plan, batch: int, seq: int, heads: int, head_dim: int, packed: bool, given: bool) -> str:
    """How the state reaches each segment: "none" (one segment), "sums" (outputs add up the sums of earlier segments and
    leave the states for the gradients), "scan" (a kernel adds them up, needed where states come in or go out: `given`),
    or "walk" (outputs walk whole sequences and leave the state at every segment for the gradients)."""
    if given or p.segments > SEGMENTS_WITHOUT_SCAN:
        return "scan"
    if p.slots == p.docs:
        return "none"
    parts = 1 if head_dim <= 64 else 2                      # the blocks of taylor_output.cu a head
    return "walk" if not packed and batch * heads * parts >= 3 * BLOCKS // 4 else "sums"


def _kernels(states: str, p: Plan, seq: int, space: Tensor | None,
             last: str = "output") -> tuple[list[str], Plan, dict[str, object]]:
    """The kernels up to and with `last`, the plan they run with, and what they get; `space`, if any, then holds the
    state of every segment. "gradient" comes last where nobody reads states after it, and `space` then means nothing."""
    if states == "none":
        return [last], p, {}
    if states == "walk":
        return ["output"], Plan(p.docs, 1, seq, p.docs), {"boundaries": space, "boundary": p.length}
    if states == "scan":
        return ["segment_state", "scan", last], p, {"space": space}
    if last == "gradient":
        return ["segment_state", last], p, {"space": space, "summed": False}
    return ["segment_state", last], p, {"space": torch.empty_like(space), "summed": False,
                                        "boundaries": space, "boundary": p.length}


def _shapes(qkv: Tensor, feature_dim: int,
            cu_seqlens: Tensor | None) -> tuple[Plan, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The plan, and the shapes of o, of one work space and of the public kv state."""
    b, s, h, width = qkv.shape
    d = width - 2 * feature_dim
    p = plan(b, s, h, None if cu_seqlens is None else cu_seqlens.numel() - 1)
    return p, (b, s, h, d), (p.slots, h, ROWS, d + 8), (p.docs, h, taylor_feature_dim(feature_dim), d)


def _sequence_first(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[batch, seq, …] that lies in memory as [seq, batch, …]."""
    return torch.empty(shape[1], shape[0], *shape[2:], dtype=dtype, device=device).transpose(0, 1)


@torch.library.custom_op("based_mp::taylor_forward", mutates_args=(), device_types="cuda")
def taylor_forward(qkv: Tensor, feature_dim: int, kv: Tensor | None, z: Tensor | None, cu_seqlens: Tensor | None,
                   scale: float, return_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, denominator [b, h, s], segment states (saved for the backward), final kv and z (empty unless asked for)."""
    p, o_shape, space_shape, kv_shape = _shapes(qkv, feature_dim, cu_seqlens)
    full = {"dtype": torch.float32, "device": qkv.device}
    o = _sequence_first(o_shape, torch.bfloat16, qkv.device)
    denominator = torch.empty(o_shape[0], o_shape[2], o_shape[1], **full)
    states = _states(p, *o_shape, cu_seqlens is not None, return_state or kv is not None)
    space = torch.empty((0,) if states == "none" else space_shape, **full)
    kv_out = torch.empty(kv_shape if return_state else (0,), **full)
    z_out = torch.empty(kv_shape[:-1] if return_state else (0,), **full)
    kv, z = (None if x is None else x.float().contiguous() for x in (kv, z))
    names, walked, how = _kernels(states, p, o_shape[1], space)
    _launch(names, walked, aligned(qkv), feature_dim, scale, exact=return_state, cu_seqlens=cu_seqlens, o=o,
            denominator=denominator, kv_in=kv, z_in=z, kv_out=kv_out if return_state else None,
            z_out=z_out if return_state else None, **how)
    return o.to(qkv.dtype), denominator, space, kv_out, z_out


@taylor_forward.register_fake
def _(qkv, feature_dim, kv, z, cu_seqlens, scale, return_state):
    p, o_shape, space_shape, kv_shape = _shapes(qkv, feature_dim, cu_seqlens)
    states = _states(p, *o_shape, cu_seqlens is not None, return_state or kv is not None)
    full = {"dtype": torch.float32, "device": qkv.device}
    return (_sequence_first(o_shape, qkv.dtype, qkv.device), torch.empty(o_shape[0], o_shape[2], o_shape[1], **full),
            torch.empty((0,) if states == "none" else space_shape, **full),
            torch.empty(kv_shape if return_state else (0,), **full),
            torch.empty(kv_shape[:-1] if return_state else (0,), **full))


@torch.library.custom_op("based_mp::taylor_backward", mutates_args=(), device_types="cuda")
def taylor_backward(grad_o: Tensor, denominator: Tensor, space: Tensor, qkv: Tensor, feature_dim: int,
                    grad_kv: Tensor | None, grad_z: Tensor | None, cu_seqlens: Tensor | None, scale: float,
                    want_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and (where wanted, else empty) of the initial kv and z."""
    p, o_shape, space_shape, kv_shape = _shapes(qkv, feature_dim, cu_seqlens)
    full = {"dtype": torch.float32, "device": qkv.device}
    x, grad_o = aligned(qkv), aligned(grad_o)
    dot = torch.empty(o_shape[0], o_shape[2], o_shape[1], **full)
    dqkv = _sequence_first(qkv.shape, torch.bfloat16, qkv.device)
    states = _states(p, *o_shape, cu_seqlens is not None, want_state or grad_kv is not None)
    grad_kv, grad_z = (None if t is None else t.float().contiguous() for t in (grad_kv, grad_z))
    dkv = torch.empty(kv_shape if want_state else (0,), **full)
    dz = torch.empty(kv_shape[:-1] if want_state else (0,), **full)
    common = {"cu_seqlens": cu_seqlens, "denominator": denominator, "grad_o": grad_o, "grad_dot": dot, "dqkv": dqkv}
    _launch(["gradient"], p, x, feature_dim, scale, space=space if space.numel() else None, **common)
    suffix = None if states == "none" else torch.empty(space_shape, **full)
    together = o_shape[-1] <= VALUES_WITH_KEYS
    names, walked, how = _kernels(states, p, o_shape[1], suffix, "gradient" if together else "output")
    _launch(names, walked, x, feature_dim, scale, reverse=True, kv_in=grad_kv, z_in=grad_z,
            kv_out=dkv if want_state else None, z_out=dz if want_state else None, **common, **how)
    if not together:
        _launch(["gradient"], p, x, feature_dim, scale, reverse=True, older=True, space=suffix, **common)
    return dqkv.to(qkv.dtype), dkv, dz


@taylor_backward.register_fake
def _(grad_o, denominator, space, qkv, feature_dim, grad_kv, grad_z, cu_seqlens, scale, want_state):
    _, _, _, kv_shape = _shapes(qkv, feature_dim, cu_seqlens)
    return (_sequence_first(qkv.shape, qkv.dtype, qkv.device),
            torch.empty(kv_shape if want_state else (0,), dtype=torch.float32, device=qkv.device),
            torch.empty(kv_shape[:-1] if want_state else (0,), dtype=torch.float32, device=qkv.device))


def _setup(ctx, inputs, output) -> None:
    qkv, ctx.feature_dim, kv, z, cu_seqlens, ctx.scale, ctx.return_state = inputs
    _, denominator, space, _, _ = output
    ctx.save_for_backward(qkv, denominator, space, cu_seqlens)
    ctx.want_state = kv is not None and (ctx.needs_input_grad[2] or ctx.needs_input_grad[3])
    ctx.mark_non_differentiable(denominator, space)
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_o, _denominator, _space, grad_kv, grad_z):
    qkv, denominator, space, cu_seqlens = ctx.saved_tensors
    if not ctx.return_state:
        grad_kv = grad_z = None
    dqkv, dkv, dz = taylor_backward(grad_o, denominator, space, qkv, ctx.feature_dim, grad_kv, grad_z, cu_seqlens,
                                    ctx.scale, ctx.want_state)
    return dqkv, None, dkv if ctx.want_state else None, dz if ctx.want_state else None, None, None, None


taylor_forward.register_autograd(_backward, setup_context=_setup)


def forward(qkv: Tensor, feature_dim: int, *, scale: float, initial_state: TaylorState | None = None,
            return_state: bool = False, cu_seqlens: Tensor | None = None) -> tuple[Tensor, TaylorState | None]:
    """See `taylor_linear_attention_qkv`; the caller has asked `backends.taylor_backend` first."""
    kv, z = initial_state if initial_state is not None else (None, None)
    cu = None if cu_seqlens is None else cu_seqlens.to(device=qkv.device, dtype=torch.int32).contiguous()
    o, _, _, kv_out, z_out = taylor_forward(qkv, feature_dim, kv, z, cu, float(scale), return_state)
    return o, TaylorState(kv_out, z_out) if return_state else None
