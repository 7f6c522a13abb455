// Matrix product y = x W^T of more rows than decode_linear.cu takes, whose time is still that of reading the weights. The weights
// are the tensor cores' left operand: a block makes 128 columns of y for N rows, over a part of the inner dimension where there
// would be too few blocks; the blocks of a cluster have one part each and add their results up through each other's shared memory,
// always in the same order. Weights are on their way, into shared memory and L2, before the input is there. With SwiGLU a block has
// 64 gates and their 64 values.
#include <cooperative_groups.h>
#include "decode_common.cuh"
#include "hopper.cuh"
using namespace decode;
using taylor::operand;

constexpr int kThreads = 256, kTile = 128, kChunk = 64, kPlanes = kChunk / 8;
constexpr int kBlocks = 264, kLeastChunks = 3;       // blocks wanted at once, two on each multiprocessor; chunks of a part

// Shared memory: stages of weights and input, as planes of eight numbers of the inner dimension, 16 bytes a row (what wgmma reads
// unswizzled); 16 bytes more a plane keep the copies free of bank conflicts. Later, in the same place, the fp32 result [N, kRow].
constexpr int kRow = kTile + 4, kWeightPlane = kTile * 16 + 16;
template <int N> struct Layout {
    static constexpr int Stages = N == 128 ? 3 : 4, Plane = N * 16 + 16, Input = kPlanes * kWeightPlane;
    static constexpr int Stage = Input + kPlanes * Plane, Result = N * kRow * 4;
    static constexpr int Bytes = Stages * Stage > Result ? Stages * Stage : Result;
};

struct Product {
    const bf16 *x, *weight;
    bf16* y;
    int rows, columns, inner, splits;
};

// 16 bytes, or zeros.
__device__ __forceinline__ void copy_or_clear(uint32_t to, const bf16* from, bool real) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

template <int N, bool Swiglu>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const __grid_constant__ Product p) {
    using L = Layout<N>;
    constexpr int Width = Swiglu ? kTile / 2 : kTile;                 // columns of y that a block makes
    extern __shared__ __align__(128) char memory[];
    let_next_start();
    const int split = blockIdx.x % p.splits, tile = blockIdx.x / p.splits, row0 = blockIdx.y * N;
    const int width = Swiglu ? p.columns / 2 : p.columns, rows = min(N, p.rows - row0);
    const int chunks = (p.inner + kChunk - 1) / kChunk, begin = split * chunks / p.splits;
    const int count = (split + 1) * chunks / p.splits - begin;
    const uint32_t base = taylor::address(memory);
    const int plane = threadIdx.x % kPlanes, first = threadIdx.x / kPlanes;
    auto weight_row = [&](int r) {                                    // of this tile, or -1
        const int column = tile * Width + r % Width;
        return column < width ? column + r / Width * width : -1;
    };
    int64_t own[kTile / 32];
    #pragma unroll
    for (int i = 0; i < kTile / 32; ++i) own[i] = (int64_t)weight_row(first + i * 32) * p.inner;
    auto load_weights = [&](int c) {
        const int k = (begin + c) * kChunk + plane * 8;
        const uint32_t to = base + c % L::Stages * L::Stage + plane * kWeightPlane + first * 16;
        #pragma unroll
        for (int i = 0; i < kTile / 32; ++i) {
            const bool real = own[i] >= 0 && k < p.inner;
            copy_or_clear(to + i * 32 * 16, p.weight + (real ? own[i] + k : 0), real);
        }
    };
    auto load_input = [&](int c) {
        const int k = (begin + c) * kChunk + plane * 8;
        const uint32_t to = base + c % L::Stages * L::Stage + L::Input + plane * L::Plane;
        #pragma unroll
        for (int r = first; r < N; r += 32) {
            const bool real = r < rows && k < p.inner;
            copy_or_clear(to + r * 16, p.x + (real ? (int64_t)(row0 + r) * p.inner + k : 0), real);
        }
    };
    #pragma unroll
    for (int c = 0; c < L::Stages - 1; ++c)
        if (c < count) load_weights(c);
    if (threadIdx.x < kTile && weight_row(threadIdx.x) >= 0) {
        const int from = (begin + L::Stages - 1) * kChunk, to = min((begin + count) * kChunk, p.inner);
        prefetch(p.weight + (int64_t)weight_row(threadIdx.x) * p.inner + from, (to - from) * 2);
    }
    wait_for_previous();
    #pragma unroll
    for (int c = 0; c < L::Stages - 1; ++c) {
        if (c < count) load_input(c);
        taylor::copies_commit();
    }
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    float sum[N / 2];
    #pragma unroll 1
    for (int c = 0; c < count; ++c) {
        taylor::copies_wait<L::Stages - 2>();
        taylor::fence_for_tensor_cores();
        __syncthreads();                                              // chunk c is there, chunk c - 1 has been used
        if (c + L::Stages - 1 < count) {
            load_weights(c + L::Stages - 1);
            load_input(c + L::Stages - 1);
        }
        taylor::copies_commit();
        const uint32_t stage = base + c % L::Stages * L::Stage;
        taylor::wgmma_begin();
        #pragma unroll
        for (int k = 0; k < kChunk / 16; ++k)
            taylor::Wgmma<N>::ss(sum, operand(stage + k * 2 * kWeightPlane + group * 64 * 16, kWeightPlane, 128),
                                 operand(stage + L::Input + k * 2 * L::Plane, L::Plane, 128), c > 0 || k > 0);
        taylor::wgmma_commit();
        taylor::wgmma_wait<0>();
    }
    taylor::copies_wait<0>();
    __syncthreads();
    float* result = (float*)memory;                                   // [row, column]
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
    #pragma unroll
    for (int i = 0; i < N / 2; ++i) result[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kRow + column + i / 2 % 2 * 8] = sum[i];
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int i = split * kThreads + threadIdx.x; i < rows * (Width / 8); i += p.splits * kThreads) {
        const int r = i / (Width / 8), c = i % (Width / 8) * 8;
        if (tile * Width + c >= width) continue;
        float a[8] = {}, b[8] = {};
        for (int s = 0; s < p.splits; ++s) {
            const float4* from = (const float4*)(cluster.map_shared_rank(result, s) + r * kRow + c);
            auto add = [](float (&x)[8], const float4& low, const float4& high) {
                x[0] += low.x; x[1] += low.y; x[2] += low.z; x[3] += low.w;
                x[4] += high.x; x[5] += high.y; x[6] += high.z; x[7] += high.w;
            };
            add(a, from[0], from[1]);
            if (Swiglu) add(b, from[Width / 4], from[Width / 4 + 1]);
        }
        if (Swiglu)
            #pragma unroll
            for (int j = 0; j < 8; ++j) a[j] = silu(rounded(a[j])) * rounded(b[j]);
        store8<false>(p.y, (int64_t)(row0 + r) * width + tile * Width + c, a);
    }
    cluster.sync();                                                   // nobody leaves while its result is read
}

template <int N> int run(Product p, int swiglu, void* stream) {
    const int width = swiglu ? p.columns / 2 : p.columns, tile = swiglu ? kTile / 2 : kTile;
    const int tiles = (width + tile - 1) / tile, blocks = (p.rows + N - 1) / N, chunks = (p.inner + kChunk - 1) / kChunk;
    for (p.splits = 8; p.splits > 1; p.splits /= 2)
        if (tiles * blocks * p.splits <= kBlocks && chunks / p.splits >= kLeastChunks) break;
    return launch_clusters(swiglu ? product_kernel<N, true> : product_kernel<N, false>, p.splits, dim3(tiles * p.splits, blocks),
                           kThreads, Layout<N>::Bytes, stream, p);
}

extern "C" int decode_product(const void* x, const void* weight, void* y, int swiglu, int rows, int columns, int inner, void* stream) {
    const Product p{(const bf16*)x, (const bf16*)weight, (bf16*)y, rows, columns, inner, 1};
    if (inner % 8 || columns % (swiglu ? 16 : 8) || rows < 1) return (int)cudaErrorInvalidValue;
    if (rows <= 16) return run<16>(p, swiglu, stream);
    if (rows <= 32) return run<32>(p, swiglu, stream);
    if (rows <= 64) return run<64>(p, swiglu, stream);
    return run<128>(p, swiglu, stream);
}
