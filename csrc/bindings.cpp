// based_mp._C: hands raw pointers, sizes and the current stream from Python to the launchers. No torch header needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "decode.h"
#include "gated_conv_args.h"
#include "taylor_args.h"
#include "window_attention_args.h"

namespace {

template <typename T> T* pointer(int64_t address) { return reinterpret_cast<T*>(address); }

// names: kernels to launch in order. pointers, strides, sizes: in the order of based_mp/ops/taylor_cuda.py.
void launch(const std::vector<std::string>& names, const std::array<int64_t, 17>& pointers,
            const std::array<int64_t, 12>& strides, const std::array<int, 14>& sizes, float scale, int64_t stream) {
    static const std::map<std::string, int (*)(const TaylorArgs*)> kernels = {
        {"segment_state", taylor_segment_state}, {"scan", taylor_scan}, {"output", taylor_output},
        {"gradient", taylor_gradient}};
    TaylorArgs a{};
    const auto& p = pointers;
    a.q = pointer<void>(p[0]); a.k = pointer<void>(p[1]); a.v = pointer<void>(p[2]);
    a.dq = pointer<void>(p[3]); a.dk = pointer<void>(p[4]); a.dv = pointer<void>(p[5]);
    a.o = pointer<void>(p[6]); a.grad_o = pointer<void>(p[7]);
    a.cu_seqlens = pointer<int>(p[8]); a.space = pointer<float>(p[9]);
    a.denominator = pointer<float>(p[10]); a.grad_dot = pointer<float>(p[11]);
    a.kv_in = pointer<float>(p[12]); a.z_in = pointer<float>(p[13]);
    a.kv_out = pointer<float>(p[14]); a.z_out = pointer<float>(p[15]);
    for (int i = 0; i < 3; ++i) {
        a.stride[i] = strides[i]; a.d_stride[i] = strides[3 + i];
        a.o_stride[i] = strides[6 + i]; a.grad_stride[i] = strides[9 + i];
    }
    a.batch = sizes[0]; a.seq = sizes[1]; a.heads = sizes[2]; a.features = sizes[3]; a.head_dim = sizes[4];
    a.docs = sizes[5]; a.segments = sizes[6]; a.segment = sizes[7]; a.slots = sizes[8];
    a.exact = sizes[9]; a.reverse = sizes[10]; a.summed = sizes[11];
    a.boundaries = pointer<float>(p[16]); a.boundary = sizes[12]; a.older = sizes[13];
    a.scale = scale;
    a.stream = pointer<void>(stream);
    for (const auto& name : names) {
        const int code = kernels.at(name)(&a);
        if (code) throw std::runtime_error("CUDA error " + std::to_string(code) + " launching taylor kernel " + name);
        a.older = 1;
    }
}

// pointers and sizes: in the order of GatedConvArgs (see based_mp/ops/gated_conv.py).
void gated_conv(bool backward, const std::array<int64_t, 12>& p, const std::array<int, 5>& sizes, int64_t stream) {
    GatedConvArgs a{};
    a.x = pointer<void>(p[0]); a.weight = pointer<void>(p[1]); a.bias = pointer<void>(p[2]);
    a.cu_seqlens = pointer<int>(p[3]); a.carry = pointer<void>(p[4]); a.carry_out = pointer<void>(p[5]);
    a.y = pointer<void>(p[6]); a.dy = pointer<void>(p[7]); a.dx = pointer<void>(p[8]);
    a.partial = pointer<float>(p[9]); a.dweight = pointer<float>(p[10]); a.dbias = pointer<float>(p[11]);
    a.seq = sizes[0]; a.batch = sizes[1]; a.channels = sizes[2]; a.docs = sizes[3]; a.dtype = sizes[4];
    a.stream = pointer<void>(stream);
    const int code = backward ? gated_conv_backward(&a) : gated_conv_forward(&a);
    if (code) throw std::runtime_error("CUDA error " + std::to_string(code) + " launching the gated convolution");
}

// pointers, strides and sizes: in the order of WindowAttentionArgs (see based_mp/ops/window_cuda.py).
void window_attention(bool backward, const std::array<int64_t, 7>& p, const std::array<int64_t, 7>& strides,
                      const std::array<int, 6>& sizes, float scale, int64_t stream) {
    WindowAttentionArgs a{};
    a.qkv = pointer<void>(p[0]); a.rotation = pointer<void>(p[1]); a.cu_seqlens = pointer<int>(p[2]);
    a.o = pointer<void>(p[3]); a.lse = pointer<float>(p[4]); a.grad_o = pointer<void>(p[5]); a.dqkv = pointer<void>(p[6]);
    for (int i = 0; i < 4; ++i) a.stride[i] = strides[i];
    for (int i = 0; i < 3; ++i) a.grad_stride[i] = strides[4 + i];
    a.seq = sizes[0]; a.batch = sizes[1]; a.heads = sizes[2]; a.head_dim = sizes[3]; a.window = sizes[4]; a.docs = sizes[5];
    a.scale = scale;
    a.stream = pointer<void>(stream);
    const int code = backward ? window_attention_backward(&a) : window_attention_forward(&a);
    if (code) throw std::runtime_error("CUDA error " + std::to_string(code) + " launching the window attention");
}

// A launcher of decode.h as a Python function: pointers are passed as integers.
template <typename T> using Passed = std::conditional_t<std::is_pointer_v<T>, int64_t, T>;
template <typename T> T received(Passed<T> x) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(x); else return x;
}
template <typename... A> void define(pybind11::module_& m, const char* name, int (*launcher)(A...)) {
    m.def(name, [=](Passed<A>... arguments) {
        const int code = launcher(received<A>(arguments)...);
        if (code) throw std::runtime_error("CUDA error " + std::to_string(code) + " launching " + name);
    });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("launch", &launch);
    m.def("gated_conv", &gated_conv);
    m.def("window_attention", &window_attention);
    define(m, "decode_embed", decode_embed);
    define(m, "decode_add_norm", decode_add_norm);
    define(m, "decode_swiglu", decode_swiglu);
    define(m, "decode_linear", decode_linear);
    define(m, "decode_product", decode_product);
    define(m, "decode_conv", decode_conv);
    define(m, "decode_taylor", decode_taylor);
    define(m, "decode_attention", decode_attention);
    define(m, "prefill_rope", prefill_rope);
    define(m, "decode_sample", decode_sample);
}
