// Gradients of q, k, v, with P = softmax weights, dS = P (dO V^T - dO . O), all made again from the scores:
//   dQ = dS K,   dK = dS^T Q,   dV = P^T dO,   those of Q and K turned back, into one buffer of the projection's layout.
// Of every strip there are two blocks side by side. One owns queries and has keys and values in its ring, the other owns keys
// and has queries and grad_o there. They read the same rows at about the same time, so that device memory is read once; nothing
// is added from two places, so no sum depends on the order of blocks.
#include "window_attention.cuh"

namespace window_attention {

template <int D> constexpr int kColumns = D <= 96 ? 64 : 32;           // of the scores at a time, as registers allow

struct Maps {
    CUtensorMap qkv, grad;
};
struct Pointers {
    const bf16* o;
    const float* lse;
    bf16* dq;
    int64_t out;                                                       // elements from token to token of o
};

template <int D, bool Keys>
__device__ __forceinline__ void load_strip(const WindowAttentionArgs& a, const Walk<Keys>& w, const Shared<D, 2>& m, const Maps& maps, const Pointers& p,
                                           const Head& head) {
    load(w, m, [&](int i, uint32_t bar) {
        const int u = w.start + i, s = u - w.lag;
        const auto queries = [&](uint32_t to, int tile) {
            copy_tile<D>(to, &maps.qkv, bar, 0, tile * kRows, head);
            copy_tile<D>(to + kTile<D>, &maps.grad, bar, 0, tile * kRows, head);
            prefetch_tile<D>(p.o, p.out, tile * kRows, a.seq);
        };
        const auto keys = [&](uint32_t to, int tile) {
            copy_tile<D>(to, &maps.qkv, bar, 1, tile * kRows, head);
            copy_tile<D>(to + kTile<D>, &maps.qkv, bar, 2, tile * kRows, head);
        };
        if (u < w.plan.tiles) { if (Keys) queries(m.slot(i), u); else keys(m.slot(i), u); }
        if (s >= w.begin) { if (Keys) keys(m.tile(s - w.begin), s); else queries(m.tile(s - w.begin), s); }
    });
}

template <int D, bool Keys>
__device__ __forceinline__ void rotate_strip(const WindowAttentionArgs& a, const Walk<Keys>& w, const Shared<D, 2>& m, const Pointers& p) {
    Angles<D> angles, angles_own;
    #pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) angles.read(pass, a.rotation, w.start * kRows, a.seq);
    Outputs<D> outputs(p.o, p.out, p.lse, w.start * kRows, a.seq);     // queries are the ring's tiles, or own ones with lag 0
    rotate(w, m, [&](int i) {
        const int u = w.start + i, s = u - w.lag;
        const bool ring = u < w.plan.tiles, own = s >= w.begin;
        if (Keys ? ring : own) {
            if (Keys) outputs.dot(m.row_stats(m.ring.of(i)), m.slot(i) + kTile<D>);
            else outputs.dot(m.row_stats(m.own.of(s - w.begin)), m.tile(s - w.begin) + kTile<D>);
        }
        #pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            if (Keys) angles_own.read(pass, a.rotation, s * kRows, a.seq);
            if (ring) angles.turn(pass, m.slot(i));
        }
        #pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            if (own) (Keys ? angles_own : angles).turn(pass, m.tile(s - w.begin));
            angles.read(pass, a.rotation, (u + 1) * kRows, a.seq);
        }
        outputs = Outputs<D>(p.o, p.out, p.lse, (u + 1) * kRows, a.seq);
    });
}

template <int D, bool Keys>
__device__ __forceinline__ void make_gradients(const WindowAttentionArgs& a, const Walk<Keys>& w, const Shared<D, 2>& m, const Pointers& to, int group) {
    constexpr int N = kColumns<D>, kParts = kRows / N;
    const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, t = lane & 3;
    const float scale = a.scale * kLog2e;
    Consumer<Keys, Shared<D, 2>> ring(w, m);
    for (int s = w.begin + group; s < w.end; s += kGroups) {
        const int row = s * kRows + warp * 16 + (lane >> 2);
        const Seen<Keys> seen(a, row);
        const uint32_t own = m.tile(s - w.begin);
        float dx[D / 2], dv[Keys ? D / 2 : 1];                         // of k (or q), of v
        float2 stats[2];                                               // {lse, grad_o . o} of the own rows
        ring.begin(s);
        if (!Keys) {
            #pragma unroll
            for (int i = 0; i < 2; ++i) stats[i] = load_shared2(m.row_stats(m.own.of(s - w.begin)) + (warp * 16 + (lane >> 2) + i * 8) * 8);
        }
        const int from = w.first(s), last = w.last(s), next = w.first(s + kGroups);
        #pragma unroll 1
        for (int v = from * kParts; v < (last + 1) * kParts; ++v) {
            const int u = v / kParts, first = v % kParts * N;
            const uint32_t slot = ring.slot(u) + first * 128;
            const uint32_t stats_at = m.row_stats(m.ring.of(u - w.start));
            float x[N / 2], y[N / 2];
            wgmma_begin();
            multiply_rows<D, N>(x, own, slot);
            multiply_rows<D, N>(y, own + kTile<D>, slot + kTile<D>);
            wgmma_commit();
            wgmma_wait<0>();                                           // also of the tile before
            ring.release(min(u, next));
            if (masked(a, Keys ? u - s : s - u)) seen.template mask<N>(x, u * kRows + first);
            uint32_t p[N / 16][4], b[N / 16][4];
            #pragma unroll
            for (int j = 0; j < N / 16; ++j) {
                #pragma unroll
                for (int n = 2 * j; n < 2 * j + 2; ++n) {
                    float4 column;                                     // {lse, grad_o . o} of two columns
                    if (Keys) column = load_shared4(stats_at + (first + n * 8 + 2 * t) * 8);
                    #pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float lse = Keys ? (e & 1 ? column.z : column.x) : stats[e >> 1].x;
                        const float dot = Keys ? (e & 1 ? column.w : column.y) : stats[e >> 1].y;
                        x[4 * n + e] = exp2f(fmaf(x[4 * n + e], scale, -lse));
                        y[4 * n + e] = x[4 * n + e] * (y[4 * n + e] - dot);
                    }
                }
                if (Keys) pack_operand(p[j], x, j);
                pack_operand(b[j], y, j);
            }
            wgmma_begin();
            if constexpr (Keys) multiply_columns<D>(dv, p, slot + kTile<D>, v > from * kParts);
            multiply_columns<D>(dx, b, slot, v > from * kParts);
            wgmma_commit();
            if (Keys && D > 64) wgmma_wait<0>();                       // two more tiles of scores have no registers
        }
        wgmma_wait<0>();
        ring.release(min(last + 1, next));
        warp_arrive(m.free(s - w.begin));
        const int64_t pitch = 3 * to.out;
        rotate_back<D>(dx, a.rotation, row, a.seq);
        store_rows<D>(dx, to.dq + (Keys ? D : 0), pitch, row, a.seq, {a.scale, a.scale});
        if constexpr (Keys) store_rows<D>(dv, to.dq + 2 * D, pitch, row, a.seq, {1.f, 1.f});
    }
}

template <int D, bool Keys>
__device__ __forceinline__ void walk_strip(const WindowAttentionArgs& a, const Walk<Keys>& w, const Shared<D, 2>& m, const Maps& maps, const Pointers& p,
                                           const Head& head) {
    const int role = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    if (role == 0) {
        registers_down<kLoaderRegisters>();
        if (threadIdx.x < 32) load_strip<D, Keys>(a, w, m, maps, p, head);
    } else if (role == 1) {
        registers_down<kRotatorRegisters>();
        rotate_strip<D, Keys>(a, w, m, p);
    } else {
        registers_up<kRegisters>();
        make_gradients<D, Keys>(a, w, m, p, role - 2);
    }
}
template <int D> __global__ void __launch_bounds__(kThreads, 1)
backward_kernel(const __grid_constant__ WindowAttentionArgs a, const __grid_constant__ Plan plan, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) char shared[];
    const bool keys = blockIdx.x & 1;
    const int strip = blockIdx.x / 2 % plan.strips, index = blockIdx.x / 2 / plan.strips;
    const Head head{index % a.heads, index / a.heads};
    const Shared<D, 2> m(address(shared), plan, keys ? plan.ring.count : plan.own.count);
    Pointers p;
    p.o = static_cast<const bf16*>(a.o) + (int64_t)index * D;
    p.lse = a.lse + (int64_t)index * a.seq;
    p.dq = static_cast<bf16*>(a.dqkv) + (int64_t)index * 3 * D;
    p.out = (int64_t)a.batch * a.heads * D;
    m.init();
    if (keys) walk_strip<D, true>(a, Walk<true>(plan, strip), m, maps, p, head);
    else walk_strip<D, false>(a, Walk<false>(plan, strip), m, maps, p, head);
}

template <int D> int backward(const WindowAttentionArgs& a) {
    const auto bytes = [](int ring, int own) { return Shared<D, 2>::bytes(ring, own, ring > own ? ring : own); };
    static_assert(Shared<D, 2>::bytes(kMaxReach + 1, 2, kMaxReach + 1) <= kMaxShared);
    const Plan p = make_plan(a, 2, bytes);
    Maps maps;
    if (!make_rows<D>(&maps.qkv, a, a.qkv, a.stride, 3, a.stride[3]) || !make_rows<D>(&maps.grad, a, a.grad_o, a.grad_stride, 1, D))
        return cudaErrorInvalidValue;
    return launch(backward_kernel<D>, a, p, maps, 2, bytes(p.ring.count, p.own.count));
}

}  // namespace window_attention

extern "C" int window_attention_backward(const WindowAttentionArgs* a) {
    HEAD_DIM_DISPATCH(a->head_dim, window_attention::backward<kD>(*a))
}
