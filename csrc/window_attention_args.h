// What the sliding-window attention's launchers receive. Plain C: shared by the kernels and the binding.
#pragma once
#include <stdint.h>

struct WindowAttentionArgs {
    // Strides in elements, multiples of 8; the last dimension is contiguous and begins on 16 bytes.
    const void* qkv;             // bf16 [seq, batch, heads, 3, head_dim]: q | k | v as the projection leaves them
    const void* rotation;        // fp16 [seq, head_dim / 2, 2]: cos and sin of each position's angles
    const int* cu_seqlens;       // [docs + 1] with batch 1, or null: one document a batch entry
    void* o;                     // bf16 [seq, batch, heads, head_dim], contiguous
    float* lse;                  // [batch, heads, seq]: log2 of the sum of 2^(score * log2 e)
    const void* grad_o;          // bf16 [seq, batch, heads, head_dim]
    void* dqkv;                  // bf16 [seq, batch, heads, 3, head_dim], contiguous
    int64_t stride[4], grad_stride[3];
    int seq, batch, heads, head_dim, window, docs;
    float scale;
    void* stream;
};

#ifdef __cplusplus
extern "C" {
#endif
int window_attention_forward(const struct WindowAttentionArgs*);
int window_attention_backward(const struct WindowAttentionArgs*);
#ifdef __cplusplus
}
#endif
