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
  float cap_in, cap_log2;  // from raw to the argument of tanh; softcap in log2 units
  float slope_log2;
  int offset;
  Plane bias;
};

constexpr int kBiasBytes = kSpec.bias_dtype == DType::kF32 ? 4 : 2;

JF_DEVICE Score score_of(const Problem& p, const Features& f, int b, int head) {
  Score score{};
  score.scale_log2 = p.scale * kLog2E;
  score.unit = kPlainScores ? score.scale_log2 : 1.f;
  if constexpr (kSpec.softcap) {
    score.cap_in = p.scale / p.softcap;
    score.cap_log2 = p.softcap * kLog2E;
  }
  if constexpr (kSpec.alibi) {
    score.slope_log2 = row_of<float>(f.alibi_slopes, b, p.q_heads)[head] * kLog2E;
    score.offset = q_offset_of(f, b);
  }
  if constexpr (kSpec.bias()) score.bias = plane_of<kBiasBytes>(p, f.bias, b, head);
  return score;
}

// By the exact identity 1 - 2 / (1 + e^2y): absolute error near 1e-7, where tanh.approx has 5e-4.
JF_DEVICE float tanh_exact(float y) { return 1.f - 2.f * reciprocal(1.f + exp2_fast(2.f * kLog2E * y)); }

// For |y| <= kNearZero, relative error under 6e-7, on the FMA units alone.
constexpr float kNearZero = 0.75f;
JF_DEVICE float tanh_near(float y) {
  const float u = y * y;
  return y *
         fmaf(fmaf(fmaf(fmaf(0.0129296316f, u, -0.0500563018f), u, 0.132589832f), u, -0.333282515f), u, 0.999999435f);
}

template <bool kNear, bool kDerivative, int N, int M>
JF_DEVICE void cap_all(float (&s)[N], float (&derivative)[M], const Score& score) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float y = s[i] * score.cap_in, t = kNear ? tanh_near(y) : tanh_exact(y);
    if constexpr (kDerivative) derivative[i] = fmaf(-t, t, 1.f);
    s[i] = t * score.cap_log2;
  }
}

// Most tiles have no score near the cap: then nothing waits for the special-function units.
template <bool kDerivative, int N, int M>
JF_DEVICE void cap_scores(float (&s)[N], float (&derivative)[M], const Score& score) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) largest = fmaxf(largest, fabsf(s[i]));
  if (__any_sync(~0u, largest * score.cap_in > kNearZero)) {
    cap_all<false, kDerivative>(s, derivative, score);
  } else {
    cap_all<true, kDerivative>(s, derivative, score);
  }
}

// A softcap as part of the softmax (softmax.cuh), where nothing is added to the capped scores: the exponents of raw
// scores by three FMAs and a product each, unless one of those that a warp looks at together is far from zero. The same
// look serves the softmax's limit, as no logit is farther from zero than without the cap. -inf is a hidden pair.
template <int kScoresAtOnce>
struct CappedLogits {
  static constexpr float kThreshold = 8.f;  // lower, and low() would often not know
  static constexpr int kAtOnce = kScoresAtOnce;
  static constexpr bool kHasLow = true;
  static constexpr float kNear = 0.25f;  // of the cap: the relative error of a logit is under 5e-7
  const Problem& problem;
  float linear, cubic, quintic;

  explicit JF_DEVICE CappedLogits(const Problem& p) : problem(p) {
    const float cap_in = p.scale / p.softcap, square = cap_in * cap_in;
    linear = 0.999999604f * kLog2E * p.scale;
    cubic = per_lane(-0.333219082f * kLog2E * p.scale * square);
    quintic = 0.128416129f * kLog2E * p.scale * square * square;
  }

  JF_DEVICE int limit(const float (&)[2]) const { return __float_as_int(kThreshold); }
  // Of squares of raw scores; negative: all are higher.
  JF_DEVICE float bound(const float (&top)[2]) const {
    const float logit = fminf(kNear * afresh(problem.softcap), (fminf(top[0], top[1]) + kThreshold) * kLn2);
    const float score = logit * reciprocal(problem.scale);
    return score * fabsf(score);
  }

  JF_DEVICE float near(float score, float square, float top) const {
    return fmaf(score, fmaf(fmaf(quintic, square, cubic), square, linear), -top);
  }
  struct Far {
    float cap_in, cap_log2;

    // No registers wait for this: few scores are far.
    explicit JF_DEVICE Far(const Problem& problem) {
      const float softcap = afresh(problem.softcap);
      cap_in = problem.scale * reciprocal(softcap);
      cap_log2 = softcap * kLog2E;
    }
    JF_DEVICE bool is_near(float score) const { return fabsf(score * cap_in) <= kNear; }
    JF_DEVICE float operator()(float score, float top) const {
      return score == -infinity() ? score : fmaf(tanh_exact(score * cap_in), cap_log2, -top);
    }
  };
  JF_DEVICE float logit(float score) const {
    const Far far(problem);
    return far.is_near(score) ? near(score, score * score, 0.f) : far(score, 0.f);
  }

  // Makes exponents of the scores if all of the warp are near and none can be high. Returns whether they are.
  template <int kBegin, int kEnd, int N>
  JF_DEVICE bool low(float (&s)[N], const float (&top)[2], float bound) const {
    float exponent[kEnd - kBegin];
    int largest = 0;  // square, or NaN, as integers of the same bits
#pragma unroll
    for (int i = kBegin; i < kEnd; i += 2) {
      const float square[2] = {s[i] * s[i], s[i + 1] * s[i + 1]};
      largest = __vimax3_s32(largest, __float_as_int(square[0]), __float_as_int(square[1]));
#pragma unroll
      for (int c = 0; c < 2; c++) exponent[i + c - kBegin] = near(s[i + c], square[c], top[fragment_row(i)]);
    }
    if (__any_sync(~0u, largest > __float_as_int(bound))) return false;
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) s[i] = exponent[i - kBegin];
    return true;
  }
  // The same of any scores.
  template <int kBegin, int kEnd, int N>
  JF_DEVICE void exponents(float (&s)[N], const float (&top)[2]) const {
    const Far far(problem);
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) {
      const float row_top = top[fragment_row(i)];
      s[i] = far.is_near(s[i]) ? near(s[i], s[i] * s[i], row_top) : far(s[i], row_top);
    }
  }
};

JF_DEVICE float bias_value(unsigned short bits) { return to_float<kSpec.bias_dtype>(bits); }
JF_DEVICE float bias_value(u32 bits) { return __int_as_float(bits); }

// Two values of the bias to registers i and i + 1.
template <int N>
JF_DEVICE void add_bias(float (&s)[N], int i, typename Words<kBiasBytes>::Two two) {
#pragma unroll
  for (int c = 0; c < 2; c++) s[i + c] = fmaf(bias_value(Words<kBiasBytes>::part(two, c)), kLog2E, s[i + c]);
}

// Raw products become logits in log2 units, but for the bias; d(logit) / d(scale * raw) goes to `derivative` if there
// is a softcap (else it is 1).
template <bool kDerivative, bool kTransposed, int N, int M>
JF_DEVICE void transform_unbiased(float (&s)[N], float (&derivative)[M], const Fragment<kTransposed>& at,
                                  const Score& score) {
  static_assert(!(kDerivative && kSpec.softcap) || N == M, "one derivative a score");
  if constexpr (kSpec.softcap) cap_scores<kDerivative>(s, derivative, score);
#pragma unroll
  for (int i = 0; i < N; i++) {
    if constexpr (!kSpec.softcap && !kPlainScores) s[i] *= score.scale_log2;
    if constexpr (kSpec.alibi) {
      const int distance = at.query(i) + score.offset - at.key(i);
      s[i] = fmaf(-score.slope_log2, fabsf(static_cast<float>(distance)), s[i]);
    }
  }
}

template <bool kDerivative, bool kTransposed, int N, int M>
JF_DEVICE void transform_scores(float (&s)[N], float (&derivative)[M], const Fragment<kTransposed>& at,
                                const Score& score) {
  transform_unbiased<kDerivative>(s, derivative, at, score);
  if constexpr (kSpec.bias()) {
    for_each_pair<kBiasBytes, N>(score.bias, at, [&](int i, Words<kBiasBytes>::Two two) { add_bias(s, i, two); });
  }
}

template <bool kTransposed, int N>
JF_DEVICE void transform_scores(float (&s)[N], const Fragment<kTransposed>& at, const Score& score) {
  float none[1];
  transform_scores<false>(s, none, at, score);
}

}  // namespace jf
