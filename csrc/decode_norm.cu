// Embedding, residual addition with RMSNorm (whose weights are in the product after it), and SwiGLU: the elementwise kernels of a
// layer, 16 bytes a thread.
#include "decode_common.cuh"
using namespace decode;

template <bool Fp32>
__global__ void embed_kernel(const int* tokens, const int* positions, const int* slots, const bf16* table, void* residual, int width,
                             int first, int count, const float* frequency, float* rotation, int half) {
    wait_for_previous();                         // in this order: no kernel of a step starts before the last step has ended
    let_next_start();
    const int row = blockIdx.x, slot = slots[row];
    const int token = slot < 0 ? -1 : tokens[slot] - first;
    const bool here = token >= 0 && token < count;
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
        float x[8] = {};
        if (here) load8<false>(table, (int64_t)token * width + i, x);
        store8<Fp32>(residual, (int64_t)row * width + i, x);
    }
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float angle = slot < 0 ? 0.f : (float)positions[slot] * frequency[i];
        double s, c;
        sincos((double)angle, &s, &c);           // --use_fast_math would ruin large angles in single precision
        rotation[(int64_t)row * 2 * half + i] = (float)c;
        rotation[(int64_t)row * 2 * half + half + i] = (float)s;
    }
}

constexpr int kMostVectors = 4;                  // 16-byte vectors a thread: width up to 256 * 8 * 4

template <bool Fp32, int Vectors>
__global__ void __launch_bounds__(256) add_norm_kernel(void* residual, const bf16* out, const bf16* bias, bf16* y, float eps,
                                                       int width) {
    __shared__ float space[32];
    let_next_start();
    const int64_t row = (int64_t)blockIdx.x * width;
    float x[Vectors][8], square = 0.f;
    uint4 b[Vectors];
    #pragma unroll
    for (int n = 0; n < Vectors; ++n) {
        const int i = threadIdx.x + n * blockDim.x;
        b[n] = i * 8 < width && bias ? ((const uint4*)bias)[i] : make_uint4(0, 0, 0, 0);
    }
    wait_for_previous();
    #pragma unroll
    for (int n = 0; n < Vectors; ++n) {
        const int i = (threadIdx.x + n * blockDim.x) * 8;
        if (i >= width) break;
        load8<Fp32>(residual, row + i, x[n]);
        if (out) {
            float a[8], c[8];
            load8<false>(out, row + i, a);
            unpack(b[n], c);
            #pragma unroll
            for (int j = 0; j < 8; ++j) x[n][j] = Fp32 ? x[n][j] + (a[j] + c[j]) : rounded(x[n][j] + (a[j] + c[j]));
            store8<Fp32>(residual, row + i, x[n]);
        }
        #pragma unroll
        for (int j = 0; j < 8; ++j) square += x[n][j] * x[n][j];
    }
    const float scale = rsqrtf(block_sum(square, space) / width + eps);
    #pragma unroll
    for (int n = 0; n < Vectors; ++n) {
        const int i = (threadIdx.x + n * blockDim.x) * 8;
        if (i >= width) break;
        #pragma unroll
        for (int j = 0; j < 8; ++j) x[n][j] *= scale;
        store8<false>(y, row + i, x[n]);
    }
}

// A block has a row.
__global__ void __launch_bounds__(kRowThreads, 2) swiglu_kernel(const bf16* x, bf16* y, int width, Norm norm) {
    __shared__ float space[32];
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x, vectors = width / 8;
    const uint4 *gates = (const uint4*)x + (int64_t)row * 2 * vectors, *values = gates + vectors;
    const Unnormed<1> stream(norm, row);
    uint4 gate, value;
    auto fetch = [&](int i) { gate = gates[i]; value = values[i]; };
    int i = threadIdx.x;
    if (i < vectors) fetch(i);
    const float factor = stream.factor(space);
    for (; i < vectors; i += blockDim.x) {
        float a[8], b[8];
        if (i >= (int)blockDim.x) fetch(i);
        unpack(gate, a);
        unpack(value, b);
        #pragma unroll
        for (int j = 0; j < 8; ++j) a[j] = silu(a[j] * factor) * (b[j] * factor);
        ((uint4*)y)[(int64_t)row * vectors + i] = pack(a);
    }
}

extern "C" int decode_embed(const int* tokens, const int* positions, const int* slots, const void* table, void* residual,
                            int fp32_residual, int rows, int width, int first, int count, const float* frequency, float* rotation,
                            int half, void* stream) {
    return launch(fp32_residual ? embed_kernel<true> : embed_kernel<false>, rows, 256, 0, stream, tokens, positions, slots,
                  (const bf16*)table, residual, width, first, count, frequency, rotation, half);
}

extern "C" int decode_add_norm(void* residual, int fp32_residual, const void* out, const void* bias, void* y, float eps,
                               int rows, int width, void* stream) {
    const int vectors = (width + 2047) / 2048;
    if (vectors > kMostVectors) return (int)cudaErrorInvalidValue;
    const int threads = ((width + 8 * vectors - 1) / (8 * vectors) + 31) / 32 * 32;
    auto run = [&](auto kernel) {
        return launch(kernel, rows, threads, 0, stream, residual, (const bf16*)out, (const bf16*)bias, (bf16*)y, eps, width);
    };
    if (vectors == 1) return fp32_residual ? run(add_norm_kernel<true, 1>) : run(add_norm_kernel<false, 1>);
    if (vectors == 2) return fp32_residual ? run(add_norm_kernel<true, 2>) : run(add_norm_kernel<false, 2>);
    return fp32_residual ? run(add_norm_kernel<true, 4>) : run(add_norm_kernel<false, 4>);
}

extern "C" int decode_swiglu(const void* x, void* y, int rows, int width, const void* residual, int d_model, float eps, void* stream) {
    return launch(swiglu_kernel, rows, row_threads(width / 8), 0, stream, (const bf16*)x, (bf16*)y, width,
                  Norm{(const bf16*)residual, d_model, eps});
}
