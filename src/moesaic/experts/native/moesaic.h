// The native expert kernels behind a C ABI: plain pointers and sizes, no PyTorch headers.
//
// T tokens · D model width · F expert hidden width · G = 2F for a gated activation, else F · E experts · K slots per
// token N routed rows. The caller checks shapes and dtypes; nothing here reads past what is described.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define MOESAIC_API __declspec(dllexport)
#else
#define MOESAIC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// What the caller was built for; changed with every change of a struct or a meaning below.
#define MOESAIC_ABI 4

// Number formats. The last two are for weights only: symmetric integers, scaled per output (int8) or per group (int4).
enum { MOESAIC_F32 = 0, MOESAIC_BF16 = 1, MOESAIC_F16 = 2, MOESAIC_INT8 = 3, MOESAIC_INT4 = 4 };

enum {
  MOESAIC_SWIGLU = 0,
  MOESAIC_GEGLU = 1,
  MOESAIC_GEGLU_TANH = 2,
  MOESAIC_RELU = 3,
  MOESAIC_GELU = 4,
  MOESAIC_GELU_TANH = 5
};

// E matrices, each mapping `in` features to `out` features. Strides count elements (int4: bytes); for float formats one
// of out_stride and in_stride is 1, for integers in_stride is 1.
//
// int8: value = q * scale[e, o], with scale float32 [E, out].
// int4: value = (nibble - 8) * scale[e, o, i / group], with scale bfloat16 [E, out, P / group], P = in rounded up to
//   128, group 32 or 64. Each 128 inputs are 64 bytes, read as 32 little-endian 16-bit words: bits 4p..4p+3 of word i
//   hold input 32p + i of the 128. Inputs beyond `in` hold nibble 8 (zero).
typedef struct {
  const void* data;
  const void* scale;  // null for float formats
  const void* bias;   // [E, out] in the layer's dtype, contiguous, or null
  int64_t expert_stride;
  int64_t out_stride;
  int64_t in_stride;
  int32_t format;
  int32_t group;  // int4 only
} MoesaicMatrix;

// One call of an expert layer: y[t] = sum over the rows n of t of weight[n] * down(activation(up(x[t]))).
typedef struct {
  int64_t tokens, top_k, num_experts, d_model, d_ff, rows;
  int32_t dtype;          // of x, out, pre and biases: F32, BF16 or F16; accumulation is in float32
  int32_t weights_dtype;  // of the routing weights: F32, BF16 or F16
  int32_t activation;
  int32_t threads;
  const void* x;               // [T, D], the last dimension contiguous
  int64_t x_stride;            // elements from token to token
  const int64_t* permutation;  // [N] slot (t * K + k) of each row, rows grouped by expert; T * K for a padding row
  const int32_t* offsets;      // [E] the row that follows each expert's last one
  const void* weights;         // [T, K] contiguous
  MoesaicMatrix up;            // D -> G, the gate's F outputs first
  MoesaicMatrix down;          // F -> D
  void* out;                   // [T, D] contiguous
  void* pre;                   // [N, G] contiguous: receives what goes into the activation, for backward; or null
  int64_t row_invariant;       // 1: forward gives a token the same bits whatever other tokens there are, but slower
} MoesaicLayer;

// How a gate turns its logits into scores.
enum { MOESAIC_SOFTMAX = 0, MOESAIC_SIGMOID = 1 };

// A gate, and where the routes of a layer's tokens go: logits = weight x + bias; the K experts with the largest logits,
// or with the largest scores + selection; the weight of each is its score, or, with unit_scale, 1 + unit_scale *
// (2 score - 1). Computed in float32.
typedef struct {
  const void* weight;       // [E, D] contiguous, of the layer's dtype
  const void* bias;         // [E] of the layer's dtype, or null
  const float* selection;   // [E], or null
  const void* unit_scale;   // [E] of the layer's dtype, or null
  const uint8_t* mask;      // [T] 0 for a token that gets no expert: ids E, weights 0; or null
  int32_t kind;             // MOESAIC_SOFTMAX or MOESAIC_SIGMOID
  int32_t normalize;        // 1: a token's weights are divided by their sum + epsilon
  float epsilon, scale;     // scale: a factor on the weights, after that
  float* logits;            // [T, E]
  float* scores;            // [T, E]
  int64_t* expert_ids;      // [T, K]
  float* weights;           // [T, K]
  int64_t* counts;          // [E] rows per expert
} MoesaicGate;

// Where backward writes; a null pointer means that this gradient is not wanted. Weight gradients are contiguous in the
// memory order of the weight itself ([E, out, in] where in_stride is 1, else [E, in, out]) and of the layer's dtype.
typedef struct {
  const void* grad_out;  // [T, D] contiguous, of the layer's dtype
  void* x;               // [T, D] contiguous
  void* up;
  void* down;
  void* up_bias;    // [E, G]
  void* down_bias;  // [E, D]
  void* weights;    // [T, K] float32
} MoesaicGradients;

// Linear layers of one shape: out[t] = weight[g] x[t] + bias[g], where the rows of group g end before offsets[g]. Rows
// behind the last group's are left alone.
typedef struct {
  int64_t tokens, inputs, outputs, groups;
  int32_t dtype;  // of x, out and the bias: F32, BF16 or F16; accumulation is in float32
  int32_t threads;
  const void* x;      // [T, in], the last dimension contiguous
  int64_t x_stride;   // elements from token to token
  const int32_t* offsets;  // [groups]
  MoesaicMatrix weight;
  void* out;          // [T, out] contiguous
  int64_t row_invariant;
} MoesaicLinear;

// Keys in a page of a KV cache.
#define MOESAIC_PAGE 16

// Causal attention of new tokens over a paged KV cache: stores their keys and values, then attends. S sequences, H
// heads, of which H / kv_heads neighbours share keys. A row's result depends on its own sequence and position only, bit
// for bit, however the tokens of a sequence are spread over calls.
typedef struct {
  int64_t tokens, heads, kv_heads, key_width, value_width, sequences, table_width;
  int32_t dtype;  // of all but sinks: F32, BF16 or F16; computed in float32
  int32_t threads;
  const void* query;  // [T, H, key_width], keys [T, kv_heads, key_width], values [T, kv_heads, value_width]
  const void* keys;
  const void* values;
  int64_t query_strides[2], key_strides[2], value_strides[2];  // elements from token to token, from head to head
  const int64_t* slots;     // [T] where a token's key goes: page * MOESAIC_PAGE + place; negative: nowhere
  const int32_t* tables;    // [S, table_width] pages of each sequence in order
  const int32_t* starts;    // [S + 1] first new token of each sequence; the last entry is T
  const int32_t* contexts;  // [S] keys of each sequence, its new tokens' included
  const float* sinks;       // [H] a logit that takes part in the softmax without a value, or null
  void* key_pool;           // [pages, kv_heads, key_width, MOESAIC_PAGE]
  void* value_pool;         // [pages, kv_heads, MOESAIC_PAGE, value_width]
  void* out;                // [T, H, value_width] contiguous
  int64_t window;           // keys that a token sees, itself included; 0: all
  float scaling, softcap;   // logits are softcap * tanh(logits / softcap), unless it is 0
} MoesaicAttention;

// 0, or 1 where memory ran out.
MOESAIC_API int moesaic_forward(const MoesaicLayer* layer);
// The same for tokens whose routes are yet to be decided: permutation, offsets and weights of the layer are not read. For
// few tokens: the gate runs on one thread.
MOESAIC_API int moesaic_route_and_forward(const MoesaicGate* gate, const MoesaicLayer* layer);
// layer->pre must hold what forward wrote; layer->out is not used. Float formats only.
MOESAIC_API int moesaic_backward(const MoesaicLayer* layer, const MoesaicGradients* gradients);

MOESAIC_API int moesaic_linear(const MoesaicLinear* layer);
MOESAIC_API int moesaic_attend(const MoesaicAttention* attention);

MOESAIC_API int moesaic_abi(void);
// Names of the instruction-set variants that this CPU can run, the best first, separated by commas; of
// "avx512_bf16", "avx512", "avx2", "portable".
MOESAIC_API const char* moesaic_isas(void);
// The variant in use; choose_isa returns 0, or 1 for a name that is not in moesaic_isas().
MOESAIC_API const char* moesaic_isa(void);
MOESAIC_API int moesaic_choose_isa(const char* name);
// 1 where loops run on OpenMP threads, 0 where the library was built without.
MOESAIC_API int moesaic_has_openmp(void);

// Reads every byte once, front to back on each thread, and returns a checksum: the measure of streaming bandwidth.
MOESAIC_API uint64_t moesaic_read(const void* data, int64_t bytes, int32_t threads);
// Runs `steps` rounds of independent multiply-adds of the variant's best instruction for dtype (F32 or BF16) on values
// in registers on each thread; returns the number of floating-point operations done (a multiply-add counts two).
MOESAIC_API double moesaic_multiply_adds(int32_t dtype, int64_t steps, int32_t threads);

#ifdef __cplusplus
}
#endif
