// What every Taylor linear-attention launcher receives. Plain C: shared by the kernels and the binding.
#pragma once
#include <stdint.h>

struct TaylorArgs {
    // Inputs, bf16: q, k [batch, seq, heads, features], v [batch, seq, heads, head_dim], parts of one tensor's rows.
    const void *q, *k, *v;
    int64_t stride[3];                                  // of all three: batch, seq, head; elements, as below
    const int* cu_seqlens;                              // [docs + 1] or null
    // Work space and outputs; denominator and grad_dot are contiguous.
    float* space;                                       // [slots, heads, 160 (head_dim + 8)] segment states, or null
    float* boundaries;                                  // the same, states that taylor_output leaves for taylor_gradient, or null
    void* o;                                            // bf16 [batch, seq, heads, head_dim]
    int64_t o_stride[3];
    float* denominator;                                 // [batch, heads, seq]
    const void* grad_o;                                 // as o
    int64_t grad_stride[3];
    float* grad_dot;                                    // [batch, heads, seq] grad_o . o, made with dq
    void *dq, *dk, *dv;                                 // as q, k, v
    int64_t d_stride[3];
    // States at the ends of the scan, fp32, the public layout [docs, heads, D(, head_dim)]; null where absent.
    const float *kv_in, *z_in;
    float *kv_out, *z_out;
    int batch, seq, heads, features, head_dim;
    int docs, segments, segment, slots;                 // segments of `segment` tokens each document (fixed lengths)
    int exact, reverse;
    int boundary;                                       // segment length of `boundaries`, a multiple of 128
    int summed;                                         // `space` holds states; else sums of segments, which taylor_output adds up
    int older;                                          // the kernel before makes nothing that is read but `space`
    float scale;
    void* stream;
};

#ifdef __cplusplus
extern "C" {
#endif
int taylor_segment_state(const struct TaylorArgs*);     // sums of every segment: (k, v), or (q / den, grad_o) if reverse
int taylor_scan(const struct TaylorArgs*);              // segment sums -> state before (behind, if reverse) each
int taylor_output(const struct TaylorArgs*);            // o and denominator; dv if reverse, for head_dim > 64
int taylor_gradient(const struct TaylorArgs*);          // dq; dk, and dv for head_dim 64, if reverse
#ifdef __cplusplus
}
#endif
