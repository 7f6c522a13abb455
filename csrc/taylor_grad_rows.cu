// Rows the backward works with, one a token and head: e = [grad_o / den | -(grad_o . o) / den | 0 x 7] in bf16. With them
// the gradient of weight w_tj is e_t . [v_j | 1]. Eight lanes share a row.
#include "taylor_common.cuh"
using namespace taylor;

template <int D>
__global__ void __launch_bounds__(256) grad_rows(const __grid_constant__ TaylorArgs p) {
    const int64_t row = ((int64_t)blockIdx.x * 256 + threadIdx.x) / 8;
    const int lane = threadIdx.x & 7;
    const bool real = row < (int64_t)p.batch * p.seq * p.heads;
    const int64_t at = real ? row : 0, token = at / p.heads;
    const bf16* g = (const bf16*)p.grad_o + token / p.seq * p.grad_stride[0] + token % p.seq * p.grad_stride[1] +
                    at % p.heads * p.grad_stride[2];
    const bf16* o = (const bf16*)p.o + at * D;
    const float inverse = 1.f / p.denominator[at];
    uint4 x[(D / 8 + 7) / 8];
    float dot = 0.f;
    #pragma unroll
    for (int i = 0; i < (D / 8 + 7) / 8; ++i) {
        const int c = (lane + i * 8) * 8;
        if (c >= D) continue;
        x[i] = *reinterpret_cast<const uint4*>(g + c);
        const uint4 y = *reinterpret_cast<const uint4*>(o + c);
        const uint32_t a[4] = {x[i].x, x[i].y, x[i].z, x[i].w}, b[4] = {y.x, y.y, y.z, y.w};
        uint32_t r[4];
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            dot += low(a[j]) * low(b[j]) + high(a[j]) * high(b[j]);
            r[j] = pack(low(a[j]) * inverse, high(a[j]) * inverse);
        }
        x[i] = make_uint4(r[0], r[1], r[2], r[3]);
    }
    #pragma unroll
    for (int m = 4; m; m >>= 1) dot += __shfl_xor_sync(~0u, dot, m);
    if (!real) return;
    bf16* e = (bf16*)p.grad_rows + row * kWide<D>;
    #pragma unroll
    for (int i = 0; i < (D / 8 + 7) / 8; ++i)
        if ((lane + i * 8) * 8 < D) *reinterpret_cast<uint4*>(e + (lane + i * 8) * 8) = x[i];
    if (lane == 0) *reinterpret_cast<uint4*>(e + D) = make_uint4(pack(-dot * inverse, 0.f), 0, 0, 0);
}

template <int D> static int run(const TaylorArgs& p) {
    const int64_t rows = (int64_t)p.batch * p.seq * p.heads;
    grad_rows<D><<<(unsigned)((rows + 31) / 32), 256, 0, (cudaStream_t)p.stream>>>(p);
    return (int)cudaGetLastError();
}
extern "C" int taylor_grad_rows(const TaylorArgs* p) { TAYLOR_DISPATCH(p->head_dim, run<kD>(*p)) }
