// Gradients of y = silu(m) * u2, m_t = w0 u1_{t-2} + w1 u1_{t-1} + w2 u1_t, u = x + bias:
//   du2 = dy silu(m);  dm = dy u2 s (1 + m (1 - s)), s = sigmoid(m);  du1_t = w2 dm_t + w1 dm_{t+1} + w0 dm_{t+2};
//   dw_i = sum_t dm_t u1_{t-2+i};  dbias = sum_t (du1, du2).   Nothing crosses a document's start.
// As in the forward kernel a thread owns 16 bytes of channels and walks a strip of tokens; du1_t is written two tokens
// later. Sums over tokens go to `partial`, one part a strip, which a second kernel adds in a fixed order.
#include "gated_conv.cuh"

namespace gated_conv {

constexpr int kStrip = 64, kAhead = 2;

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads) backward_kernel(GatedConvArgs a) {
    constexpr int N = Vec<T>::N;
    const int channel = (blockIdx.x * kThreads + threadIdx.x) * N;
    if (channel >= a.channels) return;
    const int b = blockIdx.z, begin = blockIdx.y * kStrip, end = min(begin + kStrip, a.seq);
    const int past = min(end + 2, a.seq);                // dm of two more tokens reaches du1 of this strip
    Document doc{b, 0, a.seq};
    if (kPacked) doc = Document::at(a.cu_seqlens, a.docs, begin);
    float w[3][N], b1[N], b2[N], older[N], old[N];
    float pending_older[N] = {}, pending_old[N] = {};    // du1 of tokens t - 2 and t - 1 as far as known
    float sum[5][N] = {};
    parameters<T>(a, channel, w, b1, b2);
    tap<T>(older, a, b1, begin - 2, b, channel, doc.id, doc.first);
    tap<T>(old, a, b1, begin - 1, b, channel, doc.id, doc.first);
    const T* x = static_cast<const T*>(a.x) + channel;
    const T* dy = static_cast<const T*>(a.dy) + channel;
    T* dx = static_cast<T*>(a.dx) + channel;
    for (int t0 = begin; t0 < end + 2; t0 += kAhead) {
        Vec<T> u1[kAhead], u2[kAhead], g[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int64_t row = (int64_t)min(t0 + j, past - 1) * a.batch + b;
            u1[j] = Vec<T>::load(x + row * 2 * a.channels);
            u2[j] = Vec<T>::load(x + row * 2 * a.channels + a.channels);
            g[j] = Vec<T>::load(dy + row * a.channels);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int t = t0 + j;
            if (t >= end + 2) break;
            const bool real = t < past, own = t < end;   // beyond the sequence: only the pending du1 is written
            if (kPacked && real && t >= doc.end) {
                doc.advance(a.cu_seqlens, t);
                tap<T>(older, a, b1, t - 2, b, channel, doc.id, doc.first);
                tap<T>(old, a, b1, t - 1, b, channel, doc.id, doc.first);
            }
            const float reach1 = !real || (kPacked && t - doc.first < 1) ? 0.f : 1.f;
            const float reach2 = !real || (kPacked && t - doc.first < 2) ? 0.f : 1.f;
            Vec<T> du1, du2;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float u = widen(u1[j].item[i]) + b1[i], v = widen(u2[j].item[i]) + b2[i];
                const float d = widen(g[j].item[i]);
                const float mixed = w[0][i] * older[i] + w[1][i] * old[i] + w[2][i] * u;
                const float s = sigmoid(mixed);
                const float dm = d * v * s * (1.f + mixed * (1.f - s));
                const float done = pending_older[i] + reach2 * (w[0][i] * dm);
                du1.item[i] = narrow<T>(done);
                pending_older[i] = pending_old[i] + reach1 * (w[1][i] * dm);
                pending_old[i] = w[2][i] * dm;
                if (t >= begin + 2) sum[3][i] += done;
                if (own) {
                    const float gate = d * mixed * s;
                    du2.item[i] = narrow<T>(gate);
                    sum[0][i] += dm * older[i];
                    sum[1][i] += dm * old[i];
                    sum[2][i] += dm * u;
                    sum[4][i] += gate;
                }
                older[i] = old[i];
                old[i] = u;
            }
            if (own) du2.store(dx + ((int64_t)t * a.batch + b) * 2 * a.channels + a.channels);
            if (t >= begin + 2) du1.store(dx + ((int64_t)(t - 2) * a.batch + b) * 2 * a.channels);
        }
    }
    float* part = a.partial + ((int64_t)blockIdx.y * a.batch + b) * 5 * a.channels + channel;
#pragma unroll
    for (int k = 0; k < 5; ++k)
#pragma unroll
        for (int i = 0; i < N; i += 4)
            *reinterpret_cast<float4*>(part + (int64_t)k * a.channels + i) =
                make_float4(sum[k][i], sum[k][i + 1], sum[k][i + 2], sum[k][i + 3]);
}

// Column sums of partial [parts, 5 C]: 32 columns a block, eight threads a column, always in the same order.
__global__ void __launch_bounds__(256) reduce_kernel(GatedConvArgs a, int parts) {
    __shared__ float sums[8][32];
    const int column = blockIdx.x * 32 + threadIdx.x, columns = 5 * a.channels;
    float sum = 0.f;
    if (column < columns)
        for (int part = threadIdx.y; part < parts; part += 8) sum += a.partial[(int64_t)part * columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
    for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
    const int kind = column / a.channels, channel = column % a.channels;
    if (kind < 3) a.dweight[channel * 3 + kind] += sum;
    else if (a.dbias) a.dbias[(kind - 3) * a.channels + channel] += sum;
}

template <typename T> void backward(const GatedConvArgs& a) {
    const int strips = (a.seq + kStrip - 1) / kStrip;
    const dim3 grid((a.channels / Vec<T>::N + kThreads - 1) / kThreads, strips, a.batch);
    const auto stream = static_cast<cudaStream_t>(a.stream);
    if (a.cu_seqlens) backward_kernel<T, true><<<grid, kThreads, 0, stream>>>(a);
    else backward_kernel<T, false><<<grid, kThreads, 0, stream>>>(a);
    reduce_kernel<<<(5 * a.channels + 31) / 32, dim3(32, 8), 0, stream>>>(a, strips * a.batch);
}

}  // namespace gated_conv

extern "C" int gated_conv_backward(const GatedConvArgs* a) {
    if (a->dtype == 0) gated_conv::backward<__nv_bfloat16>(*a);
    else if (a->dtype == 1) gated_conv::backward<__half>(*a);
    else gated_conv::backward<float>(*a);
    return cudaGetLastError();
}
