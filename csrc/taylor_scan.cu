// Prefix (or, reversed, suffix) sums of the segment states of each document, in place and in fp32, in a fixed order.
// Each segment receives the state before (behind) it; the sum of all goes out in the public layout, rows weighted by
// c_p = 1, sqrt(scale), scale / sqrt(2), scale and ordered as the 153 features are documented in ops/reference.py.
#include "taylor_common.cuh"
using namespace taylor;

// Public row of a work-space row, or -1 for an unused one; `factor` is c_p.
__device__ int public_row(int row, int f, float scale, float& factor) {
    const int tile = row >> 4, i = row & 15, r = tile - 1;
    factor = 1.f;
    if (row == 152) return 0;
    if (row > 152 || i >= f) return -1;
    if (tile == 0) { factor = sqrtf(scale); return 1 + i; }
    if (tile == 1) { factor = scale * 0.70710678f; return 1 + f + i; }
    factor = scale;
    if (f == 16) return 1 + (r + 1) * f + i;
    const int j = i + r;                                               // f = 8 inside 16: pairs i < j only
    if (j >= f) return -1;
    return 2 * r <= f ? 1 + (r + 1) * f + i : 1 + (f - r + 1) * f + j;
}

__global__ void scan(const __grid_constant__ TaylorArgs p) {
    wait_for_kernel_before();
    const int wide = p.head_dim + 8, item = blockIdx.z * blockDim.x + threadIdx.x, doc = blockIdx.x, head = blockIdx.y;
    if (item >= kRows * wide) return;
    // See State::own_space.
    const int block = item >> 7, lane = item >> 2 & 31, tile = block / (wide / 8);
    const int row = tile * 16 + (lane >> 2) + (item >> 1 & 1) * 8, column = block % (wide / 8) * 8 + (lane & 3) * 2 + (item & 1);
    float factor;
    const int out = column <= p.head_dim || !p.reverse ? public_row(row, p.features, p.scale, factor) : -1;
    const int states = 1 + p.features + p.features * (p.features + 1) / 2;
    const int64_t at = ((int64_t)doc * p.heads + head) * states + out;
    float sum = 0.f;
    if (out >= 0 && p.kv_in)
        sum = (column < p.head_dim ? p.kv_in[at * p.head_dim + column] : p.z_in[at]) / factor;
    if (p.slots) {
        int begin = first_slot(p, doc), count = p.segments;
        if (p.cu_seqlens) count = (p.cu_seqlens[doc + 1] - p.cu_seqlens[doc] + p.segment - 1) / p.segment;
        float* x = p.space + ((int64_t)begin * p.heads + head) * kRows * wide + item;
        const int64_t step = (int64_t)p.heads * kRows * wide;
        auto entry = [&](int i) -> float& { return x[(p.reverse ? count - 1 - i : i) * step]; };
        constexpr int Batch = 8;                     // read side by side
        for (int first = 0; first < count; first += Batch) {
            float own[Batch];
            #pragma unroll
            for (int i = 0; i < Batch; ++i) own[i] = first + i < count ? entry(first + i) : 0.f;
            #pragma unroll
            for (int i = 0; i < Batch; ++i)
                if (first + i < count) {
                    entry(first + i) = sum;
                    sum += own[i];
                }
        }
    }
    if (out >= 0 && p.kv_out) {
        if (column < p.head_dim) p.kv_out[at * p.head_dim + column] = sum * factor;
        else if (column == p.head_dim) p.z_out[at] = sum * factor;
    }
}

extern "C" int taylor_scan(const TaylorArgs* p) {
    dim3 grid(p->docs, p->heads, (kRows * (p->head_dim + 8) + 255) / 256);
    return launch(scan, grid, 256, 0, p->stream, *p);
}
