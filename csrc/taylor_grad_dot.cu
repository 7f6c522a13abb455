// grad_o . o of every token and head, in fp32. Eight lanes share a row.
#include "taylor_common.cuh"
using namespace taylor;

template <int D>
__global__ void __launch_bounds__(256) grad_dot(const __grid_constant__ TaylorArgs p) {
    const int64_t row = ((int64_t)blockIdx.x * 256 + threadIdx.x) / 8;
    const int lane = threadIdx.x & 7;
    const bool real = row < (int64_t)p.batch * p.seq * p.heads;
    const int64_t at = real ? row : 0, token = at / p.heads;
    const bf16* g = token_row(p.grad_o, p.grad_stride, token / p.seq, token % p.seq, at % p.heads);
    const bf16* o = (const bf16*)p.o + at * D;
    float dot = 0.f;
    #pragma unroll
    for (int i = 0; i < (D / 8 + 7) / 8; ++i) {
        const int c = (lane + i * 8) * 8;
        if (c >= D) continue;
        const uint4 x = *reinterpret_cast<const uint4*>(g + c), y = *reinterpret_cast<const uint4*>(o + c);
        const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
        #pragma unroll
        for (int j = 0; j < 4; ++j) dot += low(a[j]) * low(b[j]) + high(a[j]) * high(b[j]);
    }
    #pragma unroll
    for (int m = 4; m; m >>= 1) dot += __shfl_xor_sync(~0u, dot, m);
    if (real && lane == 0) p.grad_dot[row] = dot;
}

template <int D> static int run(const TaylorArgs& p) {
    const int64_t rows = (int64_t)p.batch * p.seq * p.heads;
    grad_dot<D><<<(unsigned)((rows + 31) / 32), 256, 0, (cudaStream_t)p.stream>>>(p);
    return (int)cudaGetLastError();
}
extern "C" int taylor_grad_dot(const TaylorArgs* p) { TAYLOR_DISPATCH(p->head_dim, run<kD>(*p)) }
