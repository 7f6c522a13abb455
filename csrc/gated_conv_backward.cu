// Gradients of y = silu(m) * u2, m_t = w0 u1_{t-2} + w1 u1_{t-1} + w2 u1_t, u = x + bias:
//   du2 = dy silu(m);  dm = dy u2 (s + silu(m) (1 - s)), s = sigmoid(m);  du1_t = w2 dm_t + w1 dm_{t+1} + w0 dm_{t+2};
//   dw_i = sum_t dm_t u1_{t-2+i};  dbias = sum_t (du1, du2).   Nothing crosses a document's start.
// As in the forward kernel a thread owns 16 bytes of channels and walks a strip of tokens, here with the next kAhead tokens
// always on their way; du1_t is written two tokens later. Sums over tokens go to `partial`, one part a strip, which a second
// kernel adds in a fixed order.
#include "gated_conv.cuh"

namespace gated_conv {

constexpr int kStrip = 128, kAhead = 4;

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(GatedConvArgs a) {
    constexpr int N = Vec<T>::N;
    Vec<T> next[kAhead][3];                              // u1, u2 and dy of the next tokens, on their way
    cudaTriggerProgrammaticLaunchCompletion();           // the sum may take its place
    const int channel = (blockIdx.x * kThreads + threadIdx.x) * N;
    if (channel >= a.channels) return;
    const int b = blockIdx.y, begin = blockIdx.z * kStrip, end = min(begin + kStrip, a.seq);
    const int last = end + 2;                            // dm of two more tokens reaches du1 of this strip
    const int64_t first = ((int64_t)begin * a.batch + b) * a.channels, token = (int64_t)a.batch * a.channels;
    const T* x = static_cast<const T*>(a.x) + 2 * first + channel;
    const T* dy = static_cast<const T*>(a.dy) + first + channel;
    T* dx = static_cast<T*>(a.dx) + 2 * first + channel;
    const auto fetch = [&](int t, Vec<T> (&slot)[3]) {   // of token t, zeros beyond the sequence
        const bool there = t < min(last, a.seq);
        slot[0] = there ? Vec<T>::load(x) : Vec<T>();
        slot[1] = there ? Vec<T>::load(x + a.channels) : Vec<T>();
        slot[2] = there ? Vec<T>::load(dy) : Vec<T>();
        x += 2 * token;
        dy += token;
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) fetch(begin + j, next[j]);
    Document doc{b, 0, a.seq};
    if (kPacked) doc = Document::at(a.cu_seqlens, a.docs, begin);
    float w[3][N], b1[N], b2[N], older[N], old[N];
    float pending_older[N] = {}, pending_old[N] = {};    // du1 of tokens t - 2 and t - 1 as far as known
    float sum[5][N] = {};
    parameters<T>(a, channel, w, b1, b2);
    tap<T>(older, a, b1, begin - 2, b, channel, doc.id, doc.first);
    tap<T>(old, a, b1, begin - 1, b, channel, doc.id, doc.first);
    for (int t0 = begin; t0 < last; t0 += kAhead)
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {                   // a token's slot is filled again as soon as it is read
        const int t = t0 + j;
        if (t >= last) break;
        Vec<T> (&slot)[3] = next[j];
        float u[N], v[N], d[N], gate[N], dm[N], du1[N];
        slot[0].widen_to(u);
        slot[1].widen_to(v);
        slot[2].widen_to(d);
        if (kPacked && t >= doc.end && t < a.seq) {
            doc.advance(a.cu_seqlens, t);
            tap<T>(older, a, b1, t - 2, b, channel, doc.id, doc.first);
            tap<T>(old, a, b1, t - 1, b, channel, doc.id, doc.first);
        }
        const float reach1 = kPacked && t - doc.first < 1 ? 0.f : 1.f;
        const float reach2 = kPacked && t - doc.first < 2 ? 0.f : 1.f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            u[i] += b1[i];
            const float mixed = w[0][i] * older[i] + w[1][i] * old[i] + w[2][i] * u[i];
            const float s = sigmoid(mixed), silu = mixed * s;
            gate[i] = d[i] * silu;
            dm[i] = d[i] * (v[i] + b2[i]) * (s + silu - silu * s);
            du1[i] = pending_older[i] + reach2 * w[0][i] * dm[i];
            pending_older[i] = pending_old[i] + reach1 * w[1][i] * dm[i];
            pending_old[i] = w[2][i] * dm[i];
        }
        if (t < end) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                sum[0][i] += dm[i] * older[i];
                sum[1][i] += dm[i] * old[i];
                sum[2][i] += dm[i] * u[i];
                sum[4][i] += gate[i];
            }
            Vec<T>(gate).store(dx + a.channels);
        }
        if (t >= begin + 2) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum[3][i] += du1[i];
            Vec<T>(du1).store(dx - 4 * token);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            older[i] = old[i];
            old[i] = u[i];
        }
        dx += 2 * token;
        fetch(t + kAhead, slot);
    }
    float* part = a.partial + ((int64_t)blockIdx.z * a.batch + b) * 5 * a.channels + channel;
#pragma unroll
    for (int k = 0; k < 5; ++k)
#pragma unroll
        for (int i = 0; i < N; i += 2)
            *reinterpret_cast<float2*>(part + (int64_t)k * a.channels + i) = make_float2(sum[k][i], sum[k][i + 1]);
}

// Column sums of partial [parts, 5 C]: 32 columns a block, kReaders threads a column, always in the same order.
constexpr int kReaders = 16;
__global__ void __launch_bounds__(32 * kReaders) reduce_kernel(GatedConvArgs a, int parts) {
    __shared__ float sums[kReaders][32];
    const int column = blockIdx.x * 32 + threadIdx.x, columns = 5 * a.channels;
    float sum = 0.f;
    cudaGridDependencySynchronize();
    if (column < columns)
#pragma unroll 8
        for (int part = threadIdx.y; part < parts; part += kReaders) sum += a.partial[(int64_t)part * columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
    for (int i = 1; i < kReaders; ++i) sum += sums[i][threadIdx.x];
    const int kind = column / a.channels, channel = column % a.channels;
    if (kind < 3) a.dweight[channel * 3 + kind] += sum;
    else if (a.dbias) a.dbias[(kind - 3) * a.channels + channel] += sum;
}

template <typename T> void backward(const GatedConvArgs& a) {
    const int strips = (a.seq + kStrip - 1) / kStrip;
    const dim3 grid((a.channels / Vec<T>::N + kThreads - 1) / kThreads, a.batch, strips);
    const auto stream = static_cast<cudaStream_t>(a.stream);
    if (a.cu_seqlens) backward_kernel<T, true><<<grid, kThreads, 0, stream>>>(a);
    else backward_kernel<T, false><<<grid, kThreads, 0, stream>>>(a);
    cudaLaunchAttribute early{};                         // its blocks wait where the last strips leave room
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t sum{};
    sum.gridDim = dim3((5 * a.channels + 31) / 32);
    sum.blockDim = dim3(32, kReaders);
    sum.stream = stream;
    sum.attrs = &early;
    sum.numAttrs = 1;
    cudaLaunchKernelEx(&sum, reduce_kernel, a, strips * a.batch);
}

}  // namespace gated_conv

extern "C" int gated_conv_backward(const GatedConvArgs* a) {
    if (a->dtype == 0) gated_conv::backward<__nv_bfloat16>(*a);
    else if (a->dtype == 1) gated_conv::backward<__half>(*a);
    else gated_conv::backward<float>(*a);
    return cudaGetLastError();
}
