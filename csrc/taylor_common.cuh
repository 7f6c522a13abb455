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
//   2 to 8 warps make the features that the state takes in;
//   1 warp has the chunks ahead copied by the tensor memory accelerator.
// Forwards x = k and y = [v | 1 x 8]: every lane finds the denominator in its own last column. Backwards x = q / den and
// y = [grad_o | -(grad_o . o) | 0 x 7]. What is loaded lies in shared memory as panels of 16 columns, 32 swizzled bytes a token,
// a sector of device memory; what is made as planes of 8 columns, 16 bytes a row, unswizzled.
#pragma once
#include "hopper.cuh"
#include "taylor_args.h"

namespace taylor {

constexpr int kChunk = 128, kTiles = 10, kRows = kTiles * 16;
constexpr int kStateWarps = 12;                  // and 4 or 8 output warps, 2 to 8 for features, 1 that loads
constexpr int kPanel = kChunk * 32;              // bytes of 16 columns of a chunk
constexpr int kStatePlane = kRows * 16;          // bytes from plane to plane of the published state
constexpr int kHalf = kChunk / 2, kFeaturePlane = kHalf * 16 + 16, kFeatures = kRows / 8 * kFeaturePlane;     // features of half a chunk
using bf16 = __nv_bfloat16;

// ---------------------------------------------------------------------------------------------------- segments
struct Segment {
    int doc, batch, first, length;               // tokens [first, first + length) of row `batch`,
    int begin, end;                              // of a document [begin, end)
};

__device__ __forceinline__ int first_slot(const TaylorArgs& p, int doc) {
    return p.cu_seqlens ? p.cu_seqlens[doc] / p.segment + doc : doc * p.segments;
}

// The segment of a slot; false where the slot is unused. Document i of a pack starts at slot cu[i] / segment + i.
__device__ __forceinline__ bool find_segment(const TaylorArgs& p, int slot, Segment& s) {
    if (p.cu_seqlens) {
        int lo = 0, hi = p.docs - 1;
        while (lo < hi) {
            int mid = (lo + hi + 1) / 2;
            if (first_slot(p, mid) <= slot) lo = mid; else hi = mid - 1;
        }
        s.doc = lo; s.batch = 0;
        s.begin = p.cu_seqlens[lo]; s.end = p.cu_seqlens[lo + 1];
    } else {
        s.doc = s.batch = slot / p.segments;
        s.begin = 0; s.end = p.seq;
    }
    s.first = s.begin + (slot - first_slot(p, s.doc)) * p.segment;
    s.length = min(p.segment, s.end - s.first);
    return s.length > 0;
}
// Whether a chunk of `valid` tokens ends before its 128th, at a token of the next document.
__device__ __forceinline__ bool reaches_next(const TaylorArgs& p, const Segment& s, int valid) { return valid < kChunk && s.end < p.seq; }
__device__ __forceinline__ int chunk_count(const Segment& s) { return (s.length + kChunk - 1) / kChunk; }
// Where the chunk handled in step i of a walk begins.
template <bool Backwards> __device__ __forceinline__ int chunk_begin(const Segment& s, int i) {
    return (Backwards ? chunk_count(s) - 1 - i : i) * kChunk;
}

// Row `token` of [batch, seq, heads, ...].
template <typename T> __device__ __forceinline__ auto* token_row(T* x, const int64_t* stride, int batch, int token, int head) {
    using Row = std::conditional_t<std::is_const_v<T>, const bf16, bf16>;
    return (Row*)x + batch * stride[0] + token * stride[1] + head * stride[2];
}
// Its index in contiguous [batch, heads, seq].
__device__ __forceinline__ int64_t token_index(const TaylorArgs& p, int batch, int token, int head) {
    return ((int64_t)batch * p.heads + head) * p.seq + token;
}

// ---------------------------------------------------------------------------------------------------- shared memory
// One stage of the ring: x and y feed the state; r (narrow) and u (U columns) are the rows that outputs are made for.
// Terms: 2 where features keep 16 bits, in two bf16 terms, for the state that is handed to the user.
// Makers: threads that make features.
template <int W, int U, bool Rows, int Stages_, int Published_, int Halves_, int Terms_, int Makers_> struct Layout {
    static constexpr int Stages = Stages_, Published = Published_, Halves = Halves_, Terms = Terms_, Columns = W;
    static constexpr int Makers = Makers_, RowColumns = U;
    static constexpr bool WithRows = Rows;
    // Where no outputs are made the walk goes the other way: it ends with the tokens in the L2 cache that outputs begin with.
    template <bool Reverse> static constexpr bool Backwards = Reverse == Rows;
    static constexpr int x = 0, r = x + kPanel, y = r + (Rows ? kPanel : 0), ones = y + W / 16 * kPanel, u = ones + kPanel;
    static constexpr int factors = u + U / 16 * kPanel;                // float2 {1 / den, grad_o . o / den} a token, the latter backwards
    static constexpr int stage = factors + kChunk * 8, loaded = factors - kPanel;      // the last column's panel is not a tensor's
    static constexpr int published = (W / 8 + 1) * kStatePlane, last = published;      // last: fp32 last column
    static constexpr int state = published + kRows * 4;
    static constexpr int features = Stages * stage, states = features + Halves * Terms * kFeatures;
    // The features' last buffer is not the last thing: products take in four tiles a warpgroup, two more than there are.
    static constexpr int beyond = 4 * kFeaturePlane, bars = states + (Published > 0 ? Published * state : beyond);
    static constexpr int bytes = (bars + (2 * (Stages + Published + Halves) + 1) * 8 + 15) / 16 * 16;
};
// The tensors that a stage's tiles are cut from.
struct Maps {
    CUtensorMap x, r, y, u;
};
template <class L> struct Shared {
    uint32_t base;
    __device__ uint32_t stage(int i) const { return base + i % L::Stages * L::stage; }
    __device__ uint32_t state(int i) const { return base + L::states + i % L::Published * L::state; }
    __device__ uint32_t features(int i) const { return base + L::features + i % L::Halves * L::Terms * kFeatures; }
    // Barriers: a stage is full, empty; features of half a chunk are made, used; a state is published, released; the chunk that
    // reaches into the next document has come.
    __device__ uint32_t full(int i) const { return base + L::bars + i % L::Stages * 8; }
    __device__ uint32_t empty(int i) const { return full(i) + L::Stages * 8; }
    __device__ uint32_t made(int i) const { return base + L::bars + (2 * L::Stages + i % L::Halves) * 8; }
    __device__ uint32_t used(int i) const { return made(i) + L::Halves * 8; }
    __device__ uint32_t published(int i) const { return base + L::bars + (2 * L::Stages + 2 * L::Halves + i % L::Published) * 8; }
    __device__ uint32_t released(int i) const { return published(i) + L::Published * 8; }
    __device__ uint32_t ragged() const { return base + L::bars + 2 * (L::Stages + L::Halves + L::Published) * 8; }
    __device__ static int stage_parity(int i) { return i / L::Stages & 1; }
    __device__ static int state_parity(int i) { return i / L::Published & 1; }
    __device__ static int half_parity(int i) { return i / L::Halves & 1; }
    // Called by every thread of the block.
    __device__ void init(int output_warps, const Maps& maps) const {
        if (threadIdx.x == 0) {
            prefetch_map(&maps.x);
            prefetch_map(&maps.y);
            for (int i = 0; i < L::Stages; ++i) { barrier_init(full(i), 1); barrier_init(empty(i), kStateWarps + output_warps); }
            for (int i = 0; i < L::Halves; ++i) { barrier_init(made(i), min(L::Makers, kChunk) / 32); barrier_init(used(i), kStateWarps); }
            if constexpr (L::Published > 0)
                for (int i = 0; i < L::Published; ++i) { barrier_init(published(i), kTiles); barrier_init(released(i), output_warps); }
            barrier_init(ragged(), 1);
            barriers_ready();
        }
        __syncthreads();
    }
};

// ---------------------------------------------------------------------------------------------------- loading
// Rows [batch, seq, heads, width] as panels [batch][head][panel][token][16]; boxes of `columns` columns of `tokens` tokens. Read,
// tokens past the end and columns past the width are zeros; written, they are dropped.
inline bool make_panels(CUtensorMap* map, const TaylorArgs& p, const void* rows, const int64_t (&stride)[3], int width, int columns,
                        CUtensorMapL2promotion fetch = CU_TENSOR_MAP_L2_PROMOTION_L2_128B, int tokens = kChunk) {
    return make_map<5>(map, rows, {width < 16 ? width : 16, p.seq, (width + 15) / 16, p.heads, p.batch},
                       {stride[1], 16, stride[2], stride[0]}, {16, tokens, columns / 16, 1, 1}, CU_TENSOR_MAP_SWIZZLE_32B, fetch);
}
template <class L> inline bool make_maps(Maps& maps, const TaylorArgs& p) {
    // A miss of the L2 cache brings 128 bytes where all of q | k | v, which lie side by side, is read, else 64.
    const CUtensorMapL2promotion fetch = L::RowColumns || (L::WithRows && !p.reverse) ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B
                                                                                     : CU_TENSOR_MAP_L2_PROMOTION_L2_64B;
    auto values = [&](CUtensorMap& map, bool of_grad, int columns) {
        return of_grad ? make_panels(&map, p, p.grad_o, p.grad_stride, p.head_dim, columns)
                       : make_panels(&map, p, p.v, p.stride, p.head_dim, columns, fetch);
    };
    return make_panels(&maps.x, p, p.reverse ? p.q : p.k, p.stride, p.features, 16, fetch) &&
           (!L::WithRows || make_panels(&maps.r, p, p.reverse ? p.k : p.q, p.stride, p.features, 16, fetch)) &&
           values(maps.y, p.reverse, L::Columns) && (!L::RowColumns || values(maps.u, !p.reverse, L::RowColumns));
}

// Where half a row of a panel lies.
__device__ __forceinline__ int in_panel(int token, int half) { return token * 32 + (half ^ token >> 2 & 1) * 16; }
// Operand of a product from a panel on, its K along the 16 columns, or along tokens where the product is told Trans = 1, its
// columns then in as many panels as it has.
__device__ __forceinline__ uint64_t panel(uint32_t at) { return operand(at, kPanel, 256) | (uint64_t)3 << 62; }

// Elements (first, first + 1) mod 16 of a row of 16.
__device__ __forceinline__ uint32_t pair(const uint32_t (&x)[8], int first) {
    return first % 2 ? __byte_perm(x[first / 2 & 7], x[first / 2 + 1 & 7], 0x5432) : x[first / 2 & 7];
}
// Feature tiles First .. First + 4 of one token to the planes at `to`. x: its row; z: the row times `one` (1, or 1 / den),
// lost: what rounding left out of that.
template <int First, int Terms>
__device__ __forceinline__ void write_features(uint32_t to, const uint32_t (&x)[8], const uint32_t (&z)[8], const uint32_t (&lost)[8],
                                               uint32_t one) {
    #pragma unroll
    for (int tile = First; tile < First + 5; ++tile)
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t f[4], rest[4];
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int own = half * 4 + j;
                const uint32_t other = pair(x, 2 * own + tile - 1);
                f[j] = tile == 0 ? z[own] : mul2(z[own], other);
                if (Terms == 2) rest[j] = tile == 0 ? lost[own] : fma2(lost[own], other, residual2(z[own], other, f[j]));
                if (tile == 9 && half == 1) { f[j] = j == 0 ? one & 0xffffu : 0u; rest[j] = 0; }      // the constant feature
            }
            const uint32_t at = to + (tile * 2 + half) * kFeaturePlane;
            store_shared_vector(at, f);
            if (Terms == 2) store_shared_vector(at + kFeatures, rest);
        }
}
// The features of the walk's first `chunks` chunks, half a chunk at a time: by one or two threads a token, or by two teams that
// take turns.
template <class L, bool Reverse>
__device__ __forceinline__ void make_features(const Segment& s, int chunks, const Shared<L>& m) {
    constexpr int Teams = L::Makers / kChunk > 1 ? 2 : 1;
    const int token = threadIdx.x % kHalf;
    #pragma unroll 1
    for (int n = Teams == 2 ? threadIdx.x / kChunk % 2 : 0; n < 2 * chunks; n += Teams) {
        const int i = n / 2, row = n % 2 * kHalf + token;
        const uint32_t at = m.stage(i), to = m.features(n) + token * 16;
        barrier_wait(m.full(i), Shared<L>::stage_parity(i));
        const uint4 a = load_shared_vector(at + L::x + in_panel(row, 0)), b = load_shared_vector(at + L::x + in_panel(row, 1));
        const uint32_t x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        uint32_t z[8], lost[8], one = chunk_begin<L::template Backwards<Reverse>>(s, i) + row < s.length ? 0x3f803f80u : 0u;
        if (Reverse) {
            const float inverse = load_shared2(at + L::factors + row * 8).x;
            one = pack(inverse, inverse);
        }
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
            z[j] = Reverse ? mul2(x[j], one) : x[j];
            lost[j] = Reverse && L::Terms == 2 ? residual2(x[j], one, z[j]) : 0u;
        }
        if (n >= L::Halves) barrier_wait(m.used(n), Shared<L>::half_parity(n - L::Halves));
        const bool all = L::Makers == kHalf, first = threadIdx.x % kChunk < kHalf;
        if (all || first) write_features<0, L::Terms>(to, x, z, lost, one);
        if (all || !first) write_features<5, L::Terms>(to, x, z, lost, one);
        fence_for_tensor_cores();
        warp_arrive(m.made(n));
    }
}

// One warp: has the boxes of every chunk copied and adds what is no tensor's.
template <class L, bool Reverse>
__device__ __forceinline__ void load_chunks(const TaylorArgs& p, const Maps& maps, const Segment& s, int head, int column, const Shared<L>& m) {
    constexpr int Tokens = kChunk / 32;          // of a lane, 32 apart
    constexpr bool Factors = Reverse || L::RowColumns > 0;
    const int lane = threadIdx.x & 31, chunks = chunk_count(s);
    const uint32_t filled = Reverse ? 0u : 0x3f803f80u, fill[4] = {filled, filled, filled, filled}, zeros[4] = {0, 0, 0, 0};
    auto fill_row = [](uint32_t row, const uint32_t (&x)[4]) {
        store_shared_vector(row, x);
        store_shared_vector(row + 16, x);
    };
    auto chunk = [&](int i) { return chunk_begin<L::template Backwards<Reverse>>(s, i); };
    float den[Tokens], dot[Tokens];              // of the next chunk
    auto read_factors = [&](int i) {
        #pragma unroll
        for (int j = 0; j < Tokens; ++j) {
            const int token = chunk(i) + lane + j * 32;
            const int64_t index = token_index(p, s.batch, s.first + token, head);
            den[j] = token < s.length ? p.denominator[index] : 0.f;
            dot[j] = Reverse && token < s.length ? p.grad_dot[index] : 0.f;
        }
    };
    if (Factors) read_factors(0);
    #pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
        const int valid = min(kChunk, s.length - chunk(i)), first = s.first + chunk(i);
        const uint32_t at = m.stage(i);
        const bool ragged = reaches_next(p, s, valid);                 // once a walk at most
        if (i >= L::Stages) barrier_wait(m.empty(i), Shared<L>::stage_parity(i - L::Stages));
        const uint32_t bar = ragged ? m.ragged() : m.full(i);
        if (lane == 0) {
            barrier_expect(bar, L::loaded);
            copy_box(at + L::x, &maps.x, bar, 0, first, 0, head, s.batch);
            if (L::WithRows) copy_box(at + L::r, &maps.r, bar, 0, first, 0, head, s.batch);
            copy_box(at + L::y, &maps.y, bar, 0, first, column / 16, head, s.batch);
            if (L::RowColumns) copy_box(at + L::u, &maps.u, bar, 0, first, 0, head, s.batch);
        }
        #pragma unroll
        for (int j = 0; j < Tokens; ++j) {
            const int token = lane + j * 32;
            if (i < L::Stages) fill_row(at + L::ones + token * 32, fill);
            if (!Factors) continue;
            const float inverse = token < valid ? 1.f / den[j] : 0.f;
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + L::factors + token * 8), "f"(inverse), "f"(dot[j] * inverse) : "memory");
            if (Reverse) store_shared(at + L::ones + in_panel(token, 0), pack(-dot[j], 0.f));
        }
        if (ragged) {
            warp_arrive(bar);
            barrier_wait(bar, 0);
            for (int tile = 0; tile < L::factors; tile += kPanel)
                for (int token = valid + lane; token < kChunk && tile != L::ones; token += 32) fill_row(at + tile + token * 32, zeros);
        }
        fence_for_tensor_cores();
        warp_arrive(m.full(i));
        if (Factors && i + 1 < chunks) read_factors(i + 1);
    }
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
template <int N, bool Reverse> struct State {
    float sum[N / 2];

    __device__ __forceinline__ static int tile() { return threadIdx.x >> 5; }
    __device__ __forceinline__ static int row() { return tile() * 16 + ((threadIdx.x & 31) >> 2); }

    // sum += F(x)^T y over the walk's n-th half of a chunk, not waited for. The rows behind the last tile are whatever lies there:
    // nobody reads them.
    template <class L> __device__ __forceinline__ void add(const Shared<L>& m, int n) {
        const int group = __shfl_sync(~0u, threadIdx.x >> 7, 0);
        const uint64_t y = panel(m.stage(n / 2) + L::y + n % 2 * kHalf * 32);
        const uint64_t f = operand(m.features(n) + group * 8 * kFeaturePlane, 128, kFeaturePlane);
        barrier_wait(m.made(n), Shared<L>::half_parity(n));
        wgmma_begin();
        #pragma unroll
        for (int term = 0; term < L::Terms; ++term)
            #pragma unroll
            for (int step = 0; step < kHalf / 16; ++step) add_product(further(f, term * kFeatures + step * 256), further(y, step * 512));
        wgmma_commit();
    }
    // Both halves of chunk i.
    template <class L> __device__ __forceinline__ void update(const Shared<L>& m, int i) {
        add(m, 2 * i);
        if (L::Halves == 1) {
            wgmma_wait<0>();
            warp_arrive(m.used(2 * i));
            add(m, 2 * i + 1);
        } else {
            add(m, 2 * i + 1);
            wgmma_wait<1>();
            warp_arrive(m.used(2 * i));
        }
        wgmma_wait<0>();
        warp_arrive(m.used(2 * i + 1));
    }

    // sum += f y, in two pieces where one instruction would need more registers than a thread starts with.
    __device__ __forceinline__ void add_product(uint64_t f, uint64_t y) {
        constexpr int First = N > 72 ? (N - 8) / 32 * 16 : 0;
        if constexpr (First)
            Wgmma<First>::template ss<1, 1>(reinterpret_cast<float (&)[First / 2]>(sum), f, y, 1);
        Wgmma<N - First>::template ss<1, 1>(reinterpret_cast<float (&)[(N - First) / 2]>(sum[First / 2]), f, further(y, First / 16 * kPanel), 1);
    }

    // The weighted state as bf16 operand; `last`: its last column also in fp32.
    __device__ __forceinline__ void publish(uint32_t to, uint32_t last, float scale) const {
        const int lane = threadIdx.x & 31;
        const float w0 = row_weight(row(), scale), w1 = row_weight(row() + 8, scale);
        const uint32_t at = to + tile() * 256 + (lane & 15) * 16;       // lanes 16-31: the second column tile of a pair
        auto top = [&](int n) { return pack(w0 * sum[4 * n], w0 * sum[4 * n + 1]); };
        auto bottom = [&](int n) { return pack(w1 * sum[4 * n + 2], w1 * sum[4 * n + 3]); };
        #pragma unroll
        for (int n = 0; n + 1 < N / 8; n += 2)
            stsm4(at + (n + (lane >> 4)) * kStatePlane, top(n), bottom(n), top(n + 1), bottom(n + 1));
        if (N / 8 % 2) stsm2(at + (N / 8 - 1) * kStatePlane, top(N / 8 - 1), bottom(N / 8 - 1));
        if ((lane & 3) == 0) {
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(last + row() * 4), "f"(w0 * sum[N / 2 - 4]) : "memory");
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(last + row() * 4 + 32), "f"(w1 * sum[N / 2 - 2]) : "memory");
        }
        fence_for_tensor_cores();
    }

    // The fp32 work space, [slot][head][tile][head_dim / 8 + 1][lane][4]: accumulators as the lanes hold them, eight columns after
    // eight and the last column's behind them, so that a warp's accesses are whole lines.
    __device__ __forceinline__ static float4* own_space(const TaylorArgs& p, float* space, int slot, int head) {
        return reinterpret_cast<float4*>(space) + (((int64_t)slot * p.heads + head) * kTiles + tile()) * (p.head_dim / 8 + 1) * 32 + (threadIdx.x & 31);
    }
    // Where columns 8 n .. 8 n + 7 of this block lie there, if they are real.
    __device__ __forceinline__ static bool real(const TaylorArgs& p, int n, int column) { return n == N / 8 - 1 || column + n * 8 < p.head_dim; }
    __device__ __forceinline__ static int place(const TaylorArgs& p, int n, int column) {
        return (n == N / 8 - 1 ? p.head_dim / 8 : column / 8 + n) * 32;
    }
    __device__ __forceinline__ void store(const TaylorArgs& p, float* space, int slot, int head, int column) const {
        if (tile() >= kTiles) return;
        float4* to = own_space(p, space, slot, head);
        #pragma unroll
        for (int n = 0; n < N / 8; ++n)
            if (real(p, n, column)) to[place(p, n, column)] = make_float4(sum[4 * n], sum[4 * n + 1], sum[4 * n + 2], sum[4 * n + 3]);
    }
    // The state before the segment of `slot` (behind it, if Reverse): its own entry where p.summed, else the sum over the
    // document's earlier (later) segments, in order.
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
            const float4* at = own_space(p, p.space, i, head);
            #pragma unroll
            for (int n = 0; n < N / 8; ++n)
                if (real(p, n, column)) {
                    const float4 x = at[place(p, n, column)];
                    sum[4 * n] += x.x; sum[4 * n + 1] += x.y; sum[4 * n + 2] += x.z; sum[4 * n + 3] += x.w;
                }
        }
    }
};

// The state warps' walk beside output warps: publish before each chunk, then take the chunk in.
template <class L, bool Reverse>
__device__ __forceinline__ void carry_state(const TaylorArgs& p, const Segment& s, int slot, int head, int column, const Shared<L>& m) {
    State<L::Columns + 8, Reverse> state;
    wait_for_kernel_before();                        // if only for the states
    state.load(p, slot, head, column, s.doc);
    auto at_boundary = [&](int begin) { return Reverse ? (begin + kChunk) % p.boundary == 0 || begin + kChunk >= s.length : begin % p.boundary == 0; };
    const int chunks = chunk_count(s), skipped = p.space ? 0 : 1;      // no state before the first chunk
    for (int i = 0; i < chunks; ++i) {
        const int n = i - skipped, begin = chunk_begin<Reverse>(s, i);
        if (n >= 0 && state.tile() < kTiles) {       // warps without a tile are not waited for, and could miss a release
            if (n >= L::Published) barrier_wait(m.released(n), Shared<L>::state_parity(n - L::Published));
            state.publish(m.state(n), m.state(n) + L::last, p.scale);
            warp_arrive(m.published(n));
        }
        if (!L::RowColumns && p.boundaries && at_boundary(begin))      // outputs' walks alone leave states
            state.store(p, p.boundaries, slot * ((s.length + p.boundary - 1) / p.boundary) + begin / p.boundary, head, column);
        if (i + 1 == chunks) break;                  // nobody waits for the last stage: an arrival could end the phase of the one before
        state.update(m, i);
        warp_arrive(m.empty(i));
    }
}

// ---------------------------------------------------------------------------------------------------- output rows
// The 16 values of rows g and g + 8 of this warp's 16 rows, rotated by 2t: x[m] holds elements 2t + 2m and 2t + 2m + 1.
// `rows`: a panel at the warp's first row.
__device__ __forceinline__ void load_rows(uint32_t (&x0)[8], uint32_t (&x1)[8], uint32_t rows) {
    const int lane = threadIdx.x & 31, first = in_panel(lane >> 2, 0) + (lane & 3) * 4;      // its place in 32 bytes, in which they go round
    const uint32_t row = rows + (first & ~31);
    #pragma unroll
    for (int m = 0; m < 8; ++m) {
        const uint32_t at = row + (first + 4 * m & 31);
        x0[m] = load_shared(at);
        x1[m] = load_shared(at + 256);
    }
}
// The first tile of features, which is the rows themselves, as left operand.
__device__ __forceinline__ void load_own(uint32_t (&a)[4], uint32_t rows) {
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t at = rows + in_panel((threadIdx.x & 31) >> 2, half) + (threadIdx.x & 3) * 4;
        a[2 * half] = load_shared(at);
        a[2 * half + 1] = load_shared(at + 256);
    }
}
// Elements (2t + 8 half + r, and the next) mod 16 of a row held as above.
__device__ __forceinline__ uint32_t rotated(const uint32_t (&x)[8], int r, int half) { return pair(x, 8 * half + r); }
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
// Inside the chunk a row takes columns up to its own (Reverse: from its own on): masks of a 16 x 16 left operand whose
// columns begin `after` tiles behind the warp's rows. `triangle`: see causal_triangle.
template <bool Reverse> __device__ __forceinline__ void mask_operand(uint32_t (&a)[4], int after, uint32_t triangle) {
    const bool all = Reverse ? after > 0 : after < 0, some = after == 0;
    const uint32_t diagonal = all ? ~0u : some ? triangle : 0u;
    a[0] &= diagonal;
    a[Reverse ? 2 : 1] &= all || some ? ~0u : 0u;
    a[Reverse ? 1 : 2] &= all ? ~0u : 0u;
    a[3] &= diagonal;
}
template <bool Reverse> __device__ __forceinline__ uint32_t causal_triangle() {
    const int row = (threadIdx.x & 31) >> 2, column = (threadIdx.x & 3) * 2;
    return (Reverse ? column >= row : column <= row) * 0xffffu | (Reverse ? column + 1 >= row : column + 1 <= row) * 0xffff0000u;
}
// The chunk's half that an output warpgroup makes in its turn of step i: halves differ in work, so two groups swap them.
__device__ __forceinline__ int half_of(int turn, int i) { return turn ^ (i & 1); }

// What 64 rows receive inside the chunk: sum += w y over its columns up to a row's own (Reverse: w / den, from its own on). `rows`: as
// load_rows takes them. `nothing`: sum holds nothing yet.
template <class L, bool Reverse, int N>
__device__ __forceinline__ void add_inside(float (&sum)[N], const TaylorArgs& p, uint32_t stage, int half, int valid, uint32_t rows,
                                           uint32_t triangle, bool nothing) {
    uint32_t own[4];
    load_own(own, rows);
    const int warp = threadIdx.x >> 5 & 3, t = threadIdx.x & 3;
    const int from = Reverse ? half : 0, last = Reverse ? (valid + 63) / 64 : half + 1;
    #pragma unroll 1
    for (int block = from; block < last; ++block) {
        float w[32];
        wgmma_begin();
        Wgmma<64>::rs<0>(w, own, panel(stage + L::x + block * 2048), 0);
        wgmma_commit();
        wgmma_wait<0>();
        #pragma unroll
        for (int c = 0; c < 8; ++c) {
            float4 factor;                           // {1 / den, .} of two columns
            if (Reverse) factor = load_shared4(stage + L::factors + (block * 64 + c * 8 + 2 * t) * 8);
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& x = w[4 * c + e];
                x = fmaf(x, fmaf(x, 0.5f * p.scale * p.scale, p.scale), 1.f);
                if (Reverse) x *= e & 1 ? factor.z : factor.x;
            }
        }
        uint32_t a[4][4];
        #pragma unroll
        for (int k = 0; k < 4; ++k) pack_operand(a[k], w, k);
        if (block == half)
            #pragma unroll
            for (int k = 0; k < 4; ++k) mask_operand<Reverse>(a[k], k - warp, triangle);
        const uint64_t y = panel(stage + L::y + block * 2048);
        wgmma_begin();
        #pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<2 * N>::template rs<1>(sum, a[k], further(y, k * 512), !nothing || k > 0 || block > from);
        wgmma_commit();
        wgmma_wait<0>();
    }
}
// What they receive through the n-th published state: sum += F(x) G S. `rows`: as load_rows takes them.
template <class L, int N>
__device__ __forceinline__ void add_through_state(float (&sum)[N], const Shared<L>& m, int n, uint32_t rows) {
    uint32_t x0[8], x1[8], a[5][4];
    load_rows(x0, x1, rows);
    const uint64_t state = operand(m.state(n), 128, kStatePlane);
    #pragma unroll
    for (int first = 0; first < kTiles; first += 5) {
        #pragma unroll
        for (int j = 0; j < 5; ++j) features(a[j], x0, x1, first + j);
        if (first == 0) barrier_wait(m.published(n), Shared<L>::state_parity(n));
        wgmma_begin();
        #pragma unroll
        for (int j = 0; j < 5; ++j)
            Wgmma<2 * N>::template rs<1>(sum, a[j], further(state, (first + j) * 256), 1);
        wgmma_commit();
    }
    wgmma_wait<0>();
}
// 16 rows of o (Reverse: dv), W columns from `column` on, go out from a warp's accumulators, rows g times f0 and g + 8 times f1: as a box, gathered at
// `box` (W / 16 panels of 16 rows, swizzled as those that are loaded; the caller sees to it that the box before has left), or
// by the lanes where `others`, rows of the next document, follow the `valid` ones.
template <int W, bool Reverse, int N>
__device__ __forceinline__ void store_rows(const CUtensorMap& map, uint32_t box, const TaylorArgs& p, const Segment& s, int head, int column,
                                           int token, int valid, bool others, const float (&x)[N], float f0, float f1) {
    const int lane = threadIdx.x & 31, row = lane >> 2;
    auto top = [&](int c) { return pack(x[4 * c] * f0, x[4 * c + 1] * f0); };
    auto bottom = [&](int c) { return pack(x[4 * c + 2] * f1, x[4 * c + 3] * f1); };
    if (!others) {                                   // rows past the tensor's end are dropped
        #pragma unroll
        for (int c = 0; c < W / 8; c += 2)
            stsm4(box + c * 256 + in_panel(lane & 15, lane >> 4), top(c), bottom(c), top(c + 1), bottom(c + 1));
        fence_for_tensor_cores();
        __syncwarp();
        if (lane == 0) store_box(&map, box, 0, token, column / 16, head, s.batch);
        bulk_stores_commit();
        return;
    }
    bf16* to = token_row(Reverse ? p.dv : p.o, Reverse ? p.d_stride : p.o_stride, s.batch, token + row, head) + column + (lane & 3) * 2;
    #pragma unroll
    for (int c = 0; c < W / 8; ++c) {
        if (column + c * 8 >= p.head_dim) break;
        if (row < valid) *reinterpret_cast<uint32_t*>(to + c * 8) = top(c);
        if (row + 8 < valid) *reinterpret_cast<uint32_t*>(to + 8 * (Reverse ? p.d_stride : p.o_stride)[1] + c * 8) = bottom(c);
    }
}

template <typename... P, typename... A>
inline int launch(void (*kernel)(P...), dim3 grid, int threads, int bytes, void* stream, const A&... args) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return (int)e;
    // Blocks may start while the kernel before ends: see wait_for_kernel_before.
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid; config.blockDim = dim3(threads); config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)stream; config.attrs = &early; config.numAttrs = 1;
    return (int)cudaLaunchKernelEx(&config, kernel, args...);
}
// A kernel that walks chunks, with L and `Beside` bytes in shared memory.
template <class L, int Beside = 0, typename F, typename... More>
inline int launch_walk(F* kernel, dim3 grid, int threads, const TaylorArgs& p, const More&... more) {
    static_assert(L::bytes + Beside <= kMaxShared, "more shared memory than a block may have");
    Maps maps{};
    return make_maps<L>(maps, p) ? launch(kernel, grid, threads, L::bytes + Beside, p.stream, p, maps, more...) : (int)cudaErrorInvalidValue;
}

}  // namespace taylor

// Value columns of a block of the kernels that may share a head among two: whole sectors of device memory each, the second
// block perhaps fewer real ones.
template <int D> constexpr int kColumns = D <= 64 ? D : D <= 96 ? 48 : 64;
