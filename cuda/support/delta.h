// Arguments of support/delta.cuh.
#pragma once
#include "spec.h"

namespace jf {

struct DeltaArgs {
  Problem problem;
  Features features;
  const void *out, *dout;   // [batch, q_len, q_heads, value_dim]
  const float *lse, *dlse;  // [batch, q_heads, q_len]
  float *lse_log2, *delta;  // [batch, q_heads, padded_len]
  int padded_len;           // q_len rounded up to whole query tiles
  float* dq_sums;           // [batch, q_heads, padded_len, sums_size] to clear, or null
  int sums_size;
  int* counters;  // to clear
  int counter_count;
};

}  // namespace jf
