// Outputs that are sums of rows. Forwards, with S the state before the chunk, G the weights g_p, w = 1 + s + s^2/2:
//   o_t = (F(q_t) G S + sum_j w_tj [v_j | 1]) over its own last columns, j <= t inside the chunk; denominators go out too.
// Backwards, with R = sum_t F(q_t) / den_t [grad_o_t | ...] over the tokens behind the chunk:
//   dv_j = F(k_j) G R + sum_t w_tj / den_t grad_o_t, t >= j inside the chunk.
// One block a (segment, head, half of the value columns where head_dim > 64).
#include "taylor_common.cuh"
using namespace taylor;

template <int W> using Tiles = Layout<W, 0, true, 3, 2>;
constexpr int kOutputWarps = 8, kThreads = (kStateWarps + kOutputWarps + kLoadWarps) * 32;

template <int W, bool Reverse>
__device__ __forceinline__ void make_outputs(const TaylorArgs& p, const Segment& s, int head, int column, const Shared<Tiles<W>>& m) {
    using L = Tiles<W>;
    constexpr int N = Reverse ? W : W + 8;       // backwards no denominator is wanted
    const int group = (threadIdx.x >> 7) - kStateWarps / 4, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, t = lane & 3;
    const int chunks = chunk_count(s), skipped = p.space ? 0 : 1;
    for (int i = 0; i < chunks; ++i) {
        const int begin = chunk_begin<Reverse>(s, i), valid = min(kChunk, s.length - begin), half = half_of(group, i), n = i - skipped;
        const uint32_t at = m.stage(i), rows = at + L::r + (half * 64 + warp * 16) * 16;
        const bool work = half * 64 < valid;
        float acc[N / 2] = {};
        barrier_wait(m.full(i), Shared<L>::stage_parity(i));
        if (n >= 0) {
            barrier_wait(m.published(n), Shared<L>::state_parity(n));
            if (work) {
                uint32_t x0[8], x1[8];
                load_rows(x0, x1, rows);
                #pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    uint32_t a[4];
                    features(a, x0, x1, tile);
                    wgmma_begin();
                    Wgmma<N>::template rs<1>(acc, a, operand(m.state(n) + tile * 256, 128, kStatePlane), 1);
                    wgmma_commit();
                    wgmma_wait<1>();
                }
                wgmma_wait<0>();
            }
            warp_arrive(m.released(n));
        }
        if (work) {
            uint32_t own[4];
            load_own(own, rows);
            const int last = Reverse ? (valid + 63) / 64 : half + 1;
            #pragma unroll 1
            for (int block = Reverse ? half : 0; block < last; ++block) {
                float w[32];
                wgmma_begin();
                Wgmma<64>::rs<0>(w, own, operand(at + L::x + block * 1024, kPlane, 128), 0);
                wgmma_commit();
                wgmma_wait<0>();
                #pragma unroll
                for (int c = 0; c < 8; ++c) {
                    float4 factor;               // {1 / den, .} of two columns
                    if (Reverse) factor = load_shared4(at + L::factors + (block * 64 + c * 8 + 2 * t) * 8);
                    #pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = warp * 16 + (lane >> 2) + (e >> 1) * 8, col = c * 8 + 2 * t + (e & 1);
                        float x = w[4 * c + e] * p.scale;
                        x = fmaf(x, fmaf(x, 0.5f, 1.f), 1.f);
                        if (Reverse) x *= e & 1 ? factor.z : factor.x;
                        w[4 * c + e] = block == half && (Reverse ? col < row : col > row) ? 0.f : x;
                    }
                }
                uint32_t a[4][4];
                #pragma unroll
                for (int k = 0; k < 4; ++k) pack_operand(a[k], w, k);
                wgmma_begin();
                #pragma unroll
                for (int k = 0; k < 4; ++k)
                    Wgmma<N>::template rs<1>(acc, a[k], operand(at + L::y + block * 1024 + k * 256, 128, kPlane), 1);
                wgmma_commit();
                wgmma_wait<0>();
            }
        }
        warp_arrive(m.empty(i));
        if (!work) continue;
        #pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int row = half * 64 + warp * 16 + (lane >> 2) + side * 8;
            const float den = Reverse ? 1.f : acc[N / 2 - 4 + 2 * side], factor = 1.f / den;
            if (row >= valid) continue;
            const int64_t index = token_index(p, s.batch, s.first + begin + row, head);
            if (!Reverse && t == 0 && column == 0) p.denominator[index] = den;
            bf16* to = (bf16*)(Reverse ? p.dv : p.o) + index * p.head_dim + column + t * 2;
            #pragma unroll
            for (int c = 0; c < W / 8; ++c)
                *reinterpret_cast<uint32_t*>(to + c * 8) = pack(acc[4 * c + 2 * side] * factor, acc[4 * c + 2 * side + 1] * factor);
        }
    }
}

template <int W, bool Reverse>
__global__ void __launch_bounds__(kThreads, 1) output(const __grid_constant__ TaylorArgs p) {
    using L = Tiles<W>;
    extern __shared__ __align__(128) char shared[];
    const Shared<L> m{address(shared)};
    const int parts = p.head_dim / W, slot = blockIdx.x / parts, column = blockIdx.x % parts * W, head = blockIdx.y;
    Segment s;
    if (!find_segment(p, slot, s)) return;
    m.init(kOutputWarps);
    const int warp = threadIdx.x >> 5;
    if (warp < kStateWarps) {
        registers_down<72>();
        carry_state<L, Reverse>(p, s, slot, head, column, m);
    } else if (warp < kStateWarps + kOutputWarps) {
        registers_up<112>();
        make_outputs<W, Reverse>(p, s, head, column, m);
    } else {
        registers_down<40>();
        load_chunks<L, Reverse>(p, s, head, column, m);
    }
}

template <int W> static int run(const TaylorArgs& p) {
    const dim3 grid(p.slots * (p.head_dim / W), p.heads);
    return p.reverse ? launch(output<W, true>, grid, kThreads, Tiles<W>::bytes, p)
                     : launch(output<W, false>, grid, kThreads, Tiles<W>::bytes, p);
}
extern "C" int taylor_output(const TaylorArgs* p) { TAYLOR_DISPATCH(p->head_dim, (run<kD <= 64 ? kD : kD / 2>(*p))) }
