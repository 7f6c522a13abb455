// Shared pieces of the Taylor linear-attention kernels (Hopper, bf16 tensor cores through mma.sync, fp32 sums).
//
// With s = scale * q.k the weight of key j for query t is w = 1 + s + s^2/2, and o_t = sum_j w v_j / sum_j w, j <= t.
// As features: w = sum_p g_p F_p(q) F_p(k) with F(x) = [x_i ; x_i^2 ; x_i x_{i+r mod 16}, r = 1..7 ; x_i x_{i+8}, i < 8 ;
// 1 ; 7 zeros], ten tiles of 16 rows, and weights g = scale, scale^2/2, scale^2, scale^2, 1. Only the 153 distinct
// features are kept. The denominator rides along as one more column of v: the rows of every value tile are
// [v (head_dim) | 1 | 0 x 7].
//
// A block owns one segment of one head of one document and walks it in chunks of 16 tokens a warp. Warp w owns feature
// tile w of the state (fp32, in mma accumulators) and token tile w of the chunk. Inside a chunk the quadratic form,
// before it the state. `feature_dim` 8 runs as 16 with zeros.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include "taylor_args.h"

namespace taylor {

constexpr int kWarps = 10, kThreads = kWarps * 32, kChunk = kWarps * 16;
constexpr int kRows = 160;                       // feature rows of the state, seven of them unused
constexpr int kNarrow = 24;                      // shared row stride of q and k tiles (elements): no bank conflicts
constexpr int kTransposed = kChunk + 8;          // shared row stride of a transposed tile
using bf16 = __nv_bfloat16;

template <int D> constexpr int kWide = D + 8;    // row stride of value tiles and of the state

// Lane and warp, opaque to the optimiser: addresses made from them are computed where they are used instead of being
// held in registers all along the walk over chunks.
__device__ __forceinline__ int lane_id() {
    int lane = threadIdx.x & 31;
    asm volatile("" : "+r"(lane));
    return lane;
}
__device__ __forceinline__ int warp_id() {
    int warp = threadIdx.x >> 5;
    asm volatile("" : "+r"(warp));
    return warp;
}

__device__ __forceinline__ uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void ldsm4(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldsm4t(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldsm2(uint32_t (&r)[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldsm2t(uint32_t (&r)[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float low(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm volatile("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// a*b - product, exactly what rounding `product` left out.
__device__ __forceinline__ uint32_t residual2(uint32_t a, uint32_t b, uint32_t product) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(product ^ 0x80008000u));
    return r;
}
__device__ __forceinline__ void copy16(void* to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(real ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------- segments
struct Segment {
    int doc, batch, first, length;               // tokens [first, first + length) of row `batch`
};

__device__ __forceinline__ int first_slot(const TaylorArgs& p, int doc) {
    return p.cu_seqlens ? p.cu_seqlens[doc] / p.segment + doc : doc * p.segments;
}

// The segment of a slot; false where the slot is unused. Document i of a pack starts at slot cu[i] / segment + i.
__device__ __forceinline__ bool find_segment(const TaylorArgs& p, int slot, Segment& s) {
    int begin, end;
    if (p.cu_seqlens) {
        int lo = 0, hi = p.docs - 1;
        while (lo < hi) {
            int mid = (lo + hi + 1) / 2;
            if (first_slot(p, mid) <= slot) lo = mid; else hi = mid - 1;
        }
        s.doc = lo; s.batch = 0;
        begin = p.cu_seqlens[lo]; end = p.cu_seqlens[lo + 1];
    } else {
        s.doc = s.batch = slot / p.segments;
        begin = 0; end = p.seq;
    }
    s.first = begin + (slot - first_slot(p, s.doc)) * p.segment;
    s.length = min(p.segment, end - s.first);
    return s.length > 0;
}

// ---------------------------------------------------------------------------------------------------- loading
// Row `token` of [batch, seq, heads, ...]. The empty asm keeps the compiler from holding 64-bit pointers in registers
// all along the walk over chunks: recomputing them is cheaper than spilling.
__device__ __forceinline__ const bf16* token_row(const void* x, const int64_t* stride, int batch, int token, int head) {
    asm volatile("" : "+r"(batch), "+r"(token), "+r"(head));
    return (const bf16*)x + batch * stride[0] + token * stride[1] + head * stride[2];
}
// Index of the same row in contiguous [batch, seq, heads].
__device__ __forceinline__ int64_t token_index(const TaylorArgs& p, int batch, int token, int head) {
    asm volatile("" : "+r"(batch), "+r"(token), "+r"(head));
    return ((int64_t)batch * p.seq + token) * p.heads + head;
}
// Rows of `Columns` elements into a tile of row stride `Stride`; rows past `valid` become zeros.
template <int Columns, int Stride>
__device__ __forceinline__ void load_rows(bf16* tile, const bf16* from, int64_t stride, int valid) {
    constexpr int Vectors = Columns / 8;
    #pragma unroll 1                             // unrolled, its addresses would be kept in registers all along
    for (int i = threadIdx.x; i < kChunk * Vectors; i += kThreads) {
        int row = i / Vectors, c = i % Vectors * 8;
        copy16(tile + row * Stride + c, row < valid ? from + row * stride + c : from, row < valid);
    }
}
// q or k: feature_dim 8 is filled up with zeros to 16.
__device__ __forceinline__ void load_narrow(bf16* tile, const bf16* from, int64_t stride, int valid, int features) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < kChunk * 2; i += kThreads) {
        int row = i / 2, c = i % 2 * 8;
        bool real = row < valid && c < features;
        copy16(tile + row * kNarrow + c, real ? from + row * stride + c : from, real);
    }
}
// The columns behind v: [1 | 0 x 7] for real tokens.
template <int D>
__device__ __forceinline__ void set_ones(bf16* tile, int valid) {
    for (int row = threadIdx.x; row < kChunk; row += kThreads)
        *reinterpret_cast<uint4*>(tile + row * kWide<D> + D) = make_uint4(row < valid ? 0x3f80u : 0u, 0, 0, 0);
}
// transposed[i][token] = transposed[i + 16][token] = tile[token][i] for the warp's 16 tokens.
__device__ __forceinline__ void transpose_rows(bf16* transposed, const bf16* tile) {
    const int lane = lane_id(), token = warp_id() * 16;
    uint32_t x[4];
    ldsm4t(x, address(tile + (token + (lane & 7) + (lane >> 4) * 8) * kNarrow + ((lane >> 3) & 1) * 8));
    // x0: i 0-7, tokens 0-7; x1: i 8-15, tokens 0-7; x2, x3: tokens 8-15
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        #pragma unroll
        for (int twice = 0; twice < 2; ++twice)
            *reinterpret_cast<uint32_t*>(transposed + ((lane >> 2) + (j & 1) * 8 + twice * 16) * kTransposed + token +
                                         (j >> 1) * 8 + (lane & 3) * 2) = x[j];
}
// The 16 values of rows g and g + 8 of the warp's tile, rotated by 2t: x[m] holds elements 2t + 2m and 2t + 2m + 1.
__device__ __forceinline__ void load_own_rows(uint32_t (&x0)[8], uint32_t (&x1)[8], const bf16* tile) {
    const int lane = lane_id(), g = lane >> 2, t = lane & 3;
    const bf16* row = tile + (warp_id() * 16 + g) * kNarrow;
    #pragma unroll
    for (int m = 0; m < 8; ++m) {
        int c = (2 * t + 2 * m) & 15;
        x0[m] = *reinterpret_cast<const uint32_t*>(row + c);
        x1[m] = *reinterpret_cast<const uint32_t*>(row + 8 * kNarrow + c);
    }
}
// Elements (2t + 8 half + r, and the next) mod 16 of a row held as above.
__device__ __forceinline__ uint32_t rotated(const uint32_t (&x)[8], int r, int half) {
    const int m = 4 * half + r / 2;
    return r % 2 ? __byte_perm(x[m & 7], x[(m + 1) & 7], 0x5432) : x[m & 7];
}

// ---------------------------------------------------------------------------------------------------- state
// Weight g_p of feature row p.
__device__ __forceinline__ float row_weight(int row, float scale) {
    if (row < 16) return scale;
    if (row < 32) return 0.5f * scale * scale;
    if (row < 152) return scale * scale;
    return row == 152 ? 1.f : 0.f;
}

// state += F(x)^T y over the chunk: x transposed in shared memory, y [token][D + 8]. Warp w updates feature tile w.
// Exact: products of features keep 16 bits (two bf16 terms), for the state that is handed to the user.
template <int D, bool Exact>
__device__ __forceinline__ void update_state(float (&state)[D / 8 + 1][4], const bf16* transposed, const bf16* y,
                                             int valid) {
    const int lane = lane_id(), tile = warp_id(), r = tile - 1;
    const int row = lane & 15, column = (lane >> 4) * 8;
    const uint32_t plain = address(transposed + row * kTransposed + column);
    const uint32_t turned = address(transposed + (row + max(r, 0)) * kTransposed + column);
    const uint32_t values = address(y + row * kWide<D> + column);
    for (int k = 0; k * 16 < valid; ++k) {
        uint32_t a[4], b[4], rest[4] = {0, 0, 0, 0};
        ldsm4(a, plain + k * 32);
        if (r >= 0) {
            ldsm4(b, turned + k * 32);
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t product = mul2(a[j], b[j]);
                if (Exact) rest[j] = residual2(a[j], b[j], product);
                a[j] = product;
            }
            if (r == 8) {                        // rows 8-15 of the last tile: the constant feature, then nothing
                a[1] = a[3] = lane < 4 ? 0x3f803f80u : 0u;
                rest[1] = rest[3] = 0;
            }
        }
        #pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t v[4];
            ldsm4t(v, values + (k * 16 * kWide<D> + n * 16) * 2);
            mma(state[2 * n], a, v[0], v[1]);
            mma(state[2 * n + 1], a, v[2], v[3]);
            if (Exact) {
                mma(state[2 * n], rest, v[0], v[1]);
                mma(state[2 * n + 1], rest, v[2], v[3]);
            }
        }
        uint32_t v[2];
        ldsm2t(v, values - column * 2 + (k * 16 * kWide<D> + D) * 2);
        mma(state[D / 8], a, v[0], v[1]);
        if (Exact) mma(state[D / 8], rest, v[0], v[1]);
    }
}

// The weighted state as bf16 operand: shared[row][column] = g_row * state.
template <int D>
__device__ __forceinline__ void publish_state(bf16* shared, const float (&state)[D / 8 + 1][4], float scale) {
    const int lane = lane_id(), row = warp_id() * 16 + (lane >> 2);
    const float w0 = row_weight(row, scale), w1 = row_weight(row + 8, scale);
    #pragma unroll
    for (int n = 0; n <= D / 8; ++n) {
        bf16* at = shared + row * kWide<D> + n * 8 + (lane & 3) * 2;
        *reinterpret_cast<uint32_t*>(at) = pack(w0 * state[n][0], w0 * state[n][1]);
        *reinterpret_cast<uint32_t*>(at + 8 * kWide<D>) = pack(w1 * state[n][2], w1 * state[n][3]);
    }
}

// State of a segment in the fp32 work space [slot][head][160][D + 8].
template <int D>
__device__ __forceinline__ float* slot_state(const TaylorArgs& p, float* space, int slot, int head) {
    return space + ((int64_t)slot * p.heads + head) * kRows * kWide<D>;
}
template <int D>
__device__ __forceinline__ void store_state(const float (&state)[D / 8 + 1][4], float* space) {
    const int row = warp_id() * 16 + (lane_id() >> 2), column = (lane_id() & 3) * 2;
    #pragma unroll
    for (int n = 0; n <= D / 8; ++n)
        #pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(space + (row + 8 * half) * kWide<D> + n * 8 + column) =
                make_float2(state[n][2 * half], state[n][2 * half + 1]);
}
// state (cleared) += the state before the segment of `slot` (behind it, if Reverse): its own entry once taylor_scan ran,
// else the sum over the document's earlier (later) segments, in order.
template <int D, bool Reverse>
__device__ __forceinline__ void load_state(float (&state)[D / 8 + 1][4], const TaylorArgs& p, int slot, int head, int doc) {
    int from = slot, to = slot + 1;
    if (!p.summed) {
        const int begin = first_slot(p, doc);
        const int count = p.cu_seqlens ? (p.cu_seqlens[doc + 1] - p.cu_seqlens[doc] + p.segment - 1) / p.segment : p.segments;
        from = Reverse ? slot + 1 : begin;
        to = Reverse ? begin + count : slot;
    }
    const int row = warp_id() * 16 + (lane_id() >> 2), column = (lane_id() & 3) * 2;
    #pragma unroll 1
    for (int i = from; i < to; ++i) {
        const float* space = slot_state<D>(p, p.space, i, head);
        #pragma unroll
        for (int n = 0; n <= D / 8; ++n)
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 x = *reinterpret_cast<const float2*>(space + (row + 8 * half) * kWide<D> + n * 8 + column);
                state[n][2 * half] += x.x;
                state[n][2 * half + 1] += x.y;
            }
    }
}
template <int N>
__device__ __forceinline__ void clear(float (&x)[N][4]) {
    #pragma unroll
    for (int n = 0; n < N; ++n)
        #pragma unroll
        for (int j = 0; j < 4; ++j) x[n][j] = 0.f;
}

// ---------------------------------------------------------------------------------------------------- products
// The tensor-core operand F(x) of tile `tile` for the warp's 16 tokens, from rows held by load_own_rows.
__device__ __forceinline__ void features(uint32_t (&a)[4], const uint32_t (&x0)[8], const uint32_t (&x1)[8], int tile) {
    a[0] = x0[0]; a[1] = x1[0]; a[2] = x0[4]; a[3] = x1[4];
    if (tile == 0) return;
    const int r = tile - 1;
    a[0] = mul2(a[0], rotated(x0, r, 0));
    a[1] = mul2(a[1], rotated(x1, r, 0));
    a[2] = mul2(a[2], rotated(x0, r, 1));
    a[3] = mul2(a[3], rotated(x1, r, 1));
    if (tile == 9) a[2] = a[3] = (threadIdx.x & 3) == 0 ? 0x3f80u : 0u;
}

// acc[n] += a [16 x 16] * rows [16 tokens or features][columns], n = 0 .. N-1 column tiles of 8, from row-major memory.
template <int N, int Stride>
__device__ __forceinline__ void times_rows(float (&acc)[N][4], const uint32_t (&a)[4], const bf16* rows) {
    const int lane = lane_id();
    const uint32_t at = address(rows + (lane & 15) * Stride + (lane >> 4) * 8);
    #pragma unroll
    for (int n = 0; n < N / 2; ++n) {
        uint32_t b[4];
        ldsm4t(b, at + n * 32);
        mma(acc[2 * n], a, b[0], b[1]);
        mma(acc[2 * n + 1], a, b[2], b[3]);
    }
    if (N % 2) {
        uint32_t b[2];
        ldsm2t(b, address(rows + (lane & 15) * Stride + (N - 1) * 8));
        mma(acc[N - 1], a, b[0], b[1]);
    }
}
// The warp's own 16 rows [D + 8] of a value tile as left operand.
template <int D> struct ValueRows { uint32_t a[D / 16][4]; uint32_t last[2]; };
template <int D>
__device__ __forceinline__ void load_value_rows(ValueRows<D>& rows, const bf16* tile) {
    const int lane = lane_id();
    const bf16* own = tile + (warp_id() * 16 + (lane & 15)) * kWide<D>;
    #pragma unroll
    for (int k = 0; k < D / 16; ++k) ldsm4(rows.a[k], address(own + k * 16 + (lane >> 4) * 8));
    ldsm2(rows.last, address(own + D));
}
// acc [16 x 16] += own rows * (16 rows [D + 8] of memory)^T.
template <int D>
__device__ __forceinline__ void times_rows_transposed(float (&acc)[2][4], const ValueRows<D>& rows, const bf16* with) {
    const int lane = lane_id();
    const uint32_t at = address(with + ((lane & 7) + (lane >> 4) * 8) * kWide<D> + ((lane >> 3) & 1) * 8);
    #pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t b[4];
        ldsm4(b, at + k * 32);
        mma(acc[0], rows.a[k], b[0], b[1]);
        mma(acc[1], rows.a[k], b[2], b[3]);
    }
    uint32_t b[2];
    ldsm2(b, address(with + (lane & 15) * kWide<D> + D));
    mma_k8(acc[0], rows.last[0], rows.last[1], b[0]);
    mma_k8(acc[1], rows.last[0], rows.last[1], b[1]);
}
// scores [16 x 16] = own rows (held by load_own_rows) * (16 rows of a q or k tile)^T
__device__ __forceinline__ void raw_scores(float (&s)[2][4], const uint32_t (&a)[4], const bf16* with) {
    const int lane = lane_id();
    uint32_t b[4];
    ldsm4(b, address(with + ((lane & 7) + (lane >> 4) * 8) * kNarrow + ((lane >> 3) & 1) * 8));
    clear(s);
    mma(s[0], a, b[0], b[1]);
    mma(s[1], a, b[2], b[3]);
}
// Row and column of element j of column tile n in a 16 x 16 accumulator.
__device__ __forceinline__ int element_row(int j) { return ((threadIdx.x & 31) >> 2) + (j >> 1) * 8; }
__device__ __forceinline__ int element_column(int n, int j) { return n * 8 + (threadIdx.x & 3) * 2 + (j & 1); }

__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&x)[2][4]) {
    a[0] = pack(x[0][0], x[0][1]); a[1] = pack(x[0][2], x[0][3]);
    a[2] = pack(x[1][0], x[1][1]); a[3] = pack(x[1][2], x[1][3]);
}

// dx += (dF/dx)^T (y state^T): the gradient that reaches q (or k) through the state, for the warp's 16 tokens.
template <int D>
__device__ __forceinline__ void through_state(float (&dx)[2][4], const ValueRows<D>& y, const bf16* state,
                                              const uint32_t (&x0)[8], const uint32_t (&x1)[8]) {
    #pragma unroll
    for (int tile = 0; tile < 10; ++tile) {
        const int r = tile - 1;
        const int lane = lane_id();
        const int g = lane >> 2, t = lane & 3;
        float d[2][4];
        clear(d);
        times_rows_transposed<D>(d, y, state + tile * 16 * kWide<D>);
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            if (tile == 0) {
                #pragma unroll
                for (int j = 0; j < 4; ++j) dx[n][j] += d[n][j];
                continue;
            }
            if (tile == 9 && n == 1) continue;
            uint32_t u0 = rotated(x0, r, n), u1 = rotated(x1, r, n);
            const float twice = tile == 1 ? 2.f : 1.f;
            dx[n][0] += twice * d[n][0] * low(u0);
            dx[n][1] += twice * d[n][1] * high(u0);
            dx[n][2] += twice * d[n][2] * low(u1);
            dx[n][3] += twice * d[n][3] * high(u1);
        }
        if (tile < 2) continue;
        // The other factor: element i of d * x goes to element i + r. For r = 8 that is this lane's own second tile.
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            d[n][0] *= low(x0[4 * n]); d[n][1] *= high(x0[4 * n]);
            d[n][2] *= low(x1[4 * n]); d[n][3] *= high(x1[4 * n]);
        }
        if (tile == 9) {
            #pragma unroll
            for (int j = 0; j < 4; ++j) dx[1][j] += d[0][j];
            continue;
        }
        uint32_t a[4];
        pack_operand(a, d);
        #pragma unroll
        for (int n = 0; n < 2; ++n) {            // times the permutation matrix P[i][i + r mod 16] = 1
            const int from = (g + 8 * n - r) & 15;
            uint32_t b0 = from == 2 * t ? 0x3f80u : from == 2 * t + 1 ? 0x3f800000u : 0u;
            uint32_t b1 = from == 2 * t + 8 ? 0x3f80u : from == 2 * t + 9 ? 0x3f800000u : 0u;
            mma(dx[n], a, b0, b1);
        }
    }
}
// Writes [16 tokens][16 or 8] of the gradient of q or k.
__device__ __forceinline__ void store_narrow(bf16* to, int64_t stride, const float (&dx)[2][4], int valid, int features) {
    const int lane = lane_id(), g = lane >> 2, t = lane & 3, base = warp_id() * 16;
    #pragma unroll
    for (int n = 0; n < 2; ++n)
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = base + g + 8 * half;
            if (row < valid && n * 8 < features)
                *reinterpret_cast<uint32_t*>(to + row * stride + n * 8 + t * 2) = pack(dx[n][2 * half], dx[n][2 * half + 1]);
        }
}

template <typename F>
inline int launch(F* kernel, dim3 grid, int bytes, const TaylorArgs& p) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return (int)e;
    kernel<<<grid, kThreads, bytes, (cudaStream_t)p.stream>>>(p);
    return (int)cudaGetLastError();
}

}  // namespace taylor

// One instantiation for every supported head_dim.
#define TAYLOR_DISPATCH(D, CALL)                                \
    switch (D) {                                                \
        case 64: { constexpr int kD = 64; return CALL; }        \
        case 80: { constexpr int kD = 80; return CALL; }        \
        case 96: { constexpr int kD = 96; return CALL; }        \
        case 112: { constexpr int kD = 112; return CALL; }      \
        case 128: { constexpr int kD = 128; return CALL; }      \
        default: return 1; /* cudaErrorInvalidValue */          \
    }
