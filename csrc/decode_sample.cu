// The next token of every row. temperature 0: the largest logit, the lowest id where several are equal. Otherwise the largest of
// logit / temperature + Gumbel noise (which samples the softmax) among the tokens that top_k and top_p keep; the noise is a hash of
// (seed, position, token), so it does not depend on the other rows. top_k keeps the k largest logits; top_p the fewest largest
// of those whose probabilities sum to at least p; equal logits are kept or dropped together. A block has one row, whose bf16
// logits wait in shared memory; the thresholds are found by bisection over the 16 bits of their order-preserving keys.
#include "decode_common.cuh"
using namespace decode;

constexpr int kThreads = 1024;

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
__device__ __forceinline__ uint64_t block_max(uint64_t x, uint64_t* space) {
    for (int d = 16; d; d /= 2) {
        const uint64_t other = __shfl_xor_sync(~0u, x, d);
        x = other > x ? other : x;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) space[threadIdx.x >> 5] = x;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) x = space[i] > x ? space[i] : x;
    return x;
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
    float* logprob;
    int64_t stride;
    int vocab, advance;
};

__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Sample p) {
    extern __shared__ __align__(16) uint16_t logit[];
    __shared__ float space[32];
    __shared__ uint64_t wide[32];
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x, slot = p.slots[row];
    if (slot < 0) return;
    const uint4* from = (const uint4*)(p.logits + row * p.stride);
    for (int i = threadIdx.x; i < (p.vocab + 7) / 8; i += kThreads) ((uint4*)logit)[i] = from[i];
    __syncthreads();
    uint64_t best = 0;
    for (int i = threadIdx.x; i < p.vocab; i += kThreads) {
        const uint64_t key = (uint64_t)order(logit[i]) << 32 | (uint32_t)~i;
        best = key > best ? key : best;
    }
    best = block_max(best, wide);
    const float largest = value(logit[(uint32_t)~best]);
    float mass = 0.f;
    for (int i = threadIdx.x; i < p.vocab; i += kThreads) mass += __expf(value(logit[i]) - largest);
    mass = block_sum(mass, space);
    const float temperature = p.temperature[slot];
    const int k = p.top_k[slot], position = p.positions[slot] + p.advance;
    if (temperature > 0.f) {
        const float inverse = 1.f / temperature, share = p.top_p[slot];
        uint32_t least = 0;                                        // tokens whose key is at least this are kept
        if (k > 0 && k < p.vocab) {
            for (int bit = 15; bit >= 0; --bit) {
                const uint32_t trial = least | 1u << bit;
                float count = 0.f;
                for (int i = threadIdx.x; i < p.vocab; i += kThreads) count += order(logit[i]) >= trial;
                if (block_sum(count, space) >= k) least = trial;
            }
        }
        if (share < 1.f) {
            auto above = [&](uint32_t bound) {
                float sum = 0.f;
                for (int i = threadIdx.x; i < p.vocab; i += kThreads)
                    if (order(logit[i]) >= bound) sum += __expf((value(logit[i]) - largest) * inverse);
                return block_sum(sum, space);
            };
            const float wanted = share * above(least);
            uint32_t bound = 0;
            for (int bit = 15; bit >= 0; --bit)
                if (above(bound | 1u << bit) >= wanted) bound |= 1u << bit;
            least = max(least, bound);
        }
        const uint64_t base = mix((uint64_t)p.seeds[slot] ^ mix((uint64_t)position + 0x9E3779B97F4A7C15ull));
        best = 0;
        for (int i = threadIdx.x; i < p.vocab; i += kThreads) {
            if (order(logit[i]) < least) continue;
            const uint64_t key = (uint64_t)order((value(logit[i]) - largest) * inverse + gumbel(base, i)) << 32 | (uint32_t)~i;
            best = key > best ? key : best;
        }
        best = block_max(best, wide);
    }
    if (threadIdx.x == 0) {
        const int token = (int)~(uint32_t)best;
        p.tokens[slot] = p.chosen[row] = token;
        p.positions[slot] = position;
        p.logprob[row] = value(logit[token]) - largest - __logf(mass);
    }
}

extern "C" int decode_sample(const void* logits, const int* slots, int* tokens, int* positions, const float* temperature,
                             const int* top_k, const float* top_p, const int64_t* seeds, int* chosen, float* logprob, int rows,
                             int64_t stride, int vocab, int advance, void* stream) {
    const Sample p{(const uint16_t*)logits, slots, tokens, positions, temperature, top_k, top_p, seeds, chosen, logprob, stride, vocab,
                   advance};
    if (stride % 8) return (int)cudaErrorInvalidValue;
    return launch(sample_kernel, rows, kThreads, (size_t)(vocab + 7) / 8 * 16, stream, p);
}
