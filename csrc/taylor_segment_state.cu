// Sum over one segment of F(x_t) y_t^T (x, y: see taylor_common.cuh), fp32, to the work space. One block a (segment, head,
// part of the value columns where head_dim > 64).
#include "taylor_common.cuh"
using namespace taylor;

constexpr int kMakers = 256, kSegmentThreads = kStateWarps * 32 + kMakers + 32;
template <int W, bool Exact> using Tiles = Layout<W, 0, false, Exact ? 4 : 5, 0, Exact ? 2 : 4, Exact ? 2 : 1, kMakers>;

template <int W, bool Exact, bool Reverse>
__global__ void __launch_bounds__(kSegmentThreads, 1) segment_state(const __grid_constant__ TaylorArgs p, const __grid_constant__ Maps maps) {
    using L = Tiles<W, Exact>;
    extern __shared__ __align__(1024) char shared[];
    const Shared<L> m{address(shared)};
    const int parts = (p.head_dim + W - 1) / W, slot = blockIdx.x / parts, column = blockIdx.x % parts * W, head = blockIdx.y;
    m.init(0, maps);
    wait_for_kernel_before();
    Segment s;
    if (!find_segment(p, slot, s)) return;
    // Where readers add up the sums, nobody asks for the one of a document's last segment (backwards, of its first).
    if (!p.summed && (Reverse ? s.first == s.begin : s.first + s.length == s.end)) return;
    const int warp = threadIdx.x >> 5;
    if (warp == kStateWarps + kMakers / 32) {
        load_chunks<L, Reverse>(p, maps, s, head, column, m);
        return;
    }
    if (warp >= kStateWarps) {
        make_features<L, Reverse>(s, chunk_count(s), m);
        return;
    }
    State<W + 8, Reverse> state = {};
    for (int n = 0; n < 2 * chunk_count(s); ++n) {
        state.add(m, n);
        if (n == 0) continue;
        wgmma_wait<1>();                             // the half before this one
        warp_arrive(m.used(n - 1));
        if (n % 2 == 0) warp_arrive(m.empty(n / 2 - 1));
    }
    wgmma_wait<0>();
    state.store(p, p.space, slot, head, column);
}

template <int W, bool Exact> static int run(const TaylorArgs& p) {
    const dim3 grid(p.slots * ((p.head_dim + W - 1) / W), p.heads);
    using L = Tiles<W, Exact>;
    return launch_walk<L>(p.reverse ? segment_state<W, Exact, true> : segment_state<W, Exact, false>, grid, kSegmentThreads, p);
}
template <int W> static int run(const TaylorArgs& p) { return p.exact ? run<W, true>(p) : run<W, false>(p); }
extern "C" int taylor_segment_state(const TaylorArgs* p) { HEAD_DIM_DISPATCH(p->head_dim, run<kColumns<kD>>(*p)) }
