// Launchers of the generation kernels: one new token of every row, on states that live in slots of fixed size.
//
// slots [rows]: the slot of each row, or -1 for a row without a sequence, whose states and outputs are left alone.
// Activations are bf16 and contiguous; `residual` is bf16, or fp32 where fp32_residual. Every launcher returns a CUDA error.
// Weights of norms are in the weights of the products after them (W diag(norm)). A product may also be made of the residual stream
// as it is: what takes its result x then takes `residual` [rows, d_model] bf16 and eps too, and multiplies the rows of x by
// 1 / rms(residual) first; x is a product of normalised rows where `residual` is null.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
// residual[row] = table[tokens[slot] - first], or 0 outside this rank's `count` rows of the table; and the row's rotation
// [2, half], cos and sin of positions[slot] * frequency.
int decode_embed(const int* tokens, const int* positions, const int* slots, const void* table, void* residual, int fp32_residual,
                 int rows, int width, int first, int count, const float* frequency, float* rotation, int half, void* stream);
// residual += out + bias (where given); y = residual / rms(residual). Any number of rows.
int decode_add_norm(void* residual, int fp32_residual, const void* out, const void* bias, void* y, float eps, int rows, int width,
                    void* stream);
// y[:, i] = silu(x[:, i]) * x[:, width + i], x [rows, 2 width]. Any number of rows.
int decode_swiglu(const void* x, void* y, int rows, int width, const void* residual, int d_model, float eps, void* stream);
// y = x W^T for at most 16 rows, W [columns, inner]. norm: x is the residual stream, normalised on the way. kind 1: W is
// [gate; value] and y [rows, columns / 2]; kind 2: W is the input of a convolution of `tap_count` taps, bias [columns], and y is its
// step; kind 0: with add_to, y + bias goes there (residual dtype) and y is null.
int decode_linear(const void* x, const void* weight, void* y, int kind, int norm, float eps, void* add_to,
                  const void* bias, int fp32_residual, const void* taps, int tap_count, const int* slots, void* carry, int rows,
                  int columns, int inner, void* stream);
// y = x W^T for few rows and what follows, see decode_product.cu: kind 0 plain, 1 swiglu, 2 conv, 3 add; y [rows, width].
// splits: 1, 2, 4 or 8 parts of the inner dimension. squares [parts, rows] or null; next_squares [width / 64 rounded up, rows].
int decode_product(const void* x, const void* weight, void* y, int kind, int rows, int width, int inner, int splits,
                   const float* squares, int parts, float eps, void* residual, int fp32_residual, const void* bias,
                   float* next_squares, const void* taps, int tap_count, const int* slots, void* carry, void* stream);
// Gated convolution, x [rows, 2 channels] without its bias [2 channels], carry [slots, taps - 1, channels] shifts in place. With
// `residual` also residual += out_bias [d_model].
int decode_conv(const void* x, const void* bias, const void* weight, const int* slots, void* carry, void* y, int rows, int channels,
                int taps, const void* out_bias, void* residual, int d_model, float eps, void* stream);
// Taylor linear attention, x [rows, heads, (q | k | v)], kv [slots, heads, D, head_dim] and z [slots, heads, D] fp32, recent bf16
// [slots, heads, 16, (k | v)], all in place; decay [heads]: factor a token, or null. kv and z have what came before token
// `starts` and all but the last few tokens (positions is the current one's) since; those lie in recent.
int decode_taylor(const void* x, const int* slots, const int* positions, const int* starts, float* kv, float* z, void* recent,
                  const float* decay, void* o, int rows, int heads, int features, int head_dim, float scale, const void* residual,
                  int d_model, float eps, void* stream);
// Softmax attention, x [rows, heads, (q | k | v)], over rings keys, values [slots, heads, capacity, padded] of rotated keys.
// partial: [rows, heads, splits, padded + 2] fp32 work space where splits > 1.
int decode_attention(const void* x, const int* slots, const int* positions, const float* rotation, void* keys, void* values,
                     float* partial, void* o, int rows, int heads, int head_dim, int padded, int half, int capacity, int splits,
                     float scale, const void* residual, int d_model, float eps, void* stream);
// Packed q, k (rotated), v [tokens, heads, padded] from x [tokens, heads, (q | k | v)] and rotation [tokens, 2, half]; q is
// multiplied by q_factor.
int prefill_rope(const void* x, const float* rotation, void* q, void* k, void* v, int64_t tokens, int heads, int head_dim, int padded,
                 int half, float q_factor, void* stream);
// The next token of every row from logits [rows, stride] (the first `vocab` count), see decode_sample.cu; tokens and
// positions are per slot, positions advance by `advance`. chosen and logprobs [slots, kept] are for the host, column position % kept.
int decode_sample(const void* logits, const int* slots, int* tokens, int* positions, const float* temperature, const int* top_k,
                  const float* top_p, const int64_t* seeds, int* chosen, float* logprobs, int kept, int rows, int64_t stride,
                  int vocab, int advance, void* stream);
#ifdef __cplusplus
}
#endif
