// Shared by the gated convolution's kernels: 16-byte vectors of channels and a walk along the tokens of documents.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gated_conv_args.h"

namespace gated_conv {

constexpr int kThreads = 128;

template <typename T> struct Pair;
template <> struct Pair<float> { using type = float2; };
template <> struct Pair<__half> { using type = __half2; };
template <> struct Pair<__nv_bfloat16> { using type = __nv_bfloat162; };
__device__ __forceinline__ float2 widen(float2 v) { return v; }
__device__ __forceinline__ float2 widen(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 widen(__nv_bfloat162 v) {       // in fewer instructions than __bfloat1622float2
    const uint32_t both = reinterpret_cast<const uint32_t&>(v);
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}
__device__ __forceinline__ void narrow(float2 v, float2& to) { to = v; }
__device__ __forceinline__ void narrow(float2 v, __half2& to) { to = __float22half2_rn(v); }
__device__ __forceinline__ void narrow(float2 v, __nv_bfloat162& to) { to = __float22bfloat162_rn(v); }

// As many channels as 16 bytes hold.
template <typename T> struct Vec {
    static constexpr int N = 16 / sizeof(T);
    using Two = typename Pair<T>::type;
    uint4 raw;

    __device__ __forceinline__ Vec() : raw() {}
    __device__ __forceinline__ Vec(uint4 raw) : raw(raw) {}
    __device__ __forceinline__ explicit Vec(const float (&x)[N]) {
#pragma unroll
        for (int i = 0; i < N; i += 2) narrow({x[i], x[i + 1]}, reinterpret_cast<Two*>(&raw)[i / 2]);
    }
    __device__ __forceinline__ static Vec load(const T* p) { return __ldg(reinterpret_cast<const uint4*>(p)); }
    __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = raw; }
    __device__ __forceinline__ void widen_to(float (&x)[N]) const {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const float2 two = widen(reinterpret_cast<const Two*>(&raw)[i / 2]);
            x[i] = two.x;
            x[i + 1] = two.y;
        }
    }
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
    Vec<T> v;
    const bool inside = t >= first;
    if (inside)
        v = Vec<T>::load(static_cast<const T*>(a.x) + ((int64_t)t * a.batch + b) * 2 * a.channels + channel);
    else if (a.carry)
        v = Vec<T>::load(static_cast<const T*>(a.carry) + ((int64_t)row * 2 + (t - first + 2)) * a.channels + channel);
    v.widen_to(u);
#pragma unroll
    for (int i = 0; i < Vec<T>::N; ++i) u[i] += inside ? bias[i] : 0.f;
}

template <typename T>
__device__ __forceinline__ void parameters(const GatedConvArgs& a, int channel, float (&w)[3][Vec<T>::N],
                                           float (&b1)[Vec<T>::N], float (&b2)[Vec<T>::N]) {
    constexpr int N = Vec<T>::N;
    const T* weight = static_cast<const T*>(a.weight) + channel * 3;
    const T* bias = static_cast<const T*>(a.bias) + channel;
    float taps[3][N];                                    // as they lie, the three of a channel side by side
#pragma unroll
    for (int k = 0; k < 3; ++k) Vec<T>::load(weight + k * N).widen_to(taps[k]);
#pragma unroll
    for (int i = 0; i < 3 * N; ++i) w[i % 3][i / 3] = taps[i / N][i % N];
    (a.bias ? Vec<T>::load(bias) : Vec<T>()).widen_to(b1);
    (a.bias ? Vec<T>::load(bias + a.channels) : Vec<T>()).widen_to(b2);
}

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }

}  // namespace gated_conv
