// Matrix products y = x W^T of few rows, whose time is that of bringing W and x to the multiprocessors, with what follows them
// inside. The weights are the tensor cores' left operand: a block makes the products of 64 rows of W with N rows of x, over one of
// `splits` parts of the inner dimension; the blocks of a cluster have one part each, and each adds up some rows of y from all their
// shared memories, always in the same order. A warp has W and x copied in chunks of 64 of the inner dimension (TMA, 128-byte
// swizzle), a warpgroup multiplies. Two blocks fit on a multiprocessor, so that weights are on their way while the kernel before ends.
//
// The input may be a residual stream not yet divided by its root mean square: then `squares` holds sums of squares of every row, and
// the rows of y are multiplied by the factor that they give. Afterwards:
//   plain   y
//   swiglu  W is [gate; value]: y = silu(gate) * value
//   conv    W is [u1; u2]: one token of the gated short convolution, whose window `carry` of each slot shifts
//   add     residual += y + bias, with y = residual in bf16 (where that is what the stream is, the same memory), and the sums of
//           squares of the rows over every tile
#include "decode_common.cuh"
#include "hopper.cuh"
using namespace decode;
using taylor::address;
using taylor::barrier_wait;
using taylor::copy_box;

constexpr int kThreads = 128;                    // that multiply, before a warp that copies and one for the rest
constexpr int kColumns = 64, kRow = kColumns + 4;      // of W a block; floats of a row of its result in shared memory
constexpr int kChunk = 64, kMostStages = 12;
enum Kind { kPlain, kSwiglu, kConv, kAdd };

struct Product {
    bf16* y;
    int kind, rows, width, chunks, splits, stages;           // width: columns of y
    const float* squares;                                    // [parts, rows], or null
    int parts, inner;
    float eps;
    void* residual;                                          // add: [rows, width], bf16 or fp32
    int fp32;
    const bf16* bias;                                        // add: [width] or null; conv: [2 width]
    float* next_squares;                                     // [tiles, rows]
    const bf16* taps;                                        // conv: [width, count]
    int count;
    const int* slots;
    bf16* carry;                                             // [slots, count - 1, width]
};

__device__ __forceinline__ void expect_bytes(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
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

template <int N>
__global__ void __launch_bounds__(kThreads + 64, 2)
product_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x, const __grid_constant__ Product p) {
    constexpr int Stage = (kColumns + N) * kChunk * 2;
    extern __shared__ char memory[];
    __shared__ uint64_t barriers[2 * kMostStages];
    __shared__ float factor[N];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % p.splits, tile = blockIdx.x / p.splits, row0 = blockIdx.y * N;
    const bool paired = p.kind == kSwiglu || p.kind == kConv;
    const int tile_width = paired ? kColumns / 2 : kColumns, column0 = tile * tile_width, each = N / p.splits;
    const int begin = rank * p.chunks / p.splits, count = (rank + 1) * p.chunks / p.splits - begin;
    const uint32_t base = (address(memory) + 1023) & ~1023u, full = address(barriers), empty = full + kMostStages * 8;
    if (threadIdx.x == kThreads) {
        taylor::prefetch_map(&weight);
        taylor::prefetch_map(&x);
        for (int s = 0; s < p.stages; ++s) { init(full + s * 8, 1); init(empty + s * 8, kThreads / 32); }
        taylor::barriers_ready();
    }
    __syncthreads();
    if (warp == kThreads / 32) {                                      // copies
        if (lane == 0) {
            auto load = [&](int c, bool of_weights) {
                const uint32_t to = base + c % p.stages * Stage, bar = full + c % p.stages * 8;
                const int k = (begin + c) * kChunk;
                if (of_weights) {
                    expect_bytes(bar, Stage);
                    copy_box(to, &weight, bar, k, column0, 0);
                } else {
                    copy_box(to + kColumns * kChunk * 2, &x, bar, k, row0, 0);
                }
            };
            const int first = min(p.stages, count);
            for (int c = 0; c < first; ++c) load(c, true);
            wait_for_previous();
            for (int c = 0; c < first; ++c) load(c, false);
            for (int c = first; c < count; ++c) {
                barrier_wait(empty + c % p.stages * 8, c / p.stages - 1 & 1);
                load(c, true);
                load(c, false);
            }
            let_next_start();                                         // not before, or its loads would delay these
        }
        __syncwarp();
    } else if (warp == kThreads / 32 + 1) {                           // what the end of the block needs
        const int columns = min(tile_width, p.width - column0);
        if (lane == 0 && p.kind == kAdd && p.bias) prefetch(p.bias + column0, columns * 2);
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
        float sum[N / 2];
        #pragma unroll 1
        for (int c = 0; c < count; ++c) {
            const int s = c % p.stages;
            barrier_wait(full + s * 8, c / p.stages & 1);
            const uint32_t w = base + s * Stage, in = base + s * Stage + kColumns * kChunk * 2;
            taylor::wgmma_begin();
            #pragma unroll
            for (int k = 0; k < kChunk / 16; ++k)
                taylor::Wgmma<N>::ss(sum, taylor::swizzled(w + k * 32), taylor::swizzled(in + k * 32), c > 0 || k > 0);
            taylor::wgmma_commit();
            taylor::wgmma_wait<1>();
            if (c > 0) taylor::warp_arrive(empty + (c - 1) % p.stages * 8);
        }
        taylor::wgmma_wait<0>();
        wait_for_previous();
        asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");    // all stages have been used
        const uint32_t to = base + ((lane % 4 * 2) * kRow + warp * 16 + lane / 4) * 4;
        #pragma unroll
        for (int i = 0; i < N / 2; ++i)
            taylor::store_shared(to + ((i / 4 * 8 + i % 2) * kRow + i / 2 % 2 * 8) * 4, __float_as_uint(sum[i]));
    }
    if (p.splits > 1) everyone_of_cluster(); else __syncthreads();
    if (warp < kThreads / 32) {
        const int vectors = tile_width / 4;                           // of a row: 8, 16 or 32
        for (int first = warp * 32; first < each * vectors; first += kThreads) {
            const int i = first + lane, c = i % vectors * 4, column = column0 + c, local = rank * each + i / vectors;
            const int row = row0 + local;
            const bool real = i < each * vectors && row < p.rows && column < p.width;
            float a[4] = {}, b[4] = {}, square = 0.f;
            if (real) {
                const uint32_t from = base + (local * kRow + c) * 4;
                #pragma unroll 4
                for (int s = 0; s < p.splits; ++s) {
                    const float4 v = p.splits > 1 ? load_of_peer(from, s) : taylor::load_shared4(from);
                    a[0] += v.x; a[1] += v.y; a[2] += v.z; a[3] += v.w;
                    if (paired) {
                        const float4 u = p.splits > 1 ? load_of_peer(from + kColumns * 2, s) : taylor::load_shared4(from + kColumns * 2);
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
                    float before[4], bias[4] = {};
                    if (p.bias) load4(p.bias + column, bias);
                    if (p.fp32) {
                        const float4 v = *(const float4*)((const float*)p.residual + at);
                        before[0] = v.x; before[1] = v.y; before[2] = v.z; before[3] = v.w;
                    } else {
                        load4((const bf16*)p.residual + at, before);
                    }
                    #pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        a[j] = before[j] + (a[j] + bias[j]);
                        if (!p.fp32) a[j] = rounded(a[j]);
                        square += a[j] * a[j];
                    }
                    if (p.fp32) *(float4*)((float*)p.residual + at) = make_float4(a[0], a[1], a[2], a[3]);
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

// Boxes of 64 of the inner dimension x `rows` rows of each of `parts` parts of a bf16 matrix [parts * height, inner].
static bool make_map(CUtensorMap* map, const void* matrix, int inner, int height, int parts, int rows) {
    return taylor::make_map<3>(map, matrix, {inner, height, parts}, {inner, (int64_t)inner * height}, {kChunk, rows, parts},
                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

template <int N> static int run(Product p, const void* x, const void* weight, void* stream) {
    constexpr int Stage = (kColumns + N) * kChunk * 2, Result = N * kRow * 4;
    constexpr int Most = 110 * 1024;                                  // two blocks on a multiprocessor
    static_assert(Result <= Most && Stage * 2 <= Most, "does not fit");
    const int parts = p.kind == kSwiglu || p.kind == kConv ? 2 : 1, tile = kColumns / parts;
    CUtensorMap weights, input;
    if (!make_map(&weights, weight, p.inner, p.width, parts, tile) || !make_map(&input, x, p.inner, p.rows, 1, N))
        return (int)cudaErrorInvalidValue;
    p.stages = Most / Stage < kMostStages ? Most / Stage : kMostStages;
    const int bytes = (p.stages * Stage > Result ? p.stages * Stage : Result) + 1024;
    const dim3 grid((p.width + tile - 1) / tile * p.splits, (p.rows + N - 1) / N);
    return launch_clusters(product_kernel<N>, p.splits, grid, kThreads + 64, (size_t)bytes, stream, weights, input, p);
}

extern "C" int decode_product(const void* x, const void* weight, void* y, int kind, int rows, int width, int inner, int splits,
                              const float* squares, int parts, float eps, void* residual, int fp32_residual,
                              const void* bias, float* next_squares, const void* taps, int tap_count, const int* slots,
                              void* carry, void* stream) {
    const Product p{(bf16*)y, kind, rows, width, (inner + kChunk - 1) / kChunk, splits, 0, squares, parts, inner, eps, residual,
                    fp32_residual, (const bf16*)bias, next_squares, (const bf16*)taps, tap_count, slots, (bf16*)carry};
    if (inner % 8 || width % 8 || rows < 1 || splits < 1 || splits > 8 || p.chunks < splits) return (int)cudaErrorInvalidValue;
    if (rows <= 8) return run<8>(p, x, weight, stream);
    if (rows <= 16) return run<16>(p, x, weight, stream);
    return run<32>(p, x, weight, stream);
}
