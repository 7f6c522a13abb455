// y_t = silu(w0 u1_{t-2} + w1 u1_{t-1} + w2 u1_t) * u2_t with u = x + bias, channel by channel, inside each document.
// A thread owns 16 bytes of channels and walks a strip of tokens with the two last inputs in registers, so that x is
// read once (but for two tokens a strip) and y written once.
#include "gated_conv.cuh"

namespace gated_conv {

constexpr int kStrip = 32, kAhead = 4;
constexpr int kShortStrip = 8, kFewTokens = 4096;   // few tokens take as long as one strip

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads) forward_kernel(GatedConvArgs a, int strip) {
    constexpr int N = Vec<T>::N;
    const int channel = (blockIdx.x * kThreads + threadIdx.x) * N;
    if (channel >= a.channels) return;
    const int b = blockIdx.z, begin = blockIdx.y * strip, end = min(begin + strip, a.seq);
    Document doc{b, 0, a.seq};
    if (kPacked) doc = Document::at(a.cu_seqlens, a.docs, begin);
    float w[3][N], b1[N], b2[N], older[N], old[N];
    parameters<T>(a, channel, w, b1, b2);
    tap<T>(older, a, b1, begin - 2, b, channel, doc.id, doc.first);
    tap<T>(old, a, b1, begin - 1, b, channel, doc.id, doc.first);
    const T* x = static_cast<const T*>(a.x) + channel;
    T* y = static_cast<T*>(a.y) + channel;
    for (int t0 = begin; t0 < end; t0 += kAhead) {
        Vec<T> u1[kAhead], u2[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int64_t at = ((int64_t)min(t0 + j, end - 1) * a.batch + b) * 2 * a.channels;
            u1[j] = Vec<T>::load(x + at);
            u2[j] = Vec<T>::load(x + at + a.channels);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int t = t0 + j;
            if (t >= end) break;
            if (kPacked && t >= doc.end) {
                doc.advance(a.cu_seqlens, t);
                tap<T>(older, a, b1, t - 2, b, channel, doc.id, doc.first);
                tap<T>(old, a, b1, t - 1, b, channel, doc.id, doc.first);
            }
            float u[N], v[N], out[N];
            u1[j].widen_to(u);
            u2[j].widen_to(v);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                u[i] += b1[i];
                const float mixed = w[0][i] * older[i] + w[1][i] * old[i] + w[2][i] * u[i];
                out[i] = mixed * sigmoid(mixed) * (v[i] + b2[i]);
                older[i] = old[i];
                old[i] = u[i];
            }
            Vec<T>(out).store(y + ((int64_t)t * a.batch + b) * a.channels);
            if (a.carry_out && t + 1 == doc.end) {
                T* carry = static_cast<T*>(a.carry_out) + (int64_t)doc.id * 2 * a.channels + channel;
                Vec<T>(older).store(carry);
                Vec<T>(old).store(carry + a.channels);
            }
        }
    }
}

template <typename T> void forward(const GatedConvArgs& a) {
    const int strip = (int64_t)a.seq * a.batch < kFewTokens ? kShortStrip : kStrip;
    const dim3 grid((a.channels / Vec<T>::N + kThreads - 1) / kThreads, (a.seq + strip - 1) / strip, a.batch);
    const auto stream = static_cast<cudaStream_t>(a.stream);
    if (a.cu_seqlens) forward_kernel<T, true><<<grid, kThreads, 0, stream>>>(a, strip);
    else forward_kernel<T, false><<<grid, kThreads, 0, stream>>>(a, strip);
}

}  // namespace gated_conv

extern "C" int gated_conv_forward(const GatedConvArgs* a) {
    if (a->dtype == 0) gated_conv::forward<__nv_bfloat16>(*a);
    else if (a->dtype == 1) gated_conv::forward<__half>(*a);
    else gated_conv::forward<float>(*a);
    return cudaGetLastError();
}
