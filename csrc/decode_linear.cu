// Matrix product with one row or two, where the time is that of reading the weights. A warp makes one or two columns of the
// result (with SwiGLU a gate and its value), a lane takes every 32nd vector of 16 bytes of the weight rows; the first of them are
// on their way before the input is there, the others to the L2 cache. The input waits in shared memory as bf16;
// where a norm is asked for, its factor of a row comes to the row's sums. In a convolution layer the two columns of a warp are an
// input of the convolution and its gate, and a lane makes the step of one row.
#include "decode_common.cuh"
using namespace decode;

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kFewWarps = 2112;                  // with fewer, 16 on each multiprocessor, a warp has one column

struct Linear {
    const bf16 *x, *weight;
    bf16* y;
    bool norm;                                   // x is the residual stream
    float eps;
    void* add_to;
    const bf16* bias;                            // of the addition [columns], or of the convolution's input [columns]
    const bf16* taps;                            // [columns / 2, count]
    int count;
    const int* slots;
    bf16* carry;                                 // [slots, count - 1, columns / 2]
    int columns, inner;
};
enum Kind { kPlain, kSwiglu, kConv };            // as in decode_product.cu
constexpr int kMostTaps = 4;

// N rows, C columns a warp.
template <int N, bool Fp32, Kind What, int C>
__global__ void __launch_bounds__(kThreads) linear_kernel(const __grid_constant__ Linear p) {
    constexpr int Ahead = 8 / C;
    constexpr bool Paired = What != kPlain;
    extern __shared__ __align__(16) uint4 input[];                 // [N, inner] bf16
    __shared__ float squares[N][kWarps];
    let_next_start();
    const int warp = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32, vectors = p.inner / 8;
    const int half = p.columns / 2;
    const uint4* from[C];
    int column[C];
    bool real[C];
    #pragma unroll
    for (int c = 0; c < C; ++c) {
        column[c] = Paired ? warp + c * half : C * warp + c;
        real[c] = Paired ? warp < half : column[c] < p.columns;
        from[c] = (const uint4*)p.weight + (int64_t)column[c] * vectors;
    }
    uint4 w[C][Ahead];
    auto fetch = [&](int first) {
        #pragma unroll
        for (int u = 0; u < Ahead; ++u)
            #pragma unroll
            for (int c = 0; c < C; ++c) {
                const int i = first + u * 32 + lane;
                w[c][u] = real[c] && i < vectors ? __ldcs(from[c] + i) : make_uint4(0, 0, 0, 0);
            }
    };
    fetch(0);
    #pragma unroll
    for (int c = 0; c < C; ++c)
        if (lane == 0 && real[c]) prefetch(from[c] + Ahead * 32, (vectors - Ahead * 32) * 16);
    const int slot = What == kConv && lane < N && real[0] ? p.slots[lane] : -1;
    const int64_t state = (int64_t)slot * (p.count - 1) * half + warp;
    float tap[kMostTaps] = {}, window[kMostTaps - 1] = {}, offset[C] = {};
    if (slot >= 0) {                                               // the window changes in this kernel alone
        #pragma unroll
        for (int i = 0; i < kMostTaps; ++i) {
            if (i < p.count) tap[i] = __bfloat162float(p.taps[(int64_t)warp * p.count + i]);
            if (i < p.count - 1) window[i] = __bfloat162float(p.carry[state + (int64_t)i * half]);
        }
        #pragma unroll
        for (int c = 0; c < C; ++c) offset[c] = __bfloat162float(p.bias[column[c]]);
    }
    wait_for_previous();
    float before[C] = {};                                          // what lane n adds row n's result to
    if (!Paired && p.add_to && lane < N)
        #pragma unroll
        for (int c = 0; c < C; ++c)
            if (real[c]) {
                const int64_t at = (int64_t)lane * p.columns + column[c];
                before[c] = Fp32 ? ((const float*)p.add_to)[at] : __bfloat162float(((const bf16*)p.add_to)[at]);
            }
    float square[N] = {};
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float x[8];
            if (p.norm) {
                load8<Fp32>(p.x, (int64_t)n * p.inner + i * 8, x);
                #pragma unroll
                for (int j = 0; j < 8; ++j) square[n] += x[j] * x[j];
                input[n * vectors + i] = pack(x);
            } else {
                input[n * vectors + i] = ((const uint4*)p.x)[(int64_t)n * vectors + i];
            }
        }
    }
    if (p.norm)
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            for (int d = 16; d; d /= 2) square[n] += __shfl_xor_sync(~0u, square[n], d);
            if (lane == 0) squares[n][threadIdx.x / 32] = square[n];
        }
    __syncthreads();
    float sum[C][N] = {};
    for (int first = 0; first < vectors; first += 32 * Ahead) {
        if (first) fetch(first);
        #pragma unroll
        for (int u = 0; u < Ahead; ++u) {
            const int i = first + u * 32 + lane;
            if (i >= vectors) break;
            float f[C][8];
            #pragma unroll
            for (int c = 0; c < C; ++c) unpack(w[c][u], f[c]);
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                    float x[8];
                unpack(input[n * vectors + i], x);
                #pragma unroll
                for (int c = 0; c < C; ++c)
                    #pragma unroll
                    for (int j = 0; j < 8; ++j) sum[c][n] += f[c][j] * x[j];
            }
        }
    }
    float own[C] = {}, scale = 1.f;                                // of row `lane`
    #pragma unroll
    for (int n = 0; n < N; ++n)
        #pragma unroll
        for (int c = 0; c < C; ++c) {
            for (int d = 16; d; d /= 2) sum[c][n] += __shfl_xor_sync(~0u, sum[c][n], d);
            if (lane == n) own[c] = sum[c][n];
        }
    if (lane >= N) return;
    if (p.norm) {
        float total = 0.f;
        #pragma unroll
        for (int i = 0; i < kWarps; ++i) total += squares[lane][i];
        scale = rsqrtf(total / p.inner + p.eps);
    }
    #pragma unroll
    for (int c = 0; c < C; ++c) own[c] = rounded(own[c] * scale);
    if (What == kSwiglu && real[0]) p.y[(int64_t)lane * half + warp] = __float2bfloat16(silu(own[0]) * own[C - 1]);
    if (slot >= 0) {
        const float newest = rounded(own[0] + offset[0]);
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < kMostTaps; ++i) {
            if (i >= p.count) break;
            const float x = i == p.count - 1 ? newest : window[min(i, kMostTaps - 2)];
            sum += x * tap[i];
            if (i > 0) p.carry[state + (int64_t)(i - 1) * half] = __float2bfloat16(x);
        }
        p.y[(int64_t)lane * half + warp] = __float2bfloat16(silu(sum) * rounded(own[C - 1] + offset[C - 1]));
    }
    #pragma unroll
    for (int c = 0; c < C; ++c) {
        if (Paired || !real[c]) continue;
        const int64_t at = (int64_t)lane * p.columns + column[c];
        if (p.add_to) own[c] = before[c] + (own[c] + (p.bias ? __bfloat162float(p.bias[column[c]]) : 0.f));
        if (p.add_to && Fp32) ((float*)p.add_to)[at] = own[c];
        else (p.add_to ? (bf16*)p.add_to : p.y)[at] = __float2bfloat16(own[c]);
    }
}

template <int N, bool Fp32> int run(const Linear& p, int kind, void* stream) {
    auto start = [&](auto kernel, int warps) {
        return launch(kernel, (warps + kWarps - 1) / kWarps, kThreads, (size_t)N * p.inner * 2, stream, p);
    };
    if (kind == kSwiglu) return start(linear_kernel<N, Fp32, kSwiglu, 2>, p.columns / 2);
    if (kind == kConv) return start(linear_kernel<N, Fp32, kConv, 2>, p.columns / 2);
    if (p.columns / 2 < kFewWarps) return start(linear_kernel<N, Fp32, kPlain, 1>, p.columns);
    return start(linear_kernel<N, Fp32, kPlain, 2>, (p.columns + 1) / 2);
}

extern "C" int decode_linear(const void* x, const void* weight, void* y, int kind, int norm, float eps, void* add_to,
                             const void* bias, int fp32_residual, const void* taps, int tap_count, const int* slots, void* carry,
                             int rows, int columns, int inner, void* stream) {
    const Linear p{(const bf16*)x, (const bf16*)weight, (bf16*)y, norm != 0, eps, add_to, (const bf16*)bias,
                   (const bf16*)taps, tap_count, slots, (bf16*)carry, columns, inner};
    if (inner % 8 || rows < 1 || rows > 2 || kind > kConv || (kind == kConv && (tap_count < 2 || tap_count > kMostTaps)))
        return (int)cudaErrorInvalidValue;
    auto start = [&](auto fp32) {
        constexpr bool Fp32 = decltype(fp32)::value;
        return rows == 1 ? run<1, Fp32>(p, kind, stream) : run<2, Fp32>(p, kind, stream);
    };
    return fp32_residual ? start(std::true_type{}) : start(std::false_type{});
}
