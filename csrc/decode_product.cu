// Matrix products y = x W^T of few rows, whose time is that of bringing W and x to the multiprocessors, with what follows them
// inside. The weights are the tensor cores' left operand: a block makes 64 G columns of y for N rows, over one of `splits` parts of
// the inner dimension; the blocks of a cluster have one part each, and each adds up some of the rows from all their shared memories,
// always in the same order. A warp has W and x copied in chunks of 64 of the inner dimension (TMA, 128-byte swizzle), G warpgroups
// multiply. Weights are on their way, into shared memory and L2, before the input is there; two blocks fit on a multiprocessor, so
// that this happens beside the kernel before.
//
// The input may be a residual stream times the weights of a norm, not yet divided by its root mean square: then `squares` holds sums
// of squares of every row, and the rows of y are multiplied by the factor that they give. Afterwards:
//   plain   y
//   swiglu  W is [gate; value]: y = silu(gate) * value
//   conv    W is [u1; u2]: one token of the gated short convolution, whose window `carry` of each slot shifts
//   add     residual += y + bias; y = residual * weights of the next norm, and the sums of squares of the rows over every tile
#include <cuda.h>
#include "decode_common.cuh"
#include "hopper.cuh"
using namespace decode;
using taylor::address;
using taylor::barrier_wait;

constexpr int kChunk = 64, kMostStages = 12;
enum Kind { kPlain, kSwiglu, kConv, kAdd };

struct Product {
    bf16* y;
    int kind, rows, width, chunks, splits;                   // width: columns of y
    int weight_stages, input_stages;
    int late;
    const float* squares;                                    // [parts, rows], or null
    int parts, inner;
    float eps;
    void* residual;                                          // add: [rows, width], bf16 or fp32
    int fp32;
    const bf16 *bias, *next_norm;                            // add: [width], bias or null; conv: bias [2 width]
    float* next_squares;                                     // [tiles, rows]
    const bf16* taps;                                        // conv: [width, count]
    int count;
    const int* slots;
    bf16* carry;                                             // [slots, count - 1, width]
};

// A box of a tensor to shared memory.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t bar, int k, int row, int part) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row), "r"(part) : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// An operand whose rows are 128 swizzled bytes along K.
__device__ __forceinline__ uint64_t swizzled(uint32_t at) {
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
__device__ __forceinline__ void everyone_of_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 load_of_peer(uint32_t at, int rank) {
    float4 x;
    asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];}"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at), "r"(rank) : "memory");
    return x;
}
__device__ __forceinline__ void load4(const bf16* from, float (&x)[4]) {
    const uint2 v = *(const uint2*)from;
    x[0] = low(v.x); x[1] = high(v.x); x[2] = low(v.y); x[3] = high(v.y);
}
__device__ __forceinline__ void store4(bf16* to, const float (&x)[4]) { *(uint2*)to = make_uint2(pack(x[0], x[1]), pack(x[2], x[3])); }

// Four channels of a row; u1, u2: the product, rounded.
template <int Count> __device__ __forceinline__ void convolve(const Product& p, int64_t window, int c, float (&u1)[4], float (&u2)[4]) {
    float w[Count][4], b1[4], b2[4], taps[Count * 4];
    #pragma unroll
    for (int i = 0; i < Count; ++i) load4(p.taps + (int64_t)c * Count + i * 4, *(float(*)[4])(taps + i * 4));
    load4(p.bias + c, b1);
    load4(p.bias + p.width + c, b2);
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        w[Count - 1][j] = rounded(u1[j] + b1[j]);
        u2[j] = rounded(u2[j] + b2[j]);
    }
    #pragma unroll
    for (int i = 0; i < Count - 1; ++i) load4(p.carry + window + (int64_t)i * p.width, w[i]);
    #pragma unroll
    for (int i = 0; i < Count - 1; ++i) store4(p.carry + window + (int64_t)i * p.width, w[i + 1]);
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < Count; ++i) sum += w[i][j] * taps[j * Count + i];
        u1[j] = silu(sum) * u2[j];
    }
}

template <int N, int G>
__global__ void __launch_bounds__(G * 128 + 64, 2)
product_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x, const __grid_constant__ Product p) {
    constexpr int M = 64 * G, Weights = M * kChunk * 2, Input = N * kChunk * 2, Row = M + 4, Threads = G * 128;
    extern __shared__ char memory[];
    __shared__ uint64_t barriers[4 * kMostStages];                    // weights there, used; input there, used
    __shared__ float factor[N];
    if (!p.late) let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % p.splits, tile = blockIdx.x / p.splits, row0 = blockIdx.y * N;
    const bool paired = p.kind == kSwiglu || p.kind == kConv;
    const int tile_width = paired ? M / 2 : M, column0 = tile * tile_width, each = N / p.splits;
    const int begin = rank * p.chunks / p.splits, count = (rank + 1) * p.chunks / p.splits - begin;
    const uint32_t base = (address(memory) + 1023) & ~1023u, inputs = base + p.weight_stages * Weights;
    const uint32_t weights_there = address(barriers), weights_used = weights_there + kMostStages * 8;
    const uint32_t input_there = weights_used + kMostStages * 8, input_used = input_there + kMostStages * 8;
    if (threadIdx.x == Threads) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&weight) : "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
        for (int s = 0; s < kMostStages; ++s) {
            init(weights_there + s * 8, 1);
            init(weights_used + s * 8, G * 4);
            init(input_there + s * 8, 1);
            init(input_used + s * 8, G * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        taylor::fence_for_tensor_cores();
    }
    __syncthreads();
    if (warp == G * 4) {                                              // copies
        if (lane == 0) {
            auto load_weights = [&](int c) {
                const int s = c % p.weight_stages, turn = c / p.weight_stages;
                if (turn > 0) barrier_wait(weights_used + s * 8, turn - 1 & 1);
                expect_bytes(weights_there + s * 8, Weights);
                copy_box(base + s * Weights, &weight, weights_there + s * 8, (begin + c) * kChunk, column0, 0);
            };
            auto load_input = [&](int c) {
                const int s = c % p.input_stages, turn = c / p.input_stages;
                if (turn > 0) barrier_wait(input_used + s * 8, turn - 1 & 1);
                expect_bytes(input_there + s * 8, Input);
                copy_box(inputs + s * Input, &x, input_there + s * 8, (begin + c) * kChunk, row0, 0);
            };
            int weights = 0, input = 0;                               // chunks asked for
            while (weights < min(p.weight_stages, count)) load_weights(weights++);
            wait_for_previous();
            while (input < min(p.input_stages, count)) load_input(input++);
            if (p.late == 2) let_next_start();
            while (weights < count || input < count) {
                if (p.late == 3 && input == (count + p.input_stages) / 2) let_next_start();
                if (input < count) load_input(input++);
                if (weights < count) load_weights(weights++);
            }
            if (p.late == 1 || p.late == 3) let_next_start();
        }
        __syncwarp();
    } else if (warp == G * 4 + 1) {                                   // what the end of the block needs
        const int columns = min(tile_width, p.width - column0);
        if (lane == 0 && p.kind == kAdd) {
            prefetch(p.next_norm + column0, columns * 2);
            if (p.bias) prefetch(p.bias + column0, columns * 2);
        }
        if (p.kind == kConv) {
            if (lane < 2) prefetch(p.bias + lane * p.width + column0, columns * 2);
            if (lane == 2) prefetch(p.taps + column0 * p.count, columns * p.count * 2);
            for (int i = lane; i < each * (p.count - 1); i += 32) {
                const int row = row0 + rank * each + i / (p.count - 1), slot = row < p.rows ? p.slots[row] : -1;
                if (slot >= 0) prefetch(p.carry + ((int64_t)slot * (p.count - 1) + i % (p.count - 1)) * p.width + column0, columns * 2);
            }
        }
        wait_for_previous();
        for (int i = lane; i < each; i += 32) {
            const int row = row0 + rank * each + i;
            float sum = 0.f;
            if (p.squares && row < p.rows)
                #pragma unroll 8
                for (int j = 0; j < p.parts; ++j) sum += p.squares[(int64_t)j * p.rows + row];
            factor[i] = p.squares ? rsqrtf(sum / p.inner + p.eps) : 1.f;
        }
        __syncwarp();
    } else {
        const int group = __shfl_sync(~0u, warp / 4, 0);
        float sum[N / 2];
        #pragma unroll 1
        for (int c = 0; c < count; ++c) {
            const int of_weights = c % p.weight_stages, of_input = c % p.input_stages;
            barrier_wait(weights_there + of_weights * 8, c / p.weight_stages & 1);
            barrier_wait(input_there + of_input * 8, c / p.input_stages & 1);
            const uint32_t w = base + of_weights * Weights + group * 64 * kChunk * 2, in = inputs + of_input * Input;
            taylor::wgmma_begin();
            #pragma unroll
            for (int k = 0; k < kChunk / 16; ++k)
                taylor::Wgmma<N>::ss(sum, swizzled(w + k * 32), swizzled(in + k * 32), c > 0 || k > 0);
            taylor::wgmma_commit();
            taylor::wgmma_wait<1>();
            if (c > 0) {
                taylor::warp_arrive(weights_used + (c - 1) % p.weight_stages * 8);
                taylor::warp_arrive(input_used + (c - 1) % p.input_stages * 8);
            }
        }
        taylor::wgmma_wait<0>();
        wait_for_previous();
        asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");     // all stages have been used
        const uint32_t to = base + ((lane % 4 * 2) * Row + warp * 16 + lane / 4) * 4;
        #pragma unroll
        for (int i = 0; i < N / 2; ++i)
            taylor::store_shared(to + ((i / 4 * 8 + i % 2) * Row + i / 2 % 2 * 8) * 4, __float_as_uint(sum[i]));
    }
    if (p.splits > 1) everyone_of_cluster(); else __syncthreads();
    if (warp < G * 4) {
        const int vectors = tile_width / 4;                           // of a row: 8, 16 or 32
        for (int first = warp * 32; first < each * vectors; first += Threads) {
            const int i = first + lane, c = i % vectors * 4, column = column0 + c, local = rank * each + i / vectors;
            const int row = row0 + local;
            const bool real = i < each * vectors && row < p.rows && column < p.width;
            float a[4] = {}, b[4] = {}, square = 0.f;
            if (real) {
                const uint32_t from = base + (local * Row + c) * 4;
                #pragma unroll 4
                for (int s = 0; s < p.splits; ++s) {
                    const float4 v = p.splits > 1 ? load_of_peer(from, s) : taylor::load_shared4(from);
                    a[0] += v.x; a[1] += v.y; a[2] += v.z; a[3] += v.w;
                    if (paired) {
                        const float4 u = p.splits > 1 ? load_of_peer(from + M * 2, s) : taylor::load_shared4(from + M * 2);
                        b[0] += u.x; b[1] += u.y; b[2] += u.z; b[3] += u.w;
                    }
                }
                const float scale = factor[i / vectors];
                const int64_t at = (int64_t)row * p.width + column;
                #pragma unroll
                for (int j = 0; j < 4; ++j) { a[j] = rounded(a[j] * scale); b[j] = rounded(b[j] * scale); }
                if (p.kind == kSwiglu) {
                    #pragma unroll
                    for (int j = 0; j < 4; ++j) a[j] = silu(a[j]) * b[j];
                } else if (p.kind == kConv) {
                    const int slot = p.slots[row];
                    if (slot >= 0) {
                        const int64_t window = (int64_t)slot * (p.count - 1) * p.width + column;
                        if (p.count == 3) convolve<3>(p, window, column, a, b);
                        else if (p.count == 2) convolve<2>(p, window, column, a, b);
                        else convolve<4>(p, window, column, a, b);
                    }
                } else if (p.kind == kAdd) {
                    float before[4], norm[4], bias[4] = {};
                    if (p.bias) load4(p.bias + column, bias);
                    load4(p.next_norm + column, norm);
                    if (p.fp32) {
                        const float4 v = *(const float4*)((const float*)p.residual + at);
                        before[0] = v.x; before[1] = v.y; before[2] = v.z; before[3] = v.w;
                    } else {
                        load4((const bf16*)p.residual + at, before);
                    }
                    #pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        before[j] += a[j] + bias[j];
                        if (!p.fp32) before[j] = rounded(before[j]);
                        square += before[j] * before[j];
                        a[j] = before[j] * norm[j];
                    }
                    if (p.fp32) *(float4*)((float*)p.residual + at) = make_float4(before[0], before[1], before[2], before[3]);
                    else store4((bf16*)p.residual + at, before);
                }
                store4(p.y + at, a);
            }
            if (p.kind == kAdd) {
                for (int d = vectors / 2; d; d /= 2) square += __shfl_xor_sync(~0u, square, d);
                if (c == 0 && i < each * vectors && row < p.rows) p.next_squares[(int64_t)tile * p.rows + row] = square;
            }
        }
    }
    if (p.splits > 1) { __syncwarp(); everyone_of_cluster(); }        // nobody leaves while its result is read
}

using Encode = decltype(&cuTensorMapEncodeTiled);
static Encode encoder() {
    static const Encode found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult status;
        const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
        return code == cudaSuccess && status == cudaDriverEntryPointSuccess ? (Encode)function : nullptr;
    }();
    return found;
}
// Boxes of 64 of the inner dimension x `rows` rows of each of `parts` parts of a bf16 matrix [parts * height, inner].
static bool make_map(CUtensorMap* map, const void* matrix, int inner, int height, int parts, int rows) {
    const cuuint64_t sizes[3] = {(cuuint64_t)inner, (cuuint64_t)height, (cuuint64_t)parts};
    const cuuint64_t strides[2] = {(cuuint64_t)inner * 2, (cuuint64_t)inner * height * 2};
    const cuuint32_t box[3] = {kChunk, (cuuint32_t)rows, (cuuint32_t)parts}, ones[3] = {1, 1, 1};
    return encoder() && encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)matrix, sizes, strides, box, ones,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int N, int G> static int run(Product p, const void* x, const void* weight, void* stream) {
    constexpr int M = 64 * G, Weights = M * kChunk * 2, Input = N * kChunk * 2, Result = N * (M + 4) * 4;
    constexpr int Most = 110 * 1024;                                  // two blocks on a multiprocessor
    constexpr int Inputs = N >= 128 ? 3 : N >= 64 ? 4 : N >= 32 ? 6 : kMostStages, Left = (Most - Inputs * Input) / Weights;
    static_assert(Result <= Most && Left >= 2 && N % 8 == 0, "does not fit");
    p.late = p.kind >> 8; p.kind &= 255;
    const int parts = p.kind == kSwiglu || p.kind == kConv ? 2 : 1, tile = M / parts;
    CUtensorMap weights, input;
    if (!make_map(&weights, weight, p.inner, p.width, parts, tile) || !make_map(&input, x, p.inner, p.rows, 1, N))
        return (int)cudaErrorInvalidValue;
    p.weight_stages = Left < kMostStages ? Left : kMostStages;
    p.input_stages = Inputs;
    const int stages = p.weight_stages * Weights + p.input_stages * Input, bytes = (stages > Result ? stages : Result) + 1024;
    const dim3 grid((p.width + tile - 1) / tile * p.splits, (p.rows + N - 1) / N);
    return launch_clusters(product_kernel<N, G>, p.splits, grid, G * 128 + 64, (size_t)bytes, stream, weights, input, p);
}

extern "C" int decode_product(const void* x, const void* weight, void* y, int kind, int rows, int width, int inner, int groups,
                              int splits, const float* squares, int parts, float eps, void* residual, int fp32_residual,
                              const void* bias, const void* next_norm, float* next_squares, const void* taps, int tap_count,
                              const int* slots, void* carry, void* stream) {
    const Product p{(bf16*)y, kind, rows, width, (inner + kChunk - 1) / kChunk, splits, 0, 0, 0, squares, parts, inner, eps, residual,
                    fp32_residual, (const bf16*)bias, (const bf16*)next_norm, next_squares, (const bf16*)taps, tap_count, slots,
                    (bf16*)carry};
    if (inner % 8 || width % 8 || rows < 1 || splits < 1 || splits > 8 || p.chunks < splits) return (int)cudaErrorInvalidValue;
    auto start = [&](auto n) {
        constexpr int N = decltype(n)::value;
        switch (groups) {
            case 1: return run<N, 1>(p, x, weight, stream);
            case 2: return run<N, 2>(p, x, weight, stream);
        }
        return (int)cudaErrorInvalidValue;
    };
    if (rows <= 8) return start(std::integral_constant<int, 8>{});
    if (rows <= 16) return start(std::integral_constant<int, 16>{});
    if (rows <= 32) return start(std::integral_constant<int, 32>{});
    if (rows <= 64) return start(std::integral_constant<int, 64>{});
    if (rows <= 96) return start(std::integral_constant<int, 96>{});
    return start(std::integral_constant<int, 128>{});
}
