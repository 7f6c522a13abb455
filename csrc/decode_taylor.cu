// One token of Taylor linear attention: S += phi(k) v^T, z += phi(k), o = phi(q) S / phi(q) z, with the 153 (45) distinct
// features of feature_dim 16 (8) in the order that ops/reference.py documents. A block has one head of one row: the state, 68 KB
// at 16 features and head_dim 112, passes once through registers, four columns a thread, and is what the time goes to.
//
// So it is read at every token and written at every sixteenth: k and v of the tokens since then lie in `recent`, whose share of o
// is taken from them directly, w = 1 + s + s^2/2 a token, until the state takes them in, each in turn and in fp32. Heads do
// so at different tokens, a sixteenth of them at a time.
#include "decode_common.cuh"
using namespace decode;

constexpr int kThreads = 256, kRecent = 16;

template <int F, int D>
__global__ void __launch_bounds__(kThreads) taylor_step(const bf16* x, const int* slots, const int* positions, const int* starts, float* kv,
                                                        float* z, bf16* recent, const float* decay, bf16* o, int heads, float root,
                                                        Norm norm) {
    constexpr int Features = 1 + F + F * (F + 1) / 2, Columns = D / 4, Groups = kThreads / Columns;
    constexpr int Rows = (Features + Groups - 1) / Groups;
    constexpr int Token = F + D, Vectors = Token / 8, Loads = ((kRecent - 1) * Vectors + kThreads - 1) / kThreads;
    __shared__ __align__(16) bf16 tokens[kRecent][Token];              // k | v, the newest last
    __shared__ float raw[F], phi_q[Features], phi_k[kRecent][Features], weights[kRecent], space[32];
    __shared__ float4 partial[Groups][Columns];
    let_next_start();
    const int row = blockIdx.x / heads, head = blockIdx.x % heads, slot = slots[row], thread = threadIdx.x;
    const bf16* in = x + ((int64_t)row * heads + head) * (F + Token);
    const int64_t own_head = (int64_t)slot * heads + head, state = own_head * Features;
    const int group = thread / Columns, column = thread % Columns;
    float4* own = (float4*)(kv + state * D) + column;
    float4 s[Rows];
    if (group < Groups && slot >= 0)                                   // no kernel since the last step has changed the state
        #pragma unroll
        for (int i = 0; i < Rows; ++i)
            if (group + i * Groups < Features) s[i] = __ldcs(own + (group + i * Groups) * Columns);
    const float own_z = thread < Features && slot >= 0 ? z[state + thread] : 0.f;
    // Tokens since the state was written: at the start of generation, or by this kernel.
    const int generated = slot < 0 ? 0 : positions[slot] - starts[slot], phase = (generated + head) % kRecent, before = min(generated, phase);
    const bool write = phase == kRecent - 1;
    uint4* const kept = (uint4*)(recent + own_head * kRecent * Token);
    uint4 old[Loads], newest;
    #pragma unroll
    for (int i = 0; i < Loads; ++i)
        if (thread + i * kThreads < before * Vectors) old[i] = kept[thread + i * kThreads];
    wait_for_previous();
    if (slot < 0) return;
    const Unnormed<1> stream(norm, row);
    const float own_q = thread < F ? __bfloat162float(in[thread]) : 0.f;
    if (thread < Vectors) newest = ((const uint4*)(in + F))[thread];
    const float factor = stream.factor(space);
    if (thread < F) raw[thread] = own_q * factor * root;
    uint4* const rows = (uint4*)tokens;
    #pragma unroll
    for (int i = 0; i < Loads; ++i)
        if (thread + i * kThreads < before * Vectors) rows[thread + i * kThreads] = old[i];
    if (thread < Vectors) {
        float own[8];
        unpack(newest, own);
        #pragma unroll
        for (int j = 0; j < 8; ++j) own[j] *= factor;
        newest = pack(own);
        rows[before * Vectors + thread] = newest;
        if (!write) kept[before * Vectors + thread] = newest;
    }
    const float gamma = decay ? decay[head] : 1.f, faded = powf(gamma, (float)(before + 1));
    __syncthreads();
    // Feature `f` of a row of F numbers times root: a product of two of them, or one.
    auto feature = [&](int f, auto at) {
        if (f == 0) return 1.f;
        const int n = f - 1, i = n % F, j = n < 2 * F ? i : (i + n / F - 1) % F;
        return n < F ? at(i) : at(i) * at(j) * (n < 2 * F ? 0.70710678f : 1.f);
    };
    float share = 0.f;
    if (thread < Features) {
        phi_q[thread] = feature(thread, [&](int i) { return raw[i]; });
        share = phi_q[thread] * own_z * faded;
    } else if (thread >= kThreads - kRecent && thread - (kThreads - kRecent) <= before) {
        const int token = thread - (kThreads - kRecent);
        float dot = 0.f;
        #pragma unroll
        for (int i = 0; i < F; ++i) dot += raw[i] * (__bfloat162float(tokens[token][i]) * root);
        share = (1.f + dot + 0.5f * dot * dot) * powf(gamma, (float)(before - token));
        weights[token] = share;
    }
    if (write)
        for (int i = thread; i < (before + 1) * Features; i += kThreads) {
            const int token = i / Features;
            phi_k[token][i % Features] = feature(i % Features, [&](int j) { return __bfloat162float(tokens[token][j]) * root; })
                                         * powf(gamma, (float)(before - token));
        }
    const float denominator = block_sum(share, space);                 // and what was made above is there for every thread
    if (group < Groups) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        auto add = [](float4& to, float a, const float4& b) { to.x += a * b.x; to.y += a * b.y; to.z += a * b.z; to.w += a * b.w; };
        auto values = [&](int token) {
            const uint2 four = *(const uint2*)&tokens[token][F + column * 4];
            return make_float4(low(four.x), high(four.x), low(four.y), high(four.y));
        };
        #pragma unroll
        for (int i = 0; i < Rows; ++i)
            if (group + i * Groups < Features) add(sum, phi_q[group + i * Groups], s[i]);
        sum.x *= faded; sum.y *= faded; sum.z *= faded; sum.w *= faded;
        for (int token = group; token <= before; token += Groups) add(sum, weights[token], values(token));
        partial[group][column] = sum;
        if (write) {
            #pragma unroll
            for (int i = 0; i < Rows; ++i) { s[i].x *= faded; s[i].y *= faded; s[i].z *= faded; s[i].w *= faded; }
            for (int token = 0; token <= before; ++token) {
                const float4 v = values(token);
                #pragma unroll
                for (int i = 0; i < Rows; ++i)
                    if (group + i * Groups < Features) add(s[i], phi_k[token][group + i * Groups], v);
            }
            #pragma unroll
            for (int i = 0; i < Rows; ++i)
                if (group + i * Groups < Features) __stcs(own + (group + i * Groups) * Columns, s[i]);
        }
    }
    if (write && thread < Features) {
        float sum = own_z * faded;
        for (int token = 0; token <= before; ++token) sum += phi_k[token][thread];
        z[state + thread] = sum;
    }
    __syncthreads();
    if (thread < D) {
        float sum = 0.f;
        #pragma unroll
        for (int g = 0; g < Groups; ++g) sum += ((const float*)partial[g])[thread];
        o[((int64_t)row * heads + head) * D + thread] = __float2bfloat16(sum / denominator);
    }
}

extern "C" int decode_taylor(const void* x, const int* slots, const int* positions, const int* starts, float* kv, float* z, void* recent,
                             const float* decay, void* o, int rows, int heads, int features, int head_dim, float scale,
                             const void* residual, int d_model, float eps, void* stream) {
    auto run = [&](auto kernel) {
        return launch(kernel, rows * heads, kThreads, 0, stream, (const bf16*)x, slots, positions, starts, kv, z, (bf16*)recent, decay,
                      (bf16*)o, heads, sqrtf(scale), Norm{(const bf16*)residual, d_model, eps});
    };
    switch (features * 1000 + head_dim) {
        case 16064: return run(taylor_step<16, 64>);
        case 16080: return run(taylor_step<16, 80>);
        case 16096: return run(taylor_step<16, 96>);
        case 16112: return run(taylor_step<16, 112>);
        case 16128: return run(taylor_step<16, 128>);
        case 8064: return run(taylor_step<8, 64>);
        case 8080: return run(taylor_step<8, 80>);
        case 8096: return run(taylor_step<8, 96>);
        case 8112: return run(taylor_step<8, 112>);
        case 8128: return run(taylor_step<8, 128>);
    }
    return (int)cudaErrorInvalidValue;
}
