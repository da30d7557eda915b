// Online softmax over the key tiles of a query tile, on accumulator fragments whose rows are queries.
//
//   p[j] = 2^(logit(s[j]) - top),  top near the running row maximum of the logits,  sum += p
//
// The logits, in log2 units, are a product with a number (Linear), or whatever else rises with the score and has the
// same members (CappedLogits in score.cuh).
//
// The top of a row is the maximum of the first tile in which it sees a key, and is left behind until a score exceeds it
// by more than a threshold: p stays below 2^8, which fp32 sums, f16 and bf16 hold, and the final division makes it
// exact. Whether one does is found without the rows' maxima: exponents above zero are ordered as the integers of the
// same bits, and a maximum of three integers is one instruction (on Hopper). A row that has seen no key has sum 0; -inf
// scores contribute exactly 0.
#pragma once
#include "pieces/fragment.cuh"

namespace jf {

struct Linear {
  // Where one key outweighs all others, its p is best 1, which 16 bits hold exactly: the top must not lag far behind.
  // Scores that are N(0, 1) pass 4 hardly ever, 3 in a hundredth of the steps.
  static constexpr float kThreshold = 4.f;
  static constexpr int kAtOnce = 256;     // scores that a call is for, at most
  static constexpr bool kHasLow = false;  // whether scores may tell that no exponent is high (CappedLogits::low)
  float unit;

  JF_DEVICE float logit(float score) const { return score * unit; }
  // Bits of the exponent above which a row's top rises, by the sums of this thread's columns.
  JF_DEVICE int limit(const float (&)[2]) const { return __float_as_int(kThreshold); }
  // What low() needs to tell that no exponent is higher than the threshold.
  JF_DEVICE float bound(const float (&)[2]) const { return 0.f; }
  // Scores kBegin to kEnd become logits less their row's top.
  template <int kBegin, int kEnd, int N>
  JF_DEVICE void exponents(float (&s)[N], const float (&top)[2]) const {
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) s[i] = fmaf(s[i], unit, -top[fragment_row(i)]);
  }
};

// For many keys, among which tops rise often: a key's p is to be exact where it counts, which is where the key has more
// than a share of its row. That takes no maxima, hardly a rise where scores are N(0, 1), and has nearly the errors of
// tops that are maxima (docs/performance.md). Not for fewer keys: the first sums are small, and the tops follow.
struct CloseLinear : Linear {
  static constexpr float kShare = 0.25f, kLeast = 0.5f, kMost = 8.f;

  JF_DEVICE int limit(const float (&sum)[2]) const {
    const float quarter = fminf(sum[0], sum[1]);  // four threads share a row, about evenly
    // A float's bits are its logarithm, to 0.09.
    const float log2_share = (__float_as_int(quarter) - __float_as_int(0.25f / kShare)) * 0x1p-23f;
    return __float_as_int(fminf(fmaxf(log2_share, kLeast), kMost));
  }
};

// kStartsEmpty: a row may see no key of the first tile.
template <bool kStartsEmpty>
struct OnlineSoftmax {
  float top[2];
  float bound;      // by the tops and the threshold
  int limit;        // bits of the exponent above which a top rises
  float sum[2];     // of this thread's columns only, until finish()
  int some_unseen;  // of the rows of the warp

  JF_DEVICE void reset() {
    top[0] = top[1] = sum[0] = sum[1] = 0.f;
    some_unseen = 1;
  }

  // Scores become probabilities in place. Returns whether the output must be multiplied by `rescale`. kFirst: nothing
  // was accumulated yet.
  template <bool kFirst, class Logits, int N>
  JF_DEVICE bool step(float (&s)[N], float (&rescale)[2], const Logits& logits) {
    if constexpr (kFirst) reset();
    if (kFirst || (kStartsEmpty && some_unseen)) begin<kFirst>(s, logits);
    rescale[0] = rescale[1] = 1.f;
    const int done = low_parts<0>(s, logits);
    const bool grown = done < N && parts<kFirst, 0>(s, rescale, logits, done);
    limit = logits.limit(sum);  // here, under the products, not where the next step waits for it
    return grown;
  }

  // The factor that normalises the output of row r, and the row's natural lse. `sink` (natural units) joins the
  // denominator of a row that saw a key; a row that saw none gives 0 and -inf.
  template <bool kSink>
  JF_DEVICE float finish(int r, float sink, float& lse) const {
    const float total = row_sum(sum[r]);
    if (total == 0.f) {
      lse = -infinity();
      return 0.f;
    }
    if constexpr (!kSink) {
      lse = (top[r] + log2_fast(total)) * kLn2;
      return 1.f / total;
    }
    const float sink_log2 = sink * kLog2E, high = fmaxf(top[r], sink_log2);
    const float keys = exp2_fast(top[r] - high), all = fmaf(total, keys, exp2_fast(sink_log2 - high));
    lse = (high + log2_fast(all)) * kLn2;
    return keys / all;
  }

 private:
  template <int kBegin, int kEnd, int N>
  static JF_DEVICE void row_maxima(const float (&s)[N], float (&highest)[2]) {
    highest[0] = highest[1] = -infinity();
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) highest[fragment_row(i)] = fmaxf(highest[fragment_row(i)], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) highest[r] = row_maximum(highest[r]);
  }

  // The tops of the rows that have seen no key.
  template <bool kFirst, class Logits, int N>
  JF_DEVICE void begin(const float (&s)[N], const Logits& logits) {
    float highest[2];
    row_maxima<0, N>(s, highest);
    bool unseen = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!kFirst && row_sum(sum[r]) != 0.f) continue;
      const bool none = highest[r] == -infinity();
      top[r] = none ? 0.f : logits.logit(highest[r]);
      unseen |= none;
    }
    bound = logits.bound(top);
    if constexpr (kStartsEmpty) some_unseen = __any_sync(~0u, unseen);
  }

  template <int kBegin, class Logits, int N>
  static constexpr JF_HOST_DEVICE int part_end() {
    constexpr int kLead = Logits::kAtOnce < 16 ? Logits::kAtOnce : 16, kCount = kBegin == 0 ? kLead : Logits::kAtOnce;
    return kBegin + kCount < N ? kBegin + kCount : N;
  }

  // `step` of the scores from kBegin on, in parts, for as long as the scores tell that no top must rise. Returns where
  // that ended. It stands apart from parts() so that the code of most steps is one piece, without jumps.
  template <int kBegin, class Logits, int N>
  JF_DEVICE int low_parts(float (&s)[N], const Logits& logits) {
    constexpr int kEnd = part_end<kBegin, Logits, N>();
    if constexpr (!Logits::kHasLow) {
      return kBegin;
    } else {
      if (!logits.template low<kBegin, kEnd>(s, top, bound)) return kBegin;
      exponentials<kBegin, kEnd>(s);
      if constexpr (kEnd < N) return low_parts<kEnd>(s, logits);
      return N;
    }
  }

  // `step` of the scores from kBegin on, in parts: the exponentials of one run under the search of the next. Those
  // before `done` are probabilities.
  template <bool kFirst, int kBegin, class Logits, int N>
  JF_DEVICE bool parts(float (&s)[N], float (&rescale)[2], const Logits& logits, int done) {
    constexpr int kEnd = part_end<kBegin, Logits, N>();
    bool grown = false;
    if (kBegin >= done) grown = part<kFirst, kBegin, kEnd>(s, rescale, logits);
    if constexpr (kEnd == N) {
      return grown;
    } else {
      const bool later = parts<kFirst, kEnd>(s, rescale, logits, done);
      return grown || later;
    }
  }

  // `step` of scores kBegin to kEnd; those before are probabilities.
  template <bool kFirst, int kBegin, int kEnd, class Logits, int N>
  JF_DEVICE bool part(float (&s)[N], float (&rescale)[2], const Logits& logits) {
    logits.template exponents<kBegin, kEnd>(s, top);
    bool grown = false;
    if constexpr (!kFirst) {
      grown = __any_sync(~0u, highest_bits<kBegin, kEnd>(s) > limit);
      if (grown) raise<kBegin, kEnd>(s, rescale, logits);
    }
    exponentials<kBegin, kEnd>(s);
    return grown;
  }

  template <int kBegin, int kEnd, int N>
  JF_DEVICE void exponentials(float (&s)[N]) {
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) s[i] = exp2_fast(s[i]);
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) sum[fragment_row(i)] += s[i];
  }

  // Of exponents: the highest, or anything below zero.
  template <int kBegin, int kEnd, int N>
  static JF_DEVICE int highest_bits(const float (&x)[N]) {
    constexpr int kChains = 3;
    int highest[kChains] = {};
#pragma unroll
    for (int i = kBegin; i < kEnd; i += 2) {
      int& chain = highest[i / 2 % kChains];
      chain = __vimax3_s32(chain, __float_as_int(x[i]), __float_as_int(x[i + 1]));
    }
    return __vimax3_s32(highest[0], highest[1], highest[2]);
  }

  // The tops rise to the highest exponents.
  template <int kBegin, int kEnd, class Logits, int N>
  JF_DEVICE void raise(float (&s)[N], float (&rescale)[2], const Logits& logits) {
    float by[2], factor[2];
    row_maxima<kBegin, kEnd>(s, by);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      by[r] = fmaxf(by[r], 0.f);
      factor[r] = exp2_fast(-by[r]);
      top[r] += by[r];
      sum[r] *= factor[r];
      rescale[r] *= factor[r];
    }
    bound = logits.bound(top);
#pragma unroll
    for (int i = 0; i < kBegin; i++) s[i] *= factor[fragment_row(i)];
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) s[i] -= by[fragment_row(i)];
  }
};

}  // namespace jf
