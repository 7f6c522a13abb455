// Matrix product with at most eight rows, where the time is that of reading the weights. A warp makes two columns of the
// result (with SwiGLU a gate and its value), a lane takes every 32nd vector of 16 bytes of both weight rows; the first of them are
// on their way before the input is there. The input, normalised where asked for, waits in shared memory as bf16.
#include "decode_common.cuh"
using namespace decode;

constexpr int kWarps = 4, kThreads = kWarps * 32, kAhead = 4;

struct Linear {
    const bf16 *x, *weight;
    bf16* y;
    const bf16* norm_weight;
    float eps;
    void* add_to;
    const bf16* bias;
    int rows, columns, inner;
};

__device__ __forceinline__ float element(const void* x, bool fp32, int64_t at) {
    return fp32 ? ((const float*)x)[at] : __bfloat162float(((const bf16*)x)[at]);
}

template <int N, bool Fp32, bool Swiglu>
__global__ void __launch_bounds__(kThreads) linear_kernel(const __grid_constant__ Linear p) {
    extern __shared__ __align__(16) uint4 input[];                 // [rows, inner] bf16
    __shared__ float space[32];
    let_next_start();
    const int warp = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32, vectors = p.inner / 8;
    const int half = p.columns / 2;
    const int first = Swiglu ? warp : 2 * warp, second = Swiglu ? warp + half : 2 * warp + 1;
    const bool active = first < (Swiglu ? half : p.columns), both = active && second < p.columns;
    const uint4* a = (const uint4*)p.weight + (int64_t)first * vectors;
    const uint4* b = (const uint4*)p.weight + (int64_t)second * vectors;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4 wa[kAhead], wb[kAhead];
    auto fetch = [&](int from) {
        #pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int i = from + u * 32 + lane;
            wa[u] = active && i < vectors ? __ldcs(a + i) : zero;
            wb[u] = both && i < vectors ? __ldcs(b + i) : zero;
        }
    };
    fetch(0);
    wait_for_previous();
    for (int n = 0; n < N; ++n) {
        if (n >= p.rows) break;
        float square = 0.f;
        for (int i = threadIdx.x; i < vectors; i += kThreads) {
            float x[8];
            if (p.norm_weight) load8<Fp32>(p.x, (int64_t)n * p.inner + i * 8, x);
            else load8<false>(p.x, (int64_t)n * p.inner + i * 8, x);
            for (int j = 0; j < 8; ++j) square += x[j] * x[j];
            if (!p.norm_weight) input[n * vectors + i] = pack(x);
        }
        if (p.norm_weight) {
            const float scale = rsqrtf(block_sum(square, space) / p.inner + p.eps);
            for (int i = threadIdx.x; i < vectors; i += kThreads) {
                float x[8], w[8];
                load8<Fp32>(p.x, (int64_t)n * p.inner + i * 8, x);
                load8<false>(p.norm_weight, i * 8, w);
                for (int j = 0; j < 8; ++j) x[j] *= scale * w[j];
                input[n * vectors + i] = pack(x);
            }
        }
    }
    __syncthreads();
    float sa[N] = {}, sb[N] = {};
    for (int from = 0; from < vectors; from += 32 * kAhead) {
        if (from) fetch(from);
        #pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int i = from + u * 32 + lane;
            if (i >= vectors) break;
            float fa[8], fb[8], x[8];
            unpack(wa[u], fa);
            unpack(wb[u], fb);
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                if (n >= p.rows) break;
                unpack(input[n * vectors + i], x);
                #pragma unroll
                for (int j = 0; j < 8; ++j) { sa[n] += fa[j] * x[j]; sb[n] += fb[j] * x[j]; }
            }
        }
    }
    #pragma unroll
    for (int n = 0; n < N; ++n)
        for (int d = 16; d; d /= 2) {
            sa[n] += __shfl_xor_sync(~0u, sa[n], d);
            sb[n] += __shfl_xor_sync(~0u, sb[n], d);
        }
    if (lane || !active) return;
    auto put = [&](int n, int column, float value) {
        if (p.add_to) {
            const int64_t at = (int64_t)n * p.columns + column;
            const float sum = element(p.add_to, Fp32, at) + (rounded(value) + (p.bias ? __bfloat162float(p.bias[column]) : 0.f));
            if (Fp32) ((float*)p.add_to)[at] = sum;
            else ((bf16*)p.add_to)[at] = __float2bfloat16(sum);
        } else {
            p.y[(int64_t)n * p.columns + column] = __float2bfloat16(value);
        }
    };
    #pragma unroll
    for (int n = 0; n < N; ++n) {
        if (n >= p.rows) break;
        if (Swiglu) {
            p.y[(int64_t)n * half + first] = __float2bfloat16(silu(rounded(sa[n])) * rounded(sb[n]));
        } else {
            put(n, first, sa[n]);
            if (both) put(n, second, sb[n]);
        }
    }
}

template <int N> int run(const Linear& p, int fp32, int swiglu, void* stream) {
    const int warps = swiglu ? p.columns / 2 : (p.columns + 1) / 2;
    auto kernel = fp32 ? (swiglu ? linear_kernel<N, true, true> : linear_kernel<N, true, false>)
                       : (swiglu ? linear_kernel<N, false, true> : linear_kernel<N, false, false>);
    return launch(kernel, (warps + kWarps - 1) / kWarps, kThreads, (size_t)p.rows * p.inner * 2, stream, p);
}

extern "C" int decode_linear(const void* x, const void* weight, void* y, const void* norm_weight, float eps, void* add_to,
                             const void* bias, int fp32_residual, int swiglu, int rows, int columns, int inner, void* stream) {
    const Linear p{(const bf16*)x, (const bf16*)weight, (bf16*)y, (const bf16*)norm_weight, eps, add_to, (const bf16*)bias, rows,
                   columns, inner};
    if (inner % 8 || rows < 1 || rows > 8) return (int)cudaErrorInvalidValue;
    if (rows == 1) return run<1>(p, fp32_residual, swiglu, stream);
    if (rows == 2) return run<2>(p, fp32_residual, swiglu, stream);
    if (rows <= 4) return run<4>(p, fp32_residual, swiglu, stream);
    return run<8>(p, fp32_residual, swiglu, stream);
}
