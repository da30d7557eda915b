// What one attention call is, for the planner on the host and for the kernels alike: no includes, plain structs, C++17.
//
//   Spec      what a kernel is compiled for: variant.h, made for each variant, holds it as `constexpr jf::Spec kSpec`.
//   Problem   sizes and numbers of one call: a run-time argument.
//   Features  pointers to the operands beside query, key and value: a run-time argument.
//
// Names match jax_flash/spec.py. All arrays are dense:
//   query, out [B, T, N, H], key [B, S, K, H], value [B, S, K, Hv], lse [B, N, T].
#pragma once

#ifdef __CUDACC__
#define JF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JF_HOST_DEVICE inline
#endif

namespace jf {

enum class DType : int { kNone, kF16, kBF16, kF32, kE4M3, kInt8 };

// What a kernel is compiled for. A feature that is absent costs nothing.
struct Spec {
  DType dtype;              // of query, key, value and out
  DType bias_dtype;         // kNone: no bias
  int head_dim, value_dim;  // multiples of 8, at most 256
  bool causal;              // keys at positions <= i + q_offset
  bool window_left, window_right;
  bool q_offset;
  bool segment_ids;
  bool q_lengths, kv_lengths;
  bool mask;
  bool alibi;
  bool softcap;
  bool sinks;
  bool dropout;
  bool grouped;        // fewer key heads than query heads
  bool lse_cotangent;  // backward: the lse has a cotangent
  bool deterministic;  // backward: same bits from run to run
  constexpr JF_HOST_DEVICE bool bias() const { return bias_dtype != DType::kNone; }
};

// An operand may have fewer batch entries than the call (some leading axes broadcast): entry b of the call reads entry
// (b / div) % mod.
struct BatchMap {
  int div, mod;
  JF_HOST_DEVICE int operator()(int b) const { return (b / div) % mod; }
};

struct Problem {
  int batch, q_heads, kv_heads, q_len, kv_len;
  int window_left, window_right;  // read only if the spec has them
  float scale;                    // of the raw scores
  float softcap;
  unsigned dropout_threshold;  // a pair is kept if its 16 random bits are < this, of 65536
  float dropout_scale;         // 65536 / dropout_threshold: what a kept probability is multiplied by
  BatchMap q_batch, k_batch, v_batch;
};

// An array of one row per batch entry.
struct Rows {
  const void* data;
  BatchMap batch;
};

// mask and bias: [*B, N, T, S], stride 0 on a broadcast axis. Strides count elements.
struct Dense {
  const void* data;
  BatchMap batch;
  long long batch_stride, head_stride, q_stride, k_stride;
};

struct Features {
  Rows q_offset;               // int [B]
  Rows q_segment_ids;          // int [B, T]
  Rows kv_segment_ids;         // int [B, S]
  Rows q_lengths, kv_lengths;  // int [B]
  Dense mask;                  // unsigned char, 0 or 1
  Dense bias;                  // spec.bias_dtype
  Rows alibi_slopes;           // float [B, N]
  const float* sinks;          // float [N]
  Rows dropout_seed;           // unsigned [B, 2]
  Rows dropout_batch;          // int [B]
  const int* dropout_head;     // int [N]
};

}  // namespace jf
