// Shared pieces of the generation kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <type_traits>
#include <utility>
#include "decode.h"

namespace decode {

using bf16 = __nv_bfloat16;

// The next kernel of the stream may start its prologue now; what this kernel waits for is complete afterwards. Every thread
// of every kernel calls both, before it touches anything but weights, `slots` and `positions`, which no kernel between a step's
// first and last changes. The first, decode_embed, waits first: no other starts before the previous step has ended.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Bytes from `from` on, 16-byte aligned, a multiple of 16, on their way to the L2 cache; none where there are not any. Any kernel
// may ask for anything that it will read: a later write is not missed.
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
    if (bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Launches a kernel that may overlap the end of the one before it (programmatic dependent launch), in clusters of blocks.
template <typename... P, typename... A>
int launch_clusters(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t shared, void* stream, A... args) {
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid; config.blockDim = block; config.dynamicSmemBytes = shared;
    config.stream = (cudaStream_t)stream; config.attrs = attributes; config.numAttrs = cluster > 1 ? 2 : 1;
    if (shared > 48 * 1024) {
        cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        if (code != cudaSuccess) return (int)code;
    }
    return (int)cudaLaunchKernelEx(&config, kernel, P(args)...);
}
template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, void* stream, A... args) {
    return launch_clusters(kernel, 1, grid, block, shared, stream, args...);
}

// Threads of a block that has a row of as many vectors of 16 bytes: equally many of them each, as far as warps allow.
constexpr int kRowThreads = 512;
inline int row_threads(int vectors) {
    const int each = (vectors + kRowThreads - 1) / kRowThreads;
    return ((vectors + each - 1) / each + 31) / 32 * 32;
}

__device__ __forceinline__ float low(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
// Eight bf16 in a 16-byte vector.
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8]) {
    x[0] = low(v.x); x[1] = high(v.x); x[2] = low(v.y); x[3] = high(v.y);
    x[4] = low(v.z); x[5] = high(v.z); x[6] = low(v.w); x[7] = high(v.w);
}
__device__ __forceinline__ uint32_t pack(float a, float b) {
    return (uint32_t)__bfloat16_as_ushort(__float2bfloat16(a)) | (uint32_t)__bfloat16_as_ushort(__float2bfloat16(b)) << 16;
}
__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
__device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16(x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// The residual stream [rows, width] as a product took it, without its norm; null where the norm was taken before.
struct Norm {
    const bf16* residual;
    int width;
    float eps;
};

// Eight values of a residual stream, which is bf16 or fp32.
template <bool Fp32> __device__ __forceinline__ void load8(const void* from, int64_t at, float (&x)[8]) {
    if (Fp32) {
        const float4 a = ((const float4*)from)[at / 4], b = ((const float4*)from)[at / 4 + 1];
        x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w; x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
    } else {
        unpack(((const uint4*)from)[at / 8], x);
    }
}
template <bool Fp32> __device__ __forceinline__ void store8(void* to, int64_t at, const float (&x)[8]) {
    if (Fp32) {
        ((float4*)to)[at / 4] = make_float4(x[0], x[1], x[2], x[3]);
        ((float4*)to)[at / 4 + 1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        ((uint4*)to)[at / 8] = pack(x);
    }
}

// Sum over a block of at most 1024 threads; `space` holds 32 floats. Every thread gets it.
__device__ __forceinline__ float block_sum(float x, float* space) {
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) space[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < (int)blockDim.x / 32; ++i) sum += space[i];
    return sum;
}

// A row of the residual stream whose RMSNorm a product was made without: a factor of all its results. With no stream (null) it is 1.
// `Vectors` of a thread are on their way from where this is made, the others are loaded when the factor is asked for.
template <int Vectors> struct Unnormed {
    const uint4* from;
    int count;                                   // vectors of the row
    float eps;
    uint4 x[Vectors];

    __device__ __forceinline__ Unnormed(const Norm& norm, int row)
        : from(norm.residual ? (const uint4*)norm.residual + (int64_t)row * (norm.width / 8) : nullptr), count(norm.width / 8),
          eps(norm.eps) {
        #pragma unroll
        for (int n = 0; n < Vectors; ++n) {
            const int i = threadIdx.x + n * blockDim.x;
            x[n] = from && i < count ? from[i] : make_uint4(0, 0, 0, 0);
        }
    }
    // For every thread of the block; `space` holds 32 floats.
    __device__ __forceinline__ float factor(float* space) const {
        if (!from) return 1.f;
        float square = 0.f;
        auto take = [&](const uint4& v) {
            float a[8];
            unpack(v, a);
            #pragma unroll
            for (int j = 0; j < 8; ++j) square += a[j] * a[j];
        };
        #pragma unroll
        for (int n = 0; n < Vectors; ++n) take(x[n]);
        for (int i = threadIdx.x + Vectors * blockDim.x; i < count; i += blockDim.x) take(from[i]);
        return rsqrtf(block_sum(square, space) / (count * 8) + eps);
    }
};

}  // namespace decode
