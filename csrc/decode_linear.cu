// Matrix product with at most 16 rows, where the time is that of bringing the weights. The tensor cores' small product multiplies
// 16 rows of the weights, 16 columns of the result (with SwiGLU eight gates and their values, in a convolution layer eight inputs
// of the convolution and their gates), with eight rows of x. The warps of a block take 32 of the inner dimension in turn, a lane 16
// bytes of two rows of the weights and of a row of x: two products, whose order of summing is not that of memory. All of a block's
// weights, where its warps can hold them, are on their way before x is there. Up to eight rows of x are read where they are used;
// more come to shared memory, for twice as many rows of the weights. Where a norm is asked for, its factor of a row comes to the
// row's sums; of up to eight rows such products sum the squares too, of x with itself. A warp for 16 x 8 results adds up the warps'
// parts, in order, and finishes them.
#include "decode_common.cuh"
#include "hopper.cuh"
using namespace decode;

constexpr int kStep = 32, kPad = 64;             // bytes between the ends of rows of x in shared memory

struct Linear {
    const bf16 *x, *weight;
    bf16* y;
    bool norm;                                   // x is the residual stream
    float eps;
    void* add_to;
    const bf16* bias;                            // of the addition [columns], or of the convolution's input [columns]
    const bf16* taps;                            // [columns / 2, count]
    int count;
    const int* slots;
    bf16* carry;                                 // [slots, count - 1, columns / 2]
    int rows, columns, inner;
};
enum Kind { kPlain, kSwiglu, kConv };
constexpr int kMostTaps = 4;

// T times eight rows of x; G times 16 rows of the weights; W warps for each 16, which ask for A steps at a time: a round. More than
// eight rows of x come to shared memory, whence the groups share them.
template <bool Fp32, Kind What, int T, int G, int W, int A>
__global__ void __launch_bounds__(G * W * 32, G * W > 8 ? 1 : 16 / (G * W)) linear_kernel(const __grid_constant__ Linear p) {
    constexpr bool Paired = What != kPlain, Staged = T > 1;
    constexpr int Round = A * W * kStep, Pitch = Round * 2 + kPad, Warps = G * W, Sums = (T * 8 + Warps - 1) / Warps;
    extern __shared__ __align__(16) char staged[];                 // [T * 8][Pitch]
    __shared__ float4 parts[Warps][T][32];
    __shared__ float squares[Staged ? 1 : W][T * 8];
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int width = Paired ? p.columns / 2 : p.columns;
    // The lane's columns of the result and rows of the weights.
    auto column_of = [&](int group) { return ((int)blockIdx.x * G + group) * (Paired ? 8 : 16) + g; };
    const int column[2] = {column_of(warp / W), column_of(warp / W) + 8};
    const bool real[2] = {column[0] < width, Paired ? column[0] < width : column[1] < width};
    const bf16* from[2] = {p.weight + (int64_t)column[0] * p.inner, p.weight + (int64_t)(Paired ? column[0] + width : column[1]) * p.inner};
    const int own = warp % W * kStep + t * 8;                          // where its share of the inner dimension begins
    auto input = [&](int row, int k) {
        const int64_t at = (int64_t)row * p.inner + k;
        if (!Fp32 || !p.norm) return *(const uint4*)(p.x + at);
        float values[8];
        load8<true>(p.x, at, values);
        return pack(values);
    };
    uint4 w[2][A];
    auto fetch = [&](int first) {
        #pragma unroll
        for (int u = 0; u < A; ++u)
            #pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int k = first + u * W * kStep + own;
                w[c][u] = real[c] && k < p.inner ? __ldcs((const uint4*)(from[c] + k)) : make_uint4(0, 0, 0, 0);
            }
    };
    fetch(0);
    if (warp % W == 0 && t == 0)
        #pragma unroll
        for (int c = 0; c < 2; ++c)
            if (real[c]) prefetch(from[c] + Round, (p.inner - Round) * 2);
    // What the lane finishes: these two columns, or one and its partner, of two rows.
    const int done[2] = {column_of(warp / T), column_of(warp / T) + 8}, row[2] = {warp % T * 8 + 2 * t, warp % T * 8 + 2 * t + 1};
    const bool last = warp < G * T && done[0] < width, finishes[2] = {last && row[0] < p.rows, last && row[1] < p.rows};
    int slot[2] = {-1, -1};
    float window[2][kMostTaps - 1] = {}, tap[kMostTaps] = {}, offset[2] = {};
    if (What == kConv && finishes[0]) {                            // the window changes in this kernel alone
        #pragma unroll
        for (int i = 0; i < kMostTaps; ++i)
            if (i < p.count) tap[i] = __bfloat162float(p.taps[(int64_t)done[0] * p.count + i]);
        #pragma unroll
        for (int c = 0; c < 2; ++c) offset[c] = __bfloat162float(p.bias[done[0] + c * width]);
        #pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (finishes[j]) slot[j] = p.slots[row[j]];
            #pragma unroll
            for (int i = 0; i < kMostTaps - 1; ++i)
                if (slot[j] >= 0 && i < p.count - 1)
                    window[j][i] = __bfloat162float(p.carry[((int64_t)slot[j] * (p.count - 1) + i) * width + done[0]]);
        }
    }
    wait_for_previous();
    float before[2][2] = {};                                       // [column][row]: what the results are added to
    if (!Paired && p.add_to)
        #pragma unroll
        for (int c = 0; c < 2; ++c)
            #pragma unroll
            for (int j = 0; j < 2; ++j)
                if (done[c] < width && finishes[j]) {
                    const int64_t at = (int64_t)row[j] * p.columns + done[c];
                    before[c][j] = Fp32 ? ((const float*)p.add_to)[at] : __bfloat162float(((const bf16*)p.add_to)[at]);
                }
    float sum[T][4] = {}, gram[4] = {}, square[Sums] = {};
    for (int first = 0; first < p.inner; first += Round) {
        if (first) fetch(first);
        if (Staged) {
            const int vectors = min(Round, p.inner - first) / 8;
            if (first) __syncthreads();
            for (int i = threadIdx.x; i < T * 8 * (Round / 8); i += Warps * 32) {
                const int n = i / (Round / 8), v = i % (Round / 8);
                const bool there = n < p.rows && v < vectors;
                char* to = staged + n * Pitch + v * 16;
                if (Fp32 && p.norm)
                    *(uint4*)to = there ? input(n, first + v * 8) : make_uint4(0, 0, 0, 0);
                else                                               // zeros where nothing is read
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(taylor::address(to)),
                                 "l"(p.x + (there ? (int64_t)n * p.inner + first + v * 8 : 0)), "r"(there ? 16 : 0) : "memory");
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncthreads();
            if (p.norm)
                #pragma unroll
                for (int i = 0; i < Sums; ++i)
                    for (int v = lane; v < vectors && warp + i * Warps < T * 8; v += 32) {
                        float values[8];
                        unpack(*(const uint4*)(staged + (warp + i * Warps) * Pitch + v * 16), values);
                        #pragma unroll
                        for (int j = 0; j < 8; ++j) square[i] += values[j] * values[j];
                    }
        }
        #pragma unroll
        for (int u = 0; u < A; ++u) {
            const int k = u * W * kStep + own;
            #pragma unroll
            for (int i = 0; i < T; ++i) {
                uint4 x = make_uint4(0, 0, 0, 0);
                if (Staged) x = *(const uint4*)(staged + (i * 8 + g) * Pitch + k * 2);
                else if (g < p.rows && first + k < p.inner) x = input(g, first + k);
                taylor::mma(sum[i], {w[0][u].x, w[1][u].x, w[0][u].y, w[1][u].y}, x.x, x.y);
                taylor::mma(sum[i], {w[0][u].z, w[1][u].z, w[0][u].w, w[1][u].w}, x.z, x.w);
                if (!Staged && p.norm) {
                    taylor::mma(gram, {x.x, 0, x.y, 0}, x.x, x.y);
                    taylor::mma(gram, {x.z, 0, x.w, 0}, x.z, x.w);
                }
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < T; ++i) parts[warp][i][lane] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    if (!Staged && p.norm && g / 2 == t) squares[warp][g] = gram[g % 2];             // on the diagonal
    if (Staged && p.norm)
        #pragma unroll
        for (int i = 0; i < Sums; ++i) {
            for (int d = 16; d; d /= 2) square[i] += __shfl_xor_sync(~0u, square[i], d);
            if (lane == 0 && warp + i * Warps < T * 8) squares[0][warp + i * Warps] = square[i];
        }
    __syncthreads();
    if (warp >= G * T) return;
    float all[2][2] = {}, total[2] = {};
    #pragma unroll
    for (int i = 0; i < W; ++i) {
        const float4 part = parts[warp / T * W + i][warp % T][lane];
        all[0][0] += part.x; all[0][1] += part.y; all[1][0] += part.z; all[1][1] += part.w;
        if (p.norm && i < (Staged ? 1 : W))
            #pragma unroll
            for (int j = 0; j < 2; ++j) total[j] += squares[i][row[j]];
    }
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (!finishes[j]) continue;
        const float scale = p.norm ? rsqrtf(total[j] / p.inner + p.eps) : 1.f;
        #pragma unroll
        for (int c = 0; c < 2; ++c) all[c][j] = rounded(all[c][j] * scale);
        if (What == kSwiglu) p.y[(int64_t)row[j] * width + done[0]] = __float2bfloat16(silu(all[0][j]) * all[1][j]);
        if (What == kConv && slot[j] >= 0) {
            const float newest = rounded(all[0][j] + offset[0]);
            float mixed = 0.f;
            #pragma unroll
            for (int i = 0; i < kMostTaps; ++i) {
                if (i >= p.count) break;
                const float x = i == p.count - 1 ? newest : window[j][min(i, kMostTaps - 2)];
                mixed += x * tap[i];
                if (i > 0) p.carry[((int64_t)slot[j] * (p.count - 1) + i - 1) * width + done[0]] = __float2bfloat16(x);
            }
            p.y[(int64_t)row[j] * width + done[0]] = __float2bfloat16(silu(mixed) * rounded(all[1][j] + offset[1]));
        }
        #pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (Paired || done[c] >= width) continue;
            const int64_t at = (int64_t)row[j] * p.columns + done[c];
            float result = all[c][j];
            if (p.add_to) result = before[c][j] + (result + (p.bias ? __bfloat162float(p.bias[done[c]]) : 0.f));
            if (p.add_to && Fp32) ((float*)p.add_to)[at] = result;
            else (p.add_to ? (bf16*)p.add_to : p.y)[at] = __float2bfloat16(result);
        }
    }
}

template <bool Fp32, Kind What, int T, int G, int W, int A> int run(const Linear& p, void* stream) {
    const int width = What == kPlain ? p.columns : p.columns / 2, each = (What == kPlain ? 16 : 8) * G;
    const int shared = T > 1 ? T * 8 * (A * W * kStep * 2 + kPad) : 0;
    return launch(linear_kernel<Fp32, What, T, G, W, A>, (width + each - 1) / each, G * W * 32, (size_t)shared, stream, p);
}
template <bool Fp32, Kind What> int run(const Linear& p, void* stream) {
    // As few warps as hold a block's weights, so that each asks for as much as it can; no step that all spend on nothing.
    const int steps = (p.inner + kStep - 1) / kStep;
    if (p.rows > 8) {
        if (steps <= 4 * 8) return run<Fp32, What, 2, 2, 4, 8>(p, stream);
        if (steps <= 8 * 7) return run<Fp32, What, 2, 2, 8, 7>(p, stream);
        return run<Fp32, What, 2, 1, 16, 7>(p, stream);
    }
    if (steps <= 4 * 8) return run<Fp32, What, 1, 1, 4, 8>(p, stream);
    if (steps <= 8 * 7) return run<Fp32, What, 1, 1, 8, 7>(p, stream);
    if (steps <= 8 * 8) return run<Fp32, What, 1, 1, 8, 8>(p, stream);
    if (steps <= 16 * 7) return run<Fp32, What, 1, 1, 16, 7>(p, stream);
    return run<Fp32, What, 1, 1, 16, 8>(p, stream);
}

extern "C" int decode_linear(const void* x, const void* weight, void* y, int kind, int norm, float eps, void* add_to,
                             const void* bias, int fp32_residual, const void* taps, int tap_count, const int* slots, void* carry,
                             int rows, int columns, int inner, void* stream) {
    const Linear p{(const bf16*)x, (const bf16*)weight, (bf16*)y, norm != 0, eps, add_to, (const bf16*)bias,
                   (const bf16*)taps, tap_count, slots, (bf16*)carry, rows, columns, inner};
    if (inner % 8 || rows < 1 || rows > 16 || kind > kConv || (kind == kConv && (tap_count < 2 || tap_count > kMostTaps)))
        return (int)cudaErrorInvalidValue;
    auto start = [&](auto fp32) {
        constexpr bool Fp32 = decltype(fp32)::value;
        if (kind == kSwiglu) return run<Fp32, kSwiglu>(p, stream);
        if (kind == kConv) return run<Fp32, kConv>(p, stream);
        return run<Fp32, kPlain>(p, stream);
    };
    return fp32_residual ? start(std::true_type{}) : start(std::false_type{});
}
