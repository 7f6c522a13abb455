// Shared by the gated convolution's kernels: 16-byte vectors of channels, and a walk along the tokens of documents.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gated_conv_args.h"

namespace gated_conv {

constexpr int kThreads = 128;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T> __device__ __forceinline__ T narrow(float v);
template <> __device__ __forceinline__ float narrow<float>(float v) { return v; }
template <> __device__ __forceinline__ __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// As many channels as 16 bytes hold.
template <typename T> struct Vec {
    static constexpr int N = 16 / sizeof(T);
    union { uint4 raw; T item[N]; };

    __device__ __forceinline__ static Vec zero() { Vec v; v.raw = make_uint4(0, 0, 0, 0); return v; }
    __device__ __forceinline__ static Vec load(const T* p) { Vec v; v.raw = __ldg(reinterpret_cast<const uint4*>(p)); return v; }
    __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = raw; }
};

// The document of a token: `first` is its start, `end` one past its last token; advances with the tokens.
struct Document {
    int id, first, end;

    __device__ __forceinline__ static Document at(const int* bounds, int docs, int t) {
        int low = 0, high = docs - 1;                    // the last document that starts at or before t and is not empty
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (bounds[middle] <= t) low = middle; else high = middle - 1;
        }
        return {low, bounds[low], bounds[low + 1]};
    }
    __device__ __forceinline__ void advance(const int* bounds, int t) {
        while (t >= end) { ++id; first = end; end = bounds[id + 1]; }
    }
};

// u1 + bias at token t (of batch entry b), or what precedes the document: its carry, or zero. t >= document.first - 2.
template <typename T>
__device__ __forceinline__ void tap(float (&u)[Vec<T>::N], const GatedConvArgs& a, const float* bias, int t, int b,
                                    int channel, int row, int first) {
    Vec<T> v = Vec<T>::zero();
    const bool inside = t >= first;
    if (inside)
        v = Vec<T>::load(static_cast<const T*>(a.x) + ((int64_t)t * a.batch + b) * 2 * a.channels + channel);
    else if (a.carry)
        v = Vec<T>::load(static_cast<const T*>(a.carry) + ((int64_t)row * 2 + (t - first + 2)) * a.channels + channel);
#pragma unroll
    for (int i = 0; i < Vec<T>::N; ++i) u[i] = widen(v.item[i]) + (inside ? bias[i] : 0.f);
}

template <typename T>
__device__ __forceinline__ void parameters(const GatedConvArgs& a, int channel, float (&w)[3][Vec<T>::N],
                                           float (&b1)[Vec<T>::N], float (&b2)[Vec<T>::N]) {
    const T* weight = static_cast<const T*>(a.weight) + channel * 3;
    const T* bias = static_cast<const T*>(a.bias) + channel;
#pragma unroll
    for (int i = 0; i < Vec<T>::N; ++i) {
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) w[tap][i] = widen(weight[i * 3 + tap]);
        b1[i] = a.bias ? widen(bias[i]) : 0.f;
        b2[i] = a.bias ? widen(bias[a.channels + i]) : 0.f;
    }
}

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }

}  // namespace gated_conv
