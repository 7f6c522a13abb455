// dq_t = (dF/dq)^T G S e_t + scale * sum_j (1 + s_tj) (e_t . [v_j | 1]) k_j: S the state before the chunk, j <= t inside
// it, e the rows of taylor_grad_rows.cu. Same walk as the forward.
#include "taylor_common.cuh"
using namespace taylor;

template <int D> constexpr int kStages = D <= 96 ? 2 : 1;

template <int D>
__global__ void __launch_bounds__(kThreads) backward_dq(const __grid_constant__ TaylorArgs p) {
    constexpr int Stages = kStages<D>;
    extern __shared__ __align__(128) bf16 shared[];
    bf16* q = shared;
    bf16* k = q + Stages * kChunk * kNarrow;
    bf16* v = k + Stages * kChunk * kNarrow;
    bf16* e = v + Stages * kChunk * kWide<D>;
    bf16* turned = e + Stages * kChunk * kWide<D>;
    bf16* before = turned + 32 * kTransposed;
    const int head = blockIdx.y, warp = threadIdx.x >> 5;
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
    if (Stages == 2) fetch(0);
    if (p.space) load_state<D, false>(state, p, blockIdx.x, head, s.doc);
    const int chunks = (s.length + kChunk - 1) / kChunk;
    for (int c = 0; c < chunks; ++c) {
        const int valid = min(kChunk, s.length - c * kChunk), b = c % Stages;
        const bf16* qc = q + b * kChunk * kNarrow;
        const bf16* kc = k + b * kChunk * kNarrow;
        bf16* vc = v + b * kChunk * kWide<D>;
        const bf16* ec = e + b * kChunk * kWide<D>;
        if (Stages == 1) { __syncthreads(); fetch(c); }
        set_ones<D>(vc, valid);
        copies_wait();
        __syncthreads();
        if (Stages == 2 && c + 1 < chunks) fetch(c + 1);
        transpose_rows(turned, kc);
        publish_state<D>(before, state, p.scale);
        __syncthreads();
        if (warp * 16 < valid) {
            float dq[2][4];
            clear(dq);
            uint32_t x0[8], x1[8];
            load_own_rows(x0, x1, qc);
            ValueRows<D> rows;
            load_value_rows<D>(rows, ec);
            if (c > 0 || p.space) through_state<D>(dq, rows, before, x0, x1);
            const uint32_t own[4] = {x0[0], x1[0], x0[4], x1[4]};
            #pragma unroll 1
            for (int j = 0; j <= warp; ++j) {
                float x[2][4], g[2][4];
                raw_scores(x, own, kc + j * 16 * kNarrow);
                clear(g);
                times_rows_transposed<D>(g, rows, vc + j * 16 * kWide<D>);
                #pragma unroll
                for (int n = 0; n < 2; ++n)
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float d = g[n][i] * fmaf(x[n][i], p.scale, 1.f) * p.scale;
                        g[n][i] = j == warp && element_column(n, i) > element_row(i) ? 0.f : d;
                    }
                uint32_t a[4];
                pack_operand(a, g);
                times_rows<2, kNarrow>(dq, a, kc + j * 16 * kNarrow);
            }
            store_narrow((bf16*)p.dq + token_index(p, s.batch, s.first + c * kChunk, head) * p.features,
                         (int64_t)p.heads * p.features, dq, valid, p.features);
        }
        if (c + 1 < chunks) update_state<D, false>(state, turned, vc, valid);
    }
}

template <int D> static int run(const TaylorArgs& p) {
    const int bytes = (kStages<D> * kChunk * 2 * (kNarrow + kWide<D>) + 32 * kTransposed + kRows * kWide<D>) * (int)sizeof(bf16);
    return launch(backward_dq<D>, dim3(p.slots, p.heads), bytes, p);
}
extern "C" int taylor_backward_dq(const TaylorArgs* p) { TAYLOR_DISPATCH(p->head_dim, run<kD>(*p)) }
