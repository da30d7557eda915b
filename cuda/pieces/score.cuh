// From the raw product x = q . k to the logit, and back for its derivative.
//
//   logit(x) = cap(scale * x) - slope * |i + q_offset - j| + bias[i, j],     cap(y) = softcap * tanh(y / softcap)
//
// Everything is kept in log2 units (times log2 e), so that the probability is one exp2. Without softcap, ALiBi and bias
// the scores stay raw and the softmax multiplies by `unit` inside the exponent's FMA; else transform() applies all of
// it and unit is 1.
#pragma once
#include "pieces/mask.cuh"

namespace jf {

constexpr bool kPlainScores = !kSpec.softcap && !kSpec.alibi && !kSpec.bias();

// What the logits of one (batch entry, head) need.
struct Score {
  float unit;  // from what the softmax reads to log2 units
  float scale_log2;
  float cap_in, cap_log2;  // tanh argument: raw * cap_in * 2 log2 e; softcap in log2 units
  float slope_log2;
  int offset;
  const void* bias;  // first element of this batch entry and head
  long long q_stride, k_stride;
  int q_len, kv_len;  // no bias is read past these
};

JF_DEVICE Score score_of(const Problem& p, const Features& f, int b, int head) {
  Score score{};
  score.scale_log2 = p.scale * kLog2E;
  score.unit = kPlainScores ? score.scale_log2 : 1.f;
  if constexpr (kSpec.softcap) {
    score.cap_in = 2.f * kLog2E * p.scale / p.softcap;
    score.cap_log2 = p.softcap * kLog2E;
  }
  if constexpr (kSpec.alibi) {
    score.slope_log2 = row_of<float>(f.alibi_slopes, b, p.q_heads)[head] * kLog2E;
    score.offset = q_offset_of(f, b);
  }
  if constexpr (kSpec.bias()) {
    constexpr int kBytes = kSpec.bias_dtype == DType::kF32 ? 4 : 2;
    score.bias = static_cast<const char*>(f.bias.data) + dense_offset(f.bias, b, head) * kBytes;
    score.q_stride = f.bias.q_stride;
    score.k_stride = f.bias.k_stride;
    score.q_len = p.q_len;
    score.kv_len = p.kv_len;
  }
  return score;
}

// tanh by the exact identity 1 - 2 / (1 + e^2y): absolute error near 1e-7, where tanh.approx has 5e-4.
JF_DEVICE float tanh_from(float two_y_log2) { return 1.f - 2.f * reciprocal(1.f + exp2_fast(two_y_log2)); }

// Raw products become logits in log2 units; d(logit) / d(scale * raw) goes to `derivative` if there is a softcap (else
// it is 1).
template <bool kDerivative, bool kTransposed, int N, int M>
JF_DEVICE void transform_scores(float (&s)[N], float (&derivative)[M], const Fragment<kTransposed>& at,
                                const Score& score) {
  static_assert(!(kDerivative && kSpec.softcap) || N == M, "one derivative a score");
  if constexpr (!kPlainScores) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if constexpr (kSpec.softcap) {
        const float t = tanh_from(s[i] * score.cap_in);
        if constexpr (kDerivative) derivative[i] = fmaf(-t, t, 1.f);
        s[i] = t * score.cap_log2;
      } else {
        s[i] *= score.scale_log2;
      }
      if constexpr (kSpec.alibi) {
        const int distance = at.query(i) + score.offset - at.key(i);
        s[i] = fmaf(-score.slope_log2, fabsf(static_cast<float>(distance)), s[i]);
      }
      if constexpr (kSpec.bias()) {
        const int q = min(at.query(i), score.q_len - 1), k = min(at.key(i), score.kv_len - 1);
        s[i] = fmaf(load_float<kSpec.bias_dtype>(score.bias, q * score.q_stride + k * score.k_stride), kLog2E, s[i]);
      }
    }
  }
}

template <bool kTransposed, int N>
JF_DEVICE void transform_scores(float (&s)[N], const Fragment<kTransposed>& at, const Score& score) {
  float none[1];
  transform_scores<false>(s, none, at, score);
}

}  // namespace jf
