// From the products of a score tile to its probabilities and score gradients: what every backward kernel does in
// registers.
#pragma once
#include "pieces/dropout.cuh"
#include "pieces/score.cuh"
#include "support/segments.h"

namespace jf {

// Of all rows, [batch, q_heads, padded_len], from support/delta.cuh.
struct RowStatistics {
  const float *lse_log2, *delta;
};

// One (batch entry, head) of a call.
struct GradientHead {
  int batch, head;
  CallBand band;
  Score score;
  Dropout dropout;
  RowStatistics rows;
  long long first_row;  // of the head, among all rows
};

JF_DEVICE GradientHead gradient_head(const Problem& p, const Features& f, const CallBand& band, RowStatistics rows,
                                     int padded_len, int b, int head) {
  const long long first = (static_cast<long long>(b) * p.q_heads + head) * padded_len;
  GradientHead h{b, head, band, score_of(p, f, b, head), {}, rows, first};
  if constexpr (kSpec.dropout) h.dropout = dropout_of(p, f, b, head);
  return h;
}

// s: raw products q . k, dp: dout . v. They become
//   s   the probabilities that met the values: 0 where dropped, not yet multiplied by the dropout scale
//   dp  d(loss) / d(logit); with kOfProduct times the softcap's derivative, which leaves d(loss) / d(scale * raw
//   product)
// `interior`: no pair of the tile is hidden by band or segments.
template <bool kOfProduct, int N>
JF_DEVICE void score_gradients(float (&s)[N], float (&dp)[N], const Fragment<false>& at, const Problem& p,
                               const Features& f, const GradientHead& h, bool interior) {
  float lse_log2[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    lse_log2[r] = __ldg(h.rows.lse_log2 + h.first_row + at.row[r]);
    delta[r] = __ldg(h.rows.delta + h.first_row + at.row[r]);
  }
  float derivative[kOfProduct && kSpec.softcap ? N : 1];
  transform_scores<kOfProduct>(s, derivative, at, h.score);
  if constexpr (kSpec.mask) hide_masked(s, at, p, f, h.batch, h.head);
  if (!interior) {
    hide_outside_band(s, at, h.band);
    if constexpr (kSpec.segment_ids) hide_other_segments(s, at, segments_of(p, f, h.band, h.batch));
  }
#pragma unroll
  for (int i = 0; i < N; i++) s[i] = exp2_fast(fmaf(s[i], h.score.unit, -lse_log2[fragment_row(i)]));
  if constexpr (kSpec.dropout) {
    for_each_kept<N>(h.dropout, at, [&](int i, bool kept) {
      dp[i] = s[i] * (kept ? fmaf(dp[i], h.dropout.scale, -delta[fragment_row(i)]) : -delta[fragment_row(i)]);
      s[i] = kept ? s[i] : 0.f;
    });
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) dp[i] = s[i] * (dp[i] - delta[fragment_row(i)]);
  }
  if constexpr (kOfProduct && kSpec.softcap) {
#pragma unroll
    for (int i = 0; i < N; i++) dp[i] *= derivative[i];
  }
}

// Whether band and segments hide no pair of the tile of queries [q0, q0 + queries) and keys [k0, k0 + keys).
JF_DEVICE bool gradient_interior(const CallBand& band, const Problem& p, const SegmentTiles& segments, int b, int q0,
                                 int queries, int k0, int keys) {
  if (!band.interior(q0, queries, k0, keys)) return false;
  if constexpr (!kSpec.segment_ids) return true;
  const long long batch = b;
  return segments.q_bounds[batch * ceil_div(p.q_len, queries) + q0 / queries].same_single_id(
      segments.kv_bounds[batch * ceil_div(p.kv_len, keys) + k0 / keys]);
}

}  // namespace jf
