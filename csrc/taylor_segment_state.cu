// Sum over one segment: state = sum_t F(x_t) y_t^T, x = k, y = [v | 1] (or, for the backward, x = q and
// y = [grad_o / den | -(grad_o . o) / den]). One block a (segment, head); fp32 result to the work space.
#include "taylor_common.cuh"
using namespace taylor;

template <int D, bool Exact, bool Reverse>
__global__ void __launch_bounds__(kThreads) segment_state(const __grid_constant__ TaylorArgs p) {
    extern __shared__ __align__(128) bf16 shared[];
    bf16* x = shared;                                                  // two stages
    bf16* y = x + 2 * kChunk * kNarrow;                                // two stages
    bf16* turned = y + 2 * kChunk * kWide<D>;
    const int head = blockIdx.y;
    Segment s;
    if (!find_segment(p, blockIdx.x, s)) return;
    const int64_t* xs = Reverse ? p.q_stride : p.k_stride;
    const bf16* from_x = (const bf16*)(Reverse ? p.q : p.k) + s.batch * xs[0] + s.first * xs[1] + head * xs[2];
    const int64_t ys = Reverse ? (int64_t)p.heads * kWide<D> : p.v_stride[1];
    const bf16* from_y = Reverse
        ? (const bf16*)p.grad_rows + (((int64_t)s.batch * p.seq + s.first) * p.heads + head) * kWide<D>
        : (const bf16*)p.v + s.batch * p.v_stride[0] + s.first * p.v_stride[1] + head * p.v_stride[2];
    auto fetch = [&](int chunk) {
        const int begin = chunk * kChunk, valid = min(kChunk, s.length - begin), b = chunk & 1;
        load_narrow(x + b * kChunk * kNarrow, from_x + begin * xs[1], xs[1], valid, p.features);
        load_rows<Reverse ? kWide<D> : D, kWide<D>>(y + b * kChunk * kWide<D>, from_y + begin * ys, ys, valid);
        copies_commit();
    };
    float state[D / 8 + 1][4];
    clear(state);
    const int chunks = (s.length + kChunk - 1) / kChunk;
    fetch(0);
    for (int c = 0; c < chunks; ++c) {
        const int valid = min(kChunk, s.length - c * kChunk), b = c & 1;
        if (!Reverse) set_ones<D>(y + b * kChunk * kWide<D>, valid);
        copies_wait();
        __syncthreads();
        if (c + 1 < chunks) fetch(c + 1);
        transpose_rows(turned, x + b * kChunk * kNarrow);
        __syncthreads();
        update_state<D, Exact>(state, turned, y + b * kChunk * kWide<D>, valid);
    }
    store_state<D>(state, slot_state<D>(p, p.space, blockIdx.x, head));
}

template <int D> static int run(const TaylorArgs& p) {
    const int bytes = (2 * kChunk * (kNarrow + kWide<D>) + 32 * kTransposed) * (int)sizeof(bf16);
    dim3 grid(p.slots, p.heads);
    if (p.reverse) return p.exact ? launch(segment_state<D, true, true>, grid, bytes, p)
                                  : launch(segment_state<D, false, true>, grid, bytes, p);
    return p.exact ? launch(segment_state<D, true, false>, grid, bytes, p)
                   : launch(segment_state<D, false, false>, grid, bytes, p);
}
extern "C" int taylor_segment_state(const TaylorArgs* p) { TAYLOR_DISPATCH(p->head_dim, run<kD>(*p)) }
