// Matrix product with at most eight rows, where the time is that of bringing the weights. A block makes 16 columns of the result
// (with SwiGLU eight gates and their values, in a convolution layer eight inputs of the convolution and their gates): 16 rows of
// the weights are the left operand of the tensor cores' small product, the rows of x the right one. The warps of a block take 32 of
// the inner dimension in turn, a lane 16 bytes of two rows of the weights and of a row of x: two products, whose order of summing
// is not that of memory. All of a block's weights, where its warps can hold them, are on their way before x is there. Where a norm
// is asked for, its factor of a row comes to the row's sums; the squares are summed by such products too, of x with itself. One
// warp adds up the warps' parts, in order, and finishes.
#include "decode_common.cuh"
#include "hopper.cuh"
using namespace decode;

constexpr int kRows = 8, kStep = 32;

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

// W warps, which ask for A steps at a time.
template <bool Fp32, Kind What, int W, int A>
__global__ void __launch_bounds__(W * 32, W > 8 ? 1 : 16 / W) linear_kernel(const __grid_constant__ Linear p) {
    constexpr bool Paired = What != kPlain;
    constexpr int Round = A * W * kStep;
    __shared__ float4 parts[W][32];
    __shared__ float squares[W][kRows];
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int width = Paired ? p.columns / 2 : p.columns;
    // The lane's columns of the result and rows of the weights.
    const int column[2] = {(int)blockIdx.x * (Paired ? 8 : 16) + g, (int)blockIdx.x * (Paired ? 8 : 16) + g + 8};
    const bool real[2] = {column[0] < width, Paired ? column[0] < width : column[1] < width};
    const bf16* from[2] = {p.weight + (int64_t)column[0] * p.inner, p.weight + (int64_t)(Paired ? column[0] + width : column[1]) * p.inner};
    const int own = warp * kStep + t * 8;                          // where its share of the inner dimension begins
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
    if (warp == 0 && t == 0)
        #pragma unroll
        for (int c = 0; c < 2; ++c)
            if (real[c]) prefetch(from[c] + Round, (p.inner - Round) * 2);
    // What the lane finishes: its columns of these two rows.
    const int row[2] = {2 * t, 2 * t + 1};
    const bool finishes[2] = {warp == 0 && real[0] && row[0] < p.rows, warp == 0 && real[0] && row[1] < p.rows};
    int slot[2] = {-1, -1};
    float window[2][kMostTaps - 1] = {}, tap[kMostTaps] = {}, offset[2] = {};
    if (What == kConv && finishes[0]) {                            // the window changes in this kernel alone
        #pragma unroll
        for (int i = 0; i < kMostTaps; ++i)
            if (i < p.count) tap[i] = __bfloat162float(p.taps[(int64_t)column[0] * p.count + i]);
        #pragma unroll
        for (int c = 0; c < 2; ++c) offset[c] = __bfloat162float(p.bias[column[0] + c * width]);
        #pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (finishes[j]) slot[j] = p.slots[row[j]];
            #pragma unroll
            for (int i = 0; i < kMostTaps - 1; ++i)
                if (slot[j] >= 0 && i < p.count - 1)
                    window[j][i] = __bfloat162float(p.carry[((int64_t)slot[j] * (p.count - 1) + i) * width + column[0]]);
        }
    }
    wait_for_previous();
    float before[2][2] = {};                                       // [column][row]: what the results are added to
    if (!Paired && p.add_to)
        #pragma unroll
        for (int c = 0; c < 2; ++c)
            #pragma unroll
            for (int j = 0; j < 2; ++j)
                if (real[c] && finishes[j]) {
                    const int64_t at = (int64_t)row[j] * p.columns + column[c];
                    before[c][j] = Fp32 ? ((const float*)p.add_to)[at] : __bfloat162float(((const bf16*)p.add_to)[at]);
                }
    float sum[4] = {}, gram[4] = {};
    for (int first = 0; first < p.inner; first += Round) {
        if (first) fetch(first);
        #pragma unroll
        for (int u = 0; u < A; ++u) {
            const int k = first + u * W * kStep + own;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (g < p.rows && k < p.inner) {
                const int64_t at = (int64_t)g * p.inner + k;
                if (Fp32 && p.norm) {
                    float values[8];
                    load8<true>(p.x, at, values);
                    x = pack(values);
                } else {
                    x = *(const uint4*)(p.x + at);
                }
            }
            taylor::mma(sum, {w[0][u].x, w[1][u].x, w[0][u].y, w[1][u].y}, x.x, x.y);
            taylor::mma(sum, {w[0][u].z, w[1][u].z, w[0][u].w, w[1][u].w}, x.z, x.w);
            if (p.norm) {
                taylor::mma(gram, {x.x, 0, x.y, 0}, x.x, x.y);
                taylor::mma(gram, {x.z, 0, x.w, 0}, x.z, x.w);
            }
        }
    }
    parts[warp][lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    if (p.norm && g / 2 == t) squares[warp][g] = gram[g % 2];      // on the diagonal
    __syncthreads();
    if (warp > 0) return;
    float all[2][2] = {}, total[2] = {};
    #pragma unroll
    for (int i = 0; i < W; ++i) {
        const float4 part = parts[i][lane];
        all[0][0] += part.x; all[0][1] += part.y; all[1][0] += part.z; all[1][1] += part.w;
        if (p.norm)
            #pragma unroll
            for (int j = 0; j < 2; ++j) total[j] += squares[i][row[j]];
    }
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (!finishes[j]) continue;
        const float scale = p.norm ? rsqrtf(total[j] / p.inner + p.eps) : 1.f;
        #pragma unroll
        for (int c = 0; c < 2; ++c) all[c][j] = rounded(all[c][j] * scale);
        if (What == kSwiglu) p.y[(int64_t)row[j] * width + column[0]] = __float2bfloat16(silu(all[0][j]) * all[1][j]);
        if (What == kConv && slot[j] >= 0) {
            const float newest = rounded(all[0][j] + offset[0]);
            float mixed = 0.f;
            #pragma unroll
            for (int i = 0; i < kMostTaps; ++i) {
                if (i >= p.count) break;
                const float x = i == p.count - 1 ? newest : window[j][min(i, kMostTaps - 2)];
                mixed += x * tap[i];
                if (i > 0) p.carry[((int64_t)slot[j] * (p.count - 1) + i - 1) * width + column[0]] = __float2bfloat16(x);
            }
            p.y[(int64_t)row[j] * width + column[0]] = __float2bfloat16(silu(mixed) * rounded(all[1][j] + offset[1]));
        }
        #pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (Paired || !real[c]) continue;
            const int64_t at = (int64_t)row[j] * p.columns + column[c];
            float result = all[c][j];
            if (p.add_to) result = before[c][j] + (result + (p.bias ? __bfloat162float(p.bias[column[c]]) : 0.f));
            if (p.add_to && Fp32) ((float*)p.add_to)[at] = result;
            else (p.add_to ? (bf16*)p.add_to : p.y)[at] = __float2bfloat16(result);
        }
    }
}

template <bool Fp32, Kind What> int run(const Linear& p, void* stream) {
    const int width = What == kPlain ? p.columns : p.columns / 2, each = What == kPlain ? 16 : 8;
    auto start = [&](auto kernel, int warps) { return launch(kernel, (width + each - 1) / each, warps * 32, 0, stream, p); };
    // As few warps as hold a block's weights, so that each asks for as much as it can; no step that all spend on nothing.
    const int steps = (p.inner + kStep - 1) / kStep;
    if (steps <= 4 * 8) return start(linear_kernel<Fp32, What, 4, 8>, 4);
    if (steps <= 8 * 7) return start(linear_kernel<Fp32, What, 8, 7>, 8);
    if (steps <= 8 * 8) return start(linear_kernel<Fp32, What, 8, 8>, 8);
    if (steps <= 16 * 7) return start(linear_kernel<Fp32, What, 16, 7>, 16);
    return start(linear_kernel<Fp32, What, 16, 8>, 16);
}

extern "C" int decode_linear(const void* x, const void* weight, void* y, int kind, int norm, float eps, void* add_to,
                             const void* bias, int fp32_residual, const void* taps, int tap_count, const int* slots, void* carry,
                             int rows, int columns, int inner, void* stream) {
    const Linear p{(const bf16*)x, (const bf16*)weight, (bf16*)y, norm != 0, eps, add_to, (const bf16*)bias,
                   (const bf16*)taps, tap_count, slots, (bf16*)carry, rows, columns, inner};
    if (inner % 8 || rows < 1 || rows > kRows || kind > kConv || (kind == kConv && (tap_count < 2 || tap_count > kMostTaps)))
        return (int)cudaErrorInvalidValue;
    auto start = [&](auto fp32) {
        constexpr bool Fp32 = decltype(fp32)::value;
        if (kind == kSwiglu) return run<Fp32, kSwiglu>(p, stream);
        if (kind == kConv) return run<Fp32, kConv>(p, stream);
        return run<Fp32, kPlain>(p, stream);
    };
    return fp32_residual ? start(std::true_type{}) : start(std::false_type{});
}
