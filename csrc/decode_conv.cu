// Gated short convolution, y = silu(sum_i w_i u1[t - (taps - 1 - i)]) * u2 with (u1 | u2) = x + bias: one token a row from a
// carried window (whole sequences: gated_conv_forward.cu). A thread has eight channels.
#include "decode_common.cuh"
using namespace decode;

// The taps' weights of eight channels, from [channels, taps].
template <int Taps> __device__ __forceinline__ void load_taps(const bf16* weight, int channel, float (&w)[Taps][8]) {
    float flat[Taps][8];
    #pragma unroll
    for (int i = 0; i < Taps; ++i) load8<false>(weight, (int64_t)channel * Taps + i * 8, flat[i]);
    #pragma unroll
    for (int j = 0; j < 8; ++j)
        #pragma unroll
        for (int i = 0; i < Taps; ++i) w[i][j] = flat[(j * Taps + i) / 8][(j * Taps + i) % 8];
}
// x + bias, rounded as a linear layer with a bias would.
__device__ __forceinline__ void biased(const bf16* x, int64_t at, const float (&bias)[8], float (&u)[8]) {
    load8<false>(x, at, u);
    #pragma unroll
    for (int j = 0; j < 8; ++j) u[j] = rounded(u[j] + bias[j]);
}
template <int Taps>
__device__ __forceinline__ void gate(const float (&window)[Taps][8], const float (&w)[Taps][8], const float (&u2)[8], float (&y)[8]) {
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < Taps; ++i) sum += window[i][j] * w[i][j];
        y[j] = silu(sum) * u2[j];
    }
}

template <int Taps>
__global__ void conv_step(const bf16* x, const bf16* bias, const bf16* weight, const int* slots, bf16* carry, bf16* y, int rows,
                          int channels) {
    let_next_start();
    const int n = blockIdx.x * blockDim.x + threadIdx.x, row = n / (channels / 8), channel = n % (channels / 8) * 8;
    float w[Taps][8], b1[8], b2[8], window[Taps][8], u2[8], out[8];
    if (row < rows) {
        load_taps<Taps>(weight, channel, w);
        load8<false>(bias, channel, b1);
        load8<false>(bias, channels + channel, b2);
    }
    const int slot = row < rows ? slots[row] : -1;
    const int64_t at = (int64_t)slot * (Taps - 1) * channels + channel;
    if (slot >= 0)                                // no kernel since the last step has changed the window
        #pragma unroll
        for (int i = 0; i < Taps - 1; ++i) load8<false>(carry, at + (int64_t)i * channels, window[i]);
    wait_for_previous();
    if (slot < 0) return;
    biased(x, (int64_t)row * 2 * channels + channel, b1, window[Taps - 1]);
    biased(x, (int64_t)row * 2 * channels + channels + channel, b2, u2);
    #pragma unroll
    for (int i = 0; i < Taps - 1; ++i) store8<false>(carry, at + (int64_t)i * channels, window[i + 1]);
    gate<Taps>(window, w, u2, out);
    store8<false>(y, (int64_t)row * channels + channel, out);
}

extern "C" int decode_conv(const void* x, const void* bias, const void* weight, const int* slots, void* carry, void* y, int rows,
                           int channels, int taps, void* stream) {
    const unsigned blocks = (unsigned)(((int64_t)rows * (channels / 8) + 127) / 128);
    auto run = [&](auto kernel) {
        return launch(kernel, blocks, 128, 0, stream, (const bf16*)x, (const bf16*)bias, (const bf16*)weight, slots, (bf16*)carry,
                      (bf16*)y, rows, channels);
    };
    switch (taps) {
        case 2: return run(conv_step<2>);
        case 3: return run(conv_step<3>);
        case 4: return run(conv_step<4>);
    }
    return (int)cudaErrorInvalidValue;
}
