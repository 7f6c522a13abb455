// The next token of every row. temperature 0: the largest logit, the lowest id where several are equal. Otherwise the largest of
// logit / temperature + Gumbel noise (which samples the softmax) among the tokens that top_k and top_p keep; the noise is a hash of
// (seed, position, token), so it does not depend on the other rows. top_k keeps the k largest logits; top_p the fewest largest
// of those whose probabilities sum to at least p; equal logits are kept or dropped together. A block has one row, or where there are
// few a cluster of blocks has a part of one each; the bf16 logits wait in shared memory, from where a thread takes eight at a time,
// and the thresholds are found by bisection over the 16 bits of their order-preserving keys.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include "decode_common.cuh"
using namespace decode;

constexpr int kThreads = 1024;                   // 32 warps
constexpr int kMostParts = 8, kBlocks = 128;     // of a row, as long as there are no more blocks than multiprocessors

__device__ __forceinline__ uint64_t mix(uint64_t z) {              // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}
// -log of an exponential variate: a standard Gumbel variate.
__device__ __forceinline__ float gumbel(uint64_t base, int token) {
    const float u = ((float)(uint32_t)(mix(base + (uint64_t)token * 0x9E3779B97F4A7C15ull) >> 40) + 0.5f) * 5.9604645e-8f;
    const float e = u < 0.01f ? u * (1.f + u * (0.5f + u * (1.f / 3.f))) : -__logf(1.f - u);
    return -__logf(e);
}
__device__ __forceinline__ uint32_t order(uint16_t x) { return x & 0x8000u ? (uint16_t)~x : x | 0x8000u; }
__device__ __forceinline__ float value(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
__device__ __forceinline__ uint32_t order(float x) {
    const uint32_t b = __float_as_uint(x);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}
__device__ __forceinline__ float from_order(uint32_t x) { return __uint_as_float(x & 0x80000000u ? x ^ 0x80000000u : ~x); }

// What some of a row's tokens have come to: the key of the largest logit, the sum of exp(logit - the largest), and the key of the
// largest with noise. Keys are ordered values over inverted ids; 0 is below them all.
struct Found {
    uint64_t best, noisy;
    float mass;
};
__device__ __forceinline__ uint64_t key(uint32_t ordered, int token) { return (uint64_t)ordered << 32 | (uint32_t)~token; }
__device__ __forceinline__ float largest_of(const Found& x) { return from_order((uint32_t)(x.best >> 32)); }
__device__ __forceinline__ Found joined(const Found& a, const Found& b) {
    const Found& more = a.best > b.best ? a : b;
    const float peak = largest_of(more);
    auto share = [&](const Found& x) { return x.mass > 0.f ? x.mass * __expf(largest_of(x) - peak) : 0.f; };
    return {more.best, a.noisy > b.noisy ? a.noisy : b.noisy, share(a) + share(b)};
}
__device__ __forceinline__ Found from_lane(const Found& x, int d) {
    return {__shfl_xor_sync(~0u, x.best, d), __shfl_xor_sync(~0u, x.noisy, d), __shfl_xor_sync(~0u, x.mass, d)};
}
__device__ __forceinline__ float from_lane(float x, int d) { return __shfl_xor_sync(~0u, x, d); }
__device__ __forceinline__ float joined(float a, float b) { return a + b; }

// Over a block, then over the parts of a row. Every thread gets the result; the blocks join in the same order.
template <typename T> __device__ __forceinline__ T over_row(T x, T* space) {
    for (int d = 16; d; d /= 2) x = joined(x, from_lane(x, d));
    __syncthreads();
    if ((threadIdx.x & 31) == 0) space[threadIdx.x >> 5] = x;
    __syncthreads();
    x = space[threadIdx.x & 31];
    for (int d = 16; d; d /= 2) x = joined(x, from_lane(x, d));
    const auto cluster = cooperative_groups::this_cluster();
    const int parts = cluster.num_blocks();
    if (parts == 1) return x;
    __syncthreads();
    if (threadIdx.x == 0) space[0] = x;
    cluster.sync();
    x = *cluster.map_shared_rank(space, 0);
    for (int i = 1; i < parts; ++i) x = joined(x, *cluster.map_shared_rank(space, i));
    cluster.sync();
    return x;
}

// f(i, logit i) for the thread's share of `vectors` of eight.
template <typename F> __device__ __forceinline__ void for_own(const uint4* logits, int vectors, F f) {
    for (int n = threadIdx.x; n < vectors; n += kThreads) {
        const uint4 v = logits[n];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int i = 0; i < 8; ++i) f(n * 8 + i, (uint16_t)(pairs[i / 2] >> i % 2 * 16));
    }
}

struct Sample {
    const uint16_t* logits;
    const int* slots;
    int *tokens, *positions;
    const float* temperature;
    const int* top_k;
    const float* top_p;
    const int64_t* seeds;
    int* chosen;
    float* logprobs;
    int64_t stride;
    int kept, vocab, advance;
};

__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ Sample p) {
    extern __shared__ __align__(16) uint4 logits[];
    __shared__ float space[32];
    __shared__ Found found[32];
    let_next_start();
    wait_for_previous();
    const int parts = cooperative_groups::this_cluster().num_blocks(), part = blockIdx.x % parts;
    const int row = blockIdx.x / parts, slot = p.slots[row];
    if (slot < 0) return;
    const uint4* from = (const uint4*)(p.logits + row * p.stride);
    const int each = ((p.vocab + 7) / 8 + parts - 1) / parts, first = part * each * 8;
    const int count = max(0, min(each * 8, p.vocab - first)), vectors = (count + 7) / 8;         // of this part: tokens first + i
    for (int n = threadIdx.x; n < vectors; n += kThreads) __pipeline_memcpy_async(logits + n, from + part * each + n, 16);
    __pipeline_commit();
    const float temperature = p.temperature[slot], share = p.top_p[slot], inverse = 1.f / temperature;
    const int k = p.top_k[slot], position = p.positions[slot] + p.advance;
    const uint64_t base = mix((uint64_t)p.seeds[slot] ^ mix((uint64_t)position + 0x9E3779B97F4A7C15ull));
    const bool random = temperature > 0.f, chosen_from_few = random && ((k > 0 && k < p.vocab) || share < 1.f);
    auto noisy = [&](int i, uint16_t x) { return key(order(value(x) * inverse + gumbel(base, first + i)), first + i); };
    __pipeline_wait_prior(0);                                         // a thread's own share, which no other reads
    if (count % 8 && threadIdx.x == (vectors - 1) % kThreads)         // no token
        for (int i = count; i < vectors * 8; ++i) ((uint16_t*)logits)[i] = 0xff80;       // -inf
    float peak = -INFINITY;
    int at = threadIdx.x * 8;
    for_own(logits, vectors, [&](int i, uint16_t x) {
        if (value(x) > peak) { peak = value(x); at = i; }
    });
    Found own{};
    if (threadIdx.x < vectors) own.best = key(order(peak + 0.f), first + at);            // -0 is as large as 0
    for_own(logits, vectors, [&](int, uint16_t x) { own.mass += __expf(value(x) - peak); });
    if (random && !chosen_from_few) for_own(logits, vectors, [&](int i, uint16_t x) { own.noisy = max(own.noisy, noisy(i, x)); });
    Found all = over_row(own, found);
    const float largest = largest_of(all);
    if (chosen_from_few) {
        uint32_t least = 0;                                        // tokens whose key is at least this are kept
        if (k > 0 && k < p.vocab) {
            for (int bit = 15; bit >= 0; --bit) {
                const uint32_t trial = least | 1u << bit;
                float above = 0.f;
                for_own(logits, vectors, [&](int, uint16_t x) { above += order(x) >= trial; });
                if (over_row(above, space) >= k) least = trial;
            }
        }
        if (share < 1.f) {
            auto above = [&](uint32_t bound) {
                float part = 0.f;
                for_own(logits, vectors, [&](int, uint16_t x) {
                    if (order(x) >= bound) part += __expf((value(x) - largest) * inverse);
                });
                return over_row(part, space);
            };
            const float wanted = share * above(least);
            uint32_t bound = 0;
            for (int bit = 15; bit >= 0; --bit)
                if (above(bound | 1u << bit) >= wanted) bound |= 1u << bit;
            least = max(least, bound);
        }
        for_own(logits, vectors, [&](int i, uint16_t x) {
            if (order(x) >= least) own.noisy = max(own.noisy, noisy(i, x));
        });
        all = over_row(own, found);
    }
    const int token = (int)~(uint32_t)(random ? all.noisy : all.best);
    if (threadIdx.x == 0 && token >= first && token < first + count) {
        p.positions[slot] = position;
        const int64_t place = (int64_t)slot * p.kept + position % p.kept;
        p.tokens[slot] = p.chosen[place] = token;
        p.logprobs[place] = value(((const uint16_t*)logits)[token - first]) - largest - __logf(all.mass);
    }
}

extern "C" int decode_sample(const void* logits, const int* slots, int* tokens, int* positions, const float* temperature,
                             const int* top_k, const float* top_p, const int64_t* seeds, int* chosen, float* logprobs, int kept,
                             int rows, int64_t stride, int vocab, int advance, void* stream) {
    const Sample p{(const uint16_t*)logits, slots, tokens, positions, temperature, top_k, top_p, seeds, chosen, logprobs, stride, kept,
                   vocab, advance};
    if (stride % 8) return (int)cudaErrorInvalidValue;
    int parts = kMostParts;
    while (parts > 1 && rows * parts > kBlocks) parts /= 2;
    const int vectors = ((vocab + 7) / 8 + parts - 1) / parts;
    return launch_clusters(sample_kernel, parts, rows * parts, kThreads, (size_t)vectors * 16, stream, p);
}
