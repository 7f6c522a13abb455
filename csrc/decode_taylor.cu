// One token of Taylor linear attention: S += phi(k) v^T, z += phi(k), o = phi(q) S / phi(q) z, with the 153 (45) distinct
// features of feature_dim 16 (8) in the order that ops/reference.py documents. A block has one head of one row: the state, 68 KB
// at 16 features and head_dim 112, passes once through registers, four columns a thread, and is what the time goes to.
#include "decode_common.cuh"
using namespace decode;

constexpr int kThreads = 256, kFirst = 264;      // blocks that run at once and may have to wait for their input

template <int F, int D>
__global__ void __launch_bounds__(kThreads) taylor_step(const bf16* x, const int* slots, float* kv, float* z, const float* decay,
                                                        bf16* o, int heads, float root) {
    constexpr int Features = 1 + F + F * (F + 1) / 2, Columns = D / 4, Groups = kThreads / Columns;
    constexpr int Rows = (Features + Groups - 1) / Groups;
    __shared__ float raw[2 * F], phi_q[Features], phi_k[Features], space[32];
    __shared__ float4 partial[Groups][Columns];
    let_next_start();
    const int row = blockIdx.x / heads, head = blockIdx.x % heads, slot = slots[row], thread = threadIdx.x;
    const bf16* in = x + ((int64_t)row * heads + head) * (2 * F + D);
    const int64_t state = ((int64_t)slot * heads + head) * Features;
    if (blockIdx.x < kFirst && slot >= 0 && thread == 0) prefetch(kv + state * D, Features * D * 4);
    wait_for_previous();
    if (slot < 0) return;
    const int group = thread / Columns, column = thread % Columns;
    float4* own = (float4*)(kv + state * D) + column;
    float4 s[Rows];
    if (group < Groups)
        #pragma unroll
        for (int i = 0; i < Rows; ++i)
            if (group + i * Groups < Features) s[i] = __ldcs(own + (group + i * Groups) * Columns);
    if (thread < 2 * F) raw[thread] = __bfloat162float(in[thread]) * root;
    const float gamma = decay ? decay[head] : 1.f;
    __syncthreads();
    float share = 0.f;
    if (thread < Features) {
        const float *q = raw, *k = raw + F;
        float a = 1.f, b = 1.f;
        if (thread > 0) {
            const int n = thread - 1, i = n % F, j = n < 2 * F ? i : (i + n / F - 1) % F;
            const float factor = n < F ? 1.f : n < 2 * F ? 0.70710678f : 1.f;
            a = n < F ? q[i] : q[i] * q[j] * factor;
            b = n < F ? k[i] : k[i] * k[j] * factor;
        }
        phi_q[thread] = a;
        phi_k[thread] = b;
        const float sum = z[state + thread] * gamma + b;
        z[state + thread] = sum;
        share = a * sum;
    }
    const float denominator = block_sum(share, space);             // and the features are there for every thread
    if (group < Groups) {
        const uint2 four = *(const uint2*)(in + 2 * F + column * 4);
        const float v[4] = {low(four.x), high(four.x), low(four.y), high(four.y)};
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        #pragma unroll
        for (int i = 0; i < Rows; ++i) {
            const int feature = group + i * Groups;
            if (feature < Features) {
                const float a = phi_q[feature], b = phi_k[feature];
                s[i].x = s[i].x * gamma + b * v[0]; s[i].y = s[i].y * gamma + b * v[1];
                s[i].z = s[i].z * gamma + b * v[2]; s[i].w = s[i].w * gamma + b * v[3];
                __stcs(own + feature * Columns, s[i]);
                sum.x += a * s[i].x; sum.y += a * s[i].y; sum.z += a * s[i].z; sum.w += a * s[i].w;
            }
        }
        partial[group][column] = sum;
    }
    __syncthreads();
    if (thread < D) {
        float sum = 0.f;
        #pragma unroll
        for (int g = 0; g < Groups; ++g) sum += ((const float*)partial[g])[thread];
        o[((int64_t)row * heads + head) * D + thread] = __float2bfloat16(sum / denominator);
    }
}

extern "C" int decode_taylor(const void* x, const int* slots, float* kv, float* z, const float* decay, void* o, int rows, int heads,
                             int features, int head_dim, float scale, void* stream) {
    auto run = [&](auto kernel) {
        return launch(kernel, rows * heads, kThreads, 0, stream, (const bf16*)x, slots, kv, z, decay, (bf16*)o, heads, sqrtf(scale));
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
