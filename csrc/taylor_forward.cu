// o_t = (F(q_t) G S + sum_j w_tj v_j) / (the same with v = 1): S the state before the chunk, G the weights g_p, j <= t
// inside the chunk, w = 1 + s + s^2/2. One block a (segment, head), chunks in order, state in accumulators.
#include "taylor_common.cuh"
using namespace taylor;

template <int D>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ TaylorArgs p) {
    extern __shared__ __align__(128) bf16 shared[];
    bf16* q = shared;                                                  // q, k, v: two stages
    bf16* k = q + 2 * kChunk * kNarrow;
    bf16* v = k + 2 * kChunk * kNarrow;
    bf16* turned = v + 2 * kChunk * kWide<D>;
    bf16* before = turned + 32 * kTransposed;
    const int head = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Segment s;
    if (!find_segment(p, blockIdx.x, s)) return;
    auto fetch = [&](int chunk) {
        const int begin = chunk * kChunk, valid = min(kChunk, s.length - begin), b = chunk & 1;
        load_narrow(q + b * kChunk * kNarrow, token_row(p.q, p.q_stride, s.batch, s.first + begin, head), p.q_stride[1], valid, p.features);
        load_narrow(k + b * kChunk * kNarrow, token_row(p.k, p.k_stride, s.batch, s.first + begin, head), p.k_stride[1], valid, p.features);
        load_rows<D, kWide<D>>(v + b * kChunk * kWide<D>, token_row(p.v, p.v_stride, s.batch, s.first + begin, head), p.v_stride[1], valid);
        copies_commit();
    };
    float state[D / 8 + 1][4];
    clear(state);
    fetch(0);
    if (p.space) load_state<D, false>(state, p, blockIdx.x, head, s.doc);
    const int chunks = (s.length + kChunk - 1) / kChunk;
    for (int c = 0; c < chunks; ++c) {
        const int valid = min(kChunk, s.length - c * kChunk);
        const bf16* qc = q + (c & 1) * kChunk * kNarrow;
        const bf16* kc = k + (c & 1) * kChunk * kNarrow;
        bf16* vc = v + (c & 1) * kChunk * kWide<D>;
        set_ones<D>(vc, valid);
        copies_wait();
        __syncthreads();
        if (c + 1 < chunks) fetch(c + 1);
        transpose_rows(turned, kc);
        publish_state<D>(before, state, p.scale);
        __syncthreads();
        if (warp * 16 < valid) {
            float acc[D / 8 + 1][4];
            clear(acc);
            uint32_t x0[8], x1[8], a[4];
            load_own_rows(x0, x1, qc);
            if (c > 0 || p.space) {
                #pragma unroll
                for (int tile = 0; tile < 10; ++tile) {
                    features(a, x0, x1, tile);
                    times_rows<D / 8 + 1, kWide<D>>(acc, a, before + tile * 16 * kWide<D>);
                }
            }
            const uint32_t own[4] = {x0[0], x1[0], x0[4], x1[4]};
            #pragma unroll 1
            for (int j = 0; j <= warp; ++j) {
                float w[2][4];
                raw_scores(w, own, kc + j * 16 * kNarrow);
                #pragma unroll
                for (int n = 0; n < 2; ++n)
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float x = w[n][i] * p.scale;
                        x = fmaf(x, fmaf(x, 0.5f, 1.f), 1.f);
                        w[n][i] = j == warp && element_column(n, i) > element_row(i) ? 0.f : x;
                    }
                pack_operand(a, w);
                times_rows<D / 8 + 1, kWide<D>>(acc, a, vc + j * 16 * kWide<D>);
            }
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float den = __shfl_sync(~0u, acc[D / 8][2 * half], lane & ~3), inverse = 1.f / den;
                const int row = warp * 16 + (lane >> 2) + half * 8;
                if (row >= valid) continue;
                const int64_t at = token_index(p, s.batch, s.first + c * kChunk + row, head);
                if ((lane & 3) == 0) p.denominator[at] = den;
                bf16* o = (bf16*)p.o + at * D + (lane & 3) * 2;
                #pragma unroll
                for (int n = 0; n < D / 8; ++n)
                    *reinterpret_cast<uint32_t*>(o + n * 8) = pack(acc[n][2 * half] * inverse, acc[n][2 * half + 1] * inverse);
            }
        }
        if (c + 1 < chunks) update_state<D, false>(state, turned, vc, valid);
    }
}

template <int D> static int run(const TaylorArgs& p) {
    const int bytes = (2 * kChunk * (2 * kNarrow + kWide<D>) + 32 * kTransposed + kRows * kWide<D>) * (int)sizeof(bf16);
    return launch(forward<D>, dim3(p.slots, p.heads), bytes, p);
}
extern "C" int taylor_forward(const TaylorArgs* p) { TAYLOR_DISPATCH(p->head_dim, run<kD>(*p)) }
