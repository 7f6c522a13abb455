// What the gated convolution's launchers receive. Plain C: shared by the kernels and the binding.
#pragma once
#include <stdint.h>

struct GatedConvArgs {
    // T is bf16, fp16 or fp32 (dtype 0, 1, 2). Contiguous; C channels, a multiple of 8; rows are t * batch + b.
    const void* x;               // T [seq, batch, 2 C]: u1 | u2, without the bias
    const void* weight;          // T [C, 3], the last tap on the own position
    const void* bias;            // T [2 C] or null
    const int* cu_seqlens;       // [docs + 1] with batch 1, or null: one document a batch entry
    const void* carry;           // T [docs or batch, 2, C]: u1 + bias before the first token, or null (zeros)
    void* carry_out;             // the same after the last token, or null; documents without tokens are left alone
    void* y;                     // T [seq, batch, C]
    const void* dy;              // T [seq, batch, C]
    void* dx;                    // T [seq, batch, 2 C]
    float* partial;              // [parts, 5, C]: sums of dw (3 taps) and of du1, du2 over each strip of tokens
    float *dweight, *dbias;      // [C, 3], [2 C] or null; the gradients are added to what is there
    int seq, batch, channels, docs, dtype;
    void* stream;
};

#ifdef __cplusplus
extern "C" {
#endif
int gated_conv_forward(const struct GatedConvArgs*);
int gated_conv_backward(const struct GatedConvArgs*);   // partial holds ceil(seq / 128) * batch parts
#ifdef __cplusplus
}
#endif
