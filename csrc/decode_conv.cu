// Gated short convolution, y = silu(sum_i w_i u1[t - (taps - 1 - i)]) * u2 with (u1 | u2) = x + bias: one token a row from a
// carried window (whole sequences: gated_conv_forward.cu). A block has a row, a thread eight channels at a time. Where x was made
// from the residual stream without its norm, the block has the row of the stream anyway, and adds the bias of the output
// product to it, which then only has to add up.
#include "decode_common.cuh"
using namespace decode;

struct Conv {
    const bf16 *x, *bias, *weight;
    const int* slots;
    bf16 *carry, *y;
    int channels;
    Norm norm;
    const bf16* out_bias;                        // [norm.width]
};

// x + bias, rounded as a linear layer with a bias would.
__device__ __forceinline__ void biased(const uint4& x, float factor, const uint4& bias, float (&u)[8]) {
    float b[8];
    unpack(x, u);
    unpack(bias, b);
    #pragma unroll
    for (int j = 0; j < 8; ++j) u[j] = rounded(u[j] * factor + b[j]);
}

template <int Taps>
__global__ void __launch_bounds__(kRowThreads, 2) conv_step(const __grid_constant__ Conv p) {
    __shared__ float space[32];
    let_next_start();
    const int row = blockIdx.x, vectors = p.channels / 8, slot = p.slots[row];
    const uint4 *biases = (const uint4*)p.bias, *in = (const uint4*)p.x + (int64_t)row * 2 * vectors;
    uint4* const carry = (uint4*)p.carry + (int64_t)slot * (Taps - 1) * vectors;
    uint4 taps[Taps], window[Taps - 1], b1, b2, u1, u2;
    auto fetch_state = [&](int i) {               // no kernel since the last step has changed the window
        #pragma unroll
        for (int n = 0; n < Taps; ++n) taps[n] = ((const uint4*)p.weight)[(int64_t)i * Taps + n];      // [8 channels, Taps]
        #pragma unroll
        for (int n = 0; n < Taps - 1; ++n) window[n] = carry[(int64_t)n * vectors + i];
        b1 = biases[i]; b2 = biases[vectors + i];
    };
    auto fetch = [&](int i) { u1 = in[i]; u2 = in[vectors + i]; };
    int i = threadIdx.x;
    const int width = p.norm.residual ? p.norm.width / 8 : 0;
    uint4 out_bias;
    if (i < vectors && slot >= 0) fetch_state(i);
    if (i < width) out_bias = ((const uint4*)p.out_bias)[i];
    wait_for_previous();
    if (slot < 0) return;
    const Unnormed<1> stream(p.norm, row);
    if (i < vectors) fetch(i);
    const float factor = stream.factor(space);
    for (int n = i; n < width; n += blockDim.x) {                  // the thread has read them, no other will
        float x[8], b[8];
        unpack(n == i ? stream.x[0] : stream.from[n], x);
        unpack(n == i ? out_bias : ((const uint4*)p.out_bias)[n], b);
        #pragma unroll
        for (int j = 0; j < 8; ++j) x[j] += b[j];
        ((uint4*)stream.from)[n] = pack(x);
    }
    for (; i < vectors; i += blockDim.x) {
        if (i >= (int)blockDim.x) { fetch_state(i); fetch(i); }
        float newest[8], gate[8], sum[8] = {}, flat[Taps][8];
        biased(u1, factor, b1, newest);
        biased(u2, factor, b2, gate);
        #pragma unroll
        for (int n = 0; n < Taps; ++n) unpack(taps[n], flat[n]);
        #pragma unroll
        for (int n = 0; n < Taps; ++n) {
            float u[8];
            if (n < Taps - 1) unpack(window[n], u);
            #pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += (n < Taps - 1 ? u[j] : newest[j]) * flat[(j * Taps + n) / 8][(j * Taps + n) % 8];
        }
        #pragma unroll
        for (int n = 0; n < Taps - 2; ++n) carry[(int64_t)n * vectors + i] = window[n + 1];
        carry[(int64_t)(Taps - 2) * vectors + i] = pack(newest);
        #pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = silu(sum[j]) * gate[j];
        ((uint4*)p.y)[(int64_t)row * vectors + i] = pack(sum);
    }
}

extern "C" int decode_conv(const void* x, const void* bias, const void* weight, const int* slots, void* carry, void* y, int rows,
                           int channels, int taps, const void* out_bias, void* residual, int d_model, float eps, void* stream) {
    const Conv p{(const bf16*)x, (const bf16*)bias, (const bf16*)weight, slots, (bf16*)carry, (bf16*)y, channels,
                 {(const bf16*)residual, d_model, eps}, (const bf16*)out_bias};
    auto run = [&](auto kernel) { return launch(kernel, rows, row_threads(channels / 8), 0, stream, p); };
    switch (taps) {
        case 2: return run(conv_step<2>);
        case 3: return run(conv_step<3>);
        case 4: return run(conv_step<4>);
    }
    return (int)cudaErrorInvalidValue;
}
