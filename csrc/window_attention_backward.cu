// Gradients of q, k, v, with P = softmax weights, dS = P (dO V^T - dO . O), all made again from the scores:
//   dQ = dS K,   dK = dS^T Q,   dV = P^T dO,   those of Q and K turned back, into one buffer of the projection's layout.
// Of every strip there are two blocks side by side. One owns queries and has keys and values in its ring, the other owns keys
// and has queries and grad_o there. They read the same rows at about the same time, so that device memory is read once; nothing
// is added from two places, so no sum depends on the order of blocks.
#include "window_attention.cuh"

namespace window_attention {

constexpr int kLoaderRegisters = 56, kRegisters = 200;                 // of a thread, of the 128 that all begin with
template <int D> constexpr int kColumns = D <= 96 ? 64 : 32;           // of the scores at a time, as registers allow

struct Pointers {
    const bf16 *q, *k, *v, *grad, *o;
    const float* lse;
    bf16* dq;
    int64_t out;                                                       // elements from token to token of o
};

template <int D, bool Keys>
__device__ __forceinline__ void load_strip(const WindowAttentionArgs& a, const Walk<Keys>& w, const Shared<D, 2>& m, const Pointers& p) {
    load(w, m, [&](int i) {
        const int u = w.start + i, s = u - w.lag, token = u * kRows;
        if (u < w.plan.tiles) {
            copy_tile<D>(m.slot(i), Keys ? p.q : p.k, a.stride[0], token, a.seq);
            copy_tile<D>(m.slot(i) + kTile<D>, Keys ? p.grad : p.v, Keys ? a.grad_stride[0] : a.stride[0], token, a.seq);
            if (Keys) prefetch_tile<D>(p.o, p.out, token, a.seq);
        }
        if (s >= w.begin) {
            copy_tile<D>(m.tile(s - w.begin), Keys ? p.k : p.q, a.stride[0], s * kRows, a.seq);
            copy_tile<D>(m.tile(s - w.begin) + kTile<D>, Keys ? p.v : p.grad, Keys ? a.stride[0] : a.grad_stride[0], s * kRows, a.seq);
            if (!Keys) prefetch_tile<D>(p.o, p.out, s * kRows, a.seq);
        }
    }, [&](int i) {
        const int u = w.start + i, s = u - w.lag, row = Keys ? u : s;
        const bool ring = u < w.plan.tiles, own = s >= w.begin;
        const Angles<D> early(a.rotation, u * kRows, a.seq), early_own(a.rotation, s * kRows, a.seq);
        const Outputs<D> outputs(p.o, p.out, p.lse, row * kRows, a.seq);
        wait_for_copies(w.plan.ahead);
        if (Keys ? ring : own) {
            if (Keys) outputs.dot(m.row_stats(m.ring.of(i)), m.slot(i) + kTile<D>);
            else outputs.dot(m.row_stats(m.own.of(s - w.begin)), m.tile(s - w.begin) + kTile<D>);
        }
        const Angles<D> angles = D <= 64 ? early : Angles<D>(a.rotation, u * kRows, a.seq);     // there are registers, or not
        if (ring) angles.turn(m.slot(i));
        if (own) {
            const Angles<D> angles_own = !Keys ? angles : D <= 64 ? early_own : Angles<D>(a.rotation, s * kRows, a.seq);
            angles_own.turn(m.tile(s - w.begin));
        }
    });
}

template <int D, bool Keys>
__device__ __forceinline__ void make_gradients(const WindowAttentionArgs& a, const Walk<Keys>& w, const Shared<D, 2>& m, const Pointers& to) {
    constexpr int N = kColumns<D>, kParts = kRows / N;
    const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, t = lane & 3;
    const float scale = a.scale * kLog2e;
    Consumer<Keys, Shared<D, 2>> ring(w, m);
    for (int s = w.begin + __shfl_sync(~0u, threadIdx.x >> 7, 0) - kLoaders / 128; s < w.end; s += kGroups) {
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
            const uint32_t slot = ring.slot(u) + first * 16;
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

template <int D> __global__ void __launch_bounds__(kThreads, 1)
backward_kernel(const __grid_constant__ WindowAttentionArgs a, const __grid_constant__ Plan plan) {
    extern __shared__ __align__(128) char shared[];
    const bool keys = blockIdx.x & 1;
    const int strip = blockIdx.x / 2 % plan.strips, index = blockIdx.x / 2 / plan.strips, head = index % a.heads, batch = index / a.heads;
    const Shared<D, 2> m(address(shared), plan, keys ? plan.ring.count : plan.own.count);
    Pointers p;
    p.q = static_cast<const bf16*>(a.qkv) + batch * a.stride[1] + head * a.stride[2];
    p.k = p.q + a.stride[3];
    p.v = p.k + a.stride[3];
    p.grad = static_cast<const bf16*>(a.grad_o) + batch * a.grad_stride[1] + head * a.grad_stride[2];
    p.o = static_cast<const bf16*>(a.o) + (int64_t)index * D;
    p.lse = a.lse + (int64_t)index * a.seq;
    p.dq = static_cast<bf16*>(a.dqkv) + (int64_t)index * 3 * D;
    p.out = (int64_t)a.batch * a.heads * D;
    m.init();
    if (threadIdx.x < kLoaders) {
        registers_down<kLoaderRegisters>();
        if (keys) load_strip<D, true>(a, Walk<true>(plan, strip), m, p);
        else load_strip<D, false>(a, Walk<false>(plan, strip), m, p);
    } else {
        registers_up<kRegisters>();
        if (keys) make_gradients<D, true>(a, Walk<true>(plan, strip), m, p);
        else make_gradients<D, false>(a, Walk<false>(plan, strip), m, p);
    }
}

template <int D> int backward(const WindowAttentionArgs& a) {
    const auto bytes = [](int ring, int own) { return 2 * (ring + own) * kTile<D> + (ring > own ? ring : own) * kRows * 8 + (2 * ring + own) * 8; };
    const Plan p = make_plan(a, 2, bytes);
    return launch(backward_kernel<D>, a, p, 2, bytes(p.ring.count, p.own.count));
}

}  // namespace window_attention

extern "C" int window_attention_backward(const WindowAttentionArgs* a) {
    HEAD_DIM_DISPATCH(a->head_dim, window_attention::backward<kD>(*a))
}
