// Online softmax over the key tiles of a query tile, on accumulator fragments whose rows are queries.
//
//   p[j] = 2^(unit * s[j] - unit * m),  m the running row maximum of s (as the scores come: unscaled), sum += p
//
// With kSkip the maximum is left behind until it grew by more than 2^8: p stays below 2^8, which fp32 sums, f16 and
// bf16 hold, and the final division makes it exact. The output must be multiplied by `rescale` whenever it is not 1. A
// row that has seen no key keeps m = -inf and sum 0; -inf scores contribute exactly 0.
#pragma once
#include "pieces/fragment.cuh"

namespace jf {

// Of every 16 exponentials, kSoftware run on the FMA units, spread evenly.
template <int kSoftware>
JF_DEVICE float exp2_shared(float x, int i) {
  return (i * kSoftware) % 16 < kSoftware ? exp2_software(x) : exp2_fast(x);
}

template <bool kSkip, int kSoftware = 0>
struct OnlineSoftmax {
  static constexpr float kSkipThreshold = 8.f;
  float maximum[2];
  float sum[2];  // of this thread's columns only, until finish()

  JF_DEVICE void reset() {
#pragma unroll
    for (int r = 0; r < 2; r++) maximum[r] = -infinity(), sum[r] = 0.f;
  }

  // Scores become probabilities in place. kFirst: nothing was accumulated yet, rescale is 1.
  template <bool kFirst, int N>
  JF_DEVICE void step(float (&s)[N], float (&rescale)[2], float unit) {
    float highest[2] = {kFirst ? -infinity() : maximum[0], kFirst ? -infinity() : maximum[1]};
#pragma unroll
    for (int i = 0; i < N; i++) highest[fragment_row(i)] = fmaxf(highest[fragment_row(i)], s[i]);
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      highest[r] = row_maximum(highest[r]);
      if (kSkip && !kFirst && (highest[r] - maximum[r]) * unit <= kSkipThreshold) highest[r] = maximum[r];
      const bool none = highest[r] == -infinity();  // -inf - -inf would be NaN
      shift[r] = none ? 0.f : highest[r] * unit;
      rescale[r] = kFirst || none ? 1.f : exp2_fast(maximum[r] * unit - shift[r]);
      maximum[r] = highest[r];
      sum[r] = kFirst ? 0.f : sum[r] * rescale[r];
    }
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = exp2_shared<kSoftware>(fmaf(s[i], unit, -shift[fragment_row(i)]), i);
#pragma unroll
    for (int i = 0; i < N; i++) sum[fragment_row(i)] += s[i];
  }

  // The factor that normalises the output of row r, and the row's natural lse. `sink` (natural units) joins the
  // denominator of a row that saw a key; a row that saw none gives 0 and -inf.
  template <bool kSink>
  JF_DEVICE float finish(int r, float unit, float sink, float& lse) const {
    const float total = row_sum(sum[r]);
    if (maximum[r] == -infinity()) {
      lse = -infinity();
      return 0.f;
    }
    const float top = maximum[r] * unit;
    if constexpr (!kSink) {
      lse = (top + log2_fast(total)) * kLn2;
      return 1.f / total;
    }
    const float sink_log2 = sink * kLog2E, high = fmaxf(top, sink_log2);
    const float keys = exp2_fast(top - high), all = fmaf(total, keys, exp2_fast(sink_log2 - high));
    lse = (high + log2_fast(all)) * kLn2;
    return keys / all;
  }
};

}  // namespace jf
