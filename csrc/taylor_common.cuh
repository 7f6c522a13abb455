// Shared pieces of the Taylor linear-attention kernels (Hopper, bf16 tensor cores, fp32 sums).
//
// With s = scale * q.k the weight of key j for query t is w = 1 + s + s^2/2, and o_t = sum_j w v_j / sum_j w, j <= t.
// As features: w = sum_p g_p F_p(q) F_p(k) with F(x) = [x_i ; x_i^2 ; x_i x_{i+r mod 16}, r = 1..7 ; x_i x_{i+8}, i < 8 ;
// 1 ; 7 zeros], ten tiles of 16 rows, and weights g = scale, scale^2/2, scale^2, scale^2, 1. Only the 153 distinct
// features are kept. `feature_dim` 8 runs as 16 with zeros.
//
// A block owns one segment of one head of one document (and, where the kernel allows it, some of the value columns) and
// walks it in chunks of 128 tokens: forwards, or backwards for the gradients that flow from later tokens ("Reverse").
//   3 warpgroups carry the state, sum_t F(x_t) y_t^T in accumulators, one feature tile a warp, and publish it in bf16
//     before each chunk;
//   2 warpgroups (or 1) make the outputs of 64 tokens each: what comes through the published state, and inside the chunk the
//     quadratic form;
//   1 warpgroup loads the chunks ahead.
// Forwards x = k and y = [v | 1 x 8]: every lane finds the denominator in its own last column. Backwards x = q / den and
// y = [grad_o | -(grad_o . o) | 0 x 7]. Tiles lie in shared memory as planes of 8 columns, 16 bytes a token: the layout wgmma reads unswizzled.
#pragma once
#include "hopper.cuh"
#include "taylor_args.h"

namespace taylor {

constexpr int kChunk = 128, kTiles = 10, kRows = kTiles * 16;
constexpr int kStateWarps = 12, kLoadWarps = 4;  // and 4 or 8 output warps
constexpr int kPlane = kChunk * 16;              // bytes of a plane of a chunk
constexpr int kStatePlane = kRows * 16;          // bytes of a plane of the published state
using bf16 = __nv_bfloat16;

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
__device__ __forceinline__ int chunk_count(const Segment& s) { return (s.length + kChunk - 1) / kChunk; }
// The chunk handled in step i of the walk, and how many of its tokens are real.
template <bool Reverse> __device__ __forceinline__ int chunk_begin(const Segment& s, int i) {
    return (Reverse ? chunk_count(s) - 1 - i : i) * kChunk;
}

// Row `token` of [batch, seq, heads, ...].
__device__ __forceinline__ const bf16* token_row(const void* x, const int64_t* stride, int batch, int token, int head) {
    return (const bf16*)x + batch * stride[0] + token * stride[1] + head * stride[2];
}
// Index of the same row in contiguous [batch, seq, heads].
__device__ __forceinline__ int64_t token_index(const TaylorArgs& p, int batch, int token, int head) {
    return ((int64_t)batch * p.seq + token) * p.heads + head;
}

// ---------------------------------------------------------------------------------------------------- shared memory
// One stage of the ring: x and y feed the state; r (narrow) and u (U columns) are the rows that outputs are made for.
template <int W, int U, bool Rows, int Stages_, int Published_> struct Layout {
    static constexpr int Stages = Stages_, Published = Published_, Columns = W, RowColumns = U;
    static constexpr bool WithRows = Rows;
    static constexpr int x = 0, r = x + 2 * kPlane, y = r + (Rows ? 2 * kPlane : 0), u = y + (W / 8 + 1) * kPlane;
    static constexpr int factors = u + U / 8 * kPlane;                 // float2 {1 / den, grad_o . o} a token
    static constexpr int inverse = factors + kChunk * 8;               // bf16 1 / den a token
    static constexpr int stage = inverse + kChunk * 2;
    static constexpr int published = (W / 8 + 1) * kStatePlane, last = published;      // last: fp32 last column
    static constexpr int state = published + kRows * 4;
    static constexpr int bars = Stages * stage + Published * state;
    static constexpr int bytes = bars + (2 * Stages + 2 * Published) * 8;
};
template <class L> struct Shared {
    uint32_t base;
    __device__ uint32_t stage(int i) const { return base + i % L::Stages * L::stage; }
    __device__ uint32_t full(int i) const { return base + L::bars + i % L::Stages * 8; }
    __device__ uint32_t empty(int i) const { return base + L::bars + (L::Stages + i % L::Stages) * 8; }
    __device__ uint32_t state(int i) const { return base + L::Stages * L::stage + i % L::Published * L::state; }
    __device__ uint32_t published(int i) const { return base + L::bars + (2 * L::Stages + i % L::Published) * 8; }
    __device__ uint32_t released(int i) const { return base + L::bars + (2 * L::Stages + L::Published + i % L::Published) * 8; }
    __device__ static int stage_parity(int i) { return i / L::Stages & 1; }
    __device__ static int state_parity(int i) { return i / L::Published & 1; }
    // Called by every thread of the block.
    __device__ void init(int output_warps) const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < L::Stages; ++i) { barrier_init(full(i), kLoadWarps); barrier_init(empty(i), kStateWarps + output_warps); }
            for (int i = 0; i < L::Published; ++i) { barrier_init(published(i), kTiles); barrier_init(released(i), output_warps); }
        }
        __syncthreads();
    }
};

// ---------------------------------------------------------------------------------------------------- loading
// Rows into planes, 16 bytes at a time; rows past `valid` and vectors past `real` become zeros. Eight lanes fill one
// core, neighbouring groups of eight lanes neighbouring vectors of the same rows.
template <int Vectors>
__device__ __forceinline__ void load_planes(uint32_t to, const bf16* from, int64_t stride, int valid, int real = Vectors) {
    #pragma unroll 2
    for (int i = threadIdx.x & 127; i < kChunk * Vectors; i += 128) {
        const int rest = i >> 3, vector = rest % Vectors, token = rest / Vectors * 8 + (i & 7);
        const bool copy = token < valid && vector < real;
        copy16(to + vector * kPlane + token * 16, copy ? from + token * stride + vector * 8 : from, copy);
    }
}

template <class L, bool Reverse>
__device__ __forceinline__ void load_chunks(const TaylorArgs& p, const Segment& s, int head, int column, const Shared<L>& m) {
    const int token = threadIdx.x & 127, chunks = chunk_count(s);
    for (int i = 0; i < L::Stages; ++i)            // the ones (forwards), or zeros
        for (int j = 0; j < 4; ++j)
            store_shared(m.stage(i) + L::y + L::Columns / 8 * kPlane + token * 16 + j * 4, Reverse ? 0u : 0x3f803f80u);
    bool pending = false;
    auto hand_over = [&](int i) {
        copies_wait<0>();
        fence_for_tensor_cores();
        warp_arrive(m.full(i));
        pending = false;
    };
    const int64_t* xs = Reverse ? p.q_stride : p.k_stride;
    const int64_t* rs = Reverse ? p.k_stride : p.q_stride;
    const int64_t* ys = Reverse ? p.grad_stride : p.v_stride;
    const int64_t* us = Reverse ? p.v_stride : p.grad_stride;
    for (int i = 0; i < chunks; ++i) {
        const int begin = chunk_begin<Reverse>(s, i), valid = min(kChunk, s.length - begin), first = s.first + begin;
        const uint32_t at = m.stage(i);
        if (i >= L::Stages) {
            const int parity = Shared<L>::stage_parity(i - L::Stages);
            if (pending && !__all_sync(~0u, barrier_passed(m.empty(i), parity))) hand_over(i - 1);
            barrier_wait(m.empty(i), parity);
        }
        float den = 1.f, dot = 0.f;
        if ((Reverse || L::RowColumns) && token < valid) {
            const int64_t index = token_index(p, s.batch, first + token, head);
            den = p.denominator[index];
            if (p.grad_dot) dot = p.grad_dot[index];
        }
        load_planes<2>(at + L::x, token_row(Reverse ? p.q : p.k, xs, s.batch, first, head), xs[1], valid, p.features / 8);
        if (L::WithRows)
            load_planes<2>(at + L::r, token_row(Reverse ? p.k : p.q, rs, s.batch, first, head), rs[1], valid, p.features / 8);
        load_planes<L::Columns / 8>(at + L::y, token_row(Reverse ? p.grad_o : p.v, ys, s.batch, first, head) + column, ys[1], valid);
        if (L::RowColumns)
            load_planes<L::RowColumns / 8 + !L::RowColumns>(at + L::u, token_row(Reverse ? p.v : p.grad_o, us, s.batch, first, head), us[1], valid);
        copies_commit();
        if (Reverse || L::RowColumns) {
            const float inverse = token < valid ? 1.f / den : 0.f;
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + L::factors + token * 8), "f"(inverse), "f"(dot) : "memory");
            if (Reverse) {
                asm volatile("st.shared.b16 [%0], %1;" ::"r"(at + L::inverse + token * 2), "h"((uint16_t)pack(inverse, 0.f)) : "memory");
                store_shared(at + L::y + L::Columns / 8 * kPlane + token * 16, pack(-dot, 0.f));
            }
        }
        if (pending) {
            copies_wait<1>();
            fence_for_tensor_cores();
            warp_arrive(m.full(i - 1));
        }
        pending = true;
    }
    hand_over(chunks - 1);
}

// ---------------------------------------------------------------------------------------------------- state
// Weight g_p of feature row p.
__device__ __forceinline__ float row_weight(int row, float scale) {
    if (row < 16) return scale;
    if (row < 32) return 0.5f * scale * scale;
    if (row < 152) return scale * scale;
    return row == 152 ? 1.f : 0.f;
}

// What a state warp keeps: rows 16 tile .. 16 tile + 15 of the state, columns as in an accumulator of width N.
template <int N, bool Reverse, bool Exact> struct State {
    float sum[N / 2];

    __device__ __forceinline__ static int tile() { return threadIdx.x >> 5; }
    __device__ __forceinline__ static int row() { return tile() * 16 + ((threadIdx.x & 31) >> 2); }

    // sum += F(x)^T y over a chunk. Exact: products of features keep 16 bits (two bf16 terms), for the state that is
    // handed to the user.
    __device__ __forceinline__ void update(uint32_t x, uint32_t y, uint32_t inverse, int valid) {
        const int lane = threadIdx.x & 31, t = lane & 3, r = tile() - 1, shifted = (lane >> 2) + max(r, 0);
        const int source = (shifted & 7) << 2 | t;                     // the lane that holds feature i + r (mod 16)
        const bool other = shifted & 8;
        const uint32_t from = x + (lane >> 3 & 1) * kPlane + ((lane >> 4) * 8 + (lane & 7)) * 16;
        #pragma unroll (N > 72 ? 2 : 8)            // unrolled steps hold their operands
        for (int step = 0; step < kChunk / 16; ++step) {
            uint32_t a[4], rest[4] = {0, 0, 0, 0};
            ldsm4t(a, from + step * 256);
            if (r >= 0) {
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t x0 = __shfl_sync(~0u, a[2 * half], source), x1 = __shfl_sync(~0u, a[2 * half + 1], source);
                    const uint32_t p0 = mul2(a[2 * half], other ? x1 : x0), p1 = mul2(a[2 * half + 1], other ? x0 : x1);
                    if (Exact) {
                        rest[2 * half] = residual2(a[2 * half], other ? x1 : x0, p0);
                        rest[2 * half + 1] = residual2(a[2 * half + 1], other ? x0 : x1, p1);
                    }
                    a[2 * half] = p0;
                    a[2 * half + 1] = p1;
                }
                if (r >= 8) {                    // tile 9: rows 8-15 are the constant feature, then nothing
                    #pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int left = valid - step * 16 - half * 8 - 2 * t;         // real tokens from this lane's pair on
                        a[2 * half + 1] = lane >= 4 || left <= 0 ? 0u : left == 1 ? 0x3f80u : 0x3f803f80u;
                        rest[2 * half + 1] = 0;
                    }
                }
                if (r > 8) a[0] = a[1] = a[2] = a[3] = rest[0] = rest[1] = rest[2] = rest[3] = 0;
            }
            if (Reverse) {
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t factor = load_shared(inverse + (step * 16 + half * 8 + 2 * t) * 2);
                    #pragma unroll
                    for (int j = 2 * half; j < 2 * half + 2; ++j) {
                        const uint32_t scaled = mul2(a[j], factor);
                        if (Exact) {                                   // (a + rest) * factor in two terms
                            const uint32_t more = residual2(a[j], factor, scaled), also = mul2(rest[j], factor);
                            rest[j] = pack(low(more) + low(also), high(more) + high(also));
                        }
                        a[j] = scaled;
                    }
                }
            }
            wgmma_begin();
            add_product(a, y + step * 256);
            if (Exact) add_product(rest, y + step * 256);
            wgmma_commit();
            wgmma_wait<1>();                     // the step before: its registers are free
        }
        wgmma_wait<0>();
    }

    // sum += a y, in two pieces where one instruction would need more registers than a thread starts with.
    __device__ __forceinline__ void add_product(const uint32_t (&a)[4], uint32_t y) {
        constexpr int First = N > 72 ? (N - 8) / 2 : 0;
        if constexpr (First)
            Wgmma<First>::template rs<1>(reinterpret_cast<float (&)[First / 2]>(sum), a, operand(y, 128, kPlane), 1);
        Wgmma<N - First>::template rs<1>(reinterpret_cast<float (&)[(N - First) / 2]>(sum[First / 2]), a,
                                         operand(y + First / 8 * kPlane, 128, kPlane), 1);
    }

    // The weighted state as bf16 operand; `last`: its last column also in fp32.
    __device__ __forceinline__ void publish(uint32_t to, uint32_t last, float scale) const {
        if (tile() >= kTiles) return;
        const int lane = threadIdx.x & 31;
        const float w0 = row_weight(row(), scale), w1 = row_weight(row() + 8, scale);
        const uint32_t at = to + tile() * 256 + lane * 4;
        #pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            store_shared(at + n * kStatePlane, pack(w0 * sum[4 * n], w0 * sum[4 * n + 1]));
            store_shared(at + n * kStatePlane + 128, pack(w1 * sum[4 * n + 2], w1 * sum[4 * n + 3]));
        }
        if ((lane & 3) == 0) {
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(last + row() * 4), "f"(w0 * sum[N / 2 - 4]) : "memory");
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(last + row() * 4 + 32), "f"(w1 * sum[N / 2 - 2]) : "memory");
        }
        fence_for_tensor_cores();
    }

    // Rows of the fp32 work space [slot][head][160][head_dim + 8]; columns [column, column + N - 8), then head_dim ...
    __device__ __forceinline__ static float* space(const TaylorArgs& p, int slot, int head) {
        return p.space + (((int64_t)slot * p.heads + head) * kRows + row()) * (p.head_dim + 8) + (threadIdx.x & 3) * 2;
    }
    __device__ __forceinline__ static int space_column(const TaylorArgs& p, int n, int column) {
        return n < N / 8 - 1 ? column + n * 8 : p.head_dim;
    }
    __device__ __forceinline__ void store(const TaylorArgs& p, int slot, int head, int column) const {
        if (tile() >= kTiles) return;
        float* to = space(p, slot, head);
        #pragma unroll
        for (int n = 0; n < N / 8; ++n)
            #pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<float2*>(to + half * 8 * (p.head_dim + 8) + space_column(p, n, column)) =
                    make_float2(sum[4 * n + 2 * half], sum[4 * n + 2 * half + 1]);
    }
    // The state before the segment of `slot` (behind it, if Reverse): its own entry once taylor_scan ran, else the sum
    // over the document's earlier (later) segments, in order.
    __device__ __forceinline__ void load(const TaylorArgs& p, int slot, int head, int column, int doc) {
        #pragma unroll
        for (int i = 0; i < N / 2; ++i) sum[i] = 0.f;
        if (!p.space || tile() >= kTiles) return;
        int from = slot, to = slot + 1;
        if (!p.summed) {
            const int begin = first_slot(p, doc);
            const int count = p.cu_seqlens ? (p.cu_seqlens[doc + 1] - p.cu_seqlens[doc] + p.segment - 1) / p.segment : p.segments;
            from = Reverse ? slot + 1 : begin;
            to = Reverse ? begin + count : slot;
        }
        #pragma unroll 1
        for (int i = from; i < to; ++i) {
            const float* at = space(p, i, head);
            #pragma unroll
            for (int n = 0; n < N / 8; ++n)
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 x = *reinterpret_cast<const float2*>(at + half * 8 * (p.head_dim + 8) + space_column(p, n, column));
                    sum[4 * n + 2 * half] += x.x;
                    sum[4 * n + 2 * half + 1] += x.y;
                }
        }
    }
};

// The state warps' walk beside output warps: publish before each chunk, then take the chunk in.
template <class L, bool Reverse>
__device__ __forceinline__ void carry_state(const TaylorArgs& p, const Segment& s, int slot, int head, int column, const Shared<L>& m) {
    State<L::Columns + 8, Reverse, false> state;
    state.load(p, slot, head, column, s.doc);
    const int chunks = chunk_count(s), skipped = p.space ? 0 : 1;      // no state before the first chunk
    for (int i = 0; i < chunks; ++i) {
        const int n = i - skipped;
        if (n >= 0) {
            if (n >= L::Published) barrier_wait(m.released(n), Shared<L>::state_parity(n - L::Published));
            state.publish(m.state(n), m.state(n) + L::last, p.scale);
            __syncwarp();
            if (state.tile() < kTiles) warp_arrive(m.published(n));
        }
        barrier_wait(m.full(i), Shared<L>::stage_parity(i));
        if (i + 1 < chunks) {
            const uint32_t at = m.stage(i);
            state.update(at + L::x, at + L::y, at + L::inverse, min(kChunk, s.length - chunk_begin<Reverse>(s, i)));
        }
        warp_arrive(m.empty(i));
    }
}

// ---------------------------------------------------------------------------------------------------- output rows
// The 16 values of rows g and g + 8 of this warp's 16 rows, rotated by 2t: x[m] holds elements 2t + 2m and 2t + 2m + 1.
// `rows`: a narrow tile at the warp's first row.
__device__ __forceinline__ void load_rows(uint32_t (&x0)[8], uint32_t (&x1)[8], uint32_t rows) {
    const int lane = threadIdx.x & 31, t = lane & 3;
    #pragma unroll
    for (int m = 0; m < 8; ++m) {
        const int c = (2 * t + 2 * m) & 15;
        const uint32_t at = rows + (c >> 3) * kPlane + (lane >> 2) * 16 + (c & 7) * 2;
        x0[m] = load_shared(at);
        x1[m] = load_shared(at + 128);
    }
}
// The first tile of features, which is the rows themselves, as left operand.
__device__ __forceinline__ void load_own(uint32_t (&a)[4], uint32_t rows) {
    const uint32_t at = rows + ((threadIdx.x & 31) >> 2) * 16 + (threadIdx.x & 3) * 4;
    a[0] = load_shared(at);
    a[1] = load_shared(at + 128);
    a[2] = load_shared(at + kPlane);
    a[3] = load_shared(at + kPlane + 128);
}
// Elements (2t + 8 half + r, and the next) mod 16 of a row held as above.
__device__ __forceinline__ uint32_t rotated(const uint32_t (&x)[8], int r, int half) {
    const int m = 4 * half + r / 2;
    return r % 2 ? __byte_perm(x[m & 7], x[(m + 1) & 7], 0x5432) : x[m & 7];
}
// The tensor-core operand F(x) of tile `tile` for the warp's 16 rows.
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
// Columns 16 i .. 16 i + 15 of an accumulator as left operand.
template <int M> __device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&x)[M], int i) {
    a[0] = pack(x[8 * i], x[8 * i + 1]);
    a[1] = pack(x[8 * i + 2], x[8 * i + 3]);
    a[2] = pack(x[8 * i + 4], x[8 * i + 5]);
    a[3] = pack(x[8 * i + 6], x[8 * i + 7]);
}
// The chunk's half that an output warpgroup makes in its turn of step i: halves differ in work, so two groups swap them.
__device__ __forceinline__ int half_of(int turn, int i) { return turn ^ (i & 1); }

template <typename F>
inline int launch(F* kernel, dim3 grid, int threads, int bytes, const TaylorArgs& p) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return (int)e;
    kernel<<<grid, threads, bytes, (cudaStream_t)p.stream>>>(p);
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
