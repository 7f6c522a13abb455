// Shared by the sliding-window attention's kernels. A block walks along a strip of one head: tiles of 64 tokens pass through
// a ring in shared memory. One warp has them copied there by the tensor memory accelerator, a warpgroup rotates (RoPE) what lies
// there, and two others multiply it with tiles of their own, 64 rows each. So every row is read and rotated once a strip, and only
// the last `window` rows are kept.
#pragma once
#include <cuda_fp16.h>

#include "hopper.cuh"
#include "window_attention_args.h"

namespace window_attention {
using namespace taylor;
using bf16 = __nv_bfloat16;

constexpr int kRows = 64, kPanel = kRows * 128;      // a tile is panels of 64 columns, swizzled; columns past the width are zeros
template <int D> constexpr int kPanels = (D + 63) / 64;
template <int D> constexpr int kTile = kPanels<D> * kPanel;
constexpr int kGroups = 2, kRotators = 4, kThreads = 256 + kGroups * 128;           // warpgroups that multiply; warps that rotate
constexpr int kLoaderRegisters = 24, kRotatorRegisters = 104, kRegisters = 192;     // of a thread, of the 128 that all begin with
constexpr int kMaxReach = 4;                         // window 256
constexpr float kLog2e = 1.4426950408889634f;

// How the tiles of a strip pass. Own tile s meets the ring's tiles first(s) .. last(s): those up to itself (keys of queries) or,
// Ahead, those from itself on (queries of keys). Tile u of the ring is loaded together with own tile u - lag.
struct Slots {                                        // tile i lies in slot i mod count, the turn-th that does
    int count;
    uint32_t inverse;
    __host__ __device__ Slots(int n = 2) : count(n), inverse((uint32_t)((0x100000000ull + n - 1) / n)) {}     // n > 1
    __device__ __forceinline__ int turn(int i) const { return (int)__umulhi((unsigned)i, inverse); }
    __device__ __forceinline__ int of(int i) const { return i - turn(i) * count; }
};
struct Plan {
    int tiles, reach, strip, strips;                  // tiles of a sequence; of a window beyond the own one; of a strip; strips
    Slots ring, own;
};
template <bool Ahead> struct Walk {
    int begin, end, lag, start, count;                // own tiles begin .. end - 1; the ring's `count` tiles from `start` on
    Plan plan;
    __device__ __forceinline__ Walk(const Plan& p, int strip) : plan(p) {
        begin = strip * p.strip;
        end = min(begin + p.strip, p.tiles);
        lag = Ahead ? p.reach : 0;
        start = first(begin);
        count = end + lag - start;
    }
    __device__ __forceinline__ int first(int s) const { return Ahead ? s : max(s - plan.reach, 0); }
    __device__ __forceinline__ int last(int s) const { return Ahead ? min(s + plan.reach, plan.tiles - 1) : s; }
};

// Addresses: the ring's tiles (First | Second a slot), own tiles (Owned a slot), row statistics, barriers.
template <int D, int Owned> struct Shared {
    uint32_t base, stats, barriers;
    Slots ring, own;
    __host__ __device__ static constexpr int bytes(int ring, int own, int rows) {
        return (2 * ring + Owned * own) * kTile<D> + rows * kRows * 8 + (3 * ring + own) * 8;
    }
    __device__ __forceinline__ Shared(uint32_t at, const Plan& p, int rows) : base(at), ring(p.ring), own(p.own) {
        stats = base + (2 * ring.count + Owned * own.count) * kTile<D>;
        barriers = stats + rows * kRows * 8;
    }
    __device__ __forceinline__ uint32_t slot(int i) const { return base + ring.of(i) * 2 * kTile<D>; }
    __device__ __forceinline__ uint32_t tile(int s) const { return base + (2 * ring.count + own.of(s) * Owned) * kTile<D>; }
    __device__ __forceinline__ uint32_t row_stats(int slot) const { return stats + slot * kRows * 8; }
    // A slot's tiles and the own tile beside them have come, are rotated; the slot is empty; the own tile's place is free.
    __device__ __forceinline__ uint32_t come(int i) const { return barriers + ring.of(i) * 8; }
    __device__ __forceinline__ uint32_t full(int i) const { return barriers + (ring.count + ring.of(i)) * 8; }
    __device__ __forceinline__ uint32_t empty(int i) const { return barriers + (2 * ring.count + ring.of(i)) * 8; }
    __device__ __forceinline__ uint32_t free(int s) const { return barriers + (3 * ring.count + own.of(s)) * 8; }
    __device__ __forceinline__ void init() const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < ring.count; ++i) {
                barrier_init(come(i), 1);
                barrier_init(full(i), kRotators);
                barrier_init(empty(i), kGroups * 4);
            }
            for (int i = 0; i < own.count; ++i) barrier_init(free(i), 4);
            barriers_ready();
        }
        __syncthreads();
    }
};

// ---------------------------------------------------------------------------------------------------- the warp that loads
// ask(i, bar) has what index i needs copied, counted at bar: ring tile start + i and own tile start + i - lag, where there are such.
template <bool Ahead, typename S, typename A> __device__ __forceinline__ void load(const Walk<Ahead>& w, const S& m, A ask) {
    #pragma unroll 1
    for (int i = 0; i < w.count; ++i) {
        const int s = w.start + i - w.lag - w.begin;
        if (i >= m.ring.count) barrier_wait(m.empty(i), m.ring.turn(i) - 1 & 1);
        if (s >= m.own.count) barrier_wait(m.free(s), m.own.turn(s) - 1 & 1);
        ask(i, m.come(i));
        warp_arrive(m.come(i));
    }
}
// Rows of one head, of q, k or v (`part`), 64 from token `first` on; zeros behind the sequence's end.
struct Head {
    int index, batch;
};
template <int D>
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* map, uint32_t bar, int part, int first, const Head& head) {
    if ((threadIdx.x & 31) != 0) return;
    barrier_expect(bar, kTile<D>);
    #pragma unroll
    for (int j = 0; j < kPanels<D>; ++j) copy_box(to + j * kPanel, map, bar, j * 64, first, part, head.index, head.batch);
}
// Rows of o on their way to the L2 cache, for `Outputs`.
template <int D> __device__ __forceinline__ void prefetch_tile(const bf16* from, int64_t pitch, int first, int seq) {
    for (int token = first + (threadIdx.x & 31); token < min(first + kRows, seq); token += 32)
        #pragma unroll
        for (int j = 0; j < kPanels<D>; ++j) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + token * pitch + j * 64));
}

// ---------------------------------------------------------------------------------------------------- the warps that rotate
// finish(i) rotates what has come for index i.
template <bool Ahead, typename S, typename F> __device__ __forceinline__ void rotate(const Walk<Ahead>& w, const S& m, F finish) {
    #pragma unroll 1
    for (int i = 0; i < w.count; ++i) {
        barrier_wait(m.come(i), m.ring.turn(i) & 1);
        finish(i);
        fence_for_tensor_cores();
        warp_arrive(m.full(i));
    }
}
// A warp has 16 rows of a tile, eight and eight. Eight lanes have eight rows of 16 bytes, in all banks of shared memory; four times
// eight have 64 bytes of a row of device memory.
constexpr int kPasses = kRows / kRotators / 8;
__device__ __forceinline__ int rotator_row(int pass) { return (threadIdx.x / 32 % kRotators * kPasses + pass) * 8 + (threadIdx.x & 7); }
__device__ __forceinline__ int first_vector() { return threadIdx.x >> 3 & 3; }
// Where 16 bytes of a row lie in a tile.
__device__ __forceinline__ int place(int row, int vector) { return vector / 8 * kPanel + row * 128 + ((vector ^ row) & 7) * 16; }

// What a lane needs of device memory to finish a tile, in registers before the tile is there. Angles turn pairs (i, i + D / 2)
// of every row in place (Su et al. 2021, half-split layout).
__device__ __forceinline__ float2 widen(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
template <int D> struct Angles {
    static constexpr int N = (D + 63) / 64;
    uint4 table[kPasses][N][2];
    __device__ __forceinline__ void read(int pass, const void* rotation, int first, int seq) {
        const int token = max(min(first + rotator_row(pass), seq - 1), 0);
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const __half2*>(rotation) + (int64_t)token * (D / 2));
        #pragma unroll
        for (int j = 0; j < N; ++j) {
            const int vector = min(first_vector() + 4 * j, D / 16 - 1);
            table[pass][j][0] = __ldg(from + vector * 2);
            table[pass][j][1] = __ldg(from + vector * 2 + 1);
        }
    }
    __device__ __forceinline__ void turn(int pass, uint32_t at) const {
        #pragma unroll
        for (int j = 0; j < N; ++j) {
            const int vector = first_vector() + 4 * j;
            if (vector >= D / 16) continue;
            const uint32_t low_at = at + place(rotator_row(pass), vector), high_at = at + place(rotator_row(pass), vector + D / 16);
            const uint4 a = load_shared_vector(low_at), b = load_shared_vector(high_at), t0 = table[pass][j][0], t1 = table[pass][j][1];
            const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w}, t[8] = {t0.x, t0.y, t0.z, t0.w, t1.x, t1.y, t1.z, t1.w};
            uint32_t u[4], v[4];
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 p = widen(t[2 * i]), q = widen(t[2 * i + 1]);
                u[i] = pack(low(x[i]) * p.x - low(y[i]) * p.y, high(x[i]) * q.x - high(y[i]) * q.y);
                v[i] = pack(low(y[i]) * p.x + low(x[i]) * p.y, high(y[i]) * q.x + high(x[i]) * q.y);
            }
            store_shared_vector(low_at, u);
            store_shared_vector(high_at, v);
        }
    }
};
// Rows of o and lse, and {lse, grad_o . o} of every row to `to`; behind the end {inf, 0}: no weight.
template <int D> struct Outputs {
    static constexpr int N = (D + 31) / 32;
    uint4 o[kPasses][N];
    float sum[kPasses];
    __device__ __forceinline__ Outputs(const bf16* from, int64_t pitch, const float* lse, int first, int seq) {
        #pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int token = first + rotator_row(pass), inside = max(min(token, seq - 1), 0);
            const uint4* vectors = reinterpret_cast<const uint4*>(from + inside * pitch);
            #pragma unroll
            for (int j = 0; j < N; ++j) o[pass][j] = __ldg(vectors + min(first_vector() + 4 * j, D / 8 - 1));
            sum[pass] = token < seq ? __ldg(lse + inside) : INFINITY;
        }
    }
    __device__ __forceinline__ void dot(uint32_t to, uint32_t grad) const {
        #pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            float dot = 0.f;
            #pragma unroll
            for (int j = 0; j < N; ++j) {
                const int vector = first_vector() + 4 * j;
                if (vector >= D / 8) continue;
                const uint4 a = load_shared_vector(grad + place(rotator_row(pass), vector)), b = o[pass][j];
                dot += low(a.x) * low(b.x) + high(a.x) * high(b.x) + low(a.y) * low(b.y) + high(a.y) * high(b.y)
                     + low(a.z) * low(b.z) + high(a.z) * high(b.z) + low(a.w) * low(b.w) + high(a.w) * high(b.w);
            }
            dot += __shfl_xor_sync(~0u, dot, 8);
            dot += __shfl_xor_sync(~0u, dot, 16);
            if (first_vector() == 0) {
                store_shared(to + rotator_row(pass) * 8, __float_as_uint(sum[pass]));
                store_shared(to + rotator_row(pass) * 8 + 4, __float_as_uint(dot));
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------- the multiplying warpgroups
// What a warpgroup knows of the ring: tiles before `released` it has handed back.
template <bool Ahead, typename S> struct Consumer {
    const Walk<Ahead>& w;
    const S& m;
    int released;
    __device__ __forceinline__ Consumer(const Walk<Ahead>& walk, const S& shared) : w(walk), m(shared), released(walk.start) {}
    __device__ __forceinline__ void wait_index(int i) const { barrier_wait(m.full(i), m.ring.turn(i) & 1); }
    // Hands tiles before `limit` back, each once it is there: another warpgroup may still wait for it.
    __device__ __forceinline__ void release(int limit) {
        for (; released < limit; ++released) {
            wait_index(released - w.start);
            warp_arrive(m.empty(released - w.start));
        }
    }
    // Until own tile s and all of the ring that it meets are there.
    __device__ __forceinline__ void begin(int s) {
        release(w.first(s));
        wait_index(s + w.lag - w.start);
    }
    __device__ __forceinline__ uint32_t slot(int u) const { return m.slot(u - w.start); }
};

// The columns that the thread's rows g and g + 8 of a tile see: from[i] .. from[i] + length[i].
template <bool Ahead> struct Seen {
    int from[2];
    unsigned length[2];
    __device__ __forceinline__ Seen(const WindowAttentionArgs& a, int first_row) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + i * 8;
            int begin = 0, end = a.seq;
            if (a.cu_seqlens) {
                int low = 0, high = a.docs - 1;           // the last document that starts at or before the row
                while (low < high) {
                    const int middle = (low + high + 1) / 2;
                    if (a.cu_seqlens[middle] <= row) low = middle; else high = middle - 1;
                }
                begin = a.cu_seqlens[low];
                end = a.cu_seqlens[low + 1];
            }
            from[i] = Ahead ? row : max(row - a.window + 1, begin);
            length[i] = max(Ahead ? min(a.window, end - row) - 1 : row - from[i], 0);
        }
    }
    // x = N columns from `first` on: -inf where they are not seen.
    template <int N> __device__ __forceinline__ void mask(float (&x)[N / 2], int first) const {
        const int column = first + (threadIdx.x & 3) * 2;
        #pragma unroll
        for (int n = 0; n < N / 8; ++n)
            #pragma unroll
            for (int e = 0; e < 4; ++e)
                if ((unsigned)(column + n * 8 + (e & 1) - from[e >> 1]) > length[e >> 1]) x[4 * n + e] = -INFINITY;
    }
};
// Whether a pair of tiles at this distance has anything to mask.
__device__ __forceinline__ bool masked(const WindowAttentionArgs& a, int distance) {
    return a.cu_seqlens || distance == 0 || distance * kRows + kRows - 1 >= a.window;
}

// Columns 16 i .. 16 i + 15 of an accumulator as left operand.
template <int M> __device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&x)[M], int i) {
    a[0] = pack(x[8 * i], x[8 * i + 1]);
    a[1] = pack(x[8 * i + 2], x[8 * i + 3]);
    a[2] = pack(x[8 * i + 4], x[8 * i + 5]);
    a[3] = pack(x[8 * i + 6], x[8 * i + 7]);
}
// x = A B^T, A a tile, B the N rows of a tile from address b on.
template <int D, int N> __device__ __forceinline__ void multiply_rows(float (&x)[N / 2], uint32_t a, uint32_t b) {
    #pragma unroll
    for (int k = 0; k < D / 16; ++k)
        Wgmma<N>::ss(x, swizzled(a + k / 4 * kPanel + k % 4 * 32), swizzled(b + k / 4 * kPanel + k % 4 * 32), k > 0);
}
// x (+)= A B, A of 16 N columns in registers, B as many rows of a tile from address b on.
template <int D, int N> __device__ __forceinline__ void multiply_columns(float (&x)[D / 2], const uint32_t (&a)[N][4], uint32_t b, bool add) {
    #pragma unroll
    for (int k = 0; k < N; ++k) Wgmma<D>::template rs<1>(x, a[k], swizzled(b + k * 2048, kPanel), add || k > 0);
}

// Rows g and g + 8 of a warp's 16, of which `first_row` is the thread's first, times `factor` as bf16; eight bytes of a sector
// a lane, so that four lanes fill one.
template <int D> __device__ __forceinline__ void store_rows(const float (&x)[D / 2], bf16* to, int64_t pitch, int first_row, int seq, const float (&factor)[2]) {
    const int t = threadIdx.x & 3;
    const bool odd = t & 1;
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + i * 8;
        bf16* out = to + row * pitch + (odd ? 8 + 2 * (t - 1) : 2 * t);
        #pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const uint32_t a = pack(x[8 * n + 2 * i] * factor[i], x[8 * n + 2 * i + 1] * factor[i]);
            const uint32_t b = pack(x[8 * n + 4 + 2 * i] * factor[i], x[8 * n + 5 + 2 * i] * factor[i]);
            const uint32_t other = __shfl_xor_sync(~0u, odd ? a : b, 1);
            if (row < seq) *reinterpret_cast<uint2*>(out + n * 16) = odd ? make_uint2(other, b) : make_uint2(a, other);
        }
    }
}
// The transposed rotation of an accumulator's rows: gradients of what was rotated to those of what came.
template <int D> __device__ __forceinline__ void rotate_back(float (&x)[D / 2], const void* rotation, int first_row, int seq) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const __half2* table = static_cast<const __half2*>(rotation) + (int64_t)min(first_row + i * 8, seq - 1) * (D / 2) + (threadIdx.x & 3) * 2;
        #pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const uint2 t = __ldg(reinterpret_cast<const uint2*>(table + n * 8));
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float2 turn = widen(e ? t.y : t.x);
                float &a = x[4 * n + 2 * i + e], &b = x[4 * (n + D / 16) + 2 * i + e];
                const float back = a * turn.x + b * turn.y;
                b = b * turn.x - a * turn.y;
                a = back;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------- host
// Rows [seq, batch, heads, parts, head_dim], strides in elements of the first three and of the parts.
template <int D>
inline bool make_rows(CUtensorMap* map, const WindowAttentionArgs& a, const void* rows, const int64_t* stride, int parts, int64_t part) {
    return make_map<5>(map, rows, {D, a.seq, parts, a.heads, a.batch}, {stride[0], part, stride[2], stride[1]}, {64, kRows, 1, 1, 1},
                       CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}
// Slots that fit in shared memory, as many as are of use; strips such that blocks fill the multiprocessors evenly.
// bytes(ring, own): of shared memory.
template <typename B> inline Plan make_plan(const WindowAttentionArgs& a, int roles, B bytes) {
    Plan p{};
    p.tiles = (a.seq + kRows - 1) / kRows;
    p.reach = (a.window + kRows - 2) / kRows;
    if (p.reach > p.tiles - 1) p.reach = p.tiles - 1;
    const auto fits = [&](int ring, int own) { return bytes(ring, own) <= kMaxShared; };
    int ring = p.reach < 1 ? 2 : p.reach + 1, own = 2;
    for (bool grown = true; grown;) {
        grown = false;
        if (ring < p.reach + 1 + 2 * kGroups && fits(ring + 1, own)) { ++ring; grown = true; }
        if (own < 2 * kGroups && fits(ring, own + 1)) { ++own; grown = true; }
    }
    p.ring = Slots(ring);
    p.own = Slots(own);
    int device = 0, processors = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    int64_t best = INT64_MAX;
    for (int strips = 1; strips <= p.tiles; ++strips) {
        const int strip = (p.tiles + strips - 1) / strips;
        const int64_t blocks = (int64_t)a.batch * a.heads * roles * ((p.tiles + strip - 1) / strip);
        const int64_t cost = (blocks + processors - 1) / processors * (2 * strip + (strips > 1 ? p.reach : 0) + 2);
        if (cost < best) { best = cost; p.strip = strip; p.strips = (p.tiles + strip - 1) / strip; }
    }
    return p;
}
template <typename F, typename M> inline int launch(F* kernel, const WindowAttentionArgs& a, const Plan& p, const M& maps, int roles, int bytes) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return (int)e;
    kernel<<<(unsigned)((int64_t)a.batch * a.heads * p.strips * roles), kThreads, bytes, (cudaStream_t)a.stream>>>(a, p, maps);
    return (int)cudaGetLastError();
}

}  // namespace window_attention
