"""Triton kernels of the element-wise ops. Rows are contiguous, sums are in fp32 and in a fixed order (no atomics)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward(x, delta, bias, weight, h, y, rstd, width, eps,
                 HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """A row: h = x + delta + bias (stored in x's dtype), y = h · rstd · weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + row * width + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(rstd + row, scale)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (value * scale * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(dy, dh, h, weight, rstd, dx, ddelta, dweight, dbias, rows, width,
                  ROWS_EACH: tl.constexpr, HAS_DH: tl.constexpr, TWO_TYPES: tl.constexpr,
                  HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS_EACH rows: dx = dh + rstd (w dy − n mean(w dy n)), n = h rstd; and their sums for weight and bias."""
    first = tl.program_id(0).to(tl.int64) * ROWS_EACH
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS_EACH):
        row = first + i
        here = inside & (row < rows)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normed = tl.load(h + row * width + column, mask=here, other=0.0).to(tl.float32) * scale
        g = tl.load(dy + row * width + column, mask=here, other=0.0).to(tl.float32)
        if HAS_DH:                                       # asked for before the row's sum, which waits for all threads
            residual = tl.load(dh + row * width + column, mask=here, other=0.0).to(tl.float32)
        sum_weight += g * normed
        g = g * w
        grad = scale * (g - normed * (tl.sum(g * normed, 0) / width))
        if HAS_DH:
            grad += residual
        tl.store(dx + row * width + column, grad.to(dx.dtype.element_ty), mask=here)
        if TWO_TYPES:
            tl.store(ddelta + row * width + column, grad.to(ddelta.dtype.element_ty), mask=here)
        if HAS_BIAS:
            sum_bias += grad
    at = tl.program_id(0) * width + column
    tl.store(dweight + at, sum_weight, mask=inside)
    if HAS_BIAS:
        tl.store(dbias + at, sum_bias, mask=inside)


@triton.jit
def add_sums(parts, dweight, dbias, width, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr):
    """dweight, and with HAS_BIAS dbias [width] += the sums over COUNT of parts [1 or 2, COUNT, width]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = dweight
    if HAS_BIAS:
        if tl.program_id(1) == 1:
            total = dbias
    parts += tl.program_id(1) * COUNT * width
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, COUNT, ROWS):
        row = first + tl.arange(0, ROWS)
        summed += tl.load(parts + row[:, None] * width + column[None, :], mask=(row < COUNT)[:, None] & inside[None, :],
                          other=0.0)
    before = tl.load(total + column, mask=inside, other=0.0)
    tl.store(total + column, before + tl.sum(summed, 0), mask=inside)


@triton.jit
def read_rows(tokens, weight, y, first, batch, seq, rows, width, BLOCK: tl.constexpr):
    """y [seq, batch, width]: the row of weight [rows, width] of one of tokens [batch, seq], zeros where it has none."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(tokens + place % batch * seq + place // batch) - first
    column = tl.arange(0, BLOCK)
    inside = column < width
    own = inside & (row >= 0) & (row < rows)
    tl.store(y + place * width + column, tl.load(weight + row * width + column, mask=own, other=0.0), mask=inside)


@triton.jit
def add_rows(dy, tokens, places, total, parts, first, count, rows, width, PIECE: tl.constexpr, TILE: tl.constexpr,
             BLOCK: tl.constexpr):
    """total [rows, width] += the rows of dy at all places of a token, but for tokens that reach into another piece.

    tokens [count]: sorted, cut into pieces; places: where in dy each was; parts [pieces, 2, width]: sums of the token
    that comes from the piece before (or begins with the piece) and of the one that goes on in the next.
    """
    i = tl.program_id(0)
    token = tl.load(tokens + i)
    row = token - first
    begins = tl.load(tokens + i - 1, mask=i > 0, other=-1) != token
    if (begins | (i % PIECE == 0)) & (row >= 0) & (row < rows):
        end = tl.minimum(count, (i // PIECE + 1) * PIECE)
        column = tl.arange(0, BLOCK)
        inside = column < width
        tile = tl.zeros([TILE, BLOCK], tl.float32)
        at = i + tl.arange(0, TILE)
        same = tl.load(tokens + at, mask=at < end, other=-1) == token
        while tl.max(same.to(tl.int32), 0) > 0:
            place = tl.load(places + at, mask=same, other=0)
            tile += tl.load(dy + place[:, None] * width + column[None, :], mask=same[:, None] & inside[None, :],
                            other=0.0).to(tl.float32)
            at += TILE
            same = tl.load(tokens + at, mask=at < end, other=-1) == token
        summed = tl.sum(tile, 0)
        if begins & (tl.load(tokens + end, mask=end < count, other=-1) != token):
            to = total + row.to(tl.int64) * width + column
            tl.store(to, tl.load(to, mask=inside, other=0.0) + summed, mask=inside)
        else:
            slot = i // PIECE * 2 + (i % PIECE != 0).to(tl.int32)
            tl.store(parts + slot * width + column, summed, mask=inside)


@triton.jit
def add_long_rows(parts, tokens, total, first, count, rows, width, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """What `add_rows` left in parts: of the token that begins in a piece and goes on in the next."""
    piece = tl.program_id(0)
    begin = piece * PIECE
    end = begin + PIECE
    token = tl.load(tokens + end, mask=end < count, other=-1)
    opening = tl.load(tokens + begin)
    row = token - first
    goes_on = tl.load(tokens + end - 1, mask=end < count, other=-2) == token
    begins = (opening != token) | (tl.load(tokens + begin - 1, mask=begin > 0, other=-2) != token)
    if goes_on & begins & (row >= 0) & (row < rows):
        column = tl.arange(0, BLOCK)
        inside = column < width
        slot = piece * 2 + (opening != token).to(tl.int32)
        summed = tl.load(parts + slot * width + column, mask=inside, other=0.0)
        while tl.load(tokens + end, mask=end < count, other=-1) == token:
            summed += tl.load(parts + end // PIECE * 2 * width + column, mask=inside, other=0.0)
            end += PIECE
        to = total + row.to(tl.int64) * width + column
        tl.store(to, tl.load(to, mask=inside, other=0.0) + summed, mask=inside)


@triton.jit
def swiglu_forward(x, y, width, BLOCK: tl.constexpr):
    """y = silu(a) · b of a row block, a | b = x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(dy, x, dx, width, BLOCK: tl.constexpr):
    """da = dy b s (1 + a (1 − s)), db = dy a s, s = sigmoid(a), side by side as a | b lie."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(dx + row * 2 * width + column, (g * b * s * (1.0 + a * (1.0 - s))).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + row * 2 * width + width + column, (g * a * s).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def quantize_row(x, q, scale, width, BLOCK: tl.constexpr):
    """A row in e4m3: q = x / scale, scale the smallest power of two with max |x| / scale ≤ 448."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    inverse = 448.0 / tl.maximum(tl.max(tl.abs(value), 0), 1e-12)
    inverse = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(q + row * width + column, (value * inverse).to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, 1.0 / inverse)


@triton.jit
def cross_entropy_forward(logits, labels, largest, total, target, first, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """A row of this rank's part of the vocabulary: maximum, Σ exp(logit − maximum), and the label's logit (or 0)."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * VOCAB
    column = tl.arange(0, BLOCK)
    high = tl.full([1], float("-inf"), tl.float32)
    summed = tl.zeros([1], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = tl.load(base + start + column, mask=start + column < VOCAB, other=float("-inf")).to(tl.float32)
        new = tl.maximum(high, tl.max(x, 0))
        summed = summed * tl.exp(high - new) + tl.sum(tl.exp(x - new), 0)
        high = new
    one = tl.arange(0, 1)
    tl.store(largest + row + one, high)
    tl.store(total + row + one, summed)
    label = tl.load(labels + row) - first
    own = (label >= 0) & (label < VOCAB)
    tl.store(target + row, tl.load(base + label, mask=own, other=0.0).to(tl.float32))


@triton.jit
def cross_entropy_backward(logits, labels, lse, grad, vocab, first, BLOCK: tl.constexpr):
    """logits ← grad · (softmax − one-hot label), in place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    at = logits + row * vocab + column
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(lse + row))
    p = tl.where(column == tl.load(labels + row) - first, p - 1.0, p)
    tl.store(at, (p * tl.load(grad + row)).to(logits.dtype.element_ty), mask=inside)


@triton.jit
def rope_in_place(qkv, cos, sin, batch, heads, dim, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotates q and k of one token; qkv [seq, batch, heads, 3, dim], cos and sin [seq, half]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = (i < half) & (head < heads)
    table = (row // batch) * half + i
    c = tl.load(cos + table, mask=i < half, other=0.0)
    s = tl.load(sin + table, mask=i < half, other=0.0)
    for part in tl.static_range(2):
        at = qkv + (row * heads + head) * 3 * dim + part * dim + i
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (a * c - b * s).to(qkv.dtype.element_ty), mask=inside)
        tl.store(at + half, (b * c + a * s).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def rope_backward(dq, dk, dv, dqkv, cos, sin, batch, heads, dim, half, stride_seq, stride_batch, stride_head,
                  HEADS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr):
    """Gradients of q and k rotated back, and of v, of one token into dqkv [seq, batch, heads, 3, dim].

    dq, dk, dv: [seq, batch, heads, dim] with the given strides.
    """
    row = tl.program_id(0).to(tl.int64)
    t = row // batch
    i = tl.arange(0, HALF)[None, :]
    j = tl.arange(0, DIM)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    turned = (i < half) & (head < heads)
    copied = (j >= 2 * half) & (j < dim) & (head < heads)
    c = tl.load(cos + t * half + i, mask=i < half, other=0.0)
    s = tl.load(sin + t * half + i, mask=i < half, other=0.0)
    source = t * stride_seq + (row % batch) * stride_batch + head * stride_head
    out = dqkv + (row * heads + head) * 3 * dim
    for part in tl.static_range(2):
        g = dq if part == 0 else dk
        a = tl.load(g + source + i, mask=turned, other=0.0).to(tl.float32)
        b = tl.load(g + source + half + i, mask=turned, other=0.0).to(tl.float32)
        tl.store(out + part * dim + i, (a * c + b * s).to(dqkv.dtype.element_ty), mask=turned)
        tl.store(out + part * dim + half + i, (b * c - a * s).to(dqkv.dtype.element_ty), mask=turned)
        tl.store(out + part * dim + j, tl.load(g + source + j, mask=copied, other=0.0), mask=copied)
    whole = (j < dim) & (head < heads)
    tl.store(out + 2 * dim + j, tl.load(dv + source + j, mask=whole, other=0.0), mask=whole)
