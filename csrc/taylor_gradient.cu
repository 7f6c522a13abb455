// Gradients of q and k, contractions over the value columns. With e_t = [grad_o_t | -(grad_o_t . o_t)] / den_t:
//   forwards   dq_t = (dF/dq)^T G S e_t       + scale * sum_j (1 + s_tj) (e_t . [v_j | 1]) k_j, j <= t inside the chunk,
//   backwards  dk_j = (dF/dk)^T G R [v_j | 1] + scale * sum_t (1 + s_tj) (e_t . [v_j | 1]) q_t, t >= j inside the chunk,
// and for head_dim 64 dv as in taylor_output.cu, whose R and whose chunk are the same. S and R are the states before and behind the
// chunk. Forwards the last column's part is kept apart until grad_o_t . o_t is known, which comes out of the same products:
// F(q_t) G S [grad_o_t | 0] + sum_j w_tj grad_o_t . v_j over den_t.
// One block a (segment, head).
#include "taylor_common.cuh"
using namespace taylor;

// How much fits: registers of the roles, stages of the ring, width of the pieces that outputs are made in.
template <int D> struct Shape {
    static constexpr bool Narrow = D <= 64, Wide = D > 112;
    static constexpr bool Values = Narrow;           // dv beside dk
    static constexpr int Groups = Narrow ? 2 : 1, Makers = Narrow ? 128 : 64;       // threads that make features
    // Whole warpgroups, for their registers: beside the warp that loads, others idle.
    static constexpr int Loader = kStateWarps + Groups * 4 + Makers / 32, Threads = (Loader + 4) / 4 * 128;
    // Registers of a thread by role: the sum over warpgroups is what a block starts with, 504 and 480.
    static constexpr int State = Narrow ? 64 : Wide ? 104 : 96, Output = Narrow || Wide ? 112 : 136, Feature = 56, Load = 32;
    // Rows of the state, and keys, that are multiplied together: the more, the less often the rows on the left are read.
    static constexpr int Features = Narrow || Wide ? 64 : 80;
    template <bool Reverse> static constexpr int Keys = Reverse || !(Narrow || Wide) ? 64 : 32;
    using Tiles = Layout<D, D, true, Narrow ? 3 : 2, D <= 96 ? 2 : 1, D <= 80 ? 2 : 1, 1, Makers>;
};

// Permutation matrices P_r[i][i + r mod 16] = 1, r = 1 .. 7, as right operands of `mma`: four words a lane.
constexpr int kPermutations = 7 * 32 * 16;
__device__ __forceinline__ void write_permutations(uint32_t to) {
    for (int i = threadIdx.x; i < 7 * 32; i += blockDim.x) {
        const int r = i / 32 + 1, g = i % 32 >> 2, t = i & 3;
        #pragma unroll
        for (int n = 0; n < 2; ++n)
            #pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int from = (g + 8 * n - r & 15) - 8 * k;
                store_shared(to + i * 16 + n * 8 + k * 4, from == 2 * t ? 0x3f80u : from == 2 * t + 1 ? 0x3f800000u : 0u);
            }
    }
}

// dx += (dF/dx)^T d for the features [16 tile, 16 tile + 16): d [16 rows][16 features] of this warp, in an accumulator.
template <int Tile>
__device__ __forceinline__ void through_features(float (&dx)[8], const float* d, const uint32_t (&x0)[8], const uint32_t (&x1)[8],
                                                 uint32_t permutations) {
    constexpr int r = Tile - 1;
    if constexpr (Tile == 0) {
        #pragma unroll
        for (int j = 0; j < 8; ++j) dx[j] += d[j];
    } else {
        #pragma unroll
        for (int n = 0; n < (Tile == 9 ? 1 : 2); ++n) {                // tile 9: eight features, then the constant one
            const uint32_t u0 = rotated(x0, r, n), u1 = rotated(x1, r, n);
            const float times = Tile == 1 ? 2.f : 1.f;
            dx[4 * n] += times * d[4 * n] * low(u0);
            dx[4 * n + 1] += times * d[4 * n + 1] * high(u0);
            dx[4 * n + 2] += times * d[4 * n + 2] * low(u1);
            dx[4 * n + 3] += times * d[4 * n + 3] * high(u1);
        }
        // The other factor: element i of d * x goes to element i + r. For r = 8 that is this lane's own second half.
        if constexpr (Tile == 9) {
            dx[4] += d[0] * low(x0[0]); dx[5] += d[1] * high(x0[0]);
            dx[6] += d[2] * low(x1[0]); dx[7] += d[3] * high(x1[0]);
        } else if constexpr (Tile > 1) {
            const uint32_t a[4] = {mul2(pack(d[0], d[1]), x0[0]), mul2(pack(d[2], d[3]), x1[0]),
                                   mul2(pack(d[4], d[5]), x0[4]), mul2(pack(d[6], d[7]), x1[4])};
            const uint4 b = load_shared_vector(permutations + ((r - 1) * 32 + (threadIdx.x & 31)) * 16);
            mma(dx, a, b.x, b.y);
            mma(dx + 4, a, b.z, b.w);
        }
    }
}
// The same for tiles First .. First + Count - 1, d their accumulators in a row.
template <int First, int Count>
__device__ __forceinline__ void through_tiles(float (&dx)[8], const float* d, const uint32_t (&x0)[8],
                                              const uint32_t (&x1)[8], uint32_t permutations) {
    through_features<First>(dx, d, x0, x1, permutations);
    if constexpr (Count > 1) through_tiles<First + 1, Count - 1>(dx, d + 8, x0, x1, permutations);
}

// The lane's part of x . d for rows g and g + 8 of the warp, d in an accumulator.
__device__ __forceinline__ float2 row_products(const float* d, const uint32_t (&x0)[8], const uint32_t (&x1)[8]) {
    return {low(x0[0]) * d[0] + high(x0[0]) * d[1] + low(x0[4]) * d[4] + high(x0[4]) * d[5],
            low(x1[0]) * d[2] + high(x1[0]) * d[3] + low(x1[4]) * d[6] + high(x1[4]) * d[7]};
}

// dx += (dF/dx)^T z for 16 rows x, z one row of features at `last`: z's first tile, and x times the symmetric matrix of the others,
// in two bf16 terms. x: the rows as left operand.
__device__ __forceinline__ void add_column(float (&dx)[8], const uint32_t (&x)[4], uint32_t last) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    auto entry = [&](int a, int b) {                 // of x_a x_b, see taylor_common.cuh
        const int r = b - a & 15, row = r < 8 ? 16 * (r + 1) + a : r == 8 ? 144 + (a & 7) : 16 * (17 - r) + b;
        const float z = __uint_as_float(load_shared(last + row * 4));
        return r == 0 ? 2.f * z : z;
    };
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        uint32_t high_term[2], low_term[2];
        #pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float z0 = entry(8 * k + 2 * t, 8 * n + g), z1 = entry(8 * k + 2 * t + 1, 8 * n + g);
            high_term[k] = pack(z0, z1);
            low_term[k] = pack(z0 - low(high_term[k]), z1 - high(high_term[k]));
        }
        mma(dx + 4 * n, x, high_term[0], high_term[1]);
        mma(dx + 4 * n, x, low_term[0], low_term[1]);
        const float2 z = load_shared2(last + (8 * n + 2 * t) * 4);
        dx[4 * n] += z.x; dx[4 * n + 1] += z.y;
        dx[4 * n + 2] += z.x; dx[4 * n + 3] += z.y;
    }
}

// The gradient that comes through the published state, Features rows of it at a time: the next ones are multiplied while
// those before go through the features' derivatives.
// u: operand of the wide rows, whose last column is 1 backwards, taken to be 0 forwards. products: forwards, the lane's part of
// F(x) . d for rows g and g + 8; features of the second order come twice in x . (dF/dx)^T d.
template <int D, int Count>
__device__ __forceinline__ void multiply_state(float (&d)[Count / 2], uint64_t u, uint64_t state, int first) {
    wgmma_begin();
    #pragma unroll
    for (int k = 0; k < D / 16; ++k)
        Wgmma<Count>::ss(d, further(u, k * kPanel), further(state, first * 256 + k * 2 * kStatePlane), k > 0);
    wgmma_commit();
}
// How many rows are multiplied together from tile `first` on.
__host__ __device__ constexpr int piece(int features, int first) { return features < kRows - first * 16 ? features : kRows - first * 16; }
template <int D, int Features, bool Reverse, int First, int Count = piece(Features, First)>
__device__ __forceinline__ void through_state(float (&dx)[8], float2& products, float (&d)[Count / 2], uint64_t u, uint64_t state, uint32_t last,
                                              const uint32_t (&x0)[8], const uint32_t (&x1)[8], uint32_t permutations) {
    constexpr int Next = First + Count / 16, NextCount = Next < kTiles ? piece(Features, Next) : 16;
    float next[NextCount / 2];
    if constexpr (Next < kTiles) {
        multiply_state<D, NextCount>(next, u, state, Next);
        wgmma_wait<1>();
    } else {
        wgmma_wait<0>();
    }
    if (Reverse)
        #pragma unroll
        for (int n = 0; n < Count / 8; ++n) {
            const float2 z = load_shared2(last + (First * 16 + n * 8 + (threadIdx.x & 3) * 2) * 4);
            d[4 * n] += z.x; d[4 * n + 1] += z.y;
            d[4 * n + 2] += z.x; d[4 * n + 3] += z.y;
        }
    if (!Reverse && First == 0) products = row_products(d, x0, x1);
    through_tiles<First, Count / 16>(dx, d, x0, x1, permutations);
    if constexpr (Next < kTiles) {
        through_state<D, Features, Reverse, Next>(dx, products, next, u, state, last, x0, x1, permutations);
    } else if (!Reverse) {
        const float2 twice = row_products(dx, x0, x1);
        products.x = 0.5f * (products.x + twice.x) + d[Count / 2 - 4];         // the constant feature's; 0 in lanes that do not hold it
        products.y = 0.5f * (products.y + twice.y) + d[Count / 2 - 2];
    }
}

template <int D, bool Reverse>
__device__ __forceinline__ void make_gradients(const TaylorArgs& p, const CUtensorMap& values_out, const Segment& s, int head,
                                               const Shared<typename Shape<D>::Tiles>& m) {
    using L = typename Shape<D>::Tiles;
    constexpr bool Values = Reverse && Shape<D>::Values;
    constexpr int Keys = Shape<D>::template Keys<Reverse>, Groups = Shape<D>::Groups;
    const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, t = lane & 3;
    const int chunks = chunk_count(s), skipped = p.space ? 0 : 1;
    const uint32_t triangle = causal_triangle<Reverse>();
    for (int i = 0; i < chunks; ++i) {
        const int begin = chunk_begin<Reverse>(s, i), valid = min(kChunk, s.length - begin), n = i - skipped;
        const uint32_t at = m.stage(i);
        barrier_wait(m.full(i), Shared<L>::stage_parity(i));
        #pragma unroll 1
        for (int turn = __shfl_sync(~0u, threadIdx.x >> 7, 0) - kStateWarps / 4; turn < 2; turn += Groups) {
            const int half = half_of(turn, i);
            const uint32_t rows = at + L::r + (half * 64 + warp * 16) * 32;
            const uint64_t u = panel(at + L::u + half * 2048);
            const bool work = half * 64 < valid;
            float dx[8] = {}, column[8] = {};        // column: forwards, of the last column, which is the gradient of den
            float2 products = {};                    // forwards, this lane's part of den grad_o . o for its two rows
            float bias = 0.f;                        // the same over den, taken off before everything: see below
            if (n >= 0) {
                barrier_wait(m.published(n), Shared<L>::state_parity(n));
                if (work) {
                    uint32_t x0[8], x1[8];
                    float d[Shape<D>::Features / 2];
                    const uint64_t state = operand(m.state(n), kStatePlane, 128);
                    multiply_state<D, Shape<D>::Features>(d, u, state, 0);
                    load_rows(x0, x1, rows);
                    through_state<D, Shape<D>::Features, Reverse, 0>(dx, products, d, u, state, m.state(n) + L::last, x0, x1, m.base + L::bytes);
                    if (!Reverse) {
                        uint32_t own[4];
                        load_own(own, rows);
                        add_column(column, own, m.state(n) + L::last);
                    }
                }
                if (!Values && turn + Groups >= 2) warp_arrive(m.released(n));
            }
            if (Values && i > 0) {                   // dv of the chunk before has left
                bulk_stores_read();
                warp_arrive(m.empty(i - 1));
            }
            if (work) {
                uint32_t own[4];
                load_own(own, rows);
                const int first = Reverse ? half * 64 : 0, last = Reverse ? valid : min(valid, half * 64 + 64);
                #pragma unroll 1
                for (int key = first; key < last; key += Keys) {
                    float x[Keys / 2], d[Keys / 2] = {};
                    const uint64_t keys = panel(at + L::x + key * 32);
                    wgmma_begin();
                    Wgmma<Keys>::template rs<0>(x, own, keys, 0);
                    #pragma unroll
                    for (int k = 0; k < D / 16; ++k) Wgmma<Keys>::ss(d, further(u, k * kPanel), further(keys, L::y - L::x + k * kPanel), 1);
                    wgmma_commit();
                    wgmma_wait<0>();
                    // Of the first two tokens' gradients little is left, which would drown in the rounding of what cancels: their
                    // grad_o . o, whose terms one lane has, comes off at once.
                    if (!Reverse && n < 0 && key == 0 && half * 4 + warp == 0) {
                        auto weight = [&](float s) { return fmaf(s, fmaf(s, 0.5f * p.scale * p.scale, p.scale), 1.f); };
                        const float w0 = weight(x[0]), w1 = lane < 4 ? 0.f : weight(x[1]);
                        const float dot = __shfl_sync(~0u, (w0 * d[0] + w1 * d[1]) / (w0 + w1), lane & 28);
                        if (lane < 8) bias = dot;
                    }
                    const int reach = half * 64 + warp * 16 + (lane >> 2) - key - 2 * t;       // columns up to here count for row g
                    #pragma unroll
                    for (int c = 0; c < Keys / 8; ++c) {
                        float4 factor;               // {1 / den, grad_o . o / den} of two columns
                        if (Reverse) factor = load_shared4(at + L::factors + (key + c * 8 + 2 * t) * 8);
                        #pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            float &y = d[4 * c + e], &w = x[4 * c + e];
                            if (Reverse) y = fmaf(y, e & 1 ? factor.z : factor.x, -(e & 1 ? factor.w : factor.y));
                            else if (!(e & 2)) y -= bias;
                            if (!Reverse && c * 8 + (e & 1) <= reach + (e & 2) * 4) {
                                float& sum = e & 2 ? products.y : products.x;
                                sum = fmaf(y, fmaf(w, fmaf(w, 0.5f * p.scale * p.scale, p.scale), 1.f), sum);
                            }
                            w = fmaf(w, p.scale * p.scale, p.scale);
                            y *= w;
                        }
                    }
                    uint32_t a[Keys / 16][4], b[Keys / 16][4];
                    #pragma unroll
                    for (int k = 0; k < Keys / 16; ++k) {
                        pack_operand(a[k], d, k);
                        mask_operand<Reverse>(a[k], key / 16 + k - half * 4 - warp, triangle);
                        if (Reverse) continue;
                        pack_operand(b[k], x, k);
                        mask_operand<Reverse>(b[k], key / 16 + k - half * 4 - warp, triangle);
                    }
                    wgmma_begin();
                    #pragma unroll
                    for (int k = 0; k < Keys / 16; ++k) {
                        Wgmma<16>::rs<1>(dx, a[k], further(keys, k * 512), 1);
                        if (!Reverse) Wgmma<16>::rs<1>(column, b[k], further(keys, k * 512), 1);
                    }
                    wgmma_commit();
                    wgmma_wait<0>();
                }
            }
            float inverse[2];                        // forwards, 1 / den of the two rows
            #pragma unroll
            for (int side = 0; side < 2; ++side) inverse[side] = load_shared2(at + L::factors + (half * 64 + warp * 16 + (lane >> 2) + side * 8) * 8).x;
            if (!Values && turn + Groups >= 2) warp_arrive(m.empty(i));
            #pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int row = half * 64 + warp * 16 + (lane >> 2) + side * 8;
                if (!work) break;
                float factor = 1.f, dot = 0.f;       // 1 / den and grad_o . o - bias
                if (!Reverse) {
                    dot = side ? products.y : products.x;
                    dot += __shfl_xor_sync(~0u, dot, 1);
                    dot += __shfl_xor_sync(~0u, dot, 2);
                    factor = inverse[side];
                    dot *= factor;
                }
                if (row >= valid) continue;
                const int token = s.first + begin + row;
                if (!Reverse && t == 0) p.grad_dot[token_index(p, s.batch, token, head)] = dot + (side ? 0.f : bias);
                bf16* to = token_row(Reverse ? p.dk : p.dq, p.d_stride, s.batch, token, head) + t * 2;
                auto two = [&](int e) { return pack((dx[e] - dot * column[e]) * factor, (dx[e + 1] - dot * column[e + 1]) * factor); };
                *reinterpret_cast<uint32_t*>(to) = two(2 * side);
                if (p.features > 8) *reinterpret_cast<uint32_t*>(to + 8) = two(4 + 2 * side);
            }
            if constexpr (Values) {
                float dv[D / 2] = {};
                if (work) {
                    add_inside<L, Reverse>(dv, p, at, half, valid, rows, triangle, false);
                    if (n >= 0) add_through_state(dv, m, n, rows);
                }
                if (n >= 0) warp_arrive(m.released(n));
                if (!work) continue;
                // The group is done with its half of the wide rows: dv leaves from there, the stage is free when it has.
                warpgroup_sync(1 + turn);
                const int first = half * 64 + warp * 16;
                store_rows<D, true>(values_out, at + L::u + warp * kPanel + half * 2048, p, s, head, 0, s.first + begin + first, valid - first,
                                    reaches_next(p, s, valid), dv, 1.f, 1.f);
            }
        }
    }
    if (Values) bulk_stores_done();
}

template <int D, bool Reverse>
__global__ void __launch_bounds__(Shape<D>::Threads, 1) gradient(const __grid_constant__ TaylorArgs p, const __grid_constant__ Maps maps,
                                                                     const __grid_constant__ CUtensorMap values_out) {
    using L = typename Shape<D>::Tiles;
    extern __shared__ __align__(1024) char shared[];
    const Shared<L> m{address(shared)};
    write_permutations(m.base + L::bytes);
    m.init(Shape<D>::Groups * 4, maps);
    if (!p.older) wait_for_kernel_before();
    Segment s;
    const int slot = blockIdx.x % p.slots, head = blockIdx.x / p.slots;            // from a grid of two dimensions they cost registers
    if (!find_segment(p, slot, s)) return;
    const int warp = threadIdx.x >> 5;
    if (warp < kStateWarps) {
        if constexpr (Shape<D>::State * Shape<D>::Threads <= 65536) registers_down<Shape<D>::State>();
        else registers_up<Shape<D>::State>();
        carry_state<L, Reverse>(p, s, slot, head, 0, m);
    } else if (warp < kStateWarps + Shape<D>::Groups * 4) {
        registers_up<Shape<D>::Output>();
        make_gradients<D, Reverse>(p, values_out, s, head, m);
    } else {
        // Where both roles share a warpgroup they have the same registers.
        if (L::Makers == 64 || warp < Shape<D>::Loader) registers_down<Shape<D>::Feature>();
        else registers_down<Shape<D>::Load>();
        if (warp < Shape<D>::Loader) make_features<L, Reverse>(s, chunk_count(s) - 1, m);
        if (warp == Shape<D>::Loader) load_chunks<L, Reverse>(p, maps, s, head, 0, m);
    }
}

template <int D> static int run(const TaylorArgs& p) {
    const int grid = p.slots * p.heads;
    CUtensorMap values_out{};
    if (p.reverse && Shape<D>::Values &&
        !make_panels(&values_out, p, p.dv, p.d_stride, D, D, CU_TENSOR_MAP_L2_PROMOTION_NONE, 16)) return (int)cudaErrorInvalidValue;
    return launch_walk<typename Shape<D>::Tiles, kPermutations>(p.reverse ? gradient<D, true> : gradient<D, false>, grid, Shape<D>::Threads, p, values_out);
}
extern "C" int taylor_gradient(const TaylorArgs* p) { HEAD_DIM_DISPATCH(p->head_dim, run<kD>(*p)) }
