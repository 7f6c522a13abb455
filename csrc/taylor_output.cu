// Outputs that are sums of rows. Forwards, with S the state before the chunk, G the weights g_p, w = 1 + s + s^2/2:
//   o_t = (F(q_t) G S + sum_j w_tj [v_j | 1]) over its own last columns, j <= t inside the chunk; denominators go out too.
// Backwards, with R = sum_t F(q_t) / den_t [grad_o_t | ...] over the tokens behind the chunk:
//   dv_j = F(k_j) G R + sum_t w_tj / den_t grad_o_t, t >= j inside the chunk,
// for head_dim > 64: up to there taylor_gradient.cu makes dv.
// One block a (segment, head, part of the value columns where head_dim > 64).
#include "taylor_common.cuh"
using namespace taylor;

template <int W> using Tiles = Layout<W, 0, true, 4, 2, 2, 1, 128>;
constexpr int kOutputWarps = 8, kThreads = (kStateWarps + kOutputWarps + 8) * 32;
// Where a warp's 16 rows leave from: panels of 16 columns, swizzled as those that are loaded.
template <int W> constexpr int kBox = W / 16 * 512;
template <int W> constexpr int kBoxes = (Tiles<W>::bytes + 255) / 256 * 256;

template <int W, bool Reverse>
__device__ __forceinline__ void make_outputs(const TaylorArgs& p, const CUtensorMap& rows_out, const Segment& s, int head, int column, const Shared<Tiles<W>>& m) {
    using L = Tiles<W>;
    constexpr int N = Reverse ? W : W + 8;       // backwards no denominator is wanted
    const int group = __shfl_sync(~0u, threadIdx.x >> 7, 0) - kStateWarps / 4, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const int chunks = chunk_count(s), skipped = p.space ? 0 : 1;
    const uint32_t triangle = causal_triangle<Reverse>();
    for (int i = 0; i < chunks; ++i) {
        const int begin = chunk_begin<Reverse>(s, i), valid = min(kChunk, s.length - begin), half = half_of(group, i), n = i - skipped;
        const uint32_t at = m.stage(i), rows = at + L::r + (half * 64 + warp * 16) * 32;
        const bool work = half * 64 < valid;
        float acc[N / 2];
        barrier_wait(m.full(i), Shared<L>::stage_parity(i));
        if (work) add_inside<L, Reverse>(acc, p, at, half, valid, rows, triangle, true);
        if (n >= 0) {
            if (work) add_through_state(acc, m, n, rows);
            else barrier_wait(m.published(n), Shared<L>::state_parity(n));
            warp_arrive(m.released(n));
        }
        warp_arrive(m.empty(i));
        if (!work) continue;
        const int first = half * 64 + warp * 16, token = s.first + begin + first, row = lane >> 2;
        const float den[2] = {acc[N / 2 - 4], acc[N / 2 - 2]};
        if (!Reverse && (lane & 3) == 0 && column == 0) {
            #pragma unroll
            for (int side = 0; side < 2; ++side)
                if (first + row + side * 8 < valid) p.denominator[token_index(p, s.batch, token + row + side * 8, head)] = den[side];
        }
        bulk_stores_read();                          // that of the chunk before has left
        __syncwarp();
        store_rows<W, Reverse>(rows_out, m.base + kBoxes<W> + (group * 4 + warp) * kBox<W>, p, s, head, column, token, valid - first,
                               reaches_next(p, s, valid), acc, Reverse ? 1.f : 1.f / den[0], Reverse ? 1.f : 1.f / den[1]);
    }
    bulk_stores_done();
}

template <int W, bool Reverse>
__global__ void __launch_bounds__(kThreads, 1) output(const __grid_constant__ TaylorArgs p, const __grid_constant__ Maps maps,
                                                      const __grid_constant__ CUtensorMap rows_out) {
    using L = Tiles<W>;
    extern __shared__ __align__(1024) char shared[];
    const Shared<L> m{address(shared)};
    const int parts = (p.head_dim + W - 1) / W, slot = blockIdx.x / parts, column = blockIdx.x % parts * W, head = blockIdx.y;
    m.init(kOutputWarps, maps);
    if (!p.older) wait_for_kernel_before();
    Segment s;
    if (!find_segment(p, slot, s)) return;
    const int warp = threadIdx.x >> 5;
    if (warp < kStateWarps) {
        registers_down<64>();
        carry_state<L, Reverse>(p, s, slot, head, column, m);
    } else if (warp < kStateWarps + kOutputWarps) {
        registers_up<112>();
        make_outputs<W, Reverse>(p, rows_out, s, head, column, m);
    } else if (warp < kStateWarps + kOutputWarps + 4) {
        registers_down<56>();
        make_features<L, Reverse>(s, chunk_count(s) - 1, m);
    } else {
        registers_down<32>();
        if (warp == kStateWarps + kOutputWarps + 4) load_chunks<L, Reverse>(p, maps, s, head, column, m);
    }
}

template <int W> static int run(const TaylorArgs& p) {
    constexpr int rows = kBoxes<W> - Tiles<W>::bytes + kOutputWarps * kBox<W>;
    const dim3 grid(p.slots * ((p.head_dim + W - 1) / W), p.heads);
    CUtensorMap rows_out;
    if (!make_panels(&rows_out, p, p.reverse ? p.dv : p.o, p.reverse ? p.d_stride : p.o_stride, p.head_dim, W, CU_TENSOR_MAP_L2_PROMOTION_NONE, 16)) return (int)cudaErrorInvalidValue;
    return launch_walk<Tiles<W>, rows>(p.reverse ? output<W, true> : output<W, false>, grid, kThreads, p, rows_out);
}
extern "C" int taylor_output(const TaylorArgs* p) { HEAD_DIM_DISPATCH(p->head_dim, run<kColumns<kD>>(*p)) }
