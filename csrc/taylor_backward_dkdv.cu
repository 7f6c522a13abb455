// With R = sum_t F(q_t) e_t^T over the tokens behind the chunk (e of taylor_grad_rows.cu):
//   dv_j = (F(k_j) G R)[:D]            + sum_t w_tj e_t[:D]
//   dk_j = (dF/dk)^T G R [v_j | 1]     + scale * sum_t (1 + s_tj) (e_t . [v_j | 1]) q_t,   t >= j inside the chunk.
// The forward's walk backwards.
#include "taylor_common.cuh"
using namespace taylor;

template <int D> constexpr int kStages = D <= 96 ? 2 : 1;

template <int D>
__global__ void __launch_bounds__(kThreads) backward_dkdv(const __grid_constant__ TaylorArgs p) {
    constexpr int Stages = kStages<D>;
    extern __shared__ __align__(128) bf16 shared[];
    bf16* q = shared;
    bf16* k = q + Stages * kChunk * kNarrow;
    bf16* v = k + Stages * kChunk * kNarrow;
    bf16* e = v + Stages * kChunk * kWide<D>;
    bf16* turned = e + Stages * kChunk * kWide<D>;
    bf16* behind = turned + 32 * kTransposed;
    const int head = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Segment s;
    if (!find_segment(p, blockIdx.x, s)) return;
    auto fetch = [&](int chunk) {
        const int begin = chunk * kChunk, valid = min(kChunk, s.length - begin), b = chunk % Stages;
        load_narrow(q + b * kChunk * kNarrow, token_row(p.q, p.q_stride, s.batch, s.first + begin, head), p.q_stride[1], valid, p.features);
        load_narrow(k + b * kChunk * kNarrow, token_row(p.k, p.k_stride, s.batch, s.first + begin, head), p.k_stride[1], valid, p.features);
        load_rows<D, kWide<D>>(v + b * kChunk * kWide<D>, token_row(p.v, p.v_stride, s.batch, s.first + begin, head), p.v_stride[1], valid);
        load_rows<kWide<D>, kWide<D>>(e + b * kChunk * kWide<D>, (const bf16*)p.grad_rows + token_index(p, s.batch, s.first + begin, head) * kWide<D>,
                                      (int64_t)p.heads * kWide<D>, valid);
        copies_commit();
    };
    float state[D / 8 + 1][4];
    clear(state);
    const int chunks = (s.length + kChunk - 1) / kChunk;
    if (Stages == 2) fetch(chunks - 1);
    if (p.space) load_state<D, true>(state, p, blockIdx.x, head, s.doc);
    for (int c = chunks - 1; c >= 0; --c) {
        const int valid = min(kChunk, s.length - c * kChunk), b = c % Stages, tiles = (valid + 15) / 16;
        const bf16* qc = q + b * kChunk * kNarrow;
        const bf16* kc = k + b * kChunk * kNarrow;
        bf16* vc = v + b * kChunk * kWide<D>;
        const bf16* ec = e + b * kChunk * kWide<D>;
        if (Stages == 1) { __syncthreads(); fetch(c); }
        set_ones<D>(vc, valid);
        copies_wait();
        __syncthreads();
        if (Stages == 2 && c > 0) fetch(c - 1);
        transpose_rows(turned, qc);
        publish_state<D>(behind, state, p.scale);
        __syncthreads();
        if (warp < tiles) {
            const bool with_state = c + 1 < chunks || p.space;
            uint32_t x0[8], x1[8], a[4];
            load_own_rows(x0, x1, kc);
            const uint32_t own[4] = {x0[0], x1[0], x0[4], x1[4]};
            {
                float dv[D / 8][4];
                clear(dv);
                if (with_state) {
                    #pragma unroll
                    for (int tile = 0; tile < 10; ++tile) {
                        features(a, x0, x1, tile);
                        times_rows<D / 8, kWide<D>>(dv, a, behind + tile * 16 * kWide<D>);
                    }
                }
                #pragma unroll 1
                for (int j = warp; j < tiles; ++j) {                   // rows: own keys; columns: queries
                    float w[2][4];
                    raw_scores(w, own, qc + j * 16 * kNarrow);
                    #pragma unroll
                    for (int n = 0; n < 2; ++n)
                        #pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            float x = w[n][i] * p.scale;
                            x = fmaf(x, fmaf(x, 0.5f, 1.f), 1.f);
                            w[n][i] = j == warp && element_column(n, i) < element_row(i) ? 0.f : x;
                        }
                    pack_operand(a, w);
                    times_rows<D / 8, kWide<D>>(dv, a, ec + j * 16 * kWide<D>);
                }
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = warp * 16 + (lane >> 2) + half * 8;
                    if (row >= valid) continue;
                    bf16* to = (bf16*)p.dv + token_index(p, s.batch, s.first + c * kChunk + row, head) * D + (lane & 3) * 2;
                    #pragma unroll
                    for (int n = 0; n < D / 8; ++n)
                        *reinterpret_cast<uint32_t*>(to + n * 8) = pack(dv[n][2 * half], dv[n][2 * half + 1]);
                }
            }
            float dk[2][4];
            clear(dk);
            ValueRows<D> rows;
            load_value_rows<D>(rows, vc);
            if (with_state) through_state<D>(dk, rows, behind, x0, x1);
            #pragma unroll 1
            for (int j = warp; j < tiles; ++j) {
                float x[2][4], g[2][4];
                raw_scores(x, own, qc + j * 16 * kNarrow);
                clear(g);
                times_rows_transposed<D>(g, rows, ec + j * 16 * kWide<D>);
                #pragma unroll
                for (int n = 0; n < 2; ++n)
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float d = g[n][i] * fmaf(x[n][i], p.scale, 1.f) * p.scale;
                        g[n][i] = j == warp && element_column(n, i) < element_row(i) ? 0.f : d;
                    }
                pack_operand(a, g);
                times_rows<2, kNarrow>(dk, a, qc + j * 16 * kNarrow);
            }
            store_narrow((bf16*)p.dk + token_index(p, s.batch, s.first + c * kChunk, head) * p.features, (int64_t)p.heads * p.features, dk, valid, p.features);
        }
        if (c > 0) update_state<D, false>(state, turned, ec, valid);
    }
}

template <int D> static int run(const TaylorArgs& p) {
    const int bytes = (kStages<D> * kChunk * 2 * (kNarrow + kWide<D>) + 32 * kTransposed + kRows * kWide<D>) * (int)sizeof(bf16);
    return launch(backward_dkdv<D>, dim3(p.slots, p.heads), bytes, p);
}
extern "C" int taylor_backward_dkdv(const TaylorArgs* p) { TAYLOR_DISPATCH(p->head_dim, run<kD>(*p)) }
