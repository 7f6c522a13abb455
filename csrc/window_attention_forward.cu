// o_i = sum_j softmax(q_i . k_j / sqrt(head_dim)) v_j over the last `window` positions of i's document, q and k rotated, with the
// logarithms of the sums for the backward pass. Queries are a warpgroup's own tile, keys and values the ring's (see
// window_attention.cuh); the softmax runs in fp32 over the ring's tiles as they come.
#include "window_attention.cuh"

namespace window_attention {

template <int D> __global__ void __launch_bounds__(kThreads, 1)
forward_kernel(const __grid_constant__ WindowAttentionArgs a, const __grid_constant__ Plan plan, const __grid_constant__ CUtensorMap qkv) {
    extern __shared__ __align__(1024) char shared[];
    const Shared<D, 1> m(address(shared), plan, 0);
    const Walk<false> w(plan, blockIdx.x % plan.strips);
    const int head = blockIdx.x / plan.strips % a.heads, batch = blockIdx.x / plan.strips / a.heads;
    const int role = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    m.init();
    if (role == 0) {
        registers_down<kLoaderRegisters>();
        if (threadIdx.x >= 32) return;
        load(w, m, [&](int i, uint32_t bar) {
            const int u = w.start + i, token = u * kRows;
            copy_tile<D>(m.slot(i), &qkv, bar, 1, token, {head, batch});
            if (u >= w.begin) copy_tile<D>(m.tile(u - w.begin), &qkv, bar, 0, token, {head, batch});
            copy_tile<D>(m.slot(i) + kTile<D>, &qkv, bar, 2, token, {head, batch});
        });
        return;
    }
    if (role == 1) {
        registers_down<kRotatorRegisters>();
        Angles<D> angles;
        #pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) angles.read(pass, a.rotation, w.start * kRows, a.seq);
        rotate(w, m, [&](int i) {
            const int u = w.start + i;
            #pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                angles.turn(pass, m.slot(i));
                if (u >= w.begin) angles.turn(pass, m.tile(u - w.begin));
                angles.read(pass, a.rotation, (u + 1) * kRows, a.seq);
            }
        });
        return;
    }
    registers_up<kRegisters>();
    const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const float scale = a.scale * kLog2e;
    Consumer<false, Shared<D, 1>> ring(w, m);
    for (int s = w.begin + role - 2; s < w.end; s += kGroups) {
        const int row = s * kRows + warp * 16 + (lane >> 2);
        const Seen<false> seen(a, row);
        float o[D / 2], peak[2] = {-1e30f, -1e30f}, sum[2] = {0.f, 0.f};
        ring.begin(s);
        const int from = w.first(s), next = w.first(s + kGroups);
        #pragma unroll 1
        for (int u = from; u <= s; ++u) {
            float x[32];
            wgmma_begin();
            multiply_rows<D, 64>(x, m.tile(s - w.begin), ring.slot(u));
            wgmma_commit();
            wgmma_wait<0>();                                       // also of the tile before
            ring.release(min(u, next));
            if (masked(a, s - u)) seen.template mask<64>(x, u * kRows);
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                float high = x[2 * i];
                #pragma unroll
                for (int n = 0; n < 8; ++n) high = fmaxf(high, fmaxf(x[4 * n + 2 * i], x[4 * n + 2 * i + 1]));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
                high = fmaxf(peak[i], high * scale);
                const float shrink = exp2f(peak[i] - high);
                peak[i] = high;
                sum[i] *= shrink;
                #pragma unroll
                for (int n = 0; n < 8; ++n)
                    #pragma unroll
                    for (int e = 2 * i; e < 2 * i + 2; ++e) {
                        x[4 * n + e] = exp2f(fmaf(x[4 * n + e], scale, -high));
                        sum[i] += x[4 * n + e];
                    }
                if (u > from) {
                    #pragma unroll
                    for (int n = 0; n < D / 8; ++n) { o[4 * n + 2 * i] *= shrink; o[4 * n + 2 * i + 1] *= shrink; }
                }
            }
            uint32_t p[4][4];
            #pragma unroll
            for (int j = 0; j < 4; ++j) pack_operand(p[j], x, j);
            wgmma_begin();
            multiply_columns<D>(o, p, ring.slot(u) + kTile<D>, u > from);
            wgmma_commit();
        }
        wgmma_wait<0>();
        ring.release(min(s + 1, next));
        warp_arrive(m.free(s - w.begin));
        float inverse[2];
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
            sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
            inverse[i] = 1.f / sum[i];
            if ((lane & 3) == 0 && row + i * 8 < a.seq)
                a.lse[((int64_t)batch * a.heads + head) * a.seq + row + i * 8] = peak[i] + log2f(sum[i]);
        }
        store_rows<D>(o, static_cast<bf16*>(a.o) + ((int64_t)batch * a.heads + head) * D, (int64_t)a.batch * a.heads * D, row, a.seq, inverse);
    }
}

template <int D> int forward(const WindowAttentionArgs& a) {
    static_assert(Shared<D, 1>::bytes(kMaxReach + 1, 2, 0) <= kMaxShared);
    const auto bytes = [](int ring, int own) { return Shared<D, 1>::bytes(ring, own, 0); };
    const Plan p = make_plan(a, 1, bytes);
    CUtensorMap qkv;
    if (!make_rows<D>(&qkv, a, a.qkv, a.stride, 3, a.stride[3])) return cudaErrorInvalidValue;
    return launch(forward_kernel<D>, a, p, qkv, 1, bytes(p.ring.count, p.own.count));
}

}  // namespace window_attention

extern "C" int window_attention_forward(const WindowAttentionArgs* a) {
    HEAD_DIM_DISPATCH(a->head_dim, window_attention::forward<kD>(*a))
}
