"""Triton kernels of Mamba's selective scan: a program goes over the sequence in tiles of TIME tokens × CHANNELS × N.

h_t = a_t h_{t−1} + u_t with a_t = exp(Δ_t A), u_t = Δ_t x_t B_t; y_t = h_t C_t. Inside a tile both directions are
associative scans. Sums over channels and batch are left to the caller as parts, in a fixed order (no atomics).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _combine(a_left, u_left, a_right, u_right):
    return a_left * a_right, u_left * a_right + u_right


@triton.jit
def _row(tile, t, which):
    """The row `which` of [TIME, CHANNELS, N]."""
    return tl.sum(tl.where(t[:, None, None] == which, tile, 0.0), 0)


@triton.jit
def scan_forward(x, delta, a, b, c, initial, y, starts, last, steps, batch, width,
                 TILES: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr):
    """y [steps, batch, width]; starts: h before every tile [tiles, batch, width, N]; last [batch, width, N]."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, t = tl.arange(0, N), tl.arange(0, TIME)
    inside = d < width
    state = (row * width + d)[:, None] * N + n[None, :]
    h = tl.load(initial + state, mask=inside[:, None], other=0.0)
    log_a = tl.load(a + d[:, None] * N + n[None, :], mask=inside[:, None], other=0.0)
    at_start = state
    for tile in range(TILES):
        tl.store(starts + at_start, h, mask=inside[:, None])
        at_start += batch * width * N
        position = tile * TIME + t
        token = position.to(tl.int64) * batch + row
        valid = position < steps
        both = valid[:, None] & inside[None, :]
        at = token[:, None] * width + d[None, :]
        dt = tl.load(delta + at, mask=both, other=0.0).to(tl.float32)
        xt = tl.load(x + at, mask=both, other=0.0).to(tl.float32)
        of_token = token[:, None] * N + n[None, :]
        bt = tl.load(b + of_token, mask=valid[:, None], other=0.0).to(tl.float32)
        ct = tl.load(c + of_token, mask=valid[:, None], other=0.0).to(tl.float32)
        decay = tl.exp(dt[:, :, None] * log_a[None, :, :])
        update = (dt * xt)[:, :, None] * bt[:, None, :]
        since, inner = tl.associative_scan((decay, update), 0, _combine)
        hidden = inner + since * h[None, :, :]
        tl.store(y + at, tl.sum(hidden * ct[:, None, :], 2), mask=both)
        h = _row(hidden, t, TIME - 1)
    tl.store(last + state, h, mask=inside[:, None])


@triton.jit
def scan_backward(x, delta, a, b, c, starts, dy, dlast, dx, ddelta, da, db, dc, dinitial, steps, batch, width,
                  TILES: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr):
    """dx, ddelta [steps, batch, width]; da [batch, width, N]; db, dc: parts [blocks, steps, batch, N]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, t = tl.arange(0, N), tl.arange(0, TIME)
    inside = d < width
    state = (row * width + d)[:, None] * N + n[None, :]
    after = tl.load(dlast + state, mask=inside[:, None], other=0.0)            # gradient of h at the next tile's start
    log_a = tl.load(a + d[:, None] * N + n[None, :], mask=inside[:, None], other=0.0)
    sum_a = tl.zeros([CHANNELS, N], tl.float32)
    at_start = state + (row * 0 + TILES - 1) * batch * width * N               # in 64 bits
    for i in range(TILES):
        tile = TILES - 1 - i
        position = tile * TIME + t
        token = position.to(tl.int64) * batch + row
        valid = position < steps
        both = valid[:, None] & inside[None, :]
        at = token[:, None] * width + d[None, :]
        dt = tl.load(delta + at, mask=both, other=0.0).to(tl.float32)
        following = (position + 1 < steps)[:, None] & inside[None, :]
        dt_next = tl.load(delta + at + batch * width, mask=following, other=0.0).to(tl.float32)
        xt = tl.load(x + at, mask=both, other=0.0).to(tl.float32)
        dyt = tl.load(dy + at, mask=both, other=0.0).to(tl.float32)
        of_token = token[:, None] * N + n[None, :]
        bt = tl.load(b + of_token, mask=valid[:, None], other=0.0).to(tl.float32)
        ct = tl.load(c + of_token, mask=valid[:, None], other=0.0).to(tl.float32)
        h = tl.load(starts + at_start, mask=inside[:, None], other=0.0)
        at_start -= batch * width * N
        decay = tl.exp(dt[:, :, None] * log_a[None, :, :])
        update = (dt * xt)[:, :, None] * bt[:, None, :]
        since, inner = tl.associative_scan((decay, update), 0, _combine)
        hidden = inner + since * h[None, :, :]
        # g_t = dy_t C_t + a_{t+1} g_{t+1}, from the tile's end to its beginning.
        decay_next = tl.exp(dt_next[:, :, None] * log_a[None, :, :])
        until, inner = tl.associative_scan((decay_next, dyt[:, :, None] * ct[:, None, :]), 0, _combine, reverse=True)
        g = inner + until * after[None, :, :]
        after = _row(g, t, 0)
        dlog = g * (hidden - update)                                           # of log a_t: g_t a_t h_{t−1}
        sum_a += tl.sum(dlog * dt[:, :, None], 0)
        gb = tl.sum(g * bt[:, None, :], 2)
        tl.store(ddelta + at, tl.sum(dlog * log_a[None, :, :], 2) + gb * xt, mask=both)
        tl.store(dx + at, gb * dt, mask=both)
        part = (block * steps * batch + token)[:, None] * N + n[None, :]
        tl.store(db + part, tl.sum(g * (dt * xt)[:, :, None], 1), mask=valid[:, None])
        tl.store(dc + part, tl.sum(hidden * dyt[:, :, None], 1), mask=valid[:, None])
    tl.store(da + state, sum_a, mask=inside[:, None])
    first = tl.load(delta + row * width + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(dinitial + state, after * tl.exp(first[:, None] * log_a), mask=inside[:, None])
