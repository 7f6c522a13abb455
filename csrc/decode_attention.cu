// Softmax attention of one new token a row over a ring of keys and values (Su et al. 2021 for the rotation). The token at
// position t lies at t mod capacity, so a ring of `window` entries is a sliding window, and one of the longest length is full
// attention. A block has one head of one row, or one of `splits` parts of its keys, which a second kernel puts together. A
// key is shared by L lanes, eight dimensions each; groups of lanes take every G-th key with a running maximum of their own.
#include "decode_common.cuh"
using namespace decode;

constexpr int kThreads = 128, kUnroll = 8;

// Element i of a rotated head: the half-split layout on the first 2 * half dimensions. Not yet rounded.
__device__ __forceinline__ float turned(const bf16* x, const float* cosine, int i, int half) {
    const float own = __bfloat162float(x[i]);
    if (i >= 2 * half) return own;
    const int f = i < half ? i : i - half;
    const float other = __bfloat162float(x[i < half ? i + half : f]);
    return own * cosine[f] + (i < half ? -other : other) * cosine[half + f];
}
__device__ __forceinline__ float rotated(const bf16* x, const float* cosine, int i, int half) { return rounded(turned(x, cosine, i, half)); }

struct Attention {
    const bf16* x;
    const int *slots, *positions;
    const float* rotation;
    bf16 *keys, *values;
    float* partial;
    bf16* o;
    int heads, head_dim, padded, half, capacity, splits;
    float scale;                                 // times log2(e)
    Norm norm;
};

template <int L>
__global__ void __launch_bounds__(kThreads, 4) attention_step(const __grid_constant__ Attention p) {
    constexpr int Groups = kThreads / L, Width = L * 8;
    __shared__ __align__(16) float q[Width];
    __shared__ __align__(16) bf16 k_new[Width], v_new[Width];
    __shared__ float maxima[Groups], sums[Groups], outputs[Groups][Width + 1], space[32];
    let_next_start();
    const int row = blockIdx.x / p.heads, head = blockIdx.x % p.heads, split = blockIdx.y, slot = p.slots[row];
    const int position = slot < 0 ? 0 : p.positions[slot], count = min(position + 1, p.capacity), own = position % p.capacity;
    const int share = (count + p.splits - 1) / p.splits, begin = split * share, end = min(begin + share, count);
    const int64_t ring = ((int64_t)slot * p.heads + head) * p.capacity * p.padded;
    const int group = threadIdx.x / L, lane = threadIdx.x % L;
    const bool inside = lane * 8 < p.padded;
    const uint4* k = (const uint4*)(p.keys + ring) + lane;
    const uint4* v = (const uint4*)(p.values + ring) + lane;
    const int vectors = p.padded / 8;
    uint4 keys[kUnroll], values[kUnroll];
    auto fetch = [&](int base) {
        #pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int j = base + u * Groups + group;
            const bool there = j < end && j != own && inside && slot >= 0;     // the own token is not in the ring yet
            keys[u] = there ? __ldcs(k + (int64_t)j * vectors) : make_uint4(0, 0, 0, 0);
            values[u] = there ? __ldcs(v + (int64_t)j * vectors) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch(begin);                                                  // no kernel since the last step has changed the ring
    wait_for_previous();
    if (slot < 0) return;
    const bf16* in = p.x + ((int64_t)row * p.heads + head) * 3 * p.head_dim;
    const float* cosine = p.rotation + (int64_t)row * 2 * p.half;
    const Unnormed<2> stream(p.norm, row);
    static_assert(Width <= kThreads, "a thread has one dimension");
    const int i = threadIdx.x;
    const bool real = i < p.head_dim;
    const float own_q = real ? turned(in, cosine, i, p.half) : 0.f, own_k = real ? turned(in + p.head_dim, cosine, i, p.half) : 0.f;
    const float own_v = real ? __bfloat162float(in[2 * p.head_dim + i]) : 0.f, factor = stream.factor(space);
    if (i < Width) {
        q[i] = rounded(own_q * factor) * p.scale;
        k_new[i] = __float2bfloat16(own_k * factor);
        v_new[i] = __float2bfloat16(own_v * factor);
    }
    __syncthreads();
    float query[8], sum[8] = {}, largest = -INFINITY, total = 0.f;
    #pragma unroll
    for (int i = 0; i < 8; ++i) query[i] = q[lane * 8 + i];
    for (int base = begin; base < end; base += Groups * kUnroll) {
        float score[kUnroll];
        if (base > begin) fetch(base);
        #pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            if (base + u * Groups + group == own) {
                keys[u] = ((const uint4*)k_new)[lane];
                values[u] = ((const uint4*)v_new)[lane];
            }
        float peak = largest;
        #pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float x[8], dot = 0.f;
            unpack(keys[u], x);
            #pragma unroll
            for (int i = 0; i < 8; ++i) dot += query[i] * x[i];
            #pragma unroll
            for (int d = L / 2; d; d /= 2) dot += __shfl_xor_sync(~0u, dot, d);
            score[u] = base + u * Groups + group < end ? dot : -INFINITY;
            peak = fmaxf(peak, score[u]);
        }
        if (peak > -INFINITY) {                                    // the same for the lanes of a group
            const float shrink = exp2f(largest - peak);
            largest = peak;
            total *= shrink;
            #pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] *= shrink;
            #pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const float weight = exp2f(score[u] - peak);
                float x[8];
                unpack(values[u], x);
                total += weight;
                #pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] += weight * x[i];
            }
        }
        __syncwarp();
    }
    if (own >= begin && own < end && group == 0 && inside) {       // the split that has the token keeps it
        ((uint4*)(p.keys + ring))[(int64_t)own * vectors + lane] = ((const uint4*)k_new)[lane];
        ((uint4*)(p.values + ring))[(int64_t)own * vectors + lane] = ((const uint4*)v_new)[lane];
    }
    if (lane == 0) { maxima[group] = largest; sums[group] = total; }
    #pragma unroll
    for (int i = 0; i < 8; ++i) outputs[group][lane * 8 + i] = sum[i];
    __syncthreads();
    float peak = -INFINITY;
    for (int g = 0; g < Groups; ++g) peak = fmaxf(peak, maxima[g]);
    for (int i = threadIdx.x; i < p.padded; i += kThreads) {
        float all = 0.f, whole = 0.f;
        for (int g = 0; g < Groups; ++g) {
            const float weight = maxima[g] > -INFINITY ? exp2f(maxima[g] - peak) : 0.f;
            all += weight * outputs[g][i];
            whole += weight * sums[g];
        }
        const int64_t at = (int64_t)row * p.heads + head;
        if (p.splits == 1) {
            if (i < p.head_dim) p.o[at * p.head_dim + i] = __float2bfloat16(all / whole);
        } else {
            float* part = p.partial + (at * p.splits + split) * (p.padded + 2);
            part[i] = all;
            if (i == 0) { part[p.padded] = peak; part[p.padded + 1] = whole; }
        }
    }
}

__global__ void attention_join(const __grid_constant__ Attention p) {
    let_next_start();
    wait_for_previous();
    const int64_t at = blockIdx.x;
    if (p.slots[blockIdx.x / p.heads] < 0) return;
    const float* part = p.partial + at * p.splits * (p.padded + 2);
    const int step = p.padded + 2;
    float peak = -INFINITY;
    for (int s = 0; s < p.splits; ++s) peak = fmaxf(peak, part[s * step + p.padded]);
    const int i = threadIdx.x;
    if (i >= p.head_dim) return;
    float all = 0.f, whole = 0.f;
    for (int s = 0; s < p.splits; ++s) {
        const float own = part[s * step + p.padded], weight = own > -INFINITY ? exp2f(own - peak) : 0.f;
        all += weight * part[s * step + i];
        whole += weight * part[s * step + p.padded + 1];
    }
    p.o[at * p.head_dim + i] = __float2bfloat16(all / whole);
}

// Eight elements of a padded head a thread. `aligned`: they, and those that they are rotated with, are 16 bytes of one row.
__global__ void rope_run(const bf16* x, const float* rotation, bf16* q, bf16* k, bf16* v, int64_t vectors, int heads, int head_dim,
                         int padded, int half, float q_factor, bool aligned) {
    let_next_start();
    wait_for_previous();
    const int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= vectors) return;
    const int first = n % (padded / 8) * 8;
    const int64_t at = n / (padded / 8);         // token * heads + head
    const bf16* in = x + at * 3 * head_dim;
    const float* cosine = rotation + at / heads * 2 * half;
    float a[8], b[8];
    if (aligned) {
        const int f = first < half ? first : first - half, other = first < half ? first + half : f;
        const bool turned = first < 2 * half;
        float c[8], s[8], u[8];
        load8<false>(in, first, a);
        load8<false>(in + head_dim, first, b);
        if (turned) { load8<true>(cosine, f, c); load8<true>(cosine + half, f, s); }
        #pragma unroll
        for (int part = 0; part < 2; ++part) {
            float (&own)[8] = part ? b : a;
            if (turned) load8<false>(in + part * head_dim, other, u);
            #pragma unroll
            for (int j = 0; j < 8; ++j)
                if (turned) own[j] = rounded(own[j] * c[j] + (first < half ? -u[j] : u[j]) * s[j]);
        }
        ((uint4*)v)[n] = *(const uint4*)(in + 2 * head_dim + first);
    } else {
        float own[8];
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
            const bool real = first + j < head_dim;
            a[j] = real ? rotated(in, cosine, first + j, half) : 0.f;
            b[j] = real ? rotated(in + head_dim, cosine, first + j, half) : 0.f;
            own[j] = real ? __bfloat162float(in[2 * head_dim + first + j]) : 0.f;
        }
        store8<false>(v, n * 8, own);
    }
    #pragma unroll
    for (int j = 0; j < 8; ++j) a[j] *= q_factor;
    store8<false>(q, n * 8, a);
    store8<false>(k, n * 8, b);
}

extern "C" int decode_attention(const void* x, const int* slots, const int* positions, const float* rotation, void* keys, void* values,
                                float* partial, void* o, int rows, int heads, int head_dim, int padded, int half, int capacity,
                                int splits, float scale, const void* residual, int d_model, float eps, void* stream) {
    const Attention p{(const bf16*)x, slots, positions, rotation, (bf16*)keys, (bf16*)values, partial, (bf16*)o, heads, head_dim,
                      padded, half, capacity, splits, scale * 1.44269504f, {(const bf16*)residual, d_model, eps}};
    if (padded % 8 || padded > 128) return (int)cudaErrorInvalidValue;
    const dim3 grid(rows * heads, splits);
    int code = launch(padded <= 64 ? attention_step<8> : attention_step<16>, grid, kThreads, 0, stream, p);
    if (code == 0 && splits > 1) code = launch(attention_join, rows * heads, 128, 0, stream, p);
    return code;
}

extern "C" int prefill_rope(const void* x, const float* rotation, void* q, void* k, void* v, int64_t tokens, int heads, int head_dim,
                            int padded, int half, float q_factor, void* stream) {
    const int64_t vectors = tokens * heads * (padded / 8);
    if (padded % 8) return (int)cudaErrorInvalidValue;
    return launch(rope_run, (unsigned)((vectors + 255) / 256), 256, 0, stream, (const bf16*)x, rotation, (bf16*)q, (bf16*)k, (bf16*)v,
                  vectors, heads, head_dim, padded, half, q_factor, head_dim % 8 == 0 && half % 8 == 0);
}
